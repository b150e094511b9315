"""Which pairs a step trains on, and how ranks and microbatches share them: pure functions.

The pairs of a step depend only on the seed and the step; how they are divided over ranks and
microbatches changes neither the gradient nor any metric.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SLOT_GRAIN = 128  # a row's length is a multiple of an attention block


@dataclass(frozen=True)
class Division:
    """Pairs divided over microbatches and ranks: bins[microbatch][rank] lists pair indices.

    Every rank has the same number of microbatches, because ranks compute in lockstep; a bin may be
    empty. slots: length of every microbatch's row, the fullest bin rounded up.
    """

    bins: list[list[list[int]]]
    slots: int


@dataclass(frozen=True)
class Plan:
    """The pairs of every step of a run, and their division over ranks and microbatches.

    slot_counts: int64 [pairs], slots of each pair of the data set (`packing.slots_of`).
    pairs_per_step: the global batch. max_steps: the run ends there if the epochs hold more.
    ranks, budget: see `divide_pairs`.
    """

    slot_counts: np.ndarray
    pairs_per_step: int
    epochs: int
    max_steps: int | None
    seed: int
    shuffle: bool
    ranks: int
    budget: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch; the last holds the remaining pairs."""
        return -(-len(self.slot_counts) // self.pairs_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def pairs_of(self, step: int) -> np.ndarray:
        """Indices of the pairs of optimiser step `step`, counted from 0: int64 [at most G].

        They are the next G of the epoch's permutation, which is keyed by (seed, epoch), or without
        `shuffle` of the file's order. No step spans two epochs. The same on any number of ranks.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(len(self.slot_counts))
        if self.shuffle:
            order = _permutation(self.seed, epoch, len(order))
        return order[within * self.pairs_per_step : (within + 1) * self.pairs_per_step]

    def division(self, pairs: np.ndarray) -> Division:
        """The pairs divided over ranks and microbatches."""
        return divide_pairs(pairs, self.slot_counts, ranks=self.ranks, budget=self.budget)


@lru_cache(maxsize=1)  # an epoch's steps share it; a million pairs take 20 ms
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def idle_text(pairs_per_step: int, ranks: int, unit: str) -> str | None:
    """A warning of ranks that idle in every step, on empty rows; None if there are none."""
    if ranks <= pairs_per_step:
        return None
    return (
        f"warning: a step has {pairs_per_step:,} {unit}, so at least {ranks - pairs_per_step:,} of "
        f"{ranks:,} ranks idle in every step; start fewer, or raise train.pairs_per_step"
    )


def random_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's random numbers in a step (dropout): a resumed run draws them again."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def divide_pairs(
    pairs: Sequence[int] | np.ndarray,
    slot_counts: np.ndarray,
    *,
    ranks: int,
    budget: int,
    grain: int = SLOT_GRAIN,
) -> Division:
    """Divide `pairs` into as few microbatches as the budget allows, evenly filled.

    slot_counts: int64, slots of each pair of the data set (`packing.slots_of`). budget: slots of
    one microbatch on one rank. grain: the row length is a multiple of it, but at most the budget.
    Each pair, largest first, goes into the emptiest bin, so the fullest bin stays near the mean
    and padding stays small. No pair may be larger than the budget.
    """
    sizes = slot_counts[np.asarray(pairs, dtype=np.int64)]
    assert not len(sizes) or sizes.max() <= budget, (sizes.max(), budget)
    largest_first = [int(pairs[i]) for i in np.argsort(-sizes, kind="stable")]
    microbatches = max(1, -(-int(sizes.sum()) // (ranks * budget)))
    while (filled := _fill(largest_first, slot_counts, microbatches * ranks, budget)) is None:
        microbatches += 1
    filled.sort(key=lambda bin: -bin[0])  # ranks that run at the same time get similar loads
    loads = [load for load, _ in filled]
    bins = [
        [sorted(members) for _, members in filled[m * ranks : (m + 1) * ranks]]
        for m in range(microbatches)
    ]
    return Division(bins, slots=min(budget, -(-max(loads[0], 1) // grain) * grain))


def _fill(
    largest_first: list[int], slot_counts: np.ndarray, bins: int, budget: int
) -> list[tuple[int, list[int]]] | None:
    """(load, members) of each bin; None if a pair does not fit."""
    emptiest = [(0, bin) for bin in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for pair in largest_first:
        load, bin = emptiest[0]
        load += int(slot_counts[pair])
        if load > budget:
            return None
        heapq.heapreplace(emptiest, (load, bin))
        members[bin].append(pair)
    return [(load, members[bin]) for load, bin in sorted(emptiest, key=lambda item: item[1])]
