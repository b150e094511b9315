"""Own runs compared on the same held-out pairs, with the sampling error of each difference.

python eval.py compare runs/ratings runs/critique
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notus.errors import UserError
from notus.evals.arms import (
    Arm,
    Difference,
    Scores,
    arms_of,
    differences_of,
    differing,
    names_of,
    scores_of,
    shared_pairs,
    shown,
)
from notus.evals.options import report
from notus.evals.runs import RESULTS, OwnRun, read_run
from notus.evals.statistics import RESAMPLES
from notus.tables import Cell, text_table


def compare_runs(options: argparse.Namespace) -> None:
    """The command `compare` for two runs or more: the first one is what the others differ from."""
    runs = [read_run(folder) for folder in options.run_folder]
    keys, arms = differing(runs), arms_of(runs)
    pairs, notes = shared_pairs(runs)
    scores = list(scores_of(pairs, arms, options.seed))
    differences = list(differences_of(pairs, arms, options.seed))
    of_all = [difference for difference in differences if difference.kind == "all"]
    by_group = [difference for difference in differences if difference.kind != "all"]
    tables = [
        runs_table(runs, keys),
        scores_table(scores, arms),
        f"minus {arms[0].name}:\n{differences_table(of_all)}",
        f"the same by group:\n{differences_table(by_group)}",
    ]
    content = {
        "runs": [
            {
                "run": str(run.folder),
                "settings": {key: run.settings.get(key) for key in keys},
                "final": run.evaluations[run.last],
                "best": run.evaluations[run.best],
            }
            for run in runs
        ],
        "first": arms[0].name,
        "results": RESULTS,
        "scores": [score._asdict() for score in scores],
        "differences": [difference._asdict() for difference in differences],
    }
    notes += remarks(keys, arms, options.seed)
    if options.figure:
        draw(options.figure, scores, of_all)
        notes.append(f"wrote {options.figure}")
    report("\n\n".join(tables), notes, options.json, content)


def remarks(keys: Sequence[str], arms: Sequence[Arm], seed: int) -> list[str]:
    """Notes for reading the tables."""
    notes = [
        f"[ ]: 95 % intervals, paired bootstrap over pairs ({RESAMPLES:,} resamples, seed {seed}). "
        "p: McNemar's exact test. Both cover the choice of pairs, not another training seed, and "
        "are not corrected for the number of comparisons."
    ]
    if any(len(arm.runs) > 1 for arm in arms):
        notes.append(
            "Runs that differ only in train.seed are one row, each pair's mean over them; ± seeds: "
            "the standard deviation over them; p: the exact sign test of the pairs that one row "
            "has right in more of its runs."
        )
    if different := [key for key in keys if key.startswith("loss.")]:
        notes.append(
            f"The runs differ in {', '.join(different)}: each one's loss and margin are in its own "
            "terms, and only accuracies compare."
        )
    return notes


def runs_table(runs: Sequence[OwnRun], keys: Sequence[str]) -> str:
    """A row for each run: the settings that differ, its last and its best evaluation."""
    columns = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        last, best = run.evaluations[run.last], run.evaluations[run.best]
        values = [shown(run.settings.get(key)) for key in keys]
        ends = [last[column] for column in columns]
        rows.append((name, *values, run.last, *ends, best["eval_loss"], run.best))
    header = ("run", *keys, "step", "loss", "accuracy", "margin", "best loss", "at step")
    return text_table(header, rows, digits=4)


def scores_table(scores: Sequence[Scores], arms: Sequence[Arm]) -> str:
    """Accuracy by arm and labeling, with its interval and its spread over seeds."""
    pooled = any(len(arm.runs) > 1 for arm in arms)
    header = ["accuracy on pairs of"]
    for name in dict.fromkeys(score.labeling for score in scores):
        header += [name, "± seeds"] if pooled else [name]
    rows = []
    for arm in arms:
        row: list[Cell] = [arm.name]
        for score in (score for score in scores if score.arm == arm.name):
            row.append(_interval(score.accuracy, score.low, score.high, ""))
            if pooled:
                row.append(float(np.std(score.seeds, ddof=1)) if len(score.seeds) > 1 else None)
        rows.append(row)
    return text_table(header, rows, digits=4)


def differences_table(differences: Iterable[Difference]) -> str:
    """A row for each difference; the group's name where it is not all pairs."""
    rows = []
    for d in differences:
        cells = [_interval(*ends) for ends in zip(d.values, d.low, d.high, strict=True)]
        group = "all" if d.kind == "all" else f"{d.kind} {d.name}"
        rows.append((d.arm, d.labeling, group, d.pairs, cells[0], d.p, *cells[1:]))
    header = ("", "pairs of", "group", "n", RESULTS[0], "p", *RESULTS[1:])
    return text_table(header, rows, digits=4, keys=3)


def _interval(value: float, low: float, high: float, sign: str = "+") -> str:
    """The value and its interval, as far as they are known."""
    if math.isnan(value):
        return "-"
    ends = "" if math.isnan(low) else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{value:{sign}.4f}{ends}"


def draw(file: Path, scores: Sequence[Scores], differences: Sequence[Difference]) -> None:
    """Draw accuracies, and their differences to the first arm, with error bars, by labeling.

    Raises UserError without matplotlib, or if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError:
        raise UserError("--figure: needs matplotlib: pip install -e '.[report]'") from None
    labelings = list(dict.fromkeys(score.labeling for score in scores))
    names = list(dict.fromkeys(score.arm for score in scores))
    size = (3 + 3.2 * len(labelings), 2.5 + 0.9 * len(names))
    plot = Figure(figsize=size, layout="constrained")
    panels = plot.subplots(2, len(labelings), sharey=True, sharex="row", squeeze=False)
    bar: dict[str, Any] = {"fmt": "o", "capsize": 3, "color": "#0072B2"}
    for (above, below), labeling in zip(panels.T, labelings, strict=True):
        for s in (score for score in scores if score.labeling == labeling):
            y, ends = names.index(s.arm), [[s.accuracy - s.low], [s.high - s.accuracy]]
            above.errorbar(s.accuracy, y, xerr=ends, **bar)
            if len(s.seeds) > 1:
                above.plot(s.seeds, [y + 0.25] * len(s.seeds), "|", color="#D55E00", label="seeds")
        for d in (d for d in differences if d.labeling == labeling):
            ends = [[d.values[0] - d.low[0]], [d.high[0] - d.values[0]]]
            below.errorbar(d.values[0], names.index(d.arm), xerr=ends, **bar)
        below.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=0)
        above.set(title=f"pairs of: {labeling}", xlabel="accuracy, 95 %")
        below.set_xlabel("difference to the first, 95 %")
    for row in panels:
        row[0].set_yticks(range(len(names)), names)
        row[0].set_ylim(len(names) - 0.5, -0.5)
    if handles := panels[0, 0].get_legend_handles_labels()[0]:
        panels[0, 0].legend(handles[:1], ["a seed each"], frameon=False, fontsize="small")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plot.savefig(file, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise UserError(f"{file}: cannot be written: {error}") from None
