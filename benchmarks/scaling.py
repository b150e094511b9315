"""How cost grows: curves of counts and bytes, which no other load on the machine can change.

python -m benchmarks.scaling                    # on a CPU, about a minute
python -m benchmarks.scaling --toy              # seconds
python -m benchmarks.scaling --json scaling.json

head memory       bytes above the inputs, forward and backward, by vocabulary and by rows: the
                  whole logits in autograd beside one chunk at a time. What is there beyond
                  the two gradients should be little more than one chunk.
head products     FLOPs by 2 S d V: 2 without gradient, 6 with one for hidden rows alone, 8 with
                  both (6 needed, and the logits computed again)
prefix sharing    tokens processed without by with it, at prompts of 0.1 to 10 times the
                  responses; (2P + C + R) / (P + C + R), up to 2
padding           slots by real tokens: rows padded to the longest of a random batch, of a batch
                  grouped by length, and packed here
activations       bytes a block keeps per token, by checkpointing mode: held by the allocator,
                  and the formula of notus/dryrun/memory.py
step time         a small model's, by sequence length; it is reported, not judged
eight GPUs        PROJECTED, not measured: seconds of communication and of computation per
                  microbatch from volumes and assumed rates
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import load_of, microbatch, model_shape, peak_on_cpu
from benchmarks.roofline import MODELS, PROFILES, SEED, blocks_forward, head_forward, packed
from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.dryrun.memory import MODES, block_bytes_kept
from notus.engine.distributed import _recomputed
from notus.kernels import reference
from notus.model.attention import build_mask
from notus.model.hf_config import ModelShape
from notus.model.mistral import Block, count_parameters, rope_tables
from notus.objective.logprobs import token_log_probs

Row = dict[str, Any]

# Assumed for the projection: bytes/s of one GPU's links within a node in a ring, and the share of
# the data sheet's FLOP/s reached.
NVLINK = 370e9
REACHED = 500e12


def eager_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The whole logits in autograd."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def head_inputs(rows: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return (
        torch.randn(rows, hidden, generator=generator).requires_grad_(),
        (0.02 * torch.randn(vocabulary, hidden, generator=generator)).requires_grad_(),
        torch.randint(0, vocabulary, (rows,), generator=generator),
    )


def head_peak(head: Callable[..., Tensor], rows: int, vocabulary: int, hidden: int) -> int:
    """Bytes beyond the inputs at the highest, forward and backward."""
    h, w, t = head_inputs(rows, vocabulary, hidden)
    return peak_on_cpu(lambda: torch.autograd.grad(head(h, w, t).sum(), (h, w)))


def head_memory(vocabularies: Sequence[int], row_counts: Sequence[int]) -> list[Row]:
    """Peak bytes by vocabulary at the first row count, and by rows at the first vocabulary."""
    hidden, chunk = 128, 64
    cases = [(row_counts[0], v) for v in vocabularies] + [
        (s, vocabularies[0]) for s in row_counts[1:]
    ]
    before, found = reference.CHUNK_LOGITS, []
    try:
        for rows, vocabulary in cases:
            reference.CHUNK_LOGITS = chunk * vocabulary
            ours = head_peak(reference.linear_log_probs, rows, vocabulary, hidden)
            found.append(
                {
                    "rows": rows,
                    "vocabulary": vocabulary,
                    "whole_logits_bytes": head_peak(eager_log_probs, rows, vocabulary, hidden),
                    "chunked_bytes": ours,
                    "beyond_gradients_by_chunk": (ours - 4 * hidden * (vocabulary + rows))
                    / (4 * chunk * vocabulary),
                }
            )
    finally:
        reference.CHUNK_LOGITS = before
    return found


def head_products() -> list[Row]:
    """FLOPs in units of S d V, counted by torch."""
    rows, vocabulary, hidden = 96, 512, 64
    found = []
    for trained, wanted in (("none", ()), ("hidden rows", (0,)), ("both", (0, 1))):
        inputs = head_inputs(rows, vocabulary, hidden)
        for index in (0, 1):
            inputs[index].requires_grad_(index in wanted)
        with FlopCounterMode(display=False) as counter:
            log_probs = reference.linear_log_probs(*inputs)
            if wanted:
                log_probs.sum().backward()
        unit = rows * hidden * vocabulary
        found.append({"gradients": trained, "units": counter.get_total_flops() / unit})
    return found


def sharing(ratios: Sequence[float]) -> list[Row]:
    """Slots of pairs whose prompt is `ratio` times both responses together."""
    found = []
    for ratio in ratios:
        lengths = np.array([[round(200 * ratio), 100, 100]])
        apart, shared = (int(slots_of(lengths, on)[0]) for on in (False, True))
        found.append({"prompt_by_responses": ratio, "tokens_by_shared": apart / shared})
    return found


def padded_slots(lengths: np.ndarray, batch: int, grouped: bool) -> int:
    """Slots of microbatches of `batch` pairs, both sequences padded to the longest of all."""
    longer = lengths[:, 0] + lengths[:, 1:].max(1)
    order = np.argsort(longer, kind="stable") if grouped else np.arange(len(longer))
    return int((2 * batch * longer[order].reshape(-1, batch).max(1)).sum())


def packed_slots(lengths: np.ndarray, budget: int, pairs_per_step: int) -> int:
    """Slots of the rows that train.py would make, over all steps of an epoch."""
    run = Plan(
        slots_of(lengths, prefix_sharing=True),
        pairs_per_step=pairs_per_step,
        epochs=1,
        max_steps=None,
        seed=SEED,
        shuffle=True,
        ranks=1,
        budget=budget,
    )
    divisions = [run.division(run.pairs_of(step)) for step in range(run.steps)]
    return sum(division.slots * len(division.bins) for division in divisions)


def padding(pairs: int) -> list[Row]:
    """Slots by real tokens, of sequences for what pads and of shared prompts for what packs."""
    found = []
    for profile in ("uf", "longprompt"):
        lengths = PROFILES[profile](pairs, np.random.default_rng(SEED))
        apart, shared = (int(slots_of(lengths, on).sum()) for on in (False, True))
        ours = packed_slots(lengths, 8192, 64)
        for batch in (1, 2, 4, 8, 16):
            slots = {
                name: padded_slots(lengths, batch, on)
                for name, on in (("random", False), ("grouped", True))
            }
            found.append(
                {
                    "profile": profile,
                    "pairs_per_microbatch": batch,
                    **{name: count / apart for name, count in slots.items()},
                    "packed": ours / shared,
                    **{f"{name}_by_packed": count / ours for name, count in slots.items()},
                }
            )
    return found


def kept_by_blocks(
    shape: ModelShape, slots: int, layers: int, mode: str, dtype: torch.dtype
) -> int:
    """Bytes that `layers` blocks hold after their forward pass, beyond one block's working space.

    Taken as the memory in use when the last block has run, while its result is alive.
    """
    blocks = [Block(shape).to(dtype) for _ in range(layers)]
    forwards = [
        block.forward if mode == "none" else _recomputed(block.forward, mode, dropout=False)
        for block in blocks
    ]
    position = torch.arange(slots)
    rope = rope_tables(shape, position)
    load = load_of(shape, 1, slots, "cpu")
    mask = build_mask(microbatch(load).layout, None, "dense")
    start = torch.randn(slots, shape.hidden_size, dtype=dtype).requires_grad_()
    held = []

    def forward() -> None:
        x = start * 1
        for run in forwards:
            x = run(x, rope, mask)
        held.append(x)

    with torch.profiler.profile(profile_memory=True) as recorded:
        forward()
    events = recorded.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def activations(shape: ModelShape, slots: int, dtype: torch.dtype) -> list[Row]:
    """Bytes per token that one more block keeps, and the formula, for each checkpointing mode.

    What the CPU's attention keeps besides, the mask as numbers, is left out of the first.
    """
    width, found = dtype.itemsize, []
    for mode in MODES:
        few, many = (kept_by_blocks(shape, slots, layers, mode, dtype) for layers in (2, 4))
        mask = width * slots if mode == "none" else 0
        found.append(
            {
                "mode": mode,
                "slots": slots,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes_per_token_and_layer": (many - few) / 2 / slots - mask,
                "formula": block_bytes_kept(shape, width, mode, compiled=False),
            }
        )
    return found


def step_time(slot_counts: Sequence[int]) -> list[Row]:
    """Seconds of one forward and backward pass of two layers, one row of four pairs."""
    from notus.model.mistral import MistralForCausalLM

    shape, found = model_shape(2, 128, 448, 4, 512), []
    model = MistralForCausalLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    for slots in slot_counts:
        batch = microbatch(load_of(shape, 1, slots, "cpu"))
        times = []
        for _ in range(3):
            began = time.process_time()
            token_log_probs(model, batch).sum().backward()
            times.append(time.process_time() - began)
        found.append({"slots": slots, "processor_seconds": median(times)})
    return found


def projection(name: str, ranks: int, slot_counts: Sequence[int]) -> list[Row]:
    """Communication and computation of one microbatch under FSDP2, PROJECTED.

    Each rank receives (ranks - 1) / ranks of the bfloat16 parameters in the forward and again in
    the backward pass, and sends as much of the float32 gradients. Kept gathered, a step of n
    microbatches gathers once. Computation: 3 x forward at REACHED, uf lengths.
    """
    shape, found = MODELS[name], []
    lengths = PROFILES["uf"](4096, np.random.default_rng(SEED))
    real = packed(lengths, float(lengths.sum()))
    share = (ranks - 1) / ranks
    gather, scatter = (width * count_parameters(shape) * share / NVLINK for width in (2, 4))
    for slots in slot_counts:
        part = slots / real.slots
        flops = 3 * blocks_forward(shape, slots, real.attended * part)
        flops += 4 * head_forward(shape, real.scored * part)
        compute = flops / REACHED
        found.append(
            {
                "model": name,
                "ranks": ranks,
                "slots": slots,
                "compute_seconds": compute,
                "communication_seconds": 2 * gather + scatter,
                "kept_gathered_seconds": scatter,
                "hidden": 2 * gather + scatter <= compute,
                "projected": True,
            }
        )
    return found


def lines(title: str, rows: Sequence[Row]) -> str:
    """A table of rows with the same keys."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"

    header = list(rows[0])
    cells = [header, *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    body = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([f"\n{title}", *body])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="fewer and smaller points")
    parser.add_argument("--json", type=Path, help="write every value here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    toy = options.toy
    shape = model_shape(1, 128, 448, 4, 8) if toy else model_shape(1, 512, 1792, 8, 8)
    curves = {
        "head memory": head_memory(
            (1024, 4096) if toy else (1024, 4096, 16_384, 32_768), (512, 1024, 2048)
        ),
        "head products": head_products(),
        "prefix sharing": sharing((0.1, 0.3, 1.0, 3.0, 10.0)),
        "padding": padding(64 * (10 if toy else 200)),
        "activations": [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for row in activations(shape, 256, dtype)
        ],
        "step time": step_time((256, 512) if toy else (256, 512, 1024, 2048, 4096)),
        "eight GPUs, PROJECTED": projection("B", 8, (1024, 2048, 4096, 8192, 16_384)),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(curves, indent=1) + "\n")
    for title, found in curves.items():
        print(lines(title, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
