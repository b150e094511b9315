"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer


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
    offloaded: bool = False,
    compiled: bool = False,
) -> Optimizer:
    """AdamW (arXiv 1711.05101) or RMSprop over float32 parameters; the state is sharded like them.

    state_dtype: torch.bfloat16 halves the state, see `LowMemory`. offloaded: the parameters are in
    the host's memory, where AdamW then goes through it once instead of seven times. compiled:
    whether RMSprop's update is one kernel.
    """
    parameters = list(parameters)
    if name == "adamw":
        fused = offloaded or parameters[0].is_cuda
        optimizer = AdamW(parameters, learning_rate, betas, eps, weight_decay, fused=fused)
    else:
        assert name == "rmsprop", name
        optimizer = RMSprop(parameters, learning_rate, alpha, eps, weight_decay, compiled)
    return optimizer if state_dtype == torch.float32 else LowMemory(optimizer)


class RMSprop(Optimizer):
    """torch.optim.RMSprop without momentum, to the bit, and with the same state.

    One parameter is updated after another, so that no temporary is larger than a parameter's shard.
    compiled: as one kernel, which reads and writes 20 bytes for each number (torch's: 52) and
    rounds in another order.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        alpha: float,
        eps: float,
        weight_decay: float,
        compiled: bool = False,
    ) -> None:
        defaults = {"lr": learning_rate, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self._update = torch.compile(_update_rmsprop, dynamic=True) if compiled else _update_rmsprop

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), "square_avg": torch.zeros_like(parameter)}
                state["step"] += 1
                tensors = (parameter, parameter.grad, state["square_avg"])
                # Not as views, of which the compiler would look at what they are a view of.
                numbers = [_local(tensor).view(-1).data for tensor in tensors]
                # A tensor: a number that changes from step to step would be compiled anew.
                rate = numbers[0].new_full((), group["lr"])
                if len(numbers[0]):  # a rank may have nothing of a small parameter
                    settings = group["alpha"], group["eps"], group["weight_decay"]
                    self._update(*numbers, rate, *settings)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _update_rmsprop(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    rate: Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
) -> None:
    """average = alpha average + (1 - alpha) g^2; parameter -= rate g / (sqrt(average) + eps)."""
    if weight_decay:
        gradient = gradient.add(parameter, alpha=weight_decay)
    average.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    parameter.sub_(rate * gradient / average.sqrt().add_(eps))


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
