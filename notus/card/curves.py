"""The curves of a run, as PNG files for its model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Line = Mapping[str, Any]  # of metrics.jsonl

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"


class Panel(NamedTuple):
    """One figure. lines: a metric and its colour. level: a value to mark, and what it is."""

    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    level: tuple[float, str] | None = None


SFT_PANELS = (
    Panel("loss", "Loss", "nats per token", (("loss", BLUE),)),
    Panel("log-probs", "Log-prob of a response", "nats", (("logps/chosen", BLUE),)),
)
PANELS = (
    Panel("loss", "Loss", "per pair", (("loss", BLUE),)),
    Panel(
        "rewards",
        "Rewards",
        "beta x log-ratio, nats",
        (("rewards/chosen", BLUE), ("rewards/rejected", ORANGE)),
        (0.0, "the reference"),
    ),
    Panel(
        "accuracy",
        "Accuracy",
        "share of pairs",
        (("rewards/accuracies", BLUE),),
        (0.5, "chance"),
    ),
    Panel("margin", "Margin", "chosen - rejected reward, nats", (("rewards/margins", BLUE),)),
    Panel(
        "displacement",
        "Displacement from the reference",
        "log-ratio per token, nats",
        (("displacement/chosen_per_token", BLUE), ("displacement/rejected_per_token", ORANGE)),
        (0.0, "the reference"),
    ),
    Panel(
        "falling",
        "Chosen responses that became less likely",
        "share of pairs",
        (("displacement/chosen_falling", BLUE),),
    ),
)


def panels(logged: Line, is_sft: bool) -> list[Panel]:
    """The figures of the metrics that a line of the log holds."""
    chosen = SFT_PANELS if is_sft else PANELS
    return [panel for panel in chosen if panel.lines[0][0] in logged]


def draw_curves(
    folder: Path,
    training: Sequence[Line],
    evaluations: Sequence[Line],
    steps_per_epoch: int | None,
    is_sft: bool,
) -> list[str]:
    """Draw every panel as PNG into `folder`, which it makes; returns their names.

    training, evaluations: lines of metrics.jsonl with the metrics of either. Needs matplotlib.
    """
    from matplotlib.figure import Figure  # an extra

    folder.mkdir()
    drawn = panels(training[-1], is_sft)
    last = training[-1]["step"]
    epochs = list(range(steps_per_epoch, last, steps_per_epoch)) if steps_per_epoch else []
    for panel in drawn:
        figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
        axes = figure.subplots()
        for key, colour in panel.lines:
            part = key.rpartition("/")[2].removesuffix("_per_token")
            label = f"{part}, " if len(panel.lines) > 1 else ""
            draw_line(axes, training, evaluations, epochs, key, colour, label)
        if panel.level is not None:
            value, words = panel.level
            axes.axhline(value, color="0.5", linewidth=1, linestyle="--", label=words, zorder=0)
        for epoch in epochs:
            axes.axvline(epoch, color="0.7", linewidth=1, linestyle=":", zorder=0)
        axes.set_title(panel.title)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(panel.unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(folder / f"{panel.name}.png")
    return [panel.name for panel in drawn]


def draw_line(
    axes: Any,
    training: Sequence[Line],
    evaluations: Sequence[Line],
    epochs: Sequence[int],
    key: str,
    colour: str,
    label: str,
) -> None:
    """A metric's logged steps, their running mean within each epoch, and its evaluations."""
    points = [(line["step"], line[key]) for line in training if key in line]
    steps, values = np.array(points, float).T
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    parts = np.split(values, np.searchsorted(steps, epochs, side="right"))
    smooth = np.concatenate([running_mean(part, len(values) // 80) for part in parts])
    axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{label}training")
    held_out = [(e["step"], e[f"eval_{key}"]) for e in evaluations if f"eval_{key}" in e]
    # An untrained policy ties with its reference, which counts as wrong: that 0 says nothing.
    held_out = [point for point in held_out if point[0] or key != "rewards/accuracies"]
    if held_out:
        axes.plot(
            *np.array(held_out, float).T,
            color=colour,
            marker="o",
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.6,
            linestyle="none",
            label=f"{label}held out",
        )


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Centred means over 2 half + 1 values, fewer at the ends: float [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
