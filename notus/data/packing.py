"""Planned pairs -> one packed microbatch of tensors.

A microbatch is one row of T token slots that holds many pairs side by side. With prefix sharing a
pair takes P + C + R slots, [prompt | chosen | rejected], and both responses continue the prompt's
positions; without, it takes two documents, [prompt | chosen] and [prompt | rejected]. The scored
rows are in the same order either way: for each pair the chosen response's tokens, then the
rejected one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from notus.data.tokenization import TokenizedPairs

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # branches of a document
PADDING = -1  # the document of slots that hold no token


@dataclass(frozen=True)
class Layout:
    """Where each slot of a row belongs, all that decides who may attend to whom. Shapes [T].

    document: int32, slots of different documents never meet; PADDING where there is no token.
    branch: int32, PROMPT, CHOSEN or REJECTED.
    position: int32, counted from the document's start.
    hidden: bool, True for a token that neither attends nor is attended to (an end-of-sequence token
        inside the text under the "trl-0.7.4" tokenization; FlashAttention-2 took it out of the
        sequence, and so its attention output is 0).
    """

    document: Tensor
    branch: Tensor
    position: Tensor
    hidden: Tensor


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
        """The same microbatch on `device`; from pinned memory the copy does not block."""
        return Microbatch(**{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


def _move(value: Tensor | Layout, device: torch.device) -> Tensor | Layout:
    if isinstance(value, Layout):
        return Layout(**{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def slots_of(lengths: np.ndarray, prefix_sharing: bool) -> np.ndarray:
    """Slots that each pair takes: int64 [pairs], from lengths [pairs, 3].

    Without prefix sharing 2P + C + R, which is also how trainers that pad count a pair's tokens; or
    P + C where there is no rejected response.
    """
    repeated = lengths[:, 0] * (lengths[:, 2] > 0)
    return lengths.sum(1) + (0 if prefix_sharing else repeated)


def pack(
    pairs: TokenizedPairs, chosen_pairs: Sequence[int], slots: int, prefix_sharing: bool
) -> Microbatch:
    """The pairs `chosen_pairs`, in that order, in one row of `slots` slots; the rest is padding.

    They must fit. A rejected response of no tokens takes no slot. No pairs at all gives a row of
    padding without scored rows, for a rank that has nothing to do while others work.
    """
    tokens = np.zeros(slots, np.int64)
    document = np.full(slots, PADDING, np.int32)
    branch = np.zeros(slots, np.int32)
    position = np.zeros(slots, np.int32)
    hidden = np.zeros(slots, bool)
    rows, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    cursor = 0
    documents = 0

    def place(part: slice, kind: int, first_position: int) -> int:
        """Copy one part of a pair to the cursor; returns the slot it begins at."""
        nonlocal cursor
        start, cursor = cursor, cursor + part.stop - part.start
        assert cursor <= slots, (cursor, slots)
        here = slice(start, cursor)
        tokens[here] = pairs.tokens[part]
        hidden[here] = pairs.hidden[part]
        document[here] = documents
        branch[here] = kind
        position[here] = np.arange(first_position, first_position + cursor - start)
        return start

    for pair in chosen_pairs:
        prompt, *responses = pairs.parts(pair)
        prompt_length = prompt.stop - prompt.start
        for side, part in enumerate(responses):
            if part.start == part.stop:
                continue  # there is no rejected response in supervised fine-tuning
            if side == 0 or not prefix_sharing:
                documents += 1
                prompt_end = place(prompt, PROMPT, 0) + prompt_length - 1
            start = place(part, (CHOSEN, REJECTED)[side], prompt_length)
            length = part.stop - part.start
            # The prompt's last slot predicts the first token, each token the one after it.
            rows.append(np.r_[prompt_end, start : start + length - 1].astype(np.int64))
            targets.append(pairs.tokens[part].astype(np.int64))

    def joined(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))

    indices = np.asarray(chosen_pairs, dtype=np.int64)
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        layout=Layout(*(torch.from_numpy(x) for x in (document, branch, position, hidden))),
        pairs=torch.from_numpy(indices),
        rows=joined(rows),
        targets=joined(targets),
        lengths=torch.from_numpy(pairs.lengths[indices, 1:].reshape(-1, 2)),
    )
