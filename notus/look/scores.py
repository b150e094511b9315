"""A model's log-probs of pairs, from the pairs.jsonl of `eval.py preferences`, found by texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notus.curation.marks import fingerprint
from notus.curation.rows import read_rows
from notus.data.pairs import PARTS, Pair
from notus.errors import UserError

MARGIN, DISAGREEMENT = "model margin", "disagreement"
SIDES = ("chosen", "rejected")


class Scores:
    """The log-probs of the pairs in a pairs.jsonl, and two numbers made of them, all in nats.

    "model margin": chosen - rejected, of the model's log-probs less the reference's if there is
    one, without beta. "disagreement": the share of pairs whose labels differ by less, minus the
    share of pairs with a lower margin; at most 1, where the surest label meets the surest
    contradiction.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be read or was not written by that command."""
        self.path, records = path, list(read_rows(str(path)))
        margins, differences = [], []
        self._numbers: list[dict[str, float]] = []
        for where, record in records:
            numbers = _log_probs(record, where)
            ratios = [
                numbers[f"policy {side}"] - numbers.get(f"reference {side}", 0.0) for side in SIDES
            ]
            margins.append(ratios[0] - ratios[1])
            labels = [record.get(f"{side}_score") for side in SIDES]
            differences.append(np.nan if None in labels else labels[0] - labels[1])
            self._numbers.append({MARGIN: margins[-1]} | numbers)
        apart = _shares_below(differences) - _shares_below(margins)
        for numbers, disagreement in zip(self._numbers, apart.tolist(), strict=True):
            if disagreement == disagreement:  # no label has a score
                numbers[DISAGREEMENT] = disagreement
        self._places = {
            tuple(fingerprint(record[part]) for part in PARTS): place
            for place, (_, record) in enumerate(records)
        }
        self.found = 0

    def of(self, pair: Pair) -> Mapping[str, float]:
        """The numbers of a pair by their names; none if it was not scored.

        Those of a pair whose responses have been swapped since are turned round.
        """
        prompt, *responses = (fingerprint(getattr(pair, part)) for part in PARTS)
        if (place := self._places.get((prompt, *responses))) is not None:
            self.found += 1
            return self._numbers[place]
        if (place := self._places.get((prompt, *reversed(responses)))) is None:
            return {}
        self.found += 1
        numbers = self._numbers[place]
        swapped = {
            f"{model} {side}": numbers[f"{model} {other}"]
            for model in ("policy", "reference")
            for side, other in zip(SIDES, reversed(SIDES), strict=True)
            if f"{model} {other}" in numbers
        }
        return {MARGIN: -numbers[MARGIN]} | swapped


def _log_probs(record: Mapping[str, Any], where: str) -> dict[str, float]:
    unusable = [part for part in PARTS if not _is_text(record.get(part))]
    labels = (f"{side}_score" for side in SIDES)
    unusable += [n for n in labels if record.get(n) is not None and not _is_number(record[n])]
    numbers = {}
    for model in ("policy", "reference"):
        for name in (f"{model}_{side}" for side in SIDES):
            if _is_number(record.get(name)):
                numbers[name.replace("_", " ")] = float(record[name])
            elif name in record or model == "policy":
                unusable.append(name)
    if unusable:
        raise UserError(
            f"{where}: no usable {', '.join(unusable)}; expected a pairs.jsonl of `eval.py "
            "preferences`, with finite numbers"
        )
    return numbers


def _is_number(value: Any) -> bool:
    """Whether it is a number whose difference to any other one is finite."""
    return type(value) in (int, float) and abs(value) < 1e300


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, list) and all(isinstance(message, dict) for message in part)
    )


def _shares_below(values: Sequence[float]) -> np.ndarray:
    """For each value the share of all that are lower; nan for nan."""
    found = np.array(values, dtype=np.float64)
    known = np.sort(found[~np.isnan(found)])
    shares = np.searchsorted(known, found) / max(len(known), 1)
    return np.where(np.isnan(found), np.nan, shares)
