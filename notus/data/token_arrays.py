"""A data set as token ids: the pairs, and what tokenization did to them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class TokenizedPairs:
    """The pairs of a data set in three arrays; pair i is prompt, chosen, rejected, in this order.

    tokens: int32 [tokens], pair after pair. hidden: bool [tokens], True for tokens outside
    attention. lengths: int64 [pairs, 3], tokens of prompt, chosen, rejected.
    """

    tokens: np.ndarray
    hidden: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """The index in `tokens` of each part's first token: int64 [pairs, 3]."""
        ends = self.lengths.reshape(-1).cumsum()
        return (ends - self.lengths.reshape(-1)).reshape(-1, 3)

    @cached_property
    def response_starts(self) -> np.ndarray:
        """Each pair's first index in a flat array of all response tokens: int64 [pairs + 1].

        The order is that of `tokens` without the prompts; the last entry is the total.
        """
        return np.concatenate(([0], self.lengths[:, 1:].sum(1).cumsum()))

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenizedPairs":
        """The pairs `indices`, in the order given."""
        spans = [
            np.arange(start, start + n)
            for start, n in zip(self.starts[indices, 0], self.lengths[indices].sum(1), strict=True)
        ]
        positions = np.concatenate([np.zeros(0, np.int64), *spans])
        return TokenizedPairs(self.tokens[positions], self.hidden[positions], self.lengths[indices])

    def fingerprint(self) -> str:
        """SHA-256 of the pairs: it changes with any token, length or their order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.hidden, self.lengths):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def parts(self, pair: int) -> list[slice]:
        """The slices of `tokens` that hold the pair's prompt, chosen and rejected response."""
        pieces = zip(self.starts[pair], self.lengths[pair], strict=True)
        return [slice(start, start + length) for start, length in pieces]

    @classmethod
    def join(cls, parts: Sequence["TokenizedPairs"]) -> "TokenizedPairs":
        """The pairs of all parts, in order."""
        names = ("tokens", "hidden", "lengths")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Tokenized(NamedTuple):
    """A tokenized data set.

    pairs: those that remain. kept: int64 [pairs], each one's index in the input. inputs: how many
    pairs were given. whole_lengths: int64 [pairs, 3], `pairs.lengths` before truncation. counts:
    how many pairs were "dropped: <reason>", had a part that was "cut: <part>", or are remarkable
    (tokenization.AS_TEXT, AS_SPECIAL). examples: the first such pair's index in the input.
    """

    pairs: TokenizedPairs
    kept: np.ndarray
    inputs: int
    whole_lengths: np.ndarray
    counts: dict[str, int]
    examples: dict[str, int]

    @classmethod
    def join(cls, parts: Sequence["Tokenized"]) -> "Tokenized":
        """The result for a data set from the results for consecutive shares of it."""
        shifts = np.cumsum([0, *(part.inputs for part in parts[:-1])])
        counts: Counter[str] = Counter()
        examples: dict[str, int] = {}
        for part, shift in zip(parts, shifts, strict=True):
            counts.update(part.counts)
            examples = {name: int(i + shift) for name, i in part.examples.items()} | examples
        return cls(
            TokenizedPairs.join([part.pairs for part in parts]),
            np.concatenate([p.kept + shift for p, shift in zip(parts, shifts, strict=True)]),
            sum(part.inputs for part in parts),
            np.concatenate([part.whole_lengths for part in parts]),
            dict(counts),
            examples,
        )
