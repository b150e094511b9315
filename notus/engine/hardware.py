"""GPUs: peak speed and memory, for the MFU of a run and for the plan of one not yet begun."""

import re
from typing import NamedTuple

from notus.errors import UserError


class GPU(NamedTuple):
    """One kind of GPU.

    name: what the user calls it. parts: words that are all in PyTorch's name of the device.
    peak_flops: dense bfloat16 with float32 accumulation, FLOP/s, of the maker's data sheet (half of
    the figure "with sparsity"). memory: bytes that the driver offers, less than the name says.
    """

    name: str
    parts: tuple[str, ...]
    peak_flops: float
    memory: int


GIB = 2**30

# A device is the first that fits, so the narrower names come first.
GPUS = (
    GPU("a100-40gb", ("A100", "40GB"), 312e12, int(39.4 * GIB)),
    GPU("a100-80gb", ("A100",), 312e12, int(79.1 * GIB)),
    GPU("h100-pcie", ("H100 PCIe",), 756e12, int(79.1 * GIB)),
    GPU("h100-nvl", ("H100 NVL",), 835e12, int(93.1 * GIB)),
    GPU("h100", ("H100",), 989.4e12, int(79.1 * GIB)),
    GPU("h200-nvl", ("H200 NVL",), 835e12, int(139.7 * GIB)),
    GPU("h200", ("H200",), 989.4e12, int(139.7 * GIB)),
    GPU("b200", ("B200",), 2250e12, int(178.3 * GIB)),
    GPU("l40s", ("L40S",), 362e12, int(44.4 * GIB)),
    GPU("a40", ("A40",), 149.7e12, int(44.4 * GIB)),
    GPU("rtx-a6000", ("RTX A6000",), 154.8e12, int(47.4 * GIB)),
    GPU("rtx-4090", ("RTX 4090",), 165.2e12, int(23.5 * GIB)),
    GPU("rtx-3090", ("RTX 3090",), 71e12, int(23.6 * GIB)),
)


def gpu_named(name: str) -> GPU:
    """The GPU that the user calls `name`, in any case. Raises UserError that lists the known."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"--gpu {name}: no such GPU is known; expected one of {known}")


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU whose PyTorch device name this is, or None if it is not in GPUS."""
    fitting = (
        gpu
        for gpu in GPUS
        if all(re.search(rf"\b{re.escape(part)}\b", device_name) for part in gpu.parts)
    )
    return next(fitting, None)
