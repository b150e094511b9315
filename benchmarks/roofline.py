"""How fast a step can be: FLOPs and bytes counted, beside the rates this machine reaches.

    python -m benchmarks.roofline                 # on a GPU: Mistral-7B, and 8 of its layers
    python -m benchmarks.roofline --model toy     # on a CPU, seconds
    python -m benchmarks.roofline --model A B --tflops 790 --gigabytes-per-second 4300

Two rates are measured here: a large matrix product in the compute dtype, and a copy of memory. All
else is counted. For each length profile the table gives the FLOPs that a pair needs (model), those
that the settings really do (hardware), and the least time that they and the bytes of everything
between the products take; the MFU follows. It is a ceiling: nothing overlaps, and nothing waits.

Letters: P, C, R tokens of prompt, chosen and rejected response; L layers, d hidden size, F
feed-forward size, h x e query width, k x e key width, V vocabulary.

    products of a block     N = d (2 h e + 2 k e) + 3 d F weights, 2 N FLOPs per token and forward
    attention               4 h e FLOPs per layer, query and key it may attend to
    head                    2 d V FLOPs per scored token
    forward                 f = L (2 N tokens + 4 h e attended) + 2 d V (C + R)
    model                   3 f, each token once: P + C + R with its prompt shared, causal attention
    hardware                model + what is padded, repeated or recomputed (`hardware_flops`)
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.memory import model_shape
from notus.engine.flops import model_flops, peak_flops
from notus.model.hf_config import ModelShape
from notus.model.mistral import count_parameters

MODELS = {
    "A": model_shape(layers=8, hidden=4096, inner=14_336, heads=32, vocabulary=32_000),
    "B": model_shape(layers=32, hidden=4096, inner=14_336, heads=32, vocabulary=32_000),
    "toy": model_shape(layers=4, hidden=256, inner=896, heads=8, vocabulary=32_000),
}
MAX_LENGTH = 1024
SEED = 0


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


def block_weights(shape: ModelShape) -> int:
    """N, the weights of one block's matrix products."""
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden = shape.hidden_size
    return hidden * (2 * queries + 2 * keys) + 3 * hidden * shape.intermediate_size


def blocks_forward(shape: ModelShape, tokens: float, attended: float) -> float:
    """FLOPs of all blocks' forward pass over so many token slots and query-key pairs."""
    queries = shape.num_attention_heads * shape.head_dim
    per_layer = 2 * block_weights(shape) * tokens + 4 * queries * attended
    return shape.num_hidden_layers * per_layer


def head_forward(shape: ModelShape, scored: float) -> float:
    """FLOPs of the logits of so many tokens."""
    return 2.0 * shape.hidden_size * shape.vocab_size * scored


@dataclass(frozen=True)
class Processed:
    """What really goes through the model in some steps: token slots, query-key pairs, head rows."""

    slots: float
    attended: float
    scored: float


def causal(lengths: np.ndarray) -> np.ndarray:
    """Query-key pairs of whole sequences of these lengths."""
    return lengths * (lengths + 1) / 2


