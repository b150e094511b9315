"""The public functions: the Triton kernel or its plain definition, chosen by name and device."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from notus.errors import UserError
from notus.kernels import reference

BACKENDS = ("auto", "triton", "plain")
DTYPES = (torch.bfloat16, torch.float32)


def linear_log_probs(
    hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor, backend: str = "auto"
) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets: float32 [S], with gradients.

    hidden_SD, weight_VD: both bfloat16 or both float32; targets_S: int64 in [0, V); all on one
    device. backend: "triton", "plain", or "auto" for Triton on CUDA. Raises ValueError for other
    tensors. Targets out of range raise on the CPU; on CUDA, where looking would make the host wait,
    Triton's log-prob of such a target is NaN, which stops a training step.
    """
    _check_tensors(hidden_SD, weight_VD)
    _check_targets(targets_S, hidden_SD, weight_VD)
    kernels = _kernels(backend, hidden_SD.device)
    return kernels.linear_log_probs(hidden_SD, weight_VD, targets_S)


def linear_log_sum_squares(hidden_SD: Tensor, weight_VD: Tensor, backend: str = "auto") -> Tensor:
    """log of the sum over the vocabulary of squared probabilities: float32 [S], no gradient.

    Arguments and errors as in `linear_log_probs`.
    """
    _check_tensors(hidden_SD, weight_VD)
    return _kernels(backend, hidden_SD.device).linear_log_sum_squares(hidden_SD, weight_VD)


@cache
def check_backend(backend: str, device: torch.device) -> None:
    """Raise UserError if the backend's kernels cannot run on `device`."""
    if backend not in BACKENDS:
        raise UserError(f'kernels: found "{backend}", expected one of {", ".join(BACKENDS)}')
    if backend == "plain" or (backend == "auto" and device.type != "cuda"):
        return
    if find_spec("triton") is None:
        raise UserError(
            f'kernels: "{backend}" on {device.type} needs Triton, which is not installed; install '
            'the package triton, or use "plain"'
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise UserError(
                f'kernels: "{backend}" needs a GPU of compute capability 8.0 (A100) or newer, '
                f'found {capability[0]}.{capability[1]}; use "plain"'
            )
    elif device.type != "cpu" or not _triton().INTERPRETED:
        raise UserError(
            f'kernels: "triton" compiles for CUDA, found the device {device.type}; use "auto" or '
            '"plain" (for tests on the CPU, set TRITON_INTERPRET=1 before Python starts)'
        )


def _kernels(backend: str, device: torch.device) -> ModuleType:
    check_backend(backend, device)
    use_triton = backend == "triton" or (backend == "auto" and device.type == "cuda")
    return _triton() if use_triton else reference


def _triton() -> ModuleType:
    """The module, imported only when needed: Triton exists only for Linux."""
    from notus.kernels import linear_log_probs

    return linear_log_probs


def _check_tensors(hidden_SD: Tensor, weight_VD: Tensor) -> None:
    if isinstance(weight_VD, DTensor) or isinstance(hidden_SD, DTensor):
        raise ValueError(
            "the weight or the hidden rows are a DTensor, which holds one rank's shard: call the "
            "head's module, whose FSDP hooks gather the weight, or pass tensor.full_tensor()"
        )
    if hidden_SD.dim() != 2 or weight_VD.dim() != 2 or hidden_SD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"found hidden rows {list(hidden_SD.shape)} and a weight {list(weight_VD.shape)}, "
            "expected [S, D] and [V, D] with the same D: flatten the rows, and pass the weight as "
            "nn.Linear keeps it"
        )
    if hidden_SD.dtype != weight_VD.dtype or hidden_SD.dtype not in DTYPES:
        raise ValueError(
            f"found hidden rows in {hidden_SD.dtype} and a weight in {weight_VD.dtype}, expected "
            "both in bfloat16 or both in float32: cast one with .to()"
        )
    if hidden_SD.device != weight_VD.device:
        raise ValueError(
            f"found hidden rows on {hidden_SD.device} and the weight on {weight_VD.device}, "
            "expected one device: move one with .to()"
        )


def _check_targets(targets_S: Tensor, hidden_SD: Tensor, weight_VD: Tensor) -> None:
    S, V = len(hidden_SD), len(weight_VD)
    wanted = (torch.int64, (S,), hidden_SD.device)
    if (targets_S.dtype, targets_S.shape, targets_S.device) != wanted:
        raise ValueError(
            f"found targets {list(targets_S.shape)} in {targets_S.dtype} on {targets_S.device}, "
            f"expected [{S}], one for each hidden row, in torch.int64 on {hidden_SD.device}"
        )
    if targets_S.device.type == "cpu" and S:
        outside = targets_S[(targets_S < 0) | (targets_S >= V)]
        if len(outside):
            raise ValueError(
                f"found target {outside[0].item()}, expected 0 to {V - 1}, the rows of the weight: "
                "leave rows without a target out of hidden and targets"
            )
