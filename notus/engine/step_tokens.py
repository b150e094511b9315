"""The response tokens of a step from all ranks, with any values per token, for a log."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data.packing import PROMPT, Microbatch
from notus.data.token_arrays import TokenizedPairs
from notus.objective.logprobs import flat_positions


class StepTokens(NamedTuple):
    """The N response tokens of a step's pairs, on the host.

    They are in the plan's order: pair after pair, of each the chosen response's tokens, then the
    rejected response's. pair: int64 [N], index into the data set. branch: int64 [N], CHOSEN (1) or
    REJECTED (2). position: int64 [N], in its response, from 0. token: int64 [N], its id. values:
    [K, N], what was gathered about it, in the dtype that it came in.
    """

    pair: Tensor
    branch: Tensor
    position: Tensor
    token: Tensor
    values: Tensor


@torch.no_grad()
def gather_tokens(
    seen: Sequence[tuple[Microbatch, Tensor]], pairs: TokenizedPairs, chosen: np.ndarray
) -> StepTokens:
    """The step's tokens on every rank, in an order that no packing or number of ranks changes.

    seen: this rank's microbatches of the step, each with values of its scored tokens, [K, S].
    pairs: the data set. chosen: int64 [B], the step's pairs, `plan.pairs_of(step)`. Collective;
    waits for the device.
    """
    step = pairs.select(chosen)
    (first, values), *_ = seen
    starts = np.zeros(len(pairs), np.int64)
    starts[chosen] = step.response_starts[:-1]
    starts = torch.from_numpy(starts).to(first.pairs.device)
    gathered = values.new_zeros(len(values), int(step.response_starts[-1]))
    for batch, values in seen:
        gathered[:, flat_positions(batch, starts)] = values
    dist.all_reduce(gathered)  # every entry is written by one rank and 0 on all others

    part = np.repeat(np.arange(step.lengths.size), step.lengths.reshape(-1))
    place, branch = np.divmod(part, 3)  # a pair's parts: prompt, chosen, rejected
    position = np.arange(len(part)) - step.starts.reshape(-1)[part]
    columns = chosen[place], branch, position, step.tokens.astype(np.int64)
    scored = branch != PROMPT
    return StepTokens(*(torch.from_numpy(c[scored]) for c in columns), gathered.cpu())
