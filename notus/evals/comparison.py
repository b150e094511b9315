"""A run's evaluations compared with a published run's, with the sampling error of the difference.

Several runs are compared with each other instead, by `paired`.

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

from notus.engine.history import read_history
from notus.errors import UserError
from notus.evals.options import NewPath, add_json_option, at_least, report
from notus.evals.paired import compare_runs
from notus.evals.published import DPO_RUNS, METRICS, DpoRun
from notus.evals.runs import read_evaluations
from notus.files import read_object
from notus.strict import show
from notus.tables import Cell, text_table

LIMIT = 2.0  # a difference of fewer standard errors counts as agreement
STEP = 100  # the step of the first evaluation on the model cards


class Difference(NamedTuple):
    """One metric of the run compared with the published one."""

    at: str  # "step 100" or "end"
    metric: str
    value: float
    published: float
    standard_error: float | None  # of the difference; None if unknown
    pairs: int | None  # behind the run's value
    published_pairs: int
    in_standard_errors: float | None  # the difference
    verdict: str  # "agrees", "higher", "lower", or "" if the error is unknown


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "compare runs with each other on the same pairs, or one run with a published one"
    parser = commands.add_parser("compare", help=about, description=about)
    held_out = "the run's held-out pairs; needed if it recorded none"
    folders = "the output_dir of a run; of several, the first is what the others differ from"
    parser.add_argument("run_folder", metavar="RUN", type=Path, nargs="+", help=folders)
    to = "one run: the published one (notus-7b-v1)"
    parser.add_argument("--to", choices=sorted(DPO_RUNS), help=to)
    parser.add_argument("--pairs", type=at_least(1), help=f"one run: {held_out}")
    parser.add_argument("--seed", type=at_least(0), default=0, help="several: of the bootstrap (0)")
    drawn = "several: draw the accuracies here, a PNG"
    parser.add_argument("--figure", type=Path, action=NewPath, metavar="FILE", help=drawn)
    add_json_option(parser)
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> None:
    folders = options.run_folder
    if len(folders) > 1:
        if options.to or options.pairs:
            raise UserError(f"--to and --pairs: for one run, found {len(folders)}")
        return compare_runs(options)
    if options.figure:
        raise UserError("--figure: for several runs, found one")
    compare_published(folders[0], options.to or "notus-7b-v1", options.pairs, options.json)


def compare_published(folder: Path, to: str, pairs: int | None, file: Path | None) -> None:
    """Compare the run in `folder` with the published run `to`.

    pairs: how many the run holds out, None: as configured or recorded. file: for the numbers, or
    None.
    """
    published = DPO_RUNS[to]
    evaluations = read_evaluations(folder / "metrics.jsonl")
    settings = read_object(folder / "config.json")
    held_out = _part(settings, "data").get("eval")
    if pairs is None and isinstance(held_out, dict) and "holdout" in held_out:
        pairs = held_out["holdout"]
        if type(pairs) is not int or pairs < 1:
            raise UserError(
                f"{folder / 'config.json'}: data.eval.holdout is {show(pairs)}; "
                "expected an integer of at least 1"
            )
    elif pairs is None:
        starts = [event for event in read_history(folder) if event["event"] == "start"]
        pairs = starts[-1]["data"].get("eval", {}).get("pairs") if starts else None

    last = max(evaluations)
    compared, notes = {}, []
    if STEP in evaluations and published.step_100:
        compared[f"step {STEP}"] = evaluations[STEP], published.step_100
    elif published.step_100:
        notes.append(f"No evaluation at step {STEP} (evaluation.every), so none is compared.")
    compared["end"] = evaluations[last], published.end
    by_step = {at: differences_at(at, *both, published, pairs) for at, both in compared.items()}
    differences = [difference for found in by_step.values() for difference in found]
    if not (folder / "final").is_dir():
        notes.append(f"The run has not ended: step {last} is taken as its end.")
    notes += recipe_notes(settings, published.recipe)
    if pairs is None:
        notes.append(
            "The run's number of held-out pairs is not known, so its own sampling error is left "
            "out and the differences look larger than they are: give --pairs."
        )
    else:
        notes.append(f"The run's values are means over {pairs:,} pairs.")
    notes.append(
        f"The published loss is a mean over {published.pairs:,} pairs, the other metrics over "
        f"{published.reward_pairs:,}."
    )
    header = ("metric", "run", to, "difference", "± s.e.", "in s.e.", "")
    tables = [
        f"at {at}:\n{text_table(header, map(shown, found), digits=4)}"
        for at, found in by_step.items()
    ]
    content = {
        "run": str(folder),
        "to": to,
        "source": published.source,
        "last_step": last,
        "differences": [d._asdict() for d in differences],
    }
    tables += [f"{to}: {published.source}", summary(differences)]
    report("\n\n".join(tables), notes, file, content)


def shown(d: Difference) -> tuple[Cell, ...]:
    """The row of a table."""
    change = d.value - d.published
    return d.metric, d.value, d.published, change, d.standard_error, *d[7:]


def differences_at(
    at: str,
    evaluation: Mapping[str, float],
    published: Mapping[str, float],
    run: DpoRun,
    pairs: int | None,
) -> list[Difference]:
    """The run's value of every metric that was published for this step, and the difference.

    The standard error of a difference of two means over n and m pairs is s sqrt(1/n + 1/m), with s
    the standard deviation over the published run's pairs; another seed adds to it. `pairs` None
    leaves out the run's part.
    """
    spreads = pair_spreads(published)
    rows = []
    for metric, expected in published.items():
        value = evaluation[METRICS[metric]]
        over = run.pairs if metric == "loss" else run.reward_pairs
        error, errors, verdict = None, None, ""
        if metric in spreads:
            error = spreads[metric] * math.sqrt(1 / over + (1 / pairs if pairs else 0))
            errors = (value - expected) / error
            verdict = "agrees" if abs(errors) < LIMIT else "higher" if errors > 0 else "lower"
        rows.append(Difference(at, metric, value, expected, error, pairs, over, errors, verdict))
    return rows


def pair_spreads(published: Mapping[str, float]) -> dict[str, float]:
    """Standard deviation over pairs of loss, accuracy and margin, of a published DPO evaluation.

    The accuracy a implies its own: sqrt(a (1 - a)). The others were not published, so the margins
    are assumed to be normal with the published mean m and the share a above 0, which gives the
    deviation m / quantile(a); the loss is log(1 + exp(-margin)) of these, integrated by
    Gauss-Hermite quadrature. For the published runs the implied mean loss is within 0.13 of theirs.
    """
    accuracy, mean_margin = published["accuracy"], published["margin"]
    margin = mean_margin / NormalDist().inv_cdf(accuracy)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    losses = np.logaddexp(0, -(mean_margin + margin * nodes))
    mean, square = np.average(losses, weights=weights), np.average(losses**2, weights=weights)
    return {
        "loss": math.sqrt(square - mean**2),
        "accuracy": math.sqrt(accuracy * (1 - accuracy)),
        "margin": margin,
    }


def recipe_notes(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """A line for every configuration key whose value differs from the published run's."""
    notes = []
    for key, expected in recipe.items():
        section, name = key.split(".")
        found = _part(settings, section).get(name)
        if found != expected:
            notes.append(f"{key} is {json.dumps(found)}, in the published run {expected}.")
    if (most := _part(settings, "train").get("max_steps")) is not None:
        notes.append(f"train.max_steps is {most}: a shorter run.")
    return notes


def _part(settings: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section of the settings, empty if it is none."""
    found = settings.get(section)
    return found if isinstance(found, dict) else {}


def summary(differences: list[Difference]) -> str:
    """The metrics that differ, with the number of standard errors, as text."""
    judged = [d for d in differences if d.verdict]
    apart = [d for d in judged if d.verdict != "agrees"]
    scope = (
        "Standard errors cover only the number of pairs: another seed changes a run too. Rewards "
        "and log-probs have none, because their spread was not published."
    )
    if not apart:
        return f"No difference of {LIMIT:g} standard errors or more in {len(judged)}. {scope}"
    listed = ", ".join(f"{d.metric} at {d.at} ({d.in_standard_errors:+.1f})" for d in apart)
    return f"{len(apart)} of {len(judged)} differ (in standard errors): {listed}. {scope}"
