"""The predicate as two intervals of keys for each query, and FlexAttention's mask made of them.

`attention.may_attend` defines who attends to whom. In a packed row it allows a query the slots of
its prompt and those of its own branch up to itself, which `pack` notes down as it places them
(`Layout.intervals`). FlexAttention's kernels need less than half of the instructions for these, and
which blocks of slots they have to visit follows without looking at T x T pairs. Nobody has to keep
the two in step: `agrees` compares them, and an edited predicate is applied as it is.

Shapes: T slots of a row.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from notus.data.packing import Layout, pack
from notus.data.token_arrays import TokenizedPairs

BLOCK = 128  # slots of a block of FlexAttention's mask


def limits(layout: Layout, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`first`, `stop`, `own` and `place` of every slot: int32 [T].

    Slot q attends to the keys k with first[q] <= place[k] < stop[q], which are in its prompt, and
    own[q] <= place[k] <= q. The place of a slot is its index, or T if it is hidden.
    """
    size = len(layout.document)
    slots = torch.arange(size, dtype=torch.int32, device=layout.document.device)
    first, stop, own = layout.intervals
    if window is not None:  # within a branch, slots and positions advance together
        first = torch.minimum(first + (layout.position - window + 1).clamp(min=0), stop)
        own = torch.maximum(own, slots - window + 1)
    stop = torch.where(layout.hidden, first, stop)
    own = torch.where(layout.hidden, slots + 1, own)
    return first, stop, own, torch.where(layout.hidden, size, slots)


def within(limits: tuple[Tensor, ...], query: Tensor, key: Tensor) -> Tensor:
    """`may_attend` of the slots `query` and `key`, computed from `limits`."""
    first, stop, own, place = limits
    key = place[key]
    return (key >= first[query]) & (key < stop[query]) | (key >= own[query]) & (key <= query)


def block_mask(layout: Layout, window: int | None) -> BlockMask:
    """FlexAttention's mask of a row of whole blocks, on its device, without a [T, T] array."""
    found = first, stop, own, place = limits(layout, window)
    size, device = len(place), place.device
    edges = torch.arange(0, size + 1, BLOCK, dtype=torch.int32, device=device)
    visible = place.new_zeros(size + 1)  # keys before each slot that are not hidden
    visible[1:] = (place < size).cumsum(0)

    def keys_before(stops: Tensor) -> Tensor:
        """Visible keys before `stops` and each edge, summed over each block of queries."""
        keys = visible[torch.minimum(stops[:, None], edges)]
        return keys.view(-1, BLOCK, len(edges)).sum(1)

    after = torch.arange(1, size + 1, dtype=torch.int32, device=device)
    keys = keys_before(stop) - keys_before(first) + keys_before(after) - keys_before(own)
    allowed = keys.diff()  # pairs of slots, for each block of queries and of keys
    if size == BLOCK:  # the compiler takes a size of 1 for a constant, and would compile twice
        allowed = pad(allowed, (0, 1, 0, 1))
    full = allowed == BLOCK**2
    partial = (allowed > 0) & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each row of `blocks` holds, and their indices before those of others."""
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within(found, query, key)

    by_query, by_key = ((*listed(p), *listed(f)) for p, f in ((partial, full), (partial.T, full.T)))
    return BlockMask((size, size), *by_query, *by_key, (BLOCK, BLOCK), mask_mod)


@cache
def agrees(predicate: Callable[..., Tensor], window: int | None) -> bool:
    """Whether `predicate` allows exactly what the intervals allow on packed rows.

    Compared once for each predicate, on made-up rows: prompts shared or not, single responses,
    hidden tokens, padding, short and long documents, with `window` and with a short one.
    """
    lengths = np.array([[9, 7, 8], [1, 5, 0], [3, 1, 4], [2400, 1500, 600], [40, 50, 60]])
    hidden = np.random.default_rng(0).random(lengths.sum()) < 0.1
    pairs = TokenizedPairs(np.zeros(len(hidden), np.int32), hidden, lengths)
    rows = [pack(pairs, range(len(pairs)), 8192, sharing).layout for sharing in (True, False)]
    return all(agrees_on(predicate, row, w) for row in rows for w in {window, window and 6})


def agrees_on(predicate: Callable[..., Tensor], layout: Layout, window: int | None) -> bool:
    """Whether both allow the same in one row, on the CPU: its first queries and a sample.

    A predicate that reads fields of the layout that the intervals do not know never agrees.
    """
    slots = torch.arange(len(layout.document))
    query, key = torch.cat((slots[:BLOCK], slots[BLOCK::61]))[:, None], slots[None, :]
    known = ("document", "branch", "position", "hidden")
    try:
        said = predicate(
            SimpleNamespace(**{n: getattr(layout, n) for n in known}), query, key, window
        )
    except AttributeError:
        return False
    return torch.equal(said, within(limits(layout, window), query, key))
