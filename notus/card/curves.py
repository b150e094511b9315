"""The curves of a run, as a PNG file for its model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Line = Mapping[str, Any]  # of metrics.jsonl

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00")


class Panel(NamedTuple):
    """The axes of one or two metrics. level: a value to mark."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None


ACCURACIES = "rewards/accuracies"
REWARDS = ("rewards/chosen", "rewards/rejected")
RATIOS = ("displacement/chosen_per_token", "displacement/rejected_per_token")
PANELS = (
    Panel("Loss", "mean", ("loss",)),
    Panel("Accuracy", "share of pairs", (ACCURACIES,), 0.5),
    Panel("Margin", "chosen - rejected, nats", ("rewards/margins",)),
    Panel("Rewards", "beta x log-ratio, nats", REWARDS, 0.0),
    Panel("Log-ratio to the reference", "per token, nats", RATIOS, 0.0),
    Panel("Gradient norm", "before clipping", ("grad_norm",)),
)


def draw_curves(
    path: Path,
    training: Sequence[Line],
    evaluations: Sequence[Line],
    steps_per_epoch: int | None,
) -> None:
    """Draw the panels whose metrics were logged, as one PNG file. Needs matplotlib.

    training, evaluations: lines of metrics.jsonl with the metrics of either.
    """
    from matplotlib.figure import Figure  # an extra

    drawn = [panel for panel in PANELS if panel.metrics[0] in training[-1]]
    training, last = full_lines(training), training[-1]["step"]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    # Small, so that letters can be read where a page shows the grid at half its width.
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=True):
        for key, colour in zip(panel.metrics, COLOURS, strict=False):
            part = key.rpartition("/")[2].removesuffix("_per_token")
            steps, values = points(training, key)
            smooth = running_mean(values, len(values) // 80)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps, smooth, color=colour, linewidth=1.6, label=part)
            held_out = points(evaluations, f"eval_{key}")
            axes.plot(*held_out, "o", color=colour, markeredgecolor="white", zorder=3)
        if panel.level is not None:
            axes.axhline(panel.level, color="0.5", linewidth=1, linestyle="--", zorder=0)
        for epoch in range(steps_per_epoch, last, steps_per_epoch) if steps_per_epoch else ():
            axes.axvline(epoch, color="0.7", linewidth=1, linestyle=":", zorder=0)
        axes.set(title=panel.title, xlabel="optimiser step", ylabel=panel.unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.metrics) > 1:
            axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir()
    figure.savefig(path)


def full_lines(training: Sequence[Line]) -> list[Line]:
    """Without the lines over fewer than half as many pairs as the fullest one.

    The last step of an epoch may hold a few pairs only, whose mean would look like a cliff.
    """
    most = max(line.get("pairs", 0) for line in training)
    return [line for line in training if 2 * line.get("pairs", most) >= most]


def points(lines: Sequence[Line], key: str) -> np.ndarray:
    """The steps that have this metric, and its values: float64 [2, points].

    An accuracy is left out while policy and reference are equal: ties, which count as wrong, make
    it a 0 that says nothing.
    """
    if key.endswith(ACCURACIES):
        lines = [x for x in lines if x.get(key.replace(ACCURACIES, "rewards/margins")) != 0]
    found = [(line["step"], line[key]) for line in lines if key in line]
    return np.array(found, float).reshape(-1, 2).T


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Centred means over 2 half + 1 values, fewer at the ends: float [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
