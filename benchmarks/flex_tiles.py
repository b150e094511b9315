"""Attention of one packed row by backend, and FlexAttention by the tiles of its kernels.

    python -m benchmarks.flex_tiles                       # one CUDA GPU, about five minutes
    python -m benchmarks.flex_tiles --slots 16384 --json tiles.json

A row of random pairs of UltraFeedback's lengths, heads as in Mistral 7B (32 for queries, 8 for keys
and values, of 128), bfloat16. Each line gives the median seconds of a forward pass and of both, and
how many registers of a thread each kernel spills.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from benchmarks.head import environment, seconds
from benchmarks.speed_case import random_pairs
from notus.data.packing import Microbatch, pack, slots_of
from notus.files import write_json
from notus.model import attention
from notus.model.attention import TILES, AttentionMask, attend, build_mask

HEADS, GROUPS, WIDTH = 32, 8, 128


def filled_row(slots: int) -> Microbatch:
    """As many pairs as fit."""
    pairs = random_pairs("uf", 64, vocabulary=32000)
    count = int(np.searchsorted(np.cumsum(slots_of(pairs.lengths, True)), slots, side="right"))
    return pack(pairs, range(count), slots, prefix_sharing=True)


def tiles(forward: tuple[int, ...] | None, backward: tuple[int, ...] | None) -> dict[str, int]:
    """Kernel options. forward: M, N, stages, warps; backward: M1, N1, M2, N2, stages, warps."""
    ends = ("num_stages", "num_warps")
    names = [f"fwd_{n}" for n in ("BLOCK_M", "BLOCK_N", *ends)]
    options = dict(zip(names, forward, strict=True)) if forward else {}
    names = [f"bwd_{n}" for n in ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", *ends)]
    return options | (dict(zip(names, backward, strict=True)) if backward else {})


VARIANTS: dict[str, dict[str, int]] = {
    "PyTorch's tiles": {},
    "notus": TILES,
    "backward 64 64 64 64, 2, 4": tiles(None, (64, 64, 64, 64, 2, 4)),
    "backward 64 64 64 64, 3, 8": tiles(None, (64, 64, 64, 64, 3, 8)),
    "backward 64 128 128 64, 2, 8": tiles(None, (64, 128, 128, 64, 2, 8)),
    "forward 128 128, 2, 8": TILES | tiles((128, 128, 2, 8), None),
    "forward 128 64, 2, 8": TILES | tiles((128, 64, 2, 8), None),
    "forward 64 64, 3, 4": TILES | tiles((64, 64, 3, 4), None),
}


def spills() -> list[int]:
    """Registers that each of FlexAttention's compiled kernels spills."""
    found = {
        kernel
        for module in PyCodeCache.modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, CachingAutotuner) and "flex_attention" in name
    }
    return sorted(launcher.n_spills for kernel in found for launcher in kernel.launchers)


def measure(mask: AttentionMask, qkv: Sequence[Tensor], at_least: float) -> dict[str, Any]:
    """Seconds of a forward pass and of both passes."""
    gradient = torch.randn_like(qkv[0])

    @torch.no_grad()
    def forward() -> Tensor:
        return attend(*qkv, mask)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*qkv, mask), qkv, gradient)

    device = qkv[0].device
    times = {"forward": seconds(forward, device, at_least), "both": seconds(both, device, at_least)}
    return times | {"spills": spills()}


def variants(batch: Microbatch, window: int | None) -> Iterator[tuple[str, AttentionMask]]:
    """Name and mask of each line; FlexAttention's options are set while it is consumed."""
    usual = attention._kernel_options
    yield "varlen", build_mask(batch.layout, window, "varlen")
    predicate = build_mask(replace(batch.layout, intervals=None), window, "flex")
    attention._kernel_options = lambda q: None
    yield "flex, may_attend itself", predicate
    mask = build_mask(batch.layout, window, "flex")
    try:
        for name, options in VARIANTS.items():
            attention._kernel_options = lambda q, o=options: {"IS_DIVISIBLE": True} | o
            yield f"flex, {name}", mask
    finally:
        attention._kernel_options = usual


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--window", type=int)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("FlexAttention's kernels need a CUDA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    batch = filled_row(options.slots).to(device)
    shapes = [(options.slots, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    qkv = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    report: dict[str, Any] = {"environment": environment(device), "results": {}}
    for name, mask in variants(batch, options.window):
        torch.compiler.reset()
        attention._compiled_flex_attention.cache_clear()
        PyCodeCache.cache_clear()
        try:
            found: Mapping[str, Any] = measure(mask, qkv, options.seconds)
        except Exception as error:  # tiles that do not fit must not end the others' turn
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
        report["results"][name] = found
        print(f"{name:<36}", *(f"{key} {value}" for key, value in found.items()), flush=True)
        if options.json:
            write_json(options.json, report)
    times = {n: found["both"] for n, found in report["results"].items() if "both" in found}
    for name in sorted(times, key=lambda name: times[name])[:1]:
        print(f"fastest: {name}, {times[name] * 1e3:.2f} ms forward and backward")
    return int(not times)


if __name__ == "__main__":
    sys.exit(main())
