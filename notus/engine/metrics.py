"""What a run reports: exact means over all pairs of all ranks, speed, and where it is written."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from notus.data.planning import Plan
from notus.errors import UserError
from notus.model.mistral import ModelShape
from notus.objective.losses import PairLogProbs

# Dense bfloat16 peak of one GPU in FLOP/s, from the makers' data sheets, by a part of its name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12}


@torch.no_grad()
def pair_metrics(
    losses: Tensor, pairs: PairLogProbs, beta: float, against_reference: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator of every metric over these pairs, 0-d float64 on their device.

    losses: float [B]. Rewards are beta x (log-prob under the policy - under the reference), summed
    over the response. Accuracy is strict: a tie is not a win. Log-probs in nats. Without a
    reference its log-probs are 0, and there is no displacement from it.
    """
    chosen_ratio = pairs.policy_chosen - pairs.reference_chosen
    rejected_ratio = pairs.policy_rejected - pairs.reference_rejected
    # Not a tensor made from a number: that copy from the host would wait for the forward pass.
    count = torch.full((), len(losses), dtype=torch.float64, device=losses.device)

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum(), count

    metrics = {
        "loss": mean(losses),
        "rewards/chosen": mean(beta * chosen_ratio),
        "rewards/rejected": mean(beta * rejected_ratio),
        "rewards/accuracies": mean(chosen_ratio > rejected_ratio),
        "rewards/margins": mean(beta * (chosen_ratio - rejected_ratio)),
        "logps/chosen": mean(pairs.policy_chosen),
        "logps/rejected": mean(pairs.policy_rejected),
    }
    if not against_reference:
        return metrics
    chosen_tokens, rejected_tokens = pairs.chosen_length.sum(), pairs.rejected_length.sum()
    return metrics | {
        "displacement/chosen_falling": mean(chosen_ratio < 0),
        "displacement/chosen_per_token": (chosen_ratio.double().sum(), chosen_tokens.double()),
        "displacement/rejected_per_token": (
            rejected_ratio.double().sum(),
            rejected_tokens.double(),
        ),
    }


class Totals:
    """Running sums of metrics, kept on the device until they are asked for.

    `means` divides once, after one reduction over all ranks, so a mean does not depend on how
    pairs were divided over microbatches and ranks.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add numerators and denominators, the same names every time."""
        values = torch.stack([torch.stack(pair) for pair in metrics.values()])
        self._names = list(metrics)
        self._sums = values if self._sums is None else self._sums + values

    def snapshot(self) -> dict[str, list[float]]:
        """The sums over all ranks by name, for a checkpoint between two reports; collective."""
        if self._sums is None:
            return {}
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return dict(zip(self._names, sums.tolist(), strict=True))

    def restore(self, snapshot: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from `snapshot`, which the first rank takes over for all."""
        if snapshot and dist.get_rank() == 0:
            self._names = list(snapshot)
            self._sums = torch.tensor(list(snapshot.values()), dtype=torch.float64, device=device)

    def means(self) -> dict[str, float]:
        """The exact means over all ranks since the last call; collective."""
        sums, self._sums = self._sums, None
        dist.all_reduce(sums)
        numerators, denominators = sums.T.tolist()
        pairs = zip(self._names, numerators, denominators, strict=True)
        return {name: top / bottom for name, top, bottom in pairs}


def require_finite(grad_norm: Tensor, step_loss: Tensor, step: int, chosen: np.ndarray) -> float:
    """The gradient's norm, once it and this step's loss are known to be finite on every rank.

    Raises UserError, alike on all ranks, that names the step and its pairs.
    """
    dist.all_reduce(step_loss)
    norm, loss = float(grad_norm), float(step_loss) / len(chosen)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise UserError(
            f"step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}; nothing was "
            f"updated. The step's pairs, by index in the training data: {chosen.tolist()}"
        )
    return norm


def model_flops(shape: ModelShape, lengths: np.ndarray) -> float:
    """FLOPs that training on these pairs needs: 3 x (forward of the decoder and the head).

    lengths: int64 [pairs, 3]. Counts each real token once (prompts shared by both responses), exact
    causal attention, and the head on scored tokens only; no recomputation, reference or padding.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden = shape.hidden_size
    block = hidden * (2 * queries + 2 * keys) + 3 * hidden * shape.intermediate_size
    attended = (
        _triangle(prompt) + prompt * (chosen + rejected) + _triangle(chosen) + _triangle(rejected)
    )
    linear = 2 * block * (prompt + chosen + rejected)
    attention = 4 * queries * attended
    head = 2 * hidden * shape.vocab_size * (chosen + rejected)
    return float(3 * (shape.num_hidden_layers * (linear + attention) + head).sum())


def _triangle(length: np.ndarray) -> np.ndarray:
    return length * (length + 1) / 2


class Speed:
    """Throughput since the last report, from what the plan says was done and the clock."""

    def __init__(self, shape: ModelShape, ranks: int, device: torch.device) -> None:
        self.shape, self.ranks, self.device = shape, ranks, device
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since the last report (an evaluation, a checkpoint)."""
        self._began = time.perf_counter()
        self._pairs = self._tokens = self._slots = self._filled = self._flops = 0.0

    def count(self, lengths: np.ndarray, filled: int, division: Plan) -> None:
        """One step: its pairs' lengths [pairs, 3], the slots they fill, and their division."""
        self._pairs += len(lengths)
        self._tokens += int(lengths.sum() + lengths[:, 0].sum())
        self._flops += model_flops(self.shape, lengths)
        self._filled += filled
        self._slots += division.slots * len(division.bins) * self.ranks

    def report(self) -> dict[str, float]:
        """The perf/ metrics since the last call. MFU only where the GPU's peak is known."""
        seconds = time.perf_counter() - self._began
        report = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/packing": self._filled / self._slots,
            "perf/peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            report["perf/mfu"] = self._flops / seconds / (peak * self.ranks)
        self.restart()
        return report


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of this device's data sheet, or None if it is not in PEAK_FLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


class MetricsLog:
    """metrics.jsonl, TensorBoard and the progress bar; on ranks other than 0 it does nothing.

    Lines of steps after `step` are removed first: a resumed run writes them again.
    """

    def __init__(self, folder: Path, *, step: int, total: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            # A line without an end was torn when the run was killed.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept))
            os.replace(partial, self.path)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(total=total, initial=step, unit="step", mininterval=interval)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics after `step` steps under their names, if there are any."""
        if not self.active:
            return
        self.bar.update(step - self.bar.n)
        if not metrics:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        shown = {
            "loss": metrics.get("loss"),
            "accuracy": metrics.get("rewards/accuracies"),
            "margin": metrics.get("rewards/margins"),
        }
        shown = {name: f"{value:.4f}" for name, value in shown.items() if value is not None}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        if self.active:
            self.board.close()
            self.bar.close()
