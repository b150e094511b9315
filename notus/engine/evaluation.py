"""Held-out loss, accuracy and margins; every pair counts once."""

import math

import torch
from torch import Tensor

from notus.data.tokenization import TokenizedPairs
from notus.engine.metrics import pair_metrics
from notus.objective.logprobs import pair_log_probs
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs


@torch.no_grad()
def evaluate(
    policy: Tensor, reference: Tensor, pairs: TokenizedPairs, loss: Loss
) -> dict[str, float]:
    """Metrics over all of `pairs`, under the names of training with the prefix `eval_`.

    policy, reference: log-probs of every response token, flat, as of `logprobs.score`. Every rank
    sums over all pairs, so every pair counts once whatever the number of ranks.
    """
    metrics = summarize(all_log_probs(policy, reference, pairs), loss)
    return {f"eval_{name}": value for name, value in metrics.items()}


def all_log_probs(policy: Tensor, reference: Tensor, pairs: TokenizedPairs) -> PairLogProbs:
    """The inputs of losses and metrics for every pair; both tensors flat, see `score`."""
    lengths = torch.from_numpy(pairs.lengths[:, 1:]).to(reference.device)
    return pair_log_probs(policy, reference, lengths, float(pairs.lengths[:, 1].mean()))


def summarize(scored: PairLogProbs, loss: Loss) -> dict[str, float]:
    """The means of `pair_metrics`; for supervised fine-tuning also the perplexity per token."""
    sums = pair_metrics(loss(scored), scored, loss)
    metrics = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    if not loss.uses_rejected:  # the loss is the negative log-likelihood per token
        metrics["perplexity"] = math.exp(metrics["loss"])
    return metrics