def packed(lengths: np.ndarray, slots: float) -> Processed:
    """Prefix-shared pairs [.., 3] in rows of `slots` slots in all, attention by blocks of the mask.

    A padding slot attends to itself.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    attended = causal(prompt) + prompt * (chosen + rejected) + causal(chosen) + causal(rejected)
    real = float(lengths.sum())
    return Processed(slots, float(attended.sum()) + slots - real, float(lengths[:, 1:].sum()))


def padded(batches: Sequence[tuple[int, int]], scored: float) -> Processed:
    """Right-padded microbatches of (sequences, length): a mask of padding computes every score."""
    rows = np.array(batches, dtype=np.float64)
    return Processed(float(rows.prod(1).sum()), float((rows[:, 0] * rows[:, 1] ** 2).sum()), scored)


def hardware_flops(
    shape: ModelShape,
    processed: Processed,
    *,
    head_passes: int,
    recomputed_blocks: bool,
    online_reference: bool,
) -> float:
    """FLOPs that a step really does: forward and twice that backward, and what is done again.

    head_passes: products of the head in units of its forward one, 3 are needed, 4 if the logits are
    computed again in the backward pass. recomputed_blocks: full activation checkpointing.
    online_reference: a second model's forward pass over the same microbatches.
    """
    blocks = blocks_forward(shape, processed.slots, processed.attended)
    head = head_forward(shape, processed.scored)
    total = (3 + recomputed_blocks) * blocks + head_passes * head
    return total + (blocks + head if online_reference else 0.0)


def elementwise_bytes(shape: ModelShape, width: int) -> int:
    """Bytes moved per token and layer between the products, forward and backward, if all is fused.

    Forward: two norms (4 d), two residual sums (6 d), rotation of queries and keys, and
    silu(gate) * up (3 F); backward: norms (6 d), sums (6 d), rotation, and the product (5 F).
    """
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    return width * (22 * shape.hidden_size + 4 * (queries + keys) + 8 * shape.intermediate_size)


OPTIMIZER_BYTES = (
    28  # AdamW, float32: reads weight, gradient, two moments; writes all but the second
)


class Rates(NamedTuple):
    """What a machine reaches: FLOP/s of a large matrix product, bytes/s read and written."""

    matmul: float
    copy: float


class Prediction(NamedTuple):
    """Seconds of one optimiser step by cause, and what follows."""

    products: float
    attention: float
    head: float
    elementwise: float
    optimizer: float
    pairs: int
    model_flops: float

    @property
    def seconds(self) -> float:
        return sum(self[:5])

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / self.seconds

    @property
    def flops_per_second(self) -> float:
        """The model FLOP/s that MFU divides by a peak."""
        return self.model_flops / self.seconds


def predict(shape: ModelShape, lengths: np.ndarray, rates: Rates, width: int) -> Prediction:
    """The least time of a step on these pairs, all settings at their fastest.

    Packed without padding, prompts shared, cached reference, nothing recomputed but the head's
    logits; attention's products at half the rate, as flash attention's backward repeats one.
    """
    counts = packed(lengths, float(lengths.sum()))
    products = 3 * blocks_forward(shape, counts.slots, 0.0)
    attention = 3 * blocks_forward(shape, 0.0, counts.attended)
    layer_tokens = shape.num_hidden_layers * counts.slots
    return Prediction(
        products=products / rates.matmul,
        attention=2 * attention / rates.matmul,
        head=4 * head_forward(shape, counts.scored) / rates.matmul,
        elementwise=layer_tokens * elementwise_bytes(shape, width) / rates.copy,
        optimizer=OPTIMIZER_BYTES * count_parameters(shape) / rates.copy,
        pairs=len(lengths),
        model_flops=model_flops(shape, lengths),
    )


def palm_flops(shape: ModelShape, tokens: float, mean_length: float) -> float:
    """6 (parameters without the embedding) + 12 L h e T per token: only to compare with papers."""
    queries = shape.num_attention_heads * shape.head_dim
    weights = count_parameters(shape) - shape.vocab_size * shape.hidden_size
    return tokens * (6 * weights + 12 * shape.num_hidden_layers * queries * mean_length)


# ------------------------------------------------------------------------------- this machine


def measure_rates(device: torch.device, size: int | None = None, repeats: int = 5) -> Rates:
    """Time a product of two square matrices and a copy; the median of `repeats`.

    size: of the matrices, 8192 in bfloat16 on CUDA, 1024 in float32 on the CPU by default. The copy
    moves 1 GiB on CUDA, 64 MiB on the CPU, and counts what is read and what is written.
    """
    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if cuda else 2**24, device=device, dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    product = _seconds(lambda: left @ right, device, repeats)
    copying = _seconds(lambda: target.copy_(source), device, repeats)
    return Rates(2 * size**3 / product, 2 * source.nbytes / copying)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])


# ------------------------------------------------------------------------------------ the command


def rows(models: Sequence[str], rates: Rates, width: int, pairs: int) -> list[dict[str, Any]]:
    """One row for each model and profile: FLOPs per pair, and the prediction for a step."""
    found = []
    for name in models:
        shape = MODELS[name]
        for profile, draw in PROFILES.items():
            sample = draw(20_000, np.random.default_rng(SEED))
            shared = model_flops(shape, sample) / len(sample)
            prompt, chosen, rejected = sample.astype(np.float64).T
            apart = blocks_forward(
                shape,
                float((2 * prompt + chosen + rejected).sum()),
                float((causal(prompt + chosen) + causal(prompt + rejected)).sum()),
            ) + head_forward(shape, float((chosen + rejected).sum()))
            step = predict(shape, sample[:pairs], rates, width)
            found.append(
                {
                    "model": name,
                    "profile": profile,
                    "tokens_unshared": float((2 * prompt + chosen + rejected).mean()),
                    "tokens_shared": float(sample.sum(1).mean()),
                    "tflop_unshared": 3 * apart / len(sample) / 1e12,
                    "tflop_shared": shared / 1e12,
                    "predicted_seconds": step._asdict() | {"step": step.seconds},
                    "predicted_pairs_per_second": step.pairs_per_second,
                    "predicted_tflops": step.flops_per_second / 1e12,
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: A B, or toy")
    parser.add_argument("--pairs", type=int, default=64, help="of one optimiser step")
    parser.add_argument("--tflops", type=float, help="of matrix products, instead of measuring")
    parser.add_argument("--gigabytes-per-second", type=float, help="read and written, likewise")
    parser.add_argument("--json", type=Path, help="write every value here")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    given = options.tflops, options.gigabytes_per_second
    if None in given:
        rates = measure_rates(device)
        rates = Rates(
            rates.matmul if given[0] is None else given[0] * 1e12,
            rates.copy if given[1] is None else given[1] * 1e9,
        )
    else:
        rates = Rates(given[0] * 1e12, given[1] * 1e9)
    peak = peak_flops(device)
    width = 2 if cuda or options.tflops is not None else 4
    table = rows(options.model or (["A", "B"] if cuda else ["toy"]), rates, width, options.pairs)
    report = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "matmul_flops": rates.matmul,
        "copy_bytes_per_second": rates.copy,
        "peak_flops": peak,
        "pairs_per_step": options.pairs,
        "models": {name: asdict(shape) for name, shape in MODELS.items()},
        "seed": SEED,
        "results": table,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{report['device']}: matrix products {rates.matmul / 1e12:.4g} TFLOP/s, copies "
        f"{rates.copy / 1e9:.4g} GB/s"
        + ("" if peak is None else f"; data sheet {peak / 1e12:.4g} TFLOP/s")
    )
    print(
        f"{'model':<6}{'profile':<11}{'tokens/pair':>12}{'shared':>8}{'TFLOP/pair':>12}"
        f"{'shared':>9}"
        f"{'step s':>9}{'pairs/s':>9}{'TFLOP/s':>9}{'of matmul':>10}"
        + ("" if peak is None else "  MFU")
    )
    for row in table:
        reached = row["predicted_tflops"] * 1e12
        print(
            f"{row['model']:<6}{row['profile']:<11}{row['tokens_unshared']:>12,.0f}"
            f"{row['tokens_shared']:>8,.0f}{row['tflop_unshared']:>12.4g}{row['tflop_shared']:>9.4g}"
            f"{row['predicted_seconds']['step']:>9.3g}{row['predicted_pairs_per_second']:>9.3g}"
            f"{row['predicted_tflops']:>9.4g}{reached / rates.matmul:>10.0%}"
            + ("" if peak is None else f"{reached / peak:>5.0%}")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
