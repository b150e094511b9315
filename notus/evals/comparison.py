"""A run's evaluations beside a published run's, with the sampling error between them.

python eval.py compare runs/notus-7b-v1 --to notus-7b-v1
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.published import DPO_RUNS, DpoMetrics, DpoRun
from notus.evals.tables import (
    add_json_option,
    check_new,
    read_json_object,
    text_table,
    write_json,
)

LIMIT = 2.0  # standard errors from which on a difference is called one
STEP = 100  # where the model cards show the run's beginning

# The fields of DpoMetrics and their names in metrics.jsonl.
METRICS = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "rewards_chosen": "eval_rewards/chosen",
    "rewards_rejected": "eval_rewards/rejected",
    "logps_chosen": "eval_logps/chosen",
    "logps_rejected": "eval_logps/rejected",
}


class Difference(NamedTuple):
    """One metric of the run beside the published one."""

    at: str  # "step 100" or "end"
    metric: str
    value: float
    published: float
    standard_error: float | None  # of the difference; None if it cannot be told
    pairs: int | None  # that the run's value is over
    published_pairs: int

    @property
    def errors(self) -> float | None:
        """The difference in standard errors."""
        if self.standard_error is None:
            return None
        return (self.value - self.published) / self.standard_error

    @property
    def verdict(self) -> str:
        if self.errors is None:
            return ""
        if abs(self.errors) < LIMIT:
            return "agrees"
        return "higher" if self.errors > 0 else "lower"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `compare` to the command line."""
    about = "put a run's loss, accuracy and margin beside a published run's"
    parser = commands.add_parser("compare", help=about, description=about)
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("--to", default="notus-7b-v1", choices=sorted(DPO_RUNS))
    parser.add_argument(
        "--pairs",
        type=int,
        help="held-out pairs of the run; needed where data.eval is not a holdout, whose number "
        "config.json tells",
    )
    add_json_option(parser)
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> int:
    """The command `compare`; returns the exit code."""
    check_new(options.json)
    if options.pairs is not None and options.pairs < 1:
        raise UserError(f"--pairs: found {options.pairs}, expected at least 1")
    published = DPO_RUNS[options.to]
    evaluations = read_evaluations(options.run_folder / "metrics.jsonl")
    settings = read_json_object(options.run_folder / "config.json")
    pairs = options.pairs or held_out_pairs(settings)

    last = max(evaluations)
    differences, notes = [], []
    if published.step_100 is not None and STEP in evaluations:
        at = f"step {STEP}"
        differences += differences_at(at, evaluations[STEP], published.step_100, published, pairs)
    elif published.step_100 is not None:
        notes.append(f"No evaluation at step {STEP} (evaluation.every), so none is compared.")
    differences += differences_at("end", evaluations[last], published.end, published, pairs)
    if not (options.run_folder / "final").is_dir():
        notes.append(f"The run has not ended: its end is taken to be step {last}.")
    notes += recipe_notes(settings, published.recipe)
    if pairs is None:
        notes.append(
            "How many pairs the run held out is not known, so its own sampling error is left out "
            "and the differences look larger than they are: give --pairs."
        )
    header = ("at", "metric", "run", options.to, "difference", "± s.e.", "in s.e.", "")
    header += ("n", "n published")
    rows = [
        [d.at, d.metric, d.value, d.published, d.value - d.published, d.standard_error, d.errors]
        + [d.verdict, d.pairs, d.published_pairs]
        for d in differences
    ]
    print(text_table(header, rows, digits=4))
    print(f"\n{options.to}: {published.source}\n\n{summary(differences)}")
    print("".join(f"\n{note}" for note in notes))
    write_json(
        options.json,
        {
            "run": str(options.run_folder),
            "to": options.to,
            "source": published.source,
            "last_step": last,
            "differences": [
                d._asdict() | {"in_standard_errors": d.errors, "verdict": d.verdict}
                for d in differences
            ],
            "notes": notes,
        },
    )
    return 0


