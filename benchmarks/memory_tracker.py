"""The dry run's memory formula compared with PyTorch's FSDPMemTracker, without a GPU.

    python -m benchmarks.memory_tracker          # Mistral-7B, all settings: 6 minutes of one core
    python -m benchmarks.memory_tracker --ranks 8 --optimizers adamw --lines
    python -m benchmarks.memory_tracker --toy    # also what the CPU's allocator really gave

The tracker watches every tensor of a real step (model, sharding, head and optimiser of train.py) on
fake tensors, which have a size and no memory, in a fake process group. They say that they are on
CUDA, so that attention takes FlashAttention's operator, the head its bfloat16 products, and AdamW
its fused form. The buffers inside an operator, torch.compile's fusions and Triton kernels are
invisible to it: both sides are for eager blocks and the plain head; the last column is the formula
for what runs on a GPU, compiled blocks and the Triton head. PyTorch's tracker is private and may
change. Needs torch 2.13, before which fake tensors lack the head's products (--toy runs with 2.11
too).
"""

import argparse
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.memory import (
    MISTRAL_7B,
    PAIRS,
    load_of,
    measured_peak,
    microbatch,
    model_of,
    model_shape,
    pretended_ranks,
    shard,
    take_step,
)
from notus.data.packing import Microbatch, pack
from notus.data.token_arrays import TokenizedPairs
from notus.dryrun.memory import MODES, MemoryBudget, MemorySettings, memory_budget, parameter_counts
from notus.kernels import dispatch
from notus.model.lora import LoraSettings

LORA = LoraSettings(rank=64, alpha=16)  # as in configs/notus-lora.json, without dropout
# The tracker's categories by what the formula calls them; the rest are activations, among them
# gradients of parameters that FSDP has not taken over, on one rank all of them.
CATEGORIES = {
    "Sharded Param": "weights",
    "OptState": "optimiser",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "gradients",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
}
WORDS = {  # by which a line of the formula is recognised, in this order
    "gathered": ("gathered", "prefetched"),
    "gradients": ("gradients (float32)", "being reduced", "gradients of a block's parameters"),
    "weights": ("parameters",),
    "optimiser": (" state", "square roots"),
}


def unshared(load: MemorySettings) -> Microbatch:
    """Pairs that fill the row and repeat their prompt: FlashAttention then copies no keys."""
    part = load.slots // PAIRS // 4
    lengths = np.full((PAIRS, 3), part)
    tokens = np.zeros(int(lengths.sum()), np.int32)
    pairs = TokenizedPairs(tokens, np.zeros(len(tokens), bool), lengths)
    return pack(pairs, range(PAIRS), load.slots, prefix_sharing=False)


def tracked(load: MemorySettings, lora: LoraSettings | None = None) -> dict[str, int]:
    """Bytes at the peak of the second step, by category; they sum to the peak.

    The tracker is entered after the first step, when DTensor has worked out the shapes of its
    operations: it does that with fake tensors of the full size, which the tracker would count.
    """
    batch = microbatch(load) if load.on_cpu else unshared(load)
    with ExitStack() as stack:
        stack.enter_context(pretended_ranks(load.shard))
        # The check reads values, which fake tensors do not have.
        stack.enter_context(patch.object(dispatch, "_check_targets", lambda *tensors: None))
        if not load.on_cpu:
            stack.enter_context(patch.object(torch.Tensor, "is_cuda", True))
        mesh = init_device_mesh("cpu", (load.shard,), mesh_dim_names=("shard",))
        model = model_of(load, lora)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        optimizer = shard(model, load, mesh, torch.device("cpu"))
        take_step(model, optimizer, batch, load.keep_gathered)
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            # It knows one forward pass of a model, unless it is told to forget.
            model.register_forward_pre_hook(lambda *_: tracker.reset_mod_stats(), prepend=True)
            take_step(model, optimizer, batch, load.keep_gathered)
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(key, "value", key): size for key, size in snapshot.items() if key != "Total"}


def by_group(budget: MemoryBudget, found: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Bytes of each kind of tensor at the peak: by the formula, by the tracker."""
    groups = {name: [0, 0] for name in (*WORDS, "activations")}
    for line, size in (budget.resident | budget.phases[budget.fullest]).items():
        named = (name for name, words in WORDS.items() if any(word in line for word in words))
        groups[next(named, "activations")][0] += size
    for category, size in found.items():
        groups[CATEGORIES.get(category, "activations")][1] += size
    return {name: (formula, tracker) for name, (formula, tracker) in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a small model as the CPU runs it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    names = ("adamw", "rmsprop", "lora")
    parser.add_argument("--optimizers", nargs="+", default=names, choices=names, help="lora: AdamW")
    parser.add_argument("--lines", action="store_true", help="what the peaks consist of")
    options = parser.parse_args()
    shape, unit = replace(MISTRAL_7B, num_hidden_layers=options.layers), 2**30
    slots, device, last = options.slots, "cuda", "on GPU"
    if options.toy:
        torch.set_num_threads(1)
        shape, unit = model_shape(4, 256, 896, 8, 512), 2**20
        slots, device, last = 512, "cpu", "measured"
    titles = ("formula", "tracker", "error", "seconds", last)
    print(f"{'optimizer':<10}{'mode':<10}{'ranks':>6}" + "".join(f"{t:>10}" for t in titles))
    for name, mode, ranks in product(options.optimizers, options.modes, options.ranks):
        lora = LORA if name == "lora" else None
        settings = {"optimizer": "adamw" if lora else name, "activation_checkpointing": mode}
        load = load_of(shape, ranks, slots, device, compiled=False, triton=False, **settings)
        load = replace(load, counts=parameter_counts(shape, lora))
        if not options.toy:
            load = replace(load, scored=len(unshared(load).rows))
        start = time.perf_counter()
        found = tracked(load, lora)
        seconds = time.perf_counter() - start
        budget, tracker = memory_budget(load), sum(found.values())
        if options.toy:
            final = measured_peak(load, lora)
        else:
            final = memory_budget(replace(load, compiled=True, triton=True)).peak
        print(
            f"{name:<10}{mode:<10}{ranks:>6}{budget.peak / unit:>10.1f}{tracker / unit:>10.1f}"
            f"{budget.peak / tracker - 1:>+10.1%}{seconds:>10.1f}{final / unit:>10.1f}",
            flush=True,
        )
        if options.lines:
            print(f"  {budget.fullest}")
            for group, pair in by_group(budget, found).items():
                print(f"  {group:<24}" + "".join(f"{size / unit:>10.2f}" for size in pair))


if __name__ == "__main__":
    main()
