"""FLOPs that training needs and executes, the known GPUs, and a run's speed and memory."""

import re
import resource
import sys
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from notus.data.packing import slots_of
from notus.data.planning import Division
from notus.errors import UserError
from notus.model.hf_config import ModelShape


class Work(NamedTuple):
    """The work of a step compared with a forward and a full backward pass of the policy."""

    frozen: bool = False  # the base's weights take no gradient (low-rank adapters)
    recomputed: bool = False  # blocks compute their forward pass again in the backward pass
    # forward passes without gradient: of an online reference, and of both models before a step
    # whose loss couples its pairs
    scorings: int = 0


def forward_flops(shape: ModelShape, lengths: np.ndarray) -> tuple[float, float, float]:
    """FLOPs of one forward pass over these pairs: the blocks' products, attention, the head.

    lengths: int64 [pairs, 3]. Counts each real token once (both responses share the prompt), exact
    causal attention, and the head on scored tokens only; no padding.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    block = hidden * (2 * queries + 2 * keys) + 3 * hidden * shape.intermediate_size
    attended = prompt * (chosen + rejected)
    for length in (prompt, chosen, rejected):
        attended += length * (length + 1) / 2
    return (
        float(2 * layers * block * (prompt + chosen + rejected).sum()),
        float(4 * layers * queries * attended.sum()),
        float(2 * hidden * shape.vocab_size * (chosen + rejected).sum()),
    )


def model_flops(shape: ModelShape, lengths: np.ndarray, frozen: bool = False) -> float:
    """FLOPs that training on these pairs needs: 3 x `forward_flops`, as backward is twice forward.

    No recomputation, reference or padding. frozen: a product whose weight has no gradient counts
    2 x, and the adapters' own products are left out.
    """
    products, attention, head = forward_flops(shape, lengths)
    return (2 if frozen else 3) * (products + head) + 3 * attention


def hardware_flops(shape: ModelShape, lengths: np.ndarray, slots: int, work: Work) -> float:
    """FLOPs that a step with these pairs executes in `slots` slots, padding included.

    More than `model_flops`: the head's second forward pass, the scores that flash attention's
    backward pass computes again (half of its forward pass), and `work`. Left out are attention of
    padding and of a prompt's second copy, and the weights of pairs in the head.
    """
    products, attention, head = forward_flops(shape, lengths)
    products *= slots / lengths.sum()
    more = work.recomputed + work.scorings
    passes = 2 if work.frozen else 3
    return (
        (passes + more) * products + (3.5 + more) * attention + (passes + 1 + work.scorings) * head
    )


class GPU(NamedTuple):
    """One kind of GPU."""

    name: str  # the user's
    parts: tuple[str, ...]  # words that PyTorch's name of the device contains
    # dense bfloat16 with float32 accumulation, FLOP/s, from the maker's data sheet (half of the
    # figure "with sparsity")
    peak_flops: float
    memory: int  # bytes that the driver offers, fewer than in the name


GIB = 2**30

# The first that matches a device counts, so narrower names come first.
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
    """The GPU with this name, in any case. Raises UserError that lists the known ones."""
    known = {gpu.name: gpu for gpu in GPUS}
    if name.lower() not in known:
        raise UserError(f"--gpu {name}: no such GPU is known; expected one of {', '.join(known)}")
    return known[name.lower()]


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU whose PyTorch device name this is, or None if it is not in GPUS."""
    for gpu in GPUS:
        if all(re.search(rf"\b{re.escape(part)}\b", device_name) for part in gpu.parts):
            return gpu
    return None


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of this device from its data sheet, or None if it is not in GPUS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu = gpu_of_device(name)
    return None if gpu is None else gpu.peak_flops


class Speed:
    """Throughput since the last report, from the plan's counts and the clock."""

    def __init__(self, shape: ModelShape, ranks: int, device: torch.device, work: Work) -> None:
        self.shape, self.ranks, self.device, self.work = shape, ranks, device, work
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last report (an evaluation, a checkpoint)."""
        self._began = time.perf_counter()
        self._counts: Counter[str] = Counter()

    def count(self, lengths: np.ndarray, filled: int, division: Division) -> None:
        """One step: its pairs' lengths [pairs, 3], the slots they fill, and their division."""
        slots = division.slots * len(division.bins) * self.ranks
        self._counts.update(
            pairs=len(lengths),
            tokens=int(slots_of(lengths, prefix_sharing=False).sum()),
            filled=filled,
            slots=slots,
            needed=model_flops(self.shape, lengths, self.work.frozen),
            executed=hardware_flops(self.shape, lengths, slots, self.work),
        )

    def report(self) -> dict[str, float]:
        """The perf/ metrics since the last call; utilisation if the GPU's peak is known."""
        seconds, counts = time.perf_counter() - self._began, self._counts
        report = {
            "perf/tokens_per_second": counts["tokens"] / seconds,
            "perf/pairs_per_second": counts["pairs"] / seconds,
            "perf/packing": counts["filled"] / counts["slots"],
            "perf/peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            report["perf/reserved_memory_gib"] = reserved / 2**30
        peak = peak_flops(self.device)
        if peak is not None:
            report["perf/mfu"] = counts["needed"] / seconds / (peak * self.ranks)
            report["perf/hfu"] = counts["executed"] / seconds / (peak * self.ranks)
        self.restart()
        return report


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