def read_evaluations(file: Path) -> dict[int, Mapping[str, float]]:
    """The evaluations of a run after its start, by step, from metrics.jsonl.

    Raises UserError if there is none, or if one lacks a metric of METRICS.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the output_dir of a run")
    found: dict[int, Mapping[str, float]] = {}
    for where, row in read_rows(str(file)):
        if "eval_loss" not in row or row.get("step") == 0:
            continue
        if not isinstance(row.get("step"), int):
            raise UserError(f"{where}: step is {row.get('step')!r}; expected a whole number")
        for name in METRICS.values():
            if not isinstance(row.get(name), int | float) or not math.isfinite(row[name]):
                raise UserError(f"{where}: {name} is {row.get(name)!r}; expected a finite number")
        found[row["step"]] = row
    if not found:
        raise UserError(
            f"{file}: no evaluation after step 0; expected eval_loss and more: a run with "
            "data.eval, and evaluation.every steps long at least"
        )
    return found


def held_out_pairs(settings: Mapping[str, Any]) -> int | None:
    """How many pairs a run evaluated on, if its resolved configuration tells: data.eval.holdout."""
    held_out = settings.get("data", {}).get("eval")
    return held_out.get("holdout") if isinstance(held_out, dict) else None


def differences_at(
    at: str,
    evaluation: Mapping[str, float],
    published: DpoMetrics,
    run: DpoRun,
    pairs: int | None,
) -> list[Difference]:
    """Every metric that was published for this moment, beside the run's.

    The standard error of a difference of two means over n and m pairs is s sqrt(1/n + 1/m), with s
    the spread of the published run's pairs; it says nothing of other seeds. `pairs` None leaves
    out the run's part.
    """
    spreads = pair_spreads(published)
    rows = []
    for metric, name in METRICS.items():
        expected = getattr(published, metric)
        if expected is None:
            continue
        over = run.pairs if metric == "loss" else run.reward_pairs
        error = None
        if metric in spreads:
            error = spreads[metric] * math.sqrt(1 / over + (1 / pairs if pairs else 0))
        rows.append(Difference(at, metric, evaluation[name], expected, error, pairs, over))
    return rows


def pair_spreads(published: DpoMetrics) -> dict[str, float]:
    """Standard deviation over pairs of loss, accuracy and margin, of a published DPO evaluation.

    That of the accuracy a follows from it: sqrt(a (1 - a)). Nobody published the others, so the
    margins are taken as normal with the published mean m and the share a above 0, which gives the
    spread m / quantile(a); the loss is log(1 + exp(-margin)) of these, integrated by Gauss-Hermite
    quadrature. For the published runs the mean loss that this implies is within 0.13 of theirs.
    """
    normal = NormalDist()
    margin = published.margin / normal.inv_cdf(published.accuracy)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    losses = np.logaddexp(0, -(published.margin + margin * nodes))
    mean, square = np.average(losses, weights=weights), np.average(losses**2, weights=weights)
    return {
        "loss": math.sqrt(square - mean**2),
        "accuracy": math.sqrt(published.accuracy * (1 - published.accuracy)),
        "margin": margin,
    }


def recipe_notes(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """A line for every key of the configuration that is not as in the published run."""
    notes = []
    for key, expected in recipe.items():
        section, name = key.split(".")
        found = settings.get(section, {}).get(name)
        if found != expected:
            notes.append(f"{key} is {json.dumps(found)}, in the published run {expected}.")
    if settings.get("train", {}).get("max_steps") is not None:
        notes.append(f"train.max_steps is {settings['train']['max_steps']}: a shorter run.")
    return notes


def summary(differences: list[Difference]) -> str:
    """Which metrics differ, and by how many standard errors."""
    judged = [d for d in differences if d.errors is not None]
    apart = [d for d in judged if d.verdict != "agrees"]
    scope = (
        "Standard errors are of the number of pairs alone: another seed moves a run too. Rewards "
        "and log-probs have none, because their spread was not published."
    )
    if not apart:
        return f"No difference of {LIMIT:g} standard errors or more in {len(judged)}. {scope}"
    listed = ", ".join(f"{d.metric} at {d.at} ({d.errors:+.1f})" for d in apart)
    return f"{len(apart)} of {len(judged)} differ, by so many standard errors: {listed}. {scope}"
