"""Packed tokens -> log-probs per response token -> sums per response.

Policy and reference, training and evaluation all go through the functions of this file. The
log-probs of many pairs are kept in one flat array, in scoring order: for each pair the chosen
response's tokens, then the rejected response's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data.packing import Microbatch, Rows, pack_division, slots_of
from notus.data.planning import divide_pairs
from notus.data.token_arrays import TokenizedPairs
from notus.model.attention import build_mask, default_backend
from notus.model.mistral import MistralForCausalLM
from notus.objective.losses import PairLogProbs, Sums


def token_log_probs(
    model: MistralForCausalLM, batch: Microbatch, sum_squares: bool = False
) -> Tensor:
    """Log-prob of every response token of the microbatch, in nats: float32 [S].

    With `sum_squares`, [2, S]: the second row is log sum_v p(v)^2, without gradient.
    """
    backend = model.attention or default_backend(batch.tokens.device, model.shape.head_dim)
    mask = build_mask(batch.layout, model.shape.sliding_window, backend)
    position_T = batch.layout.position
    log_probs_S, _ = model(batch.tokens, position_T, mask, batch.rows, batch.targets, sum_squares)
    return log_probs_S


def pair_log_probs(
    policy_S: Tensor, reference_S: Tensor, lengths_B2: Tensor, mean_chosen_length: float
) -> PairLogProbs:
    """The input of the losses, in float64, for B pairs with S scored tokens.

    policy_S: float32 [S] with gradient, or [2, S] of `token_log_probs`. reference_S: float32 [S].
    lengths_B2: int64 [B, 2]. mean_chosen_length: see PairLogProbs.
    """
    weights = (None, None)
    if policy_S.dim() == 2:
        policy_S, squares_S = policy_S
        scale = response_sums(policy_S.detach() - squares_S, lengths_B2) / lengths_B2
        weights = scale.exp().unbind(1)
    shared_S = _within_shorter(lengths_B2, len(policy_S)).to(policy_S.dtype)
    chosen_length, rejected_length = lengths_B2.double().unbind(1)
    return PairLogProbs(
        policy=_sums(policy_S, shared_S, lengths_B2),
        reference=_sums(reference_S, shared_S, lengths_B2),
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        # Not torch.tensor: a copy from the host would wait for the forward pass.
        mean_chosen_length=torch.full(
            (), mean_chosen_length, dtype=torch.float64, device=policy_S.device
        ),
        chosen_weight=weights[0],
        rejected_weight=weights[1],
    )


def response_sums(values_S: Tensor, lengths_B2: Tensor) -> Tensor:
    """Sum each response's values: float64 [B, 2], chosen and rejected.

    values_S is in scoring order, lengths_B2 int64. Deterministic: no atomics. The sums stay in
    float64, because rewards are small differences of large ones.
    """
    sums = torch.segment_reduce(
        values_S.double(), "sum", lengths=lengths_B2.flatten(), initial=0.0, unsafe=True
    )
    return sums.view(-1, 2)


def _sums(values_S: Tensor, shared_S: Tensor, lengths_B2: Tensor) -> Sums:
    chosen, rejected = response_sums(values_S, lengths_B2).unbind(1)
    chosen_shared, rejected_shared = response_sums(values_S * shared_S, lengths_B2).unbind(1)
    return Sums(chosen, rejected, chosen_shared, rejected_shared)


def _within_shorter(lengths_B2: Tensor, size: int) -> Tensor:
    """Whether each scored token is among the first min(C, R) of its response: bool [S]."""
    lengths = lengths_B2.flatten()
    shorter = lengths_B2.amin(1, keepdim=True).expand(-1, 2).flatten()
    start = lengths.cumsum(0) - lengths
    spread = torch.stack((start, shorter)).repeat_interleave(lengths, dim=1, output_size=size)
    return torch.arange(size, device=lengths.device) - spread[0] < spread[1]


@torch.no_grad()
def score(
    model: MistralForCausalLM,
    pairs: TokenizedPairs,
    indices: Sequence[int] | np.ndarray,
    rows: Rows,
    sum_squares: bool = False,
    after_batch: Callable[[int], object] = lambda pairs: None,
) -> Tensor:
    """Log-probs of the response tokens of the pairs `indices`, in that order: float32, flat.

    With `sum_squares`, [2, tokens], see `token_log_probs`. after_batch: is called after each
    microbatch with the number of pairs in it, over all ranks. Leaves the model in evaluation mode.
    Collective: all ranks pass the same indices, share the work and get all results.
    """
    wanted = pairs.select(indices)
    slot_counts = slots_of(wanted.lengths, rows.prefix_sharing)
    ranks, size = dist.get_world_size(), int(wanted.response_starts[-1])
    division = divide_pairs(range(len(wanted)), slot_counts, ranks=ranks, budget=rows.budget)
    starts = torch.from_numpy(wanted.response_starts).to(rows.device)
    flat = torch.zeros((2, size) if sum_squares else size, device=rows.device)
    model.eval()  # no dropout in what is measured
    batches = pack_division(division, wanted, dist.get_rank(), rows)
    for batch, of_ranks in zip(batches, division.bins, strict=True):
        flat[..., flat_positions(batch, starts)] = token_log_probs(model, batch, sum_squares)
        after_batch(sum(map(len, of_ranks)))
    dist.all_reduce(flat)  # every entry is written by one rank and 0 on all others
    return flat


def flat_positions(batch: Microbatch, response_starts: Tensor) -> Tensor:
    """The positions of the microbatch's scored tokens in the data set's flat array: int64 [S].

    response_starts: int64 [pairs + 1], `TokenizedPairs.response_starts` on the batch's device.
    """
    counts, size = batch.lengths.sum(1), len(batch.rows)
    shift = response_starts[batch.pairs] - (counts.cumsum(0) - counts)
    shift_S = shift.repeat_interleave(counts, output_size=size)
    return torch.arange(size, device=shift.device) + shift_S


def gather_pairs(
    flat: Tensor, pairs: TokenizedPairs, indices: Sequence[int] | np.ndarray
) -> Tensor:
    """The entries of the pairs `indices`, in that order, in a flat array of all pairs: [..., S]."""
    starts = pairs.response_starts
    spans = [np.arange(starts[i], starts[i + 1]) for i in indices]
    positions = np.concatenate([np.zeros(0, np.int64), *spans])
    return flat[..., torch.from_numpy(positions).to(flat.device)]
