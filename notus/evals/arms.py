"""Runs grouped into arms, and the arms' results on the pairs that all runs were evaluated on."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from notus.errors import UserError
from notus.evals.accuracy import LENGTH_EDGES, ranges
from notus.evals.runs import Labeling, OwnRun
from notus.evals.statistics import bootstrap_interval, mcnemar

SEED = "train.seed"
UNCOMPARED = ("output_dir", "reference.cache")  # places, which change no result
Pairs = dict[str, list[tuple[str, int]]]  # by labeling, as `Labeling.place` names them


class Arm(NamedTuple):
    """Runs that differ in nothing but train.seed, or a single run."""

    name: str
    runs: list[OwnRun]


class Scores(NamedTuple):
    """An arm's accuracy on a labeling: the mean over its seeds.

    low, high: the ends of the 95 % bootstrap interval. seeds: the accuracy of each run.
    """

    arm: str
    labeling: str
    pairs: int
    accuracy: float
    low: float
    high: float
    seeds: list[float]


class Difference(NamedTuple):
    """An arm minus the first one on the same pairs of a labeling.

    kind, name: the group of pairs. values, low, high: mean differences of RESULTS and the ends of
    their 95 % bootstrap intervals. first_more, arm_more: pairs that one of the two has right in
    more of its runs; p: exact, that each is as likely as the other, which for single runs is
    McNemar's test.
    """

    labeling: str
    arm: str
    kind: str
    name: str
    pairs: int
    values: list[float]
    low: list[float]
    high: list[float]
    first_more: int
    arm_more: int
    p: float


def differing(runs: Sequence[OwnRun]) -> list[str]:
    """The keys of the settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in UNCOMPARED)
    return [key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]


def arms_of(runs: Sequence[OwnRun]) -> list[Arm]:
    """The runs by their settings without train.seed; each by itself if only that differs."""
    keys = [key for key in differing(runs) if key != SEED]
    groups: dict[str, list[OwnRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.settings.get(key) for key in keys]), []).append(run)
    if len(groups) == 1 or len(groups) == len(runs):
        return [Arm(name, [run]) for name, run in zip(names_of(runs), runs, strict=True)]
    short = {key: key.rpartition(".")[2] for key in keys}
    if len({*short.values()}) < len(keys):
        short = {key: key for key in keys}
    return [
        Arm(", ".join(f"{short[k]} {shown(members[0].settings.get(k))}" for k in keys), members)
        for members in groups.values()
    ]


def names_of(runs: Sequence[OwnRun]) -> list[str]:
    """The folders' names; their paths where two have the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len({*names}) == len(names) else [str(run.folder) for run in runs]


def shared_pairs(runs: Sequence[OwnRun]) -> tuple[Pairs, list[str]]:
    """The pairs that all runs have results on, and notes on those that they do not share.

    Raises UserError if there is none.
    """
    names = dict.fromkeys(name for run in runs for name in run.labelings)
    common, notes = {}, []
    for name in names:
        having = [run.labelings[name] for run in runs if name in run.labelings]
        if len(having) < len(runs):
            notes.append(f"{name}: only {len(having)} of {len(runs)} runs have results on it.")
            continue
        pairs = [pair for pair in having[0].place if all(pair in one.place for one in having)]
        most = max(len(one.place) for one in having)
        if pairs:
            common[name] = pairs
        if len(pairs) < most:
            notes.append(
                f"{name}: {len(pairs):,} of {most:,} pairs are shared by all runs; where the rest "
                "was left out by the runs' own rules, the shared ones are not a fair sample."
            )
    if not common:
        told = " ".join(notes)
        raise UserError(f"the runs share no held-out pair, so nothing can be compared. {told}")
    return common, notes


def results_of(run: OwnRun, labeling: str, pairs: Sequence[tuple[str, int]]) -> np.ndarray:
    """The run's results on these pairs, float64 [pairs, RESULTS]."""
    found = run.labelings[labeling]
    return found.values[[found.place[pair] for pair in pairs]]


def scores_of(pairs: Pairs, arms: Sequence[Arm], seed: int) -> Iterator[Scores]:
    """The accuracy of each arm on each labeling. seed: of the bootstrap."""
    for labeling, chosen in pairs.items():
        right = [
            np.stack([results_of(run, labeling, chosen)[:, 0] for run in arm.runs]) for arm in arms
        ]
        means = np.stack([of_runs.mean(0) for of_runs in right], axis=1)  # [pairs, arms]
        ends = bootstrap_interval(means, seed).T.tolist()
        for arm, of_runs, (low, high) in zip(arms, right, ends, strict=True):
            accuracy, seeds = float(of_runs.mean()), of_runs.mean(1).tolist()
            yield Scores(arm.name, labeling, len(chosen), accuracy, low, high, seeds)


def differences_of(pairs: Pairs, arms: Sequence[Arm], seed: int) -> Iterator[Difference]:
    """Each arm but the first minus the first: on all pairs, then by source and by length."""
    for labeling, chosen in pairs.items():
        results = [[results_of(run, labeling, chosen) for run in arm.runs] for arm in arms]
        first, *others = [np.mean(of_arm, axis=0) for of_arm in results]
        changes = np.stack([mean - first for mean in others], axis=1)  # [pairs, arms - 1, RESULTS]
        for kind, name, members in groups_of(arms[0].runs[0].labelings[labeling], chosen):
            change = changes[members]
            ends = bootstrap_interval(change.reshape(len(change), -1), seed)
            lows, highs = ends.reshape(2, *change.shape[1:]).tolist()
            for i, arm in enumerate(arms[1:]):
                more = [int((sign * change[:, i, 0] > 0).sum()) for sign in (-1, 1)]
                yield Difference(
                    *(labeling, arm.name, kind, name, len(change)),
                    *(change[:, i].mean(0).tolist(), lows[i], highs[i], *more, mcnemar(*more)),
                )


def groups_of(
    found: Labeling, pairs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, name, members as bool [pairs]) of all pairs, of each source, of each length bin."""
    rows = [found.place[pair] for pair in pairs]
    yield "all", "all pairs", np.ones(len(pairs), bool)
    sources = found.sources[rows]
    if len(names := sorted({*sources.tolist()})) > 1:
        yield from (("source", name or "unknown", sources == name) for name in names)
    yield from ranges("chosen longer by", found.longer[rows].astype(float), LENGTH_EDGES)


def shown(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value)
