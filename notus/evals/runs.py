"""A finished run as comparisons read it: settings, evaluations, each held-out pair's results."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from notus.curation.rows import read_rows
from notus.engine.pair_records import FILE
from notus.errors import UserError
from notus.evals.published import METRICS
from notus.files import read_object
from notus.strict import show

RESULTS = ("accuracy", "loss", "margin")  # of a pair: 1.0 if it is right, else 0.0; nats
WHOLE_SET = "held out"  # the name of the evaluation pairs where data.eval names no sets
Evaluation = Mapping[str, float]


class Labeling(NamedTuple):
    """A run's results on one set of pairs, labelled by one rule or annotator.

    place: each pair's row, by the SHA-256 of its tokens and its number among equal pairs. values:
    float64 [pairs, RESULTS], nan for a loss that was not computed. sources: "" where unknown.
    longer: int64 [pairs], the tokens by which the chosen response is longer.
    """

    place: dict[tuple[str, int], int]
    values: np.ndarray
    sources: np.ndarray
    longer: np.ndarray


class OwnRun(NamedTuple):
    """A run: its folder, resolved settings by dotted key, evaluations by step, and labelings."""

    folder: Path
    settings: dict[str, Any]
    evaluations: dict[int, Evaluation]
    labelings: dict[str, Labeling]

    @property
    def last(self) -> int:
        """The step of the last evaluation."""
        return max(self.evaluations)

    @property
    def best(self) -> int:
        """The step of the evaluation with the lowest loss."""
        return min(self.evaluations, key=lambda step: self.evaluations[step]["eval_loss"])


def read_run(folder: Path) -> OwnRun:
    """Read config.json, metrics.jsonl, eval_pairs.jsonl and evals/NAME/pairs.jsonl of a run.

    A set that data.eval names is a labeling, and so is a folder of `eval.py preferences` in evals/.
    Raises UserError that names the file if one is missing or damaged, or there is no labeling.
    """
    evaluations = read_evaluations(folder / "metrics.jsonl")
    settings = dict(_flat(read_object(folder / "config.json")))
    labelings: dict[str, Labeling] = {}
    for file in [folder / FILE, *sorted(folder.glob("evals/*/pairs.jsonl"))]:
        if file.name != FILE:
            labelings |= _read_labelings(file, f"evals/{file.parent.name}")
        elif file.is_file():
            labelings |= _read_labelings(file, WHOLE_SET)
    if not labelings:
        raise UserError(
            f"{folder}: holds no {FILE}, which a run with data.eval writes, and no result of "
            f"eval.py preferences ... --out {folder / 'evals/NAME'}"
        )
    return OwnRun(folder, settings, evaluations, labelings)


def read_evaluations(file: Path) -> dict[int, Evaluation]:
    """The evaluations in a metrics.jsonl by step, except the one at step 0.

    Raises UserError if there is none, or if one lacks a metric of METRICS.
    """
    if not os.path.isfile(file):  # False, not an error, for a name that is too long
        raise UserError(f"{file}: no such file; expected the output_dir of a run")
    found: dict[int, Evaluation] = {}
    for where, row in read_rows(str(file)):
        if "eval_loss" not in row or row.get("step") == 0:
            continue
        if type(row.get("step")) is not int:
            raise UserError(f"{where}: step is {show(row.get('step'))}; expected an integer")
        for name in METRICS.values():
            if not isinstance(row.get(name), int | float) or not math.isfinite(row[name]):
                raise UserError(f"{where}: {name} is {row.get(name)!r}; expected a finite number")
        found[row["step"]] = row
    if not found:
        raise UserError(f"{file}: no evaluation after step 0; expected a run with data.eval")
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; items of lists are numbered from 0."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _read_labelings(file: Path, name: str) -> dict[str, Labeling]:
    """The labelings in a file of pair records, by their sets' names; `name` for pairs without."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for where, row in read_rows(str(file)):
        _check(row, where)
        rows.setdefault(row.get("set", name), []).append(row)
    return {each: _labeling(records) for each, records in rows.items()}


def _check(row: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless the row is a pair record."""
    if "sha256" not in row:
        raise UserError(f'{where}: no "sha256", so an earlier version wrote it: evaluate again')
    for key, kind in (("sha256", str), ("right", bool), ("set", str), ("source", str)):
        found = row.get(key, kind() if key in ("set", "source") else None)
        if not isinstance(found, kind):
            raise UserError(f"{where}: {key} is {found!r:.60}; expected {kind.__name__}")
    for key in ("margin", "loss", "chosen_tokens", "rejected_tokens"):
        value = row.get(key, 0 if key == "loss" else None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e300:  # nor nan, nor an integer that no float holds
            raise UserError(f"{where}: {key} is {json.dumps(value):.60}; expected a finite number")


def _labeling(rows: list[dict[str, Any]]) -> Labeling:
    seen: Counter[str] = Counter()
    place = {}
    for i, row in enumerate(rows):
        place[row["sha256"], seen[row["sha256"]]] = i
        seen[row["sha256"]] += 1
    return Labeling(
        place,
        np.array([(row["right"], row.get("loss", math.nan), row["margin"]) for row in rows], float),
        np.array([row.get("source", "") for row in rows]),
        np.array([row["chosen_tokens"] - row["rejected_tokens"] for row in rows]),
    )
