"""Pairs with plausible log-probs, their gradient, and the options that losses are tested with."""

import torch
from torch import Tensor

from notus.objective.losses import LOSSES, PairLogProbs, Sums


def map_tensors(function, pairs: PairLogProbs) -> PairLogProbs:
    """The pairs with the function applied to every tensor."""
    both = {
        "policy": Sums(*map(function, pairs.policy)),
        "reference": Sums(*map(function, pairs.reference)),
    }
    rest = {k: function(v) for k, v in pairs._asdict().items() if k not in both}
    return PairLogProbs(**both, **rest)


def make_pairs(seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64) -> PairLogProbs:
    """Log-probs of a plausible size: some -1.5 nats per token, policy near the reference."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    chosen_length = uniform(3, 12).round()
    rejected_length = uniform(3, 12).round()
    chosen = chosen_length * uniform(-2, -1)
    rejected = rejected_length * uniform(-2, -1)
    reference = Sums(
        chosen=chosen,
        rejected=rejected,
        chosen_shared=chosen * uniform(0.5, 1),
        rejected_shared=rejected * uniform(0.5, 1),
    )
    pairs = PairLogProbs(
        policy=Sums(
            chosen=reference.chosen + uniform(-2.5, 2.5),
            rejected=reference.rejected + uniform(-2.5, 2.5),
            chosen_shared=reference.chosen_shared + uniform(-1, 1),
            rejected_shared=reference.rejected_shared + uniform(-1, 1),
        ),
        reference=reference,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        mean_chosen_length=chosen_length.mean(),
        chosen_weight=uniform(0.2, 1),
        rejected_weight=uniform(0.2, 1),
    )
    return map_tensors(lambda tensor: tensor.to(dtype), pairs)


def with_gradient(pairs: PairLogProbs) -> PairLogProbs:
    """The same pairs with the policy's sums as leaves."""
    return pairs._replace(
        policy=Sums(*(sums.detach().clone().requires_grad_() for sums in pairs.policy))
    )


def policy_gradient(values: Tensor, pairs: PairLogProbs) -> Tensor:
    """[4, B]: d(sum of values) / d(each of the policy's sums)."""
    return torch.stack(
        torch.autograd.grad(values.sum(), pairs.policy, allow_unused=True, materialize_grads=True)
    )


# The options each loss is tried with, in addition to its defaults.
OTHER_OPTIONS: dict[str, list[dict[str, object]]] = {
    "sigmoid": [{"beta": 0.7, "label_smoothing": 0.2}],
    "robust": [{"label_smoothing": 0.0}, {"beta": 0.5, "label_smoothing": 0.3}],
    "ipo": [{"average": False}, {"beta": 0.6}],
    "hinge": [{"beta": 0.9}],
    "sigmoid_norm": [{"beta": 5}],
    "simpo": [{"beta": 2.5, "gamma": 0.3}],
    "orpo": [{"odds_weight": 0.8}],
    "rpo": [{"beta": 0.4, "alpha": 0.2}],
    "dpop": [{"beta": 0.3, "penalty": 5}],
    "exo_pair": [{"beta": 0.4, "label_smoothing": 0.1}],
    "aot": [{"beta": 0.6, "label_smoothing": 0.1}],
    "aot_unpaired": [{"beta": 0.6, "label_smoothing": 0.1}],
    "discopop": [{"beta": 0.02, "temperature": 0.3}],
    "ld_dpo": [{"beta": 0.8, "alpha": 0.0}, {"alpha": 1}],
    "f_dpo": [
        {"divergence": "jensen_shannon", "beta": 0.8},
        {"divergence": "alpha", "beta": 0.5},
        {"divergence": "alpha", "alpha": 0.8},
    ],
}

CASES = [
    {"name": name, **options} for name in LOSSES for options in [{}, *OTHER_OPTIONS.get(name, [])]
]
