"""Held-out loss, accuracy and margins; every pair counts once."""

import math

import torch
from torch import Tensor

from notus.data.tokenization import TokenizedPairs
from notus.engine.metrics import pair_metrics
from notus.objective.logprobs import Scorer, pair_log_probs
from notus.objective.losses import Loss, PairLogProbs


@torch.no_grad()
def evaluate(
    score_pairs: Scorer, pairs: TokenizedPairs, reference: Tensor, loss: Loss
) -> dict[str, float]:
    """Metrics over all of `pairs`, under the names of training with the prefix `eval_`.

    score_pairs: the policy's scorer over these pairs; reference: float32, flat, the reference's
    log-probs of every response token. The ranks share the scoring, then each rank sums over all
    pairs, so every pair counts once on any number of ranks. Collective.
    """
    metrics = summarize(all_log_probs(score_pairs(range(len(pairs))), reference, pairs), loss)
    return {f"eval_{name}": value for name, value in metrics.items()}


def all_log_probs(policy: Tensor, reference: Tensor, pairs: TokenizedPairs) -> PairLogProbs:
    """The inputs of losses and metrics for every pair; both tensors flat, see `scorer`."""
    lengths = torch.from_numpy(pairs.lengths[:, 1:]).to(reference.device)
    return pair_log_probs(policy, reference, lengths, float(pairs.lengths[:, 1].mean()))


def summarize(scored: PairLogProbs, loss: Loss) -> dict[str, float]:
    """The means of `pair_metrics`; for supervised fine-tuning also the perplexity per token."""
    sums = pair_metrics(loss(scored), scored, loss)
    metrics = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    if not loss.uses_rejected:  # the loss is the negative log-likelihood per token
        metrics["perplexity"] = math.exp(metrics["loss"])
    return metrics
