"""The memory that `--dry-run` predicts beside the memory that the allocator really gave.

    python -m benchmarks.memory                 # on one GPU, a quarter of Mistral-7B, ranks 1 and 8
    python -m benchmarks.memory --layers 32     # all of it; on a small GPU only --ranks 8 fits
    python -m benchmarks.memory --toy           # on the CPU, seconds

One process takes two optimiser steps of two microbatches of random tokens, through the sharding and
the loss head of train.py, and the peak of the bytes allocated is compared with
notus.dryrun.memory. More ranks than one are played by PyTorch's "fake" process group: every
buffer is allocated as on the first of that many ranks, and nothing is sent. What is gathered is
then garbage, which takes as much memory. On a GPU the peak is torch.cuda.max_memory_allocated, on
the CPU the profiler's record of every allocation. "reserved" is what PyTorch's allocator took from
a GPU for it, fragmentation included. Exit code 1: a prediction is off by more than 20 %.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from notus.data.packing import Microbatch, pack
from notus.data.token_arrays import TokenizedPairs
from notus.dryrun.memory import (
    MODES,
    OPTIMIZER_STATES,
    MemorySettings,
    memory_budget,
    parameter_counts,
)
from notus.engine.distributed import accumulate, shard_model
from notus.engine.optim import make_optimizer
from notus.files import write_json
from notus.model.hf_config import ModelShape
from notus.model.lora import LoraSettings, add_adapters
from notus.model.mistral import MistralForCausalLM, count_parameters
from notus.objective.logprobs import token_log_probs

TOLERANCE = 0.2
PAIRS = 4


def model_shape(layers: int, hidden: int, inner: int, heads: int, vocabulary: int) -> ModelShape:
    """A Mistral with a key/value head for every four query heads."""
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )


def load_of(shape: ModelShape, ranks: int, slots: int, device: str, **settings) -> MemorySettings:
    """What is predicted for and measured: full training; `settings` replace the defaults."""
    defaults = {
        "compute_width": 2,
        "optimizer": "adamw",
        "state_width": 4,
        "activation_checkpointing": "full",
        "keep_gathered": False,
        "compiled": device == "cuda",
        "triton": device == "cuda",
    }
    part = slots // PAIRS
    return MemorySettings(
        shape=shape,
        shard=ranks,
        counts=parameter_counts(shape, None),
        slots=slots,
        scored=PAIRS * 2 * (part // 3),
        scoring_slots=slots,
        reference_width=0,
        kept_log_probs=0,
        cpu_offload=False,
        on_cpu=device == "cpu",
        **(defaults | settings),
    )


def microbatch(load: MemorySettings) -> Microbatch:
    """Random pairs that fill the row: as many tokens in each response as in the prompt, or more."""
    part = load.slots // PAIRS
    response = part // 3
    lengths = np.array([[part - 2 * response, response, response]] * PAIRS)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, load.shape.vocab_size, int(lengths.sum())).astype(np.int32)
    pairs = TokenizedPairs(tokens, np.zeros(len(tokens), bool), lengths)
    return pack(pairs, range(PAIRS), load.slots, prefix_sharing=True)


def model_of(load: MemorySettings, lora: LoraSettings | None = None) -> MistralForCausalLM:
    """The model that `load` describes, on the meta device; the base of adapters is not float32."""
    attention = "dense" if load.on_cpu else None
    with torch.device("meta"):
        model = MistralForCausalLM(load.shape, "triton" if load.triton else "plain", attention)
        if lora is not None:
            add_adapters(model.to(compute_dtype(load)), lora)
    return model


def compute_dtype(load: MemorySettings) -> torch.dtype:
    return torch.bfloat16 if load.compute_width == 2 else torch.float32


def shard(
    model: MistralForCausalLM, load: MemorySettings, mesh: DeviceMesh, device: torch.device
) -> Optimizer:
    """Shard the model in place as train.py does, and make its optimiser."""
    shard_model(
        model,
        mesh,
        device,
        compute_dtype=compute_dtype(load),
        activation_checkpointing=load.activation_checkpointing,
        compile_blocks=load.compiled,
        cpu_offload=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(0.01)
    return make_optimizer(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        name=load.optimizer,
        learning_rate=1e-3,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        alpha=0.99,
        eps=1e-8,
        state_dtype=torch.float32 if load.state_width == 4 else torch.bfloat16,
    )


def take_step(
    model: MistralForCausalLM, optimizer: Optimizer, batch: Microbatch, keep_gathered: bool
) -> None:
    """One optimiser step of two equal microbatches."""
    for same in accumulate(model, [batch] * 2, 2, keep_gathered):
        token_log_probs(model, same).sum().backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_two_steps(
    load: MemorySettings, device: torch.device, lora: LoraSettings | None = None
) -> None:
    """Build, shard and train the model that `load` describes, as train.py does."""
    mesh = init_device_mesh(device.type, (load.shard,), mesh_dim_names=("shard",))
    model = model_of(load, lora)
    optimizer = shard(model, load, mesh, device)
    batch = microbatch(load).to(device)
    for _ in range(2):
        take_step(model, optimizer, batch, load.keep_gathered)


@contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """A process group in which this process is the first of `count` and nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def peak_on_cpu(work: Callable[[], None]) -> int:
    """Most bytes that the CPU allocator had given out at once during `work`."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    return int(np.cumsum([size for _, size in changes]).max())


def peak_on_gpu(work: Callable[[], None]) -> int:
    """torch.cuda.max_memory_allocated during `work`, above what was there."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured_peak(load: MemorySettings, lora: LoraSettings | None = None) -> int:
    """The peak of a rank in bytes."""
    device = torch.device("cpu" if load.on_cpu else "cuda")
    measure = peak_on_cpu if load.on_cpu else peak_on_gpu
    with pretended_ranks(load.shard):
        return measure(lambda: train_two_steps(load, device, lora))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a small model on the CPU")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, help="write every value here, after each")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU was found; --toy measures a small model on the CPU")
    device = "cpu" if options.toy else "cuda"
    if options.toy:
        torch.set_num_threads(1)
        shape, slots = model_shape(4, 256, 896, 8, 512), 512
    else:
        shape, slots = model_shape(options.layers, 4096, 14_336, 32, 32_000), options.slots
    print(f"{count_parameters(shape):,} parameters, rows of {slots:,} slots, {device}; MiB")
    names = ("predicted", "measured", "reserved")
    print(
        f"{'checkpointing':<15}{'ranks':>6}{'optimizer':>11}" + "".join(f"{n:>11}" for n in names)
    )
    rows, worst = [], 0.0
    # Blocks compile once for each mode.
    for mode, optimizer, ranks in itertools.product(MODES, OPTIMIZER_STATES, options.ranks):
        load = load_of(
            shape, ranks, slots, device, activation_checkpointing=mode, optimizer=optimizer
        )
        predicted, measured = memory_budget(load).peak, measured_peak(load)
        reserved = None if options.toy else torch.cuda.max_memory_reserved()
        off = predicted / measured - 1
        worst = max(worst, abs(off))
        rows.append([mode, ranks, optimizer, predicted, measured, reserved])
        sizes = ("-" if size is None else f"{size / 2**20:,.1f}" for size in rows[-1][3:])
        cells = "".join(f"{size:>11}" for size in sizes)
        print(f"{mode:<15}{ranks:>6}{optimizer:>11}{cells}{off:>+8.1%}", flush=True)
        if options.json is not None:
            columns = ("mode", "ranks", "optimizer", *names)
            write_json(options.json, [dict(zip(columns, row, strict=True)) for row in rows])
    print(f"worst {worst:.1%}, tolerated {TOLERANCE:.0%}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
