"""What curation found in a set of rated responses: counts, and a report in Markdown.

The figures are PNG files where matplotlib is installed (`pip install -e '.[report]'`), else the
same numbers stand in the report as tables.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from notus.curation.decontamination import COVERAGE, NGRAM, Dropped, Hit
from notus.curation.ratings import (
    Choice,
    Completion,
    RatedRow,
    aspect_ratings,
    mean_rating,
    overall_score,
)
from notus.errors import UserError

LISTED_HITS = 100
NO_SOURCE = "(no source)"


@dataclass
class Summary:
    """Counts over the rows of one curation, filled by `add`."""

    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by source
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (reason, source)
    hits: list[tuple[str, Hit]] = field(default_factory=list)  # (the row's place, what it holds)
    ratings: Counter[tuple[str, float]] = field(default_factory=Counter)  # by (aspect, rating)
    means_of_tens: Counter[str] = field(default_factory=Counter)  # by the mean rating's range
    compared: int = 0  # rows where both the mean and the overall score pick a completion
    differ: int = 0  # ... and they pick different ones
    differ_untied: int = 0  # ... and the mean's is not among those with the highest overall score
    scores: Counter[tuple[str, float]] = field(default_factory=Counter)  # by (side, score)
    lengths: Counter[str] = field(default_factory=Counter)  # by which response is longer
    characters: Counter[str] = field(default_factory=Counter)  # by side
    unusable: Counter[str] = field(default_factory=Counter)  # pairs the trainer will drop

    @property
    def pairs(self) -> int:
        """How many rows gave a pair."""
        return sum(self.kept.values())

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """How many rows gave none for which reason."""
        counts: Counter[str] = Counter()
        for (reason, _), count in self.dropped.items():
            counts[reason] += count
        return dict(counts)

    def add(self, row: RatedRow, outcome: Choice | Dropped, where: str) -> None:
        """Counts a row and what became of it."""
        self.rows += 1
        source = row.source or NO_SOURCE
        self._add_ratings(row.completions)
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason, source] += 1
            if outcome.hit:
                self.hits.append((where, outcome.hit))
            return
        self.kept[source] += 1
        chosen, rejected = outcome.chosen["response"], outcome.rejected["response"]
        self.scores["chosen", outcome.chosen_score] += 1
        self.scores["rejected", outcome.rejected_score] += 1
        self.characters += Counter(chosen=len(chosen), rejected=len(rejected))
        difference = len(chosen) - len(rejected)
        self.lengths["chosen" if difference > 0 else "rejected" if difference else "equal"] += 1
        if not chosen.strip():
            self.unusable["empty chosen response"] += 1
        elif not rejected.strip():
            self.unusable["empty rejected response"] += 1
        elif chosen == rejected:
            self.unusable["identical responses"] += 1
        elif not row.prompt.strip():
            self.unusable["empty prompt"] += 1

    def _add_ratings(self, completions: list[Completion]) -> None:
        """Counts ratings; those that the rule does not use may be out of range, and are not."""
        means = [_readable(mean_rating, completion) for completion in completions]
        overall = [_readable(overall_score, completion) for completion in completions]
        for completion, mean, score in zip(completions, means, overall, strict=True):
            if mean is not None:
                self.ratings.update(aspect_ratings(completion))
            if score == 10:
                self.means_of_tens[_range_of(mean)] += 1
        best_mean, best_overall = _highest(means), _highest(overall)
        if best_mean and best_overall:
            self.compared += 1
            self.differ += best_mean[0] != best_overall[0]
            self.differ_untied += best_mean[0] not in best_overall


def _readable(rule: Callable[[Completion], float | None], completion: Completion) -> float | None:
    try:
        return rule(completion)
    except UserError:
        return None


def _highest(scores: list[float | None]) -> list[int]:
    """Where the highest score stands; nowhere if there is none."""
    known = [score for score in scores if score is not None]
    return [index for index, score in enumerate(scores) if known and score == max(known)]


RANGES = ("not rated", "up to 2: a 1", "above 2, up to 4: unclear", "above 4: a 10")


def _range_of(mean: float | None) -> str:
    return RANGES[0 if mean is None else 1 + (mean > 2) + (mean > 4)]


# --------------------------------------------------------------------------------- the report


class Chart(NamedTuple):
    """Bars: a group for every label, in it one for every series."""

    name: str
    title: str
    labels: list[str]
    series: dict[str, list[int]]


def write_report(folder: Path, summary: Summary, settings: Mapping[str, str]) -> None:
    """Writes report.md into `folder`, and figures/*.png where matplotlib is installed."""
    lines = ["# Curation", "", *_table(["setting", "value"], settings.items()), ""]
    for title, section in (
        ("Rows", _rows_section(summary)),
        ("The two rules", _rules_section(summary)),
        ("Length", _length_section(summary)),
        ("Contamination", _contamination_section(summary)),
    ):
        lines += [f"## {title}", "", *section, ""]
    has_figures = find_spec("matplotlib") is not None
    for chart in _charts(summary):
        lines += [f"## {chart.title}", ""]
        if has_figures:
            (folder / "figures").mkdir(exist_ok=True)
            _draw(chart, folder / "figures" / f"{chart.name}.png")
            lines += [f"![{chart.title}](figures/{chart.name}.png)", ""]
        else:
            rows = zip(chart.labels, *chart.series.values(), strict=True)
            lines += [*_table(["", *chart.series], rows), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _rows_section(summary: Summary) -> Iterator[str]:
    sources = sorted({source for _, source in summary.dropped} | summary.kept.keys())
    reasons = sorted(summary.dropped_by_reason.items(), key=lambda item: -item[1])
    yield f"{summary.rows:,} rows gave {summary.pairs:,} pairs."
    yield ""
    rows = [("pairs", summary.pairs, *(summary.kept[source] for source in sources))]
    for reason, count in reasons:
        rows.append((reason, count, *(summary.dropped[reason, source] for source in sources)))
    yield from _table(["", "all", *sources], rows)
    if summary.unusable:
        yield ""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in summary.unusable.items())
        yield f"Among the pairs, and dropped by the trainer: {counts}."


def _rules_section(summary: Summary) -> Iterator[str]:
    if not summary.compared:
        yield "The rows do not hold both aspect ratings and overall scores."
        return
    share, untied = (n / summary.compared for n in (summary.differ, summary.differ_untied))
    yield (
        f"The mean rating and the overall score choose different responses in {summary.differ:,} "
        f"of {summary.compared:,} rows ({share:.1%}); in {summary.differ_untied:,} ({untied:.1%}) "
        "no tie explains it."
    )
    yield ""
    yield "Completions with an overall score of 10, by their mean rating:"
    yield ""
    yield from _table(
        ["mean rating", "completions"], ((r, summary.means_of_tens[r]) for r in RANGES)
    )


def _length_section(summary: Summary) -> Iterator[str]:
    if not summary.pairs:
        yield "There are no pairs."
        return
    longer = summary.lengths["chosen"] / summary.pairs
    chosen, rejected = (summary.characters[side] / summary.pairs for side in ("chosen", "rejected"))
    yield (
        f"The longer response is chosen in {summary.lengths['chosen']:,} of {summary.pairs:,} "
        f"pairs ({longer:.1%}), the shorter in {summary.lengths['rejected']:,}; "
        f"{summary.lengths['equal']:,} are of equal length. On average a chosen response has "
        f"{chosen:,.0f} characters and a rejected one {rejected:,.0f}."
    )


def _contamination_section(summary: Summary) -> Iterator[str]:
    yield (
        f"{len(summary.hits):,} rows hold a benchmark prompt: exactly, with the same words "
        f"(normalised), or with {NGRAM}-grams that cover more than {COVERAGE:.0%} of its words."
    )
    if summary.hits:
        yield ""
        rows = (
            (where, hit.kind, f"{hit.overlap:.0%}", hit.where, _shorten(hit.prompt))
            for where, hit in summary.hits[:LISTED_HITS]
        )
        yield from _table(["row", "found", "covered", "benchmark", "its prompt"], rows)
    if len(summary.hits) > LISTED_HITS:
        yield ""
        yield f"The other {len(summary.hits) - LISTED_HITS:,} are in jsonl/dropped.jsonl."


def _charts(summary: Summary) -> Iterator[Chart]:
    for name, title, counts in (
        ("ratings", "Ratings of all completions by aspect", summary.ratings),
        ("scores", "Scores of the pairs under the rule", _binned(summary.scores)),
    ):
        if counts:
            values = sorted({value for _, value in counts})
            groups = sorted({group for group, _ in counts})
            series = {group: [counts[group, value] for value in values] for group in groups}
            yield Chart(name, title, [f"{value:g}" for value in values], series)


def _binned(scores: Counter[tuple[str, float]]) -> Counter[tuple[str, float]]:
    """Scores rounded down to a half, or to a twentieth of a long range, for a readable axis."""
    values = [value for _, value in scores]
    width = max(0.5, (max(values) - min(values)) / 20) if values else 0.5
    binned: Counter[tuple[str, float]] = Counter()
    for (side, value), count in scores.items():
        binned[side, value // width * width] += count
    return binned


def _table(header: list[str], rows: object) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _draw(chart: Chart, path: Path) -> None:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(chart.series)
    for number, (name, counts) in enumerate(chart.series.items()):
        places = [place + (number + 0.5) * width - 0.4 for place in range(len(counts))]
        axes.bar(places, counts, width, label=name)
    axes.set_xticks(range(len(chart.labels)), chart.labels)
    axes.set_ylabel("count")
    axes.set_title(chart.title)
    figure.legend(loc="outside right upper")
    figure.savefig(path)
