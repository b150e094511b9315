"""What a checkpoint costs: how long the steps wait for it, how much slower they are behind it, and
the host memory that it takes.

    torchrun --nproc_per_node 2 -m benchmarks.checkpoint [--hidden 512 --layers 8 --folder DIR]

A random Mistral takes AdamW steps over random tokens, under FSDP2 as in train.py. Then, with a
save after the first of every few steps: in the foreground (each save awaited), in the background,
and in the background with no room on the host for more than one file. Reported per rank 0: seconds
of a step without a save; seconds that the loop stands still for a save; by how much all steps from
one save to the next exceed those without; and how far the resident memory rose above that of steps
alone, beside the bytes that this rank trains with and writes.
"""

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import AdamW, Optimizer

from notus.data.packing import Microbatch, pack
from notus.data.token_arrays import TokenizedPairs
from notus.engine import distributed
from notus.engine.checkpoint import Progress
from notus.engine.distributed import Ranks
from notus.engine.saver import Saver
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import token_log_probs

PROMPT, RESPONSE, VOCABULARY = 16, 16, 8000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of a checkpoint.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="between two saves")
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--folder", help="in which to write a temporary folder; default: /tmp")
    options = parser.parse_args()
    ranks = distributed.start()
    torch.manual_seed(0)
    made = [tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder) if ranks.first else None]
    dist.broadcast_object_list(made, 0)
    folder = Path(made[0])
    source = folder / "source"
    if ranks.first:
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(shape_of(options.hidden, options.layers)))
    dist.barrier()
    model, optimizer = build(source, ranks)
    batch = random_batch(ranks)
    try:
        report(options.steps, options.saves, folder, source, model, optimizer, batch, ranks)
    finally:
        dist.barrier()
        if ranks.first:
            shutil.rmtree(folder)
        distributed.stop()


def shape_of(hidden: int, layers: int) -> dict[str, object]:
    """A config.json with the proportions of Mistral-7B."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }


def build(source: Path, ranks: Ranks) -> tuple[MistralForCausalLM, Optimizer]:
    """A sharded model of random weights, and its optimiser."""
    with torch.device("meta"):
        model = MistralForCausalLM(read_shape(source))
    distributed.shard_model(
        model,
        distributed.make_mesh(ranks, None, 1),
        ranks.device,
        compute_dtype=torch.bfloat16 if ranks.device.type == "cuda" else torch.float32,
        activation_checkpointing="none",
        compile_blocks=False,
        cpu_offload=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    return model, AdamW(model.parameters(), 1e-5)


def random_batch(ranks: Ranks) -> Microbatch:
    """Two pairs of random tokens."""
    lengths = np.array([[PROMPT, RESPONSE, RESPONSE]] * 2)
    tokens = np.random.default_rng(ranks.rank).integers(3, VOCABULARY, lengths.sum())
    pairs = TokenizedPairs(tokens.astype(np.int32), np.zeros(len(tokens), bool), lengths)
    return pack(pairs, [0, 1], int(lengths.sum()), prefix_sharing=True).to(ranks.device)


def report(
    steps: int,
    saves: int,
    folder: Path,
    source: Path,
    model: MistralForCausalLM,
    optimizer: Optimizer,
    batch: Microbatch,
    ranks: Ranks,
) -> None:
    """Measure and print."""

    def train_step() -> None:
        (-token_log_probs(model, batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        train_step()
    parameters = sum(p.numel() for p in model.parameters())
    written = 12 * parameters // ranks.count
    ranks.say(f"{parameters:,} parameters on {ranks.count} x {ranks.device.type}")
    ranks.say(f"a rank trains with {gib(16 * parameters // ranks.count)} and writes {gib(written)}")
    reset_peak()
    plain = timed(train_step, steps * saves) / (steps * saves)
    usual = peak()
    ranks.say(f"a step without a save: {plain:.3f} s")
    for name, room, wait in (
        ("in the foreground", 2**50, True),
        ("in the background", 2**50, False),
        ("in the background, room for one file", 0, False),
    ):
        saver = Saver(folder / "checkpoints", keep=1, source=source, facts={}, host_bytes=room)
        reset_peak()
        with saver:
            save = partial(save_now, saver, model, optimizer, wait)
            standing, total = 0.0, 0.0
            for _ in range(saves):
                now = timed(save, 1)
                standing += now
                total += now + timed(train_step, steps)
            last = timed(saver.wait, 1)
        ranks.say(
            f"{name}: the loop stands still for {standing / saves:.3f} s, "
            f"{total / saves - steps * plain:.3f} s more per {steps} steps in all "
            f"(then {last:.3f} s for the last save), "
            f"memory + {gib(max(0, peak() - usual))}"
        )


def save_now(saver: Saver, model: MistralForCausalLM, optimizer: Optimizer, wait: bool) -> None:
    """One checkpoint, awaited or not."""
    saver.save(model, optimizer, None, Progress(1, {}, 0))
    if wait:
        saver.wait()


def timed(action: Callable[[], object], times: int) -> float:
    """Seconds that all ranks take."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(times):
        action()
    dist.barrier()
    return time.perf_counter() - began


def gib(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.3f} GiB"


def reset_peak() -> None:
    """Make `peak` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process had in memory at once (Linux)."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
