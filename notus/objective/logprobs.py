"""Packed tokens -> log-probs per response token -> sums per response.

Policy and reference, training and evaluation all go through the functions of this file. The
log-probs of many pairs are kept in one flat array, in the order in which microbatches score them:
for each pair the chosen response's tokens, then the rejected one's.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data.packing import Microbatch, pack, slots_of
from notus.data.planning import Plan, plan
from notus.data.tokenization import TokenizedPairs
from notus.model.attention import build_mask, default_backend
from notus.model.mistral import MistralForCausalLM
from notus.objective.losses import Loss, PairLogProbs, couple

# From indices of pairs to their flat log-probs, in that order.
Scorer = Callable[[Sequence[int] | np.ndarray], Tensor]


def token_log_probs(
    model: MistralForCausalLM, batch: Microbatch, sum_squares: bool = False
) -> Tensor:
    """Log-prob of every response token of the microbatch, in nats: float32 [S].

    With `sum_squares`, [2, S]: the second row is log sum_v p(v)^2, without gradient.
    """
    backend = model.attention or default_backend(batch.tokens.device, model.shape.head_dim)
    mask = build_mask(batch.layout, model.shape.sliding_window, backend)
    return model(batch.tokens, batch.layout.position, mask, batch.rows, batch.targets, sum_squares)


def response_sums(values_S: Tensor, lengths_B2: Tensor) -> Tensor:
    """Sum each response's values: float64 [B, 2], chosen and rejected.

    values_S is in scoring order, lengths_B2 int64. Deterministic: no atomics. The sums stay in
    float64, because rewards are small differences of large ones.
    """
    sums = torch.segment_reduce(
        values_S.double(), "sum", lengths=lengths_B2.flatten(), initial=0.0, unsafe=True
    )
    return sums.view(-1, 2)


def pair_log_probs(
    policy_S: Tensor, reference_S: Tensor, lengths_B2: Tensor, mean_chosen_length: float
) -> PairLogProbs:
    """What the losses look at, in float64, for the B pairs whose response tokens are scored in S.

    policy_S: float32 [S] with gradient, or [2, S] with log sum_v p(v)^2 in the second row, for
    losses that weight pairs by it. reference_S: float32 [S]. lengths_B2: int64 [B, 2].
    mean_chosen_length: chosen tokens per pair over the whole optimiser step.
    """
    weights = (None, None)
    if policy_S.dim() == 2:
        policy_S, squares_S = policy_S
        scale = response_sums(policy_S.detach() - squares_S, lengths_B2) / lengths_B2
        weights = scale.exp().unbind(1)
    shared_S = _within_shorter(lengths_B2, len(policy_S)).to(policy_S.dtype)
    sums = [
        response_sums(values, lengths_B2).unbind(1)
        for values in (policy_S, reference_S, policy_S * shared_S, reference_S * shared_S)
    ]
    policy, reference, policy_shared, reference_shared = sums
    lengths = lengths_B2.double().unbind(1)
    # Not torch.tensor: a copy from the host would wait for the forward pass.
    mean_length = torch.full((), mean_chosen_length, dtype=torch.float64, device=policy_S.device)
    return PairLogProbs(
        *policy, *reference, *lengths, *policy_shared, *reference_shared, mean_length, *weights
    )


def _within_shorter(lengths_B2: Tensor, size: int) -> Tensor:
    """Whether each scored token's place in its response also exists in the other: bool [S]."""
    lengths = lengths_B2.flatten()
    shorter = lengths_B2.amin(1, keepdim=True).expand(-1, 2).flatten()
    start = lengths.cumsum(0) - lengths
    spread = torch.stack((start, shorter)).repeat_interleave(lengths, dim=1, output_size=size)
    return torch.arange(size, device=lengths.device) - spread[0] < spread[1]


