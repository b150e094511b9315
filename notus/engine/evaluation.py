"""Held-out loss, accuracy and margins, every pair counted once."""

import torch
from torch import Tensor

from notus.data.tokenization import TokenizedPairs
from notus.engine.metrics import pair_metrics
from notus.objective.logprobs import Scorer, pair_log_probs
from notus.objective.losses import Loss


@torch.no_grad()
def evaluate(
    score_pairs: Scorer, pairs: TokenizedPairs, reference: Tensor, loss: Loss
) -> dict[str, float]:
    """Metrics over all of `pairs`, under the names of training with the prefix `eval_`.

    score_pairs: the policy's scorer over these pairs; reference: float32, flat, the reference's
    log-probs of every response token. The ranks share the scoring, then each one sums over all
    pairs, so every pair counts once whatever their number. Collective.
    """
    policy = score_pairs(range(len(pairs)))
    lengths = torch.from_numpy(pairs.lengths[:, 1:]).to(reference.device)
    scored = pair_log_probs(policy, reference, lengths, float(pairs.lengths[:, 1].mean()))
    metrics = pair_metrics(loss(scored), scored, loss.beta, loss.uses_reference)
    return {f"eval_{name}": float(top / bottom) for name, (top, bottom) in metrics.items()}
