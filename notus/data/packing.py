"""Pairs -> packed microbatches of tensors.

A microbatch is one row of T token slots that holds many pairs, one after another. With prefix
sharing a pair takes P + C + R slots, [prompt | chosen | rejected], and both responses continue the
prompt's positions; without, it takes two documents, [prompt | chosen] and [prompt | rejected]. The
scored rows are in the same order either way: for each pair the chosen response's tokens, then the
rejected response's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from notus.data.planning import Division
from notus.data.token_arrays import TokenizedPairs

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # branches of a document
PADDING = -1  # the document of slots that hold no token
NO_SLOTS = slice(0, 0)
PADDING_SEGMENT = 128  # slots; a row of only padding should not cost a full row of attention


class Rows(NamedTuple):
    """How pairs are packed for scoring.

    budget: slots of one row at most. prefix_sharing: whether the two responses of a pair share its
    prompt. device: of the microbatches.
    """

    budget: int
    prefix_sharing: bool
    device: torch.device


@dataclass(frozen=True)
class Segments:
    """A row as G causal sequences, for attention of variable length.

    A prompt with a single response is one segment. Where two responses share a prompt, the prompt
    is a segment, and each response is one whose keys are the prompt's followed by its own: queries
    and keys end at the same token. The keys of all segments, concatenated, are K copies of slots;
    the slots of a shared prompt are copied three times. Padding is cut into segments of its own, so
    that every slot gets a finite result.

    query_edges, key_edges: int32 [G + 1], where segments start among slots and among keys.
    key_slots: int64 [K], the slot that each key is a copy of. copies: int64 [T, 3], the positions
    of each slot's copies among the keys, filled up with K. most_queries, most_keys: the largest
    numbers in one segment.
    """

    query_edges: Tensor
    key_edges: Tensor
    key_slots: Tensor
    copies: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Layout:
    """Where each slot of a row belongs, which decides who may attend to whom. Shapes [T].

    document: int32, slots of different documents never attend to each other; PADDING where there
        is no token.
    branch: int32, PROMPT, CHOSEN or REJECTED.
    position: int32, counted from the document's start.
    hidden: bool, True for a token that neither attends nor is attended to (an end-of-sequence token
        inside the text under the "trl-0.7.4" tokenization; FlashAttention-2 took it out of the
        sequence, and so its attention output is 0).
    segments: the row as causal sequences; None if any token is hidden.
    intervals: int32 [3, T], the slots that each slot attends to if nothing is hidden and no window
        limits it: the first number up to and without the second, in its prompt, and the third up
        to itself, in its own branch. Padding attends to itself.
    """

    document: Tensor
    branch: Tensor
    position: Tensor
    hidden: Tensor
    segments: Segments | None = None
    intervals: Tensor | None = None


@dataclass(frozen=True)
class Microbatch:
    """B pairs in T slots with S scored response tokens.

    tokens: int64 [T]. layout: see Layout. pairs: int64 [B], indices into the data set.
    rows: int64 [S], the slot whose hidden state predicts the token; targets: int64 [S], the token.
    lengths: int64 [B, 2], tokens of the chosen and the rejected response; they sum to S.
    """

    tokens: Tensor
    layout: Layout
    pairs: Tensor
    rows: Tensor
    targets: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> "Microbatch":
        """A copy of the microbatch on `device`; from pinned memory the copy does not block."""
        return _move(self, device)


def _move(value: Any, device: torch.device) -> Any:
    if is_dataclass(value):
        return type(value)(**{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def slots_of(lengths: np.ndarray, prefix_sharing: bool) -> np.ndarray:
    """Slots that each pair takes: int64 [pairs], from lengths [pairs, 3].

    With prefix sharing P + C + R. Without it 2P + C + R (as trainers that pad count tokens),
    or P + C where there is no rejected response.
    """
    repeated = lengths[:, 0] * (lengths[:, 2] > 0)
    return lengths.sum(1) + (0 if prefix_sharing else repeated)


def pack(
    pairs: TokenizedPairs, chosen_pairs: Sequence[int], slots: int, prefix_sharing: bool
) -> Microbatch:
    """The pairs `chosen_pairs`, in that order, in one row of `slots` slots; the rest is padding.

    They must fit. A rejected response of no tokens takes no slot. Without pairs the row is padding
    with no scored rows, for a rank that has nothing to do while others work.
    """
    tokens = np.zeros(slots, np.int64)
    document = np.full(slots, PADDING, np.int32)
    branch = np.zeros(slots, np.int32)
    position = np.zeros(slots, np.int32)
    hidden = np.zeros(slots, bool)
    intervals = np.zeros((3, slots), np.int32)
    intervals[2] = np.arange(slots)
    rows, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    segments: list[tuple[slice, slice]] = []  # slots of the shared prompt, if any, and the queries
    cursor = 0
    documents = 0

    def place(part: slice, kind: int, prompt: slice) -> slice:
        """Copy one part of a pair, after the slots `prompt`, to the cursor; returns its slots."""
        nonlocal cursor
        start, cursor = cursor, cursor + part.stop - part.start
        assert cursor <= slots, (cursor, slots)
        here = slice(start, cursor)
        tokens[here] = pairs.tokens[part]
        hidden[here] = pairs.hidden[part]
        document[here] = documents
        branch[here] = kind
        position[here] = prompt.stop - prompt.start + np.arange(cursor - start)
        intervals[:, here] = [[prompt.start], [prompt.stop], [start]]
        return here

    for pair in chosen_pairs:
        prompt, *responses = pairs.parts(pair)
        # Supervised fine-tuning has no rejected responses.
        responses = [part for part in responses if part.stop > part.start]
        shared = prefix_sharing and len(responses) == 2
        for side, part in enumerate(responses):
            if side == 0 or not shared:
                documents += 1
                before = place(prompt, PROMPT, NO_SLOTS)
                if shared:
                    segments.append((NO_SLOTS, before))
            own = place(part, (CHOSEN, REJECTED)[side], before)
            whole = slice(before.start, own.stop)
            segments.append((before, own) if shared else (NO_SLOTS, whole))
            # The prompt's last slot predicts the first token, each token the one after it.
            rows.append(np.r_[before.stop - 1, own.start : own.stop - 1].astype(np.int64))
            targets.append(pairs.tokens[part].astype(np.int64))

    for start in range(cursor, slots, PADDING_SEGMENT):
        segments.append((NO_SLOTS, slice(start, min(start + PADDING_SEGMENT, slots))))

    indices = np.asarray(chosen_pairs, dtype=np.int64)
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        layout=Layout(
            *(torch.from_numpy(x) for x in (document, branch, position, hidden)),
            segments=None if hidden.any() else _join(segments, slots),
            intervals=torch.from_numpy(intervals),
        ),
        pairs=torch.from_numpy(indices),
        rows=torch.from_numpy(np.concatenate(rows)),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=torch.from_numpy(pairs.lengths[indices, 1:].reshape(-1, 2)),
    )


def pack_division(
    division: Division, pairs: TokenizedPairs, rank: int, rows: Rows
) -> Iterator[Microbatch]:
    """The microbatches of one rank, packed one at a time, on `rows.device`.

    On a GPU each is packed while the passes over the one before still run: nothing between two
    microbatches waits for the device. A step's first one is packed while the optimiser updates the
    weights.
    """
    for bins in division.bins:
        batch = pack(pairs, bins[rank], division.slots, rows.prefix_sharing)
        yield batch.to(rows.device)


def _join(segments: Sequence[tuple[slice, slice]], slots: int) -> Segments:
    """`Segments` of a row from (slots of the shared prompt, slots of the queries) in slot order."""
    sizes = [(own.stop - own.start, own.stop - own.start + p.stop - p.start) for p, own in segments]
    edges = np.concatenate([[[0, 0]], np.cumsum(sizes, axis=0)]).astype(np.int32)
    key_slots = np.concatenate([np.r_[shared, own] for shared, own in segments]).astype(np.int64)
    # A copy's column is its number among the copies of its slot.
    order = np.argsort(key_slots, kind="stable")
    times = np.bincount(key_slots, minlength=slots)
    column = np.arange(len(order)) - np.repeat(np.cumsum(times) - times, times)
    copies = np.full((slots, 3), len(key_slots), np.int64)
    copies[key_slots[order], column] = order
    arrays = (torch.from_numpy(np.ascontiguousarray(x)) for x in (*edges.T, key_slots, copies))
    return Segments(*arrays, *(int(most) for most in np.max(sizes, axis=0)))
