"""Sources -> preference pairs: mixed by weight, held-out rows set aside, unusable pairs dropped.

Each source's rows become pairs (sources.py), the sources are mixed, held-out rows are drawn, and
unusable pairs are dropped with a named reason.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from notus.curation.curate import HELD_OUT_PROMPT, reason_to_drop
from notus.curation.decontamination import Dropped, SeenPrompts, whole_text
from notus.data.pairs import Pair
from notus.data.sources import Reading, Source, read_pairs
from notus.errors import UserError


class Preferences(NamedTuple):
    """Pairs in training order, held-out pairs, and how many rows were dropped, by reason.

    remarks: lines about what was read.
    """

    train: list[Pair]
    holdout: list[Pair]
    dropped: dict[str, int]
    remarks: list[str]


# -------------------------------------------------------------------------------------- mixing


def weighted_rows(count: int, weight: float, seed: int, source_index: int) -> np.ndarray:
    """Indices (int64) of the rows that enter an epoch: each of them `weight` times.

    The integer part of the weight repeats the source in file order; the rest is a random part of
    it, drawn by (seed, source_index), also in file order.
    """
    repeats, fraction = divmod(weight, 1)
    generator = np.random.default_rng((seed, source_index))
    part = np.sort(generator.permutation(count)[: round(fraction * count)])
    return np.concatenate([np.tile(np.arange(count), int(repeats)), part])


def split_holdout(count: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices into `count` rows, int64, in the order they are to be used.

    Equal to `datasets`' shuffle(seed) followed by train_test_split(test_size=holdout, seed=seed),
    which is how Notus set aside 2,000 of its 63,619 rows; both draw the same permutation. With
    holdout 0 all rows keep their order.
    """
    if holdout == 0:
        return np.arange(count), np.arange(0)
    permutation = np.random.default_rng(seed).permutation(count)
    shuffled_twice = permutation[permutation]
    return shuffled_twice[holdout:], shuffled_twice[:holdout]


MOST_ROWS = 10**8  # of a source in an epoch, all of them held in memory
HELD_OUT_COPY = "copy of a held-out row"


def find_leaks(pairs: Iterable[Pair], held_out: Iterable[Pair]) -> list[str | None]:
    """For each pair, the origin of a held-out pair with (nearly) the same prompt, or None.

    `SeenPrompts` defines "nearly".
    """
    seen = SeenPrompts()
    for pair in held_out:
        seen.add(whole_text(pair.prompt), pair.where)
    return [seen.find(whole_text(pair.prompt)) for pair in pairs]


def load_preferences(
    sources: Sequence[Source],
    *,
    seed: int,
    holdout: int = 0,
    holdout_seed: int | None = None,
    evaluation: Sequence[Pair] = (),
    drop_leaks: bool = False,
    responses_only: bool = False,
) -> Preferences:
    """Read, convert and mix the sources, set `holdout` rows aside, and drop what is unusable.

    A source's rows enter `weight` times, in the order of the sources; those that curation leaves
    out do not, as the published curated sets were split into train and test without them. The
    held-out rows are drawn by `holdout_seed` (None: `seed`) from all entered rows before any is
    dropped, so that dropping does not change the draw. A copy of a held-out row (weight above 1) is
    dropped from training and, with `drop_leaks`, so is every row whose prompt is, or nearly is,
    that of a held-out row or of one of the `evaluation` pairs. `dropped` counts rows as often as
    they enter, and once if curation leaves them out. responses_only (supervised fine-tuning): only
    chosen responses are read, and each answer of a conversation is a row of its own. Raises
    UserError if a source cannot be read or converted, `holdout` takes every row, or no pair is
    left.
    """
    rows: list[Pair | Dropped] = []
    dropped: Counter[str] = Counter()
    entered, remarks = [], []
    for index, source in enumerate(sources):
        first = len(rows)
        reading = Reading(source.path)
        for found in read_pairs(source, seed, responses_only, reading):
            if isinstance(found, Pair) or found.is_row:
                rows.append(found)
            else:
                dropped[found.reason] += 1
        if source.weight * (len(rows) - first) > MOST_ROWS:
            raise UserError(
                f"{source.path}: {len(rows) - first:,} rows with the weight {source.weight:g}; "
                f"expected at most {MOST_ROWS:,} rows in an epoch"
            )
        remarks += reading.lines()
        entered.append(first + weighted_rows(len(rows) - first, source.weight, seed, index))
    order = np.concatenate(entered)
    if holdout and holdout >= len(order):
        raise UserError(
            f"data.eval.holdout is {holdout}, but the sources hold only {len(order)} rows; "
            "expected fewer than there are"
        )

    def usable(indices: np.ndarray) -> list[Pair]:
        """The pairs worth training on; the other rows are counted by reason."""
        pairs = []
        for row in (rows[index] for index in indices):
            if isinstance(row, Dropped):
                reason = row.reason
            else:
                rejected = None if responses_only else row.rejected
                reason = reason_to_drop(row.prompt, row.chosen, rejected)
            if reason is None:
                pairs.append(row)
            else:
                dropped[reason] += 1
        return pairs

    split_seed = seed if holdout_seed is None else holdout_seed
    train, held_out = (order[part] for part in split_holdout(len(order), holdout, split_seed))
    is_copy = np.isin(train, held_out)
    dropped += Counter({HELD_OUT_COPY: int(is_copy.sum())})
    train_pairs, holdout_pairs = usable(train[~is_copy]), usable(held_out)
    if responses_only:  # the answers of one conversation stay together
        conversations = {pair.where for pair in holdout_pairs}
        apart = [pair for pair in train_pairs if pair.where not in conversations]
        dropped += Counter({HELD_OUT_COPY: len(train_pairs) - len(apart)})
        train_pairs = apart
    if drop_leaks:
        leaks = find_leaks(train_pairs, [*holdout_pairs, *evaluation])
        train_pairs = [pair for pair, leak in zip(train_pairs, leaks, strict=True) if leak is None]
        dropped += Counter({HELD_OUT_PROMPT: len(leaks) - len(train_pairs)})
    if not train_pairs or (holdout and not holdout_pairs):
        problem = "held out" if train_pairs else "left"
        paths = ", ".join(source.path for source in sources)
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{paths}: no pair is {problem}; dropped: {counts or 'none'}")
    return Preferences(train_pairs, holdout_pairs, dict(dropped), remarks)
