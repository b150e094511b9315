"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    alpha: float,
    eps: float,
) -> Optimizer:
    """AdamW (arXiv 1711.05101) or RMSprop over float32 parameters; state has their sharding."""
    parameters = list(parameters)
    on_gpu = parameters[0].is_cuda
    if name == "adamw":
        return AdamW(parameters, learning_rate, betas, eps, weight_decay, fused=on_gpu)
    assert name == "rmsprop", name
    return RMSprop(parameters, learning_rate, alpha, eps, weight_decay, foreach=on_gpu)


def schedule_factor(step: int, *, total: int, name: str, warmup_ratio: float) -> float:
    """The share of the peak learning rate that optimiser step `step` (from 0) of `total` uses.

    Rises linearly from 0 over the first ceil(warmup_ratio * total) steps, then falls to 0 at
    `total` linearly or as half a cosine, or stays. As transformers' schedulers of the same names,
    so that published recipes keep their meaning.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if name == "linear":
        return 1 - progress
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    assert name == "constant", name
    return 1.0
