"""The frozen reference's log-probs during training, and the check of a run's start.

`CachedReference` looks them up (reference_cache.py computes and keeps them), `OnlineReference` runs
the model each time. Both have the same two methods, so the loop does not tell them apart.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from notus.data.packing import Microbatch, Rows
from notus.data.token_arrays import TokenizedPairs
from notus.errors import UserError
from notus.model.lora import adapters_off
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import flat_positions, gather_pairs, score, token_log_probs
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs, log_ratios
from notus.objective.rounding import compare


class CachedReference:
    """Log-probs looked up in `flat`: float32, the response tokens of all `pairs`."""

    def __init__(self, flat: Tensor, pairs: TokenizedPairs) -> None:
        self.flat, self.pairs = flat, pairs
        self.starts = torch.from_numpy(pairs.response_starts).to(flat.device)

    def of_batch(self, batch: Microbatch) -> Tensor:
        """The microbatch's scored tokens: float32 [S]."""
        return self.flat[flat_positions(batch, self.starts)]

    def of_pairs(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The response tokens of the pairs `indices`, in that order: float32, flat."""
        return gather_pairs(self.flat, self.pairs, indices)


class OnlineReference:
    """Log-probs of `pairs` computed by the model on every call, without its adapters.

    A policy with adapters is its own reference: without them it has its initial weights.
    """

    def __init__(self, model: MistralForCausalLM, pairs: TokenizedPairs, rows: Rows) -> None:
        self.model, self.pairs, self.rows = model, pairs, rows

    @torch.no_grad()
    def of_batch(self, batch: Microbatch) -> Tensor:
        """The microbatch's scored tokens: float32 [S]."""
        with adapters_off(self.model):
            return token_log_probs(self.model, batch)

    def of_pairs(
        self,
        indices: Sequence[int] | np.ndarray,
        after_batch: Callable[[int], object] = lambda pairs: None,
    ) -> Tensor:
        """The response tokens of the pairs `indices`, in that order: float32, flat. Collective.

        after_batch: as for `score`.
        """
        with adapters_off(self.model):
            return score(self.model, self.pairs, indices, self.rows, after_batch=after_batch)


Reference = CachedReference | OnlineReference


def no_reference(pairs: TokenizedPairs, device: torch.device) -> CachedReference:
    """Zeros, for losses that use no reference; rewards are then beta x the policy's log-probs."""
    return CachedReference(torch.zeros(int(pairs.response_starts[-1]), device=device), pairs)


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """Move the reference towards the policy: ref <- share x policy + (1 - share) x ref.

    TR-DPO, arXiv 2404.09656, equation 6. Both have the same, equally sharded float32 parameters.
    """
    for own, other in zip(reference.parameters(), policy.parameters(), strict=True):
        own.lerp_(other, share)


def check_start(loss: Loss, pairs: PairLogProbs, compute_dtype: torch.dtype) -> str:
    """Refuse to start if policy and reference, which have the same weights, disagree.

    Each response's log-ratio must be 0 up to rounding. The loss, a function of nothing else, then
    has its known value (ln 2 for sigmoid), which must be finite. Returns the comparison in words.
    Raises UserError with the likely cause.
    """
    lengths = torch.cat((pairs.chosen_length, pairs.rejected_length))
    found = compare(torch.cat(log_ratios(pairs)), lengths, compute_dtype)
    if not found.within:
        raise UserError(
            f"before the first step, policy and reference disagree, though both are the same "
            f"weights: {found.words}. Likely causes: a cache made by other weights, weights "
            "changed on disk since, or (if not a number) a checkpoint with non-finite values"
        )
    known = loss(pairs._replace(policy=pairs.reference))
    if not torch.isfinite(known).all():
        raise UserError(f"loss: {loss.name} is not finite where policy and reference agree")
    return found.words
