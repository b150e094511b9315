"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
    state_dtype: torch.dtype = torch.float32,
) -> Optimizer:
    """AdamW (arXiv 1711.05101) or RMSprop over float32 parameters; the state is sharded like them.

    state_dtype: torch.bfloat16 halves the state, see `LowMemory`.
    """
    parameters = list(parameters)
    on_gpu = parameters[0].is_cuda
    if name == "adamw":
        optimizer = AdamW(parameters, learning_rate, betas, eps, weight_decay, fused=on_gpu)
    else:
        assert name == "rmsprop", name
        optimizer = RMSprop(parameters, learning_rate, alpha, eps, weight_decay, foreach=on_gpu)
    return optimizer if state_dtype == torch.float32 else LowMemory(optimizer)


class LowMemory(Optimizer):
    """`inner`, an AdamW or RMSprop, with its state in bfloat16 between steps.

    One parameter at a time, the state is widened to float32, updated by `inner` as usual, and
    rounded back stochastically, so that the moving averages stay right on average where rounding to
    nearest would stop them: a step of 1e-3 of a bfloat16 value is below half its last place.
    Parameters, gradients and the update itself are float32 and never rounded; an update differs
    from that with float32 state by the relative error of bfloat16, 2^-8, in each average. The noise
    depends only on the step and the order of parameters, so a resumed run draws the same.
    """

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.inner.param_groups = self.param_groups  # one learning rate for both
        device = self.param_groups[0]["params"][0].device
        self.noise = torch.Generator(device)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        (group,) = self.param_groups
        parameters = group["params"]
        for index, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            # `inner` sees only this parameter, with its state in float32.
            group["params"] = [parameter]
            self.inner.state[parameter] = {
                key: value if key == "step" else value.float() for key, value in state.items()
            }
            self.inner.step()
            updated = self.inner.state.pop(parameter)
            if index == 0:
                self.noise.manual_seed(int(updated["step"]))
            for key, value in updated.items():
                state[key] = value if key == "step" else self._rounded(value)
        group["params"] = parameters

    def _rounded(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return round_stochastically(value, self.noise)
        local = round_stochastically(value.to_local(), self.noise)
        return DTensor.from_local(
            local,
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """A float32 tensor in bfloat16, rounded up or down with odds that make the mean exact.

    The 16 bits that bfloat16 lacks, over 2^16, are the chance of rounding away from zero: a uniform
    integer below 2^16 is added to them, and they are cut off.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def schedule_factor(step: int, *, total: int, name: str, warmup_ratio: float) -> float:
    """The share of the peak learning rate that optimiser step `step` (from 0) of `total` uses.

    It rises linearly from 0 over the first ceil(warmup_ratio * total) steps, then falls to 0 at
    `total` linearly or as half a cosine, or stays. Equal to transformers' schedulers of the same
    names, so that published recipes keep their meaning.
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