def flat_positions(batch: Microbatch, response_starts: Tensor) -> Tensor:
    """Where the microbatch's scored tokens stand in the data set's flat array: int64 [S].

    response_starts: int64 [pairs + 1], `TokenizedPairs.response_starts` on the batch's device.
    """
    counts = batch.lengths.sum(1)
    shift = response_starts[batch.pairs] - (counts.cumsum(0) - counts)
    size = len(batch.rows)
    return torch.arange(size, device=shift.device) + shift.repeat_interleave(
        counts, output_size=size
    )


def pack_plan(
    plan: Plan, pairs: TokenizedPairs, prefix_sharing: bool, device: torch.device
) -> Iterable[Microbatch]:
    """This rank's microbatches of a plan, one after another, on `device`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for bins in plan.bins:
        yield pack(pairs, bins[rank], plan.slots, prefix_sharing).to(device)


@torch.no_grad()
def score(
    model: MistralForCausalLM,
    batches: Iterable[Microbatch],
    pairs: TokenizedPairs,
    device: torch.device,
    sum_squares: bool = False,
) -> Tensor:
    """Log-probs of the response tokens of all ranks' microbatches: float32, flat, on every rank.

    Has one entry for every response token of `pairs`; those of pairs in no microbatch are 0. No
    pair may be in two. With `sum_squares`, [2, tokens], see `token_log_probs`. Leaves the model in
    evaluation mode. Collective, with equally many microbatches on all ranks.
    """
    starts = torch.from_numpy(pairs.response_starts).to(device)
    size = int(pairs.response_starts[-1])
    model.eval()  # no dropout in what is measured
    flat = torch.zeros((2, size) if sum_squares else (size,), dtype=torch.float32, device=device)
    for batch in batches:
        flat[..., flat_positions(batch, starts)] = token_log_probs(model, batch, sum_squares)
    if dist.is_initialized():
        dist.all_reduce(flat)  # every entry is written by one rank and 0 on all others
    return flat


def scorer(
    model: MistralForCausalLM,
    pairs: TokenizedPairs,
    *,
    budget: int,
    prefix_sharing: bool,
    device: torch.device,
    sum_squares: bool = False,
) -> Scorer:
    """A function from pair indices to those pairs' flat log-probs under `model`, in that order.

    See `score`. All ranks must call it with the same indices; they share the work.
    """

    def score_pairs(indices: Sequence[int] | np.ndarray) -> Tensor:
        wanted = pairs.select(indices)
        counts = slots_of(wanted.lengths, prefix_sharing)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        division = plan(range(len(wanted)), counts, ranks=ranks, budget=budget)
        batches = pack_plan(division, wanted, prefix_sharing, device)
        return score(model, batches, wanted, device, sum_squares)

    return score_pairs


def gather_pairs(
    flat: Tensor, pairs: TokenizedPairs, indices: Sequence[int] | np.ndarray
) -> Tensor:
    """What a flat array of all pairs holds for `indices`, in that order: [..., S]."""
    starts = pairs.response_starts
    spans = [np.arange(starts[i], starts[i + 1]) for i in indices]
    positions = np.concatenate([np.zeros(0, np.int64), *spans])
    return flat[..., torch.from_numpy(positions).to(flat.device)]


def couple_step(
    loss: Loss, policy: Tensor, reference: Tensor, pairs: TokenizedPairs, indices: np.ndarray
) -> Callable[[PairLogProbs, Tensor], Tensor]:
    """A loss that couples pairs, made additive: `losses.couple` over the step's pairs.

    policy, reference: flat log-probs of the step's pairs `indices`, in that order. Returns a
    function of a microbatch's log-probs and its pairs' indices in the data set: losses [B].
    """
    scored = pair_log_probs(
        policy,
        reference,
        torch.from_numpy(pairs.lengths[indices, 1:]).to(policy.device),
        float(pairs.lengths[indices, 1].mean()),
    )
    coupled = couple(loss, scored)
    known, place = torch.from_numpy(indices).to(policy.device).sort()
    return lambda batch, batch_pairs: coupled(batch, place[torch.searchsorted(known, batch_pairs)])
