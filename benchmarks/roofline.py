"""The limit: how fast a step can be at most on this machine.

    python -m benchmarks.roofline                 # on a GPU: Mistral-7B, and 8 of its layers
    python -m benchmarks.roofline --model toy     # on a CPU, seconds
    python -m benchmarks.roofline --model A B --tflops 790 --gigabytes-per-second 4300

Two rates are measured: a large matrix product in the compute dtype, and a copy of memory. FLOPs
are counted by notus/engine/flops.py. For each length profile the table gives the FLOPs that a pair
needs and the least time that they and the bytes of everything between the products take; the MFU
follows. It is a ceiling: nothing overlaps, and nothing waits.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.head import seconds
from benchmarks.memory import MISTRAL_7B, model_shape
from notus.engine.flops import forward_flops, model_flops, peak_flops
from notus.files import write_json
from notus.model.hf_config import ModelShape
from notus.model.mistral import count_parameters
from notus.tables import text_table

MODELS = {
    "A": replace(MISTRAL_7B, num_hidden_layers=8),
    "B": MISTRAL_7B,
    "toy": model_shape(layers=4, hidden=256, inner=896, heads=8, vocabulary=32_000),
}
MAX_LENGTH = 1024
SEED = 0

Row = dict[str, Any]


# ------------------------------------------------------------------------------- length profiles


def uf_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths like UltraFeedback's: int64 [count, 3].

    P = exp N(ln 120, 0.95) within [20, 512]; C and R log-normal about 260 and 215 with deviations
    0.70 and 0.80 and a correlation of 0.6, within [8, 1024 - P].
    """
    prompt = np.exp(rng.normal(np.log(120), 0.95, count)).clip(20, 512)
    return _with_responses(prompt, (260, 0.70), (215, 0.80), rng)


def longprompt_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Long prompts and short responses: int64 [count, 3].

    P = exp N(ln 560, 0.45) within [64, 900]; C and R about 130 and 120, deviations 0.60, as above.
    """
    prompt = np.exp(rng.normal(np.log(560), 0.45, count)).clip(64, 900)
    return _with_responses(prompt, (130, 0.60), (120, 0.60), rng)


def equal_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """The control: P = C = R = 256, so that nothing needs padding."""
    return np.full((count, 3), 256)


def _with_responses(
    prompt: np.ndarray,
    chosen: tuple[float, float],
    rejected: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Append responses, (median, deviation of the logarithm) each, correlated by 0.6."""
    prompt = prompt.astype(np.int64)
    first = rng.normal(size=len(prompt))
    second = 0.6 * first + 0.8 * rng.normal(size=len(prompt))
    responses = [
        np.exp(np.log(middle) + deviation * z).astype(np.int64).clip(8, MAX_LENGTH - prompt)
        for (middle, deviation), z in ((chosen, first), (rejected, second))
    ]
    return np.stack([prompt, *responses], axis=1)


PROFILES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "uf": uf_lengths,
    "longprompt": longprompt_lengths,
    "equal": equal_lengths,
}


# ----------------------------------------------------------------------------------- the formulae


@dataclass(frozen=True)
class Processed:
    """What goes through the model in some steps: token slots, query-key pairs, head rows."""

    slots: float
    attended: float
    scored: float

    def forward_flops(self, shape: ModelShape) -> tuple[float, float]:
        """FLOPs of a forward pass: of all blocks, and of the head."""
        products, attention, _ = forward_flops(shape, np.array([[1, 0, 0]]))
        head = forward_flops(shape, np.array([[0, 1, 0]]))[2]
        return products * self.slots + attention * self.attended, head * self.scored


def causal(lengths: np.ndarray) -> np.ndarray:
    """Query-key pairs of complete sequences of these lengths."""
    return lengths * (lengths + 1) / 2


