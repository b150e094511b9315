"""Data sets: sources -> pairs -> tokens, for training and for `eval.py preferences`."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from notus.data.formats import Pair
from notus.data.packing import slots_of
from notus.data.preferences import Source, load_preferences
from notus.data.token_arrays import Tokenized, TokenizedPairs
from notus.data.tokenization import tokenize_pairs
from notus.errors import UserError, agreed

# Gives each rank a contiguous share of the pairs and returns all ranks' results, in order.
MapOverRanks = Callable[
    [Sequence[Pair], Callable[[Sequence[Pair]], Tokenized]], Sequence[Tokenized]
]


@dataclass(frozen=True)
class Dataset:
    """A data set as text and as tokens.

    rows: its pairs as they were read. tokenized: their tokens. dropped: how many rows were dropped
    while reading, by reason; a holdout's are counted with the training data's. sets: the places in
    `pairs` of each named set. remarks: lines on the columns that were read without use, and on
    those that were ignored.
    """

    rows: Sequence[Pair]
    tokenized: Tokenized
    dropped: Mapping[str, int]
    sets: Mapping[str, range] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def pairs(self) -> TokenizedPairs:
        """The tokens."""
        return self.tokenized.pairs

    @cached_property
    def kept(self) -> list[Pair]:
        """The pairs that have tokens, in the order of `pairs`."""
        return [self.rows[place] for place in self.tokenized.kept]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were dropped, cut or remarkable, by reason."""
        dropped = {f"dropped: {reason}": n for reason, n in self.dropped.items()}
        return dropped | self.tokenized.counts

    @property
    def notes(self) -> str:
        """`counts` as the end of a sentence."""
        return "".join(f"; {n:,} {reason}" for reason, n in self.counts.items())


def load_datasets(
    train: Sequence[Source],
    evaluation: Sequence[Source] | Mapping[str, Source],
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokenization: Mapping[str, Any],
    prefix_sharing: bool,
    tokens_per_microbatch: int,
    map_over_ranks: MapOverRanks,
    seed: int,
    holdout: int = 0,
    holdout_seed: int | None = None,
    drop_leaks: bool = False,
    responses_only: bool = False,
) -> dict[str, Dataset]:
    """The data sets "train" and, of `evaluation` sources or `holdout` rows, "eval".

    evaluation: sources by name are sets of the one data set, in that order.
    tokenization: the keyword arguments of `tokenize_pairs`. The last five: as for
    `load_preferences`. Collective. Raises UserError, on every rank, if a source cannot be read, a
    pair cannot be tokenized, no pair is left, or one takes more than tokens_per_microbatch.
    """
    named = evaluation if isinstance(evaluation, Mapping) else {}
    together = [[source] for source in named.values()] if named else [evaluation] * bool(evaluation)
    with agreed():
        parts = [load_preferences(x, seed=seed, responses_only=responses_only) for x in together]
        held_out = [pair for part in parts for pair in part.train]
        found = load_preferences(
            train,
            seed=seed,
            holdout=holdout,
            holdout_seed=holdout_seed,
            evaluation=held_out,
            drop_leaks=drop_leaks,
            responses_only=responses_only,
        )
    read = {"train": (found.train, found.dropped, found.remarks)}
    if parts:
        dropped = sum((Counter(part.dropped) for part in parts), Counter())
        remarks = [remark for part in parts for remark in part.remarks]
        read["eval"] = (held_out, dropped, remarks)
    elif holdout:
        read["eval"] = (found.holdout, {}, [])

    tokenize = partial(tokenize_pairs, tokenizer=tokenizer, **tokenization)
    datasets = {}
    for name, (rows, dropped, remarks) in read.items():
        tokenized = Tokenized.join(map_over_ranks(rows, tokenize))
        sets = {}
        if name == "eval" and named:
            ends = np.cumsum([0, *(len(part.train) for part in parts)])
            edges = np.searchsorted(tokenized.kept, ends).tolist()
            sets = dict(
                zip(named, itertools.starmap(range, itertools.pairwise(edges)), strict=True)
            )
        data = datasets[name] = Dataset(rows, tokenized, dropped, sets, remarks)
        for each, places in sets.items():
            if not places:
                raise UserError(f"data.eval.{each}: no pair is left after tokenization{data.notes}")
        if not len(data.pairs):
            paths = ", ".join(source.path for source in train)
            place = paths if name == "train" else "data.eval"
            raise UserError(f"{place}: no pair is left after tokenization{data.notes}")
        slots = slots_of(data.pairs.lengths, prefix_sharing)
        if slots.max() > tokens_per_microbatch:
            raise UserError(
                f"{data.kept[slots.argmax()].where}: the pair takes {slots.max()} tokens, but "
                f"tokens_per_microbatch is {tokens_per_microbatch}; raise it, or lower max_length"
            )
    return datasets
