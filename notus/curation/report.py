"""report.md: counts of a curated set in tables, and figures where matplotlib is installed."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from notus.console import drawing
from notus.curation.rows import Row
from notus.tables import markdown_table

LISTED = 100  # hits, and marks; all of them are in dropped.jsonl and the manifest
LISTED_SOURCES = 10  # the largest ones; the others share a column
NO_SOURCE, OTHERS = "(no source)", "(others)"
SIDES = ("chosen", "rejected")
# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def write_report(
    folder: Path,
    name: Path,
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    pairs: Sequence[Row],
    dropped: Sequence[Row],
    ratings: Mapping[str, Sequence[float]],
    marked: Sequence[Row],
) -> None:
    """Write report.md into `folder`, and figures/*.png where matplotlib is installed.

    name: the folder's path once it is complete. settings, counts, marked: as in manifest.json.
    pairs, dropped: the records of train.jsonl and dropped.jsonl. ratings: those of all completions,
    by aspect.
    """
    tables = {
        "Rows": f"{_rows_table(pairs, dropped)}\n\nTo look at them: `{look_command(name)}`",
        "Responses": _responses_table(pairs),
    }
    if marked:
        tables["Marks"] = markdown_table(
            ["row", "mark", "note"], [list(mark.values()) for mark in marked[:LISTED]]
        )
    if unusable := counts["pairs that the trainer drops"]:
        tables["Pairs that the trainer drops"] = markdown_table(["", "pairs"], unusable.items())
    hits = [record for record in dropped if "benchmark_prompt" in record]
    tables["Benchmark prompts"] = _hits_table(hits)
    if not settings["decontaminate"]:
        tables["Benchmark prompts"] = "Not screened: no file of benchmark prompts was given."
    elif not hits:
        tables["Benchmark prompts"] = "No row holds one."
    if find_spec("matplotlib"):
        (folder / "figures").mkdir()
        figures = {}
        if ratings:
            figures["ratings"] = "Ratings of all completions by aspect", ratings
        if with_scores := scored(pairs):
            scores = {side: [pair[f"{side}_avg_rating"] for pair in with_scores] for side in SIDES}
            under = " under the rule" if settings["rule"] else ""
            figures["scores"] = f"Scores of the pairs{under}", scores
        for name, (title, values) in figures.items():
            with drawing():
                _draw(folder / "figures" / f"{name}.png", name.removesuffix("s"), values)
                tables[title] = f"![{title}](figures/{name}.png)"
    lines = [(name, _shown(value)) for name, value in settings.items()]
    tables["Settings"] = markdown_table(["setting", "value"], lines)
    text = "# Curation\n" + "".join(f"\n## {title}\n\n{table}\n" for title, table in tables.items())
    (folder / "report.md").write_text(text, encoding="utf-8")


def _shown(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = ", ".join(value) if isinstance(value, tuple) else str(value)
    return "none" if value is None else words or "none"


def look_command(source: object, *options: str) -> str:
    """The command that makes a page of a source's rows."""
    return shlex.join(["python", "-m", "notus.look", str(source), *options, "--out", "page.html"])


def scored(pairs: Sequence[Row]) -> list[Row]:
    """The records of pairs with a score of both responses."""
    return [pair for pair in pairs if None not in (pair[f"{side}_avg_rating"] for side in SIDES)]


def _rows_table(pairs: Sequence[Row], dropped: Sequence[Row]) -> str:
    """How many rows became pairs or were dropped for a reason, by source if there are several."""
    outcomes: Counter[str] = Counter()
    by_source: Counter[tuple[str, str]] = Counter()
    for record in (*pairs, *dropped):
        outcome = record.get("reason", "pairs")
        outcomes[outcome] += 1
        by_source[outcome, record["source"] or NO_SOURCE] += 1
    sizes = Counter(record["source"] or NO_SOURCE for record in (*pairs, *dropped))
    sources = sorted(source for source, _ in sizes.most_common(LISTED_SOURCES))
    if others := sizes.keys() - sources:
        for outcome in outcomes:
            by_source[outcome, OTHERS] = sum(by_source[outcome, source] for source in others)
        sources.append(OTHERS)
    sources = sources if len(sources) > 1 else []
    return markdown_table(
        ["", "all", *sources],
        [
            (outcome, count, *(by_source[outcome, source] for source in sources))
            for outcome, count in outcomes.most_common()
        ],
    )


def _responses_table(pairs: Sequence[Row]) -> str:
    lengths = np.array([[len(pair[f"{side}_response"]) for side in SIDES] for pair in pairs])
    scores = np.array([[pair[f"{side}_avg_rating"] for side in SIDES] for pair in scored(pairs)])
    longer = (lengths > lengths[:, ::-1]).sum(0)
    rows = [
        ("longer response", *longer.tolist()),
        ("mean length in characters", *lengths.mean(0).tolist()),
    ]
    if len(scores):
        rows.append(("mean score", *scores.mean(0).tolist()))
    return markdown_table(["", *SIDES], rows, digits=2)


def _hits_table(hits: Sequence[Row]) -> str:
    """The first rows that hold a benchmark prompt; all of them are in dropped.jsonl."""
    rows = []
    for hit in hits[:LISTED]:
        prompt = " ".join(hit["benchmark_prompt"].split())
        prompt = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
        kind, covered = hit["benchmark_kind"], f"{hit['benchmark_overlap']:.0%}"
        rows.append((hit["row"], kind, covered, hit["benchmark_where"], prompt))
    return markdown_table(["row", "found", "covered", "benchmark", "its prompt"], rows)


def _draw(path: Path, unit: str, values: Mapping[str, Sequence[float]]) -> None:
    """A histogram of each sequence of values, side by side.

    A bin is a point wide, or half a point where there are values in between.
    """
    from matplotlib.figure import Figure  # an extra

    low, high = min(map(min, values.values())), max(map(max, values.values()))
    whole = all(float(value).is_integer() for found in values.values() for value in found)
    width = max(1 if whole else 0.5, (high - low) / 20)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(low, high + 1.5 * width, width)
    labels = [name.replace("_", " ") for name in values]
    colours = list(islice(cycle(COLOURS), len(values)))
    axes.hist(list(values.values()), edges, align="left", label=labels, color=colours)
    axes.set(xlabel=unit, ylabel="count")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
