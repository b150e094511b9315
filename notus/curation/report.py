"""Counts over a set of rated responses and its pairs, and their report in Markdown.

The report has figures where matplotlib is installed (`pip install -e '.[report]'`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

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
from notus.tables import markdown_table

LISTED_HITS = 100
NO_SOURCE = "(no source)"


@dataclass
class Summary:
    """Counts over the rows of one curation, filled by `add`."""

    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by source
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (reason, source)
    hits: list[tuple[str, Hit]] = field(default_factory=list)  # (the row's origin, what it holds)
    ratings: Counter[tuple[str, float]] = field(default_factory=Counter)  # by (aspect, rating)
    compared: int = 0  # rows where both the mean and the overall score pick a completion
    differ: int = 0  # ... and they pick different ones
    differ_untied: int = 0  # ... and the mean's is not among those with the highest overall score
    scores: Counter[tuple[str, float]] = field(default_factory=Counter)  # by (side, score)
    lengths: Counter[str] = field(default_factory=Counter)  # by which response is longer
    characters: Counter[str] = field(default_factory=Counter)  # by side
    unusable: Counter[str] = field(default_factory=Counter)  # pairs that the trainer will drop

    @property
    def pairs(self) -> int:
        """How many rows gave a pair."""
        return sum(self.kept.values())

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """How many rows gave no pair, by reason."""
        counts: Counter[str] = Counter()
        for (reason, _), count in self.dropped.items():
            counts[reason] += count
        return dict(counts)

    def add(self, row: RatedRow, outcome: Choice | Dropped, where: str) -> None:
        """Count a row and its outcome."""
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
        """Count ratings; those out of range, which the rule may not use, are left out."""
        means = [_readable(mean_rating, completion) for completion in completions]
        overall = [_readable(overall_score, completion) for completion in completions]
        for completion, mean in zip(completions, means, strict=True):
            if mean is not None:
                self.ratings.update(aspect_ratings(completion))
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
    """The indices of the highest score; none if there is no score."""
    known = [score for score in scores if score is not None]
    return [index for index, score in enumerate(scores) if known and score == max(known)]


# --------------------------------------------------------------------------------- the report


def write_report(folder: Path, summary: Summary, settings: Mapping[str, str]) -> None:
    """Write report.md into `folder`, and figures/*.png where matplotlib is installed."""
    lines = ["# Curation", "", markdown_table(["setting", "value"], settings.items())]
    lines += ["", "## Rows", "", *_rows_section(summary)]
    lines += ["", "## Responses", "", *_responses_section(summary)]
    lines += ["", "## Contamination", "", *_contamination_section(summary)]
    if find_spec("matplotlib"):
        (folder / "figures").mkdir()
        for name, title, counts in (
            ("ratings", "Ratings of all completions by aspect", summary.ratings),
            ("scores", "Scores of the pairs under the rule", _binned(summary.scores)),
        ):
            if counts:
                _draw(folder / "figures" / f"{name}.png", title, counts)
                lines += ["", f"![{title}](figures/{name}.png)"]
    (folder / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _rows_section(summary: Summary) -> Iterator[str]:
    sources = sorted({source for _, source in summary.dropped} | summary.kept.keys())
    reasons = sorted(summary.dropped_by_reason.items(), key=lambda item: -item[1])
    rows = [("pairs", summary.pairs, *(summary.kept[source] for source in sources))]
    for reason, count in reasons:
        rows.append((reason, count, *(summary.dropped[reason, source] for source in sources)))
    yield f"{summary.rows:,} rows gave {summary.pairs:,} pairs."
    yield ""
    yield markdown_table(["", "all", *sources], rows)
    if summary.unusable:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in summary.unusable.items())
        yield f"\nAmong the pairs, and dropped by the trainer: {counts}."


def _responses_section(summary: Summary) -> Iterator[str]:
    longer = summary.lengths["chosen"] / summary.pairs
    chosen, rejected = (summary.characters[side] / summary.pairs for side in ("chosen", "rejected"))
    yield (
        f"The longer response is chosen in {summary.lengths['chosen']:,} of {summary.pairs:,} "
        f"pairs ({longer:.1%}), the shorter in {summary.lengths['rejected']:,}; "
        f"{summary.lengths['equal']:,} are of equal length. On average a chosen response has "
        f"{chosen:,.0f} characters and a rejected one {rejected:,.0f}."
    )
    if summary.compared:
        yield (
            "The mean rating and the overall score choose different responses in "
            f"{summary.differ:,} of {summary.compared:,} rows; in {summary.differ_untied:,} no tie "
            "explains it."
        )


def _contamination_section(summary: Summary) -> Iterator[str]:
    yield (
        f"{len(summary.hits):,} rows hold a benchmark prompt: exactly, with the same words "
        f"(normalised), or with {NGRAM}-grams that cover more than {COVERAGE:.0%} of its words."
    )
    if summary.hits:
        rows = (
            (where, hit.kind, f"{hit.overlap:.0%}", hit.where, _shorten(hit.prompt))
            for where, hit in summary.hits[:LISTED_HITS]
        )
        yield ""
        yield markdown_table(["row", "found", "covered", "benchmark", "its prompt"], rows)
    if len(summary.hits) > LISTED_HITS:
        yield f"\nThe other {len(summary.hits) - LISTED_HITS:,} are in jsonl/dropped.jsonl."


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _binned(scores: Counter[tuple[str, float]]) -> Counter[tuple[str, float]]:
    """Scores rounded down to a half, or to a twentieth of a long range, for a readable axis."""
    values = [value for _, value in scores]
    width = max(0.5, (max(values) - min(values)) / 20) if values else 0.5
    binned: Counter[tuple[str, float]] = Counter()
    for (side, value), count in scores.items():
        binned[side, value // width * width] += count
    return binned


def _draw(path: Path, title: str, counts: Counter[tuple[str, float]]) -> None:
    """Bars: a group for every value, in it one for every first part of the keys."""
    from matplotlib.figure import Figure  # an extra

    values = sorted({value for _, value in counts})
    names = sorted({name for name, _ in counts})
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number + 0.5) * width - 0.4 for place in range(len(values))]
        axes.bar(places, [counts[name, value] for value in values], width, label=name)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set(ylabel="count", title=title)
    figure.legend(loc="outside right upper")
    figure.savefig(path)
