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
    missing = [part for part in PARTS if part not in record]
    numbers = {}
    for model in ("policy", "reference"):
        for name in (f"{model}_{side}" for side in SIDES):
            if name in record or model == "policy":
                if type(record.get(name)) not in (int, float):
                    missing.append(name)
                else:
                    numbers[name.replace("_", " ")] = float(record[name])
    if missing:
        raise UserError(
            f"{where}: no {', '.join(missing)}; expected a pairs.jsonl of `eval.py preferences`"
        )
    return numbers


def _shares_below(values: Sequence[float]) -> np.ndarray:
    """For each value the share of all that are lower; nan for nan."""
    found = np.array(values, dtype=np.float64)
    known = np.sort(found[~np.isnan(found)])
    shares = np.searchsorted(known, found) / max(len(known), 1)
    return np.where(np.isnan(found), np.nan, shares)
