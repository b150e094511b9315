"""Each held-out pair's result, a line of JSON: eval_pairs.jsonl, and `eval.py preferences`."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from notus.data.dataset import Dataset
from notus.data.formats import PARTS
from notus.data.token_arrays import TokenizedPairs
from notus.engine.log import warn
from notus.files import set_aside, write_whole
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs, log_ratios

FILE = "eval_pairs.jsonl"  # in output_dir: the results of the newest evaluation
Record = dict[str, Any]


def describe_pairs(data: Dataset) -> list[Record]:
    """The part of each pair's record that no model changes: origin, labels, texts, ratings, ...

    "sha256" identifies the pair by its tokens, in other runs and other files too. `python -m
    notus.look` shows such files, or finds their pairs by the texts in another source.
    """
    set_of = {place: {"set": name} for name, places in data.sets.items() for place in places}
    return [
        {
            "where": pair.where,
            **set_of.get(i, {}),
            **pair.labels,
            **{part: getattr(pair, part) for part in PARTS},
            "chosen_tokens": int(data.pairs.lengths[i, 1]),
            "rejected_tokens": int(data.pairs.lengths[i, 2]),
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "sha256": _identity(data.pairs, i),
        }
        for i, pair in enumerate(data.kept)
    ]


def _identity(pairs: TokenizedPairs, pair: int) -> str:
    digest = hashlib.sha256()
    for part in pairs.parts(pair):
        digest.update(pairs.tokens[part].tobytes() + b"|")
    return digest.hexdigest()[:32]


def pair_records(
    about: Sequence[Record], scored: PairLogProbs, loss: Loss, referenced: bool
) -> Iterator[Record]:
    """The complete records, of pairs in the order of `about` (see `describe_pairs`).

    Log-probs are sums over a response, in nats. margin: chosen minus rejected log-ratio to the
    reference, times beta; without a reference the difference of the log-probs, and no loss unless
    the loss needs none. right: whether it is above 0.
    """
    models = {"policy": scored.policy} | ({"reference": scored.reference} if referenced else {})
    values: dict[str, Tensor] = {
        f"{name}_{side}": getattr(found, side)
        for name, found in models.items()
        for side in ("chosen", "rejected")
    }
    chosen, rejected = log_ratios(scored)
    scale = loss.beta if referenced or not loss.uses_reference else 1.0
    values |= {"right": chosen > rejected, "margin": scale * (chosen - rejected)}
    if referenced or not loss.uses_reference:
        values["loss"] = loss(scored)
    columns = {name: column.detach().tolist() for name, column in values.items()}
    for i, known in enumerate(about):
        yield known | {name: _finite(column[i]) for name, column in columns.items()}


def _finite(value: float) -> float | None:
    """The number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None


def record_pairs(folder: Path, about: Sequence[Record], scored: PairLogProbs, loss: Loss) -> None:
    """Write an evaluation's results into `folder`, in place of an earlier one's, on rank 0 only.

    A file system that refuses costs the file, never the run. Nothing is written for a loss that
    ignores rejected responses.
    """
    if dist.get_rank() or not loss.uses_rejected:
        return
    records = pair_records(about, scored, loss, loss.uses_reference)
    path = folder / FILE
    try:
        if path.is_dir():
            warn(f"{path} is damaged, a folder: kept as {set_aside(path).name}")
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        warn(f"{path}: {error.strerror}; it is not written, training continues")