def packed(lengths: np.ndarray, slots: float) -> Processed:
    """Prefix-shared pairs [.., 3] in rows of `slots` slots in all, attention by blocks of the mask.

    A padding slot attends to itself.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    attended = causal(prompt) + prompt * (chosen + rejected) + causal(chosen) + causal(rejected)
    real = float(lengths.sum())
    return Processed(slots, float(attended.sum()) + slots - real, float(lengths[:, 1:].sum()))


def unshared(lengths: np.ndarray) -> Processed:
    """The same pairs [.., 3] as two sequences each, without padding."""
    prompt, chosen, rejected = lengths.astype(np.float64).T
    return Processed(
        float((2 * prompt + chosen + rejected).sum()),
        float((causal(prompt + chosen) + causal(prompt + rejected)).sum()),
        float((chosen + rejected).sum()),
    )


def padded(batches: Sequence[tuple[int, int]], scored: float) -> Processed:
    """Right-padded microbatches of (sequences, length): a mask of padding computes every score."""
    rows = np.array(batches, dtype=np.float64)
    return Processed(float(rows.prod(1).sum()), float((rows[:, 0] * rows[:, 1] ** 2).sum()), scored)


def hardware_flops(
    shape: ModelShape, processed: Processed, *, recomputed_blocks: bool, online_reference: bool
) -> float:
    """FLOPs that a step really does: forward, twice that backward, and what is done again.

    The logits are always computed again in the backward pass. recomputed_blocks: full activation
    checkpointing. online_reference: a second model's forward pass over the same microbatches.
    """
    blocks, head = processed.forward_flops(shape)
    total = (3 + recomputed_blocks) * blocks + 4 * head
    return total + (blocks + head if online_reference else 0.0)


def elementwise_bytes(shape: ModelShape, width: int) -> int:
    """Bytes moved per token and layer between the products, forward and backward, if all is fused.

    Hidden size d, feed-forward size F. Forward: two norms (4 d), two residual sums (6 d), rotation
    of queries and keys, and silu(gate) * up (3 F); backward: norms (6 d), sums (6 d), rotation,
    and the product (5 F).
    """
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    return width * (22 * shape.hidden_size + 4 * (queries + keys) + 8 * shape.intermediate_size)


# AdamW, float32: reads weight, gradient and two moments, writes all but the gradient.
OPTIMIZER_BYTES = 28


class Rates(NamedTuple):
    """What a machine reaches: FLOP/s of a large matrix product, bytes/s read and written."""

    matmul: float
    copy: float


def least_seconds(
    shape: ModelShape, lengths: np.ndarray, rates: Rates, width: int
) -> dict[str, float]:
    """The least time of a step on these pairs by cause, all settings at their fastest.

    Packed without padding, prompts shared, cached reference, nothing recomputed but the head's
    logits; attention's products at half the rate, as flash attention's backward repeats one.
    """
    products, attention, head = forward_flops(shape, lengths)
    layer_tokens = shape.num_hidden_layers * int(lengths.sum())
    return {
        "products": 3 * products / rates.matmul,
        "attention": 2 * 3 * attention / rates.matmul,
        "head": 4 * head / rates.matmul,
        "elementwise": layer_tokens * elementwise_bytes(shape, width) / rates.copy,
        "optimizer": OPTIMIZER_BYTES * count_parameters(shape) / rates.copy,
    }


def measure_rates(device: torch.device, size: int | None = None, at_least: float = 0.3) -> Rates:
    """Time a product of two square matrices and a copy, each for at least so many seconds.

    size: of the matrices, 8192 in bfloat16 on CUDA, 1024 in float32 on the CPU by default. The copy
    moves 1 GiB on CUDA, 64 MiB on the CPU, and counts what is read and what is written.
    """
    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if cuda else 2**24, device=device, dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    product = seconds(lambda: left @ right, device, at_least)
    copying = seconds(lambda: target.copy_(source), device, at_least)
    return Rates(2 * size**3 / product, 2 * source.nbytes / copying)


# ------------------------------------------------------------------------------------ the command


def ceilings(
    models: Sequence[str], rates: Rates, peak: float | None, width: int, pairs: int
) -> Iterator[Row]:
    """One row for each model and profile: what a pair needs, and the prediction for a step."""
    for name in models:
        shape = MODELS[name]
        for profile, draw in PROFILES.items():
            sample = draw(20_000, np.random.default_rng(SEED))
            apart = unshared(sample)
            causes = least_seconds(shape, sample[:pairs], rates, width)
            total = sum(causes.values())
            reached = model_flops(shape, sample[:pairs]) / total
            yield {
                "model": name,
                "profile": profile,
                "tokens/pair": apart.slots / len(sample),
                "shared": float(sample.sum(1).mean()),
                "TFLOP/pair": 3 * sum(apart.forward_flops(shape)) / len(sample) / 1e12,
                "TFLOP shared": model_flops(shape, sample) / len(sample) / 1e12,
                **{f"{cause} s": value for cause, value in causes.items()},
                "step s": total,
                "pairs/s": pairs / total,
                "TFLOP/s": reached / 1e12,
                "of matmul": reached / rates.matmul,
                "MFU": None if peak is None else reached / peak,
            }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: A B, or toy")
    parser.add_argument("--pairs", type=int, default=64, help="of one optimiser step")
    parser.add_argument("--tflops", type=float, help="of matrix products, instead of measuring")
    parser.add_argument("--gigabytes-per-second", type=float, help="read and written, likewise")
    parser.add_argument("--json", type=Path, help="write every value here")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda, peak = device.type == "cuda", peak_flops(device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "peak_flops": peak,
        "pairs_per_step": options.pairs,
        "models": {name: asdict(shape) for name, shape in MODELS.items()},
        "seed": SEED,
    }
    tflops, gigabytes = options.tflops, options.gigabytes_per_second
    rates = Rates((tflops or 0.0) * 1e12, (gigabytes or 0.0) * 1e9)
    if None in (tflops, gigabytes):
        measured = measure_rates(device)
        rates = Rates(rates.matmul or measured.matmul, rates.copy or measured.copy)
    width = 2 if cuda or tflops is not None else 4
    models = options.model or (["A", "B"] if cuda else ["toy"])
    rows = list(ceilings(models, rates, peak, width, options.pairs))
    title = (
        f"{report['device']}: matrix products {rates.matmul / 1e12:.4g} TFLOP/s, copies "
        f"{rates.copy / 1e9:.4g} GB/s"
    )
    report |= {"matmul_flops": rates.matmul, "copy_bytes_per_second": rates.copy}
    report["tables"] = {title: rows}
    if options.json is not None:
        write_json(options.json, report)
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print(f"\n{title}\n{text_table(list(rows[0]), cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
