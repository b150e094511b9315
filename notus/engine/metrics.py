"""What a run reports: exact means over all pairs of all ranks, speed, and where it is written."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.engine.hardware import gpu_of_device
from notus.engine.progress import progress
from notus.errors import UserError
from notus.model.hf_config import ModelShape
from notus.objective.losses import Loss, PairLogProbs


@torch.no_grad()
def pair_metrics(
    losses: Tensor, pairs: PairLogProbs, loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator of every metric over these pairs, 0-d float64 on their device.

    losses: float [B], what `loss` gave. Rewards are beta x (log-prob under the policy - under the
    reference), summed over the response. Accuracy is strict: a tie is not a win. Log-probs in nats.
    Without a reference its log-probs are 0, and there is no displacement from it. A loss that does
    not look at rejected responses (SFT) has no rewards either: its metrics are the negative
    log-likelihood per chosen token, however many steps the mean is taken over, and `logps/chosen`.
    """
    # Not a tensor made from a number: that copy from the host would wait for the forward pass.
    count = torch.full((), len(losses), dtype=torch.float64, device=losses.device)

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum(), count

    if not loss.uses_rejected:
        per_token = (-pairs.policy_chosen.double().sum(), pairs.chosen_length.double().sum())
        return {"loss": per_token, "logps/chosen": mean(pairs.policy_chosen)}
    chosen_ratio = pairs.policy_chosen - pairs.reference_chosen
    rejected_ratio = pairs.policy_rejected - pairs.reference_rejected
    beta = loss.beta
    metrics = {
        "loss": mean(losses),
        "rewards/chosen": mean(beta * chosen_ratio),
        "rewards/rejected": mean(beta * rejected_ratio),
        "rewards/accuracies": mean(chosen_ratio > rejected_ratio),
        "rewards/margins": mean(beta * (chosen_ratio - rejected_ratio)),
        "logps/chosen": mean(pairs.policy_chosen),
        "logps/rejected": mean(pairs.policy_rejected),
    }
    if not loss.uses_reference:
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

    def add_step(self, step: "Totals", finite: bool) -> None:
        """Add a step's sums; of one that is not finite, only that it was not (`nonfinite`)."""
        sums = step._sums if finite else torch.zeros_like(step._sums)
        counted = torch.ones_like(sums[:1])
        counted[0, 0] = float(not finite)
        sums = torch.cat((sums, counted))
        self._names = [*step._names, "nonfinite"]
        self._sums = sums if self._sums is None else self._sums + sums

    def snapshot(self) -> dict[str, list[list[float]]]:
        """The sums of each rank by name, for a checkpoint between two reports; collective."""
        if self._sums is None:
            return {}
        parts = [torch.empty_like(self._sums) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self._sums)
        return dict(zip(self._names, torch.stack(parts, 1).tolist(), strict=True))

    def restore(self, snapshot: Mapping[str, list[list[float]]], device: torch.device) -> None:
        """Go on from `snapshot`: each rank from its own sums, or, of other ranks, a share."""
        if snapshot:
            parts = torch.tensor(list(snapshot.values()), dtype=torch.float64)
            own = parts[:, dist.get_rank() :: dist.get_world_size()].sum(1)
            self._names, self._sums = list(snapshot), own.to(device)

    def means(self) -> dict[str, float]:
        """The exact means over all ranks since the last call; collective.

        What was counted over nothing has none.
        """
        sums, self._sums = self._sums, None
        dist.all_reduce(sums)
        numerators, denominators = sums.T.tolist()
        pairs = zip(self._names, numerators, denominators, strict=True)
        return {name: top / bottom for name, top, bottom in pairs if bottom}


class Verdict(NamedTuple):
    """What all ranks know of a step before its update: the same on each.

    loss: the mean over the step's pairs. finite: whether it and the gradient's norm are. stop,
    save: whether a signal has asked any rank for it.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    save: bool


def judge_step(step_loss: Tensor, grad_norm: Tensor, pairs: int, stop: bool, save: bool) -> Verdict:
    """Agree on what becomes of a step: one reduction, and the step's only wait for the device.

    step_loss: 0-d float64, the sum over this rank's pairs. grad_norm: 0-d, of the whole gradient.
    pairs: of the step, over all ranks.
    """
    grad_norm = grad_norm.to(step_loss)
    # Not tensors made from numbers: such a copy from the host would be a wait of its own.
    flags = [torch.full_like(step_loss, float(flag)) for flag in (stop, save)]
    sums = torch.stack([step_loss, (~grad_norm.isfinite()).to(step_loss), *flags])
    dist.all_reduce(sums)
    total, broken, stops, saves, norm = torch.cat((sums, grad_norm[None])).tolist()
    finite = math.isfinite(total) and broken == 0
    return Verdict(total / pairs, norm, finite, stops > 0, saves > 0)


def nonfinite_pairs(seen: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """The pairs, over all ranks, whose loss is not finite, ascending. Collective.

    seen: this rank's pair indices [B] and losses [B], by microbatch.
    """
    own = [i for pairs, losses in seen for i in pairs[~losses.isfinite()].tolist()]
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return sorted(index for part in found for index in part)


NONFINITE_FILE = "nonfinite.jsonl"  # of output_dir: steps without an update, and their pairs


class LinesFile:
    """A file that grows by whole lines of JSON, one object each.

    What the file system refuses (no space) is said once and waits in memory for the next line; the
    file holds no part of it. Lines of steps after `step` are removed first, and torn ones, for a
    run that goes on from there writes them again. Raises UserError when that is refused.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self._waiting, self._refused = path, b"", False
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text("".join(line for line in lines if _step_of(line) <= step))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line, with those that wait; numbers that JSON does not have become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        self._waiting += json.dumps(finite).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Try to write what waits, if anything does; whether nothing does any more."""
        if not self._waiting:
            return True
        try:
            _append_whole(self.path, self._waiting)
        except OSError as error:
            if not self._refused:
                warn(f"{self.path}: {error.strerror}; its lines wait in memory, training goes on")
            self._refused = True
            return False
        self._waiting, self._refused = b"", False
        return True


def _append_whole(path: Path, text: bytes) -> None:
    """Append all of `text`, or, raising OSError, nothing."""
    with path.open("ab", buffering=0) as file:
        size, left = file.tell(), memoryview(text)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _step_of(line: str) -> float:
    """The step that a line is about; infinite for one that is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def warn(text: str) -> None:
    """Say it on the standard error, on a line of its own beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Work(NamedTuple):
    """What a step computes, beyond a forward and a full backward pass of the policy.

    frozen: the base's weights take no gradient (low-rank adapters). recomputed: blocks compute
    their forward pass again in the backward pass. scorings: forward passes without gradient, of a
    reference that runs beside the policy, and of both before a step whose loss couples its pairs.
    """

    frozen: bool = False
    recomputed: bool = False
    scorings: int = 0


FULL_TRAINING = Work()


def forward_flops(shape: ModelShape, lengths: np.ndarray) -> tuple[float, float, float]:
    """FLOPs of one forward pass over these pairs: the blocks' products, attention, the head.

    lengths: int64 [pairs, 3]. Counts each real token once (prompts shared by both responses), exact
    causal attention, and the head on scored tokens only; no padding.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    block = hidden * (2 * queries + 2 * keys) + 3 * hidden * shape.intermediate_size
    attended = (
        _triangle(prompt) + prompt * (chosen + rejected) + _triangle(chosen) + _triangle(rejected)
    )
    return (
        float(2 * layers * block * (prompt + chosen + rejected).sum()),
        float(4 * layers * queries * attended.sum()),
        float(2 * hidden * shape.vocab_size * (chosen + rejected).sum()),
    )


def model_flops(shape: ModelShape, lengths: np.ndarray, frozen: bool = False) -> float:
    """FLOPs that training on these pairs needs: 3 x `forward_flops`, backward being twice as much.

    No recomputation, reference or padding. frozen: a product whose weight has no gradient counts
    2 x; the adapters' own are left out.
    """
    products, attention, head = forward_flops(shape, lengths)
    return (2 if frozen else 3) * (products + head) + 3 * attention


def hardware_flops(shape: ModelShape, lengths: np.ndarray, slots: int, work: Work) -> float:
    """FLOPs that a step with these pairs executes in `slots` slots, padding and all.

    On top of `model_flops`: the head's second forward pass, the scores that flash attention's
    backward pass computes again (half of its forward pass), and `work`. Attention over padding is
    left out, as kernels skip its blocks, and so is that of a prompt's second copy, and what weights
    pairs in the head.
    """
    products, attention, head = forward_flops(shape, lengths)
    products *= slots / lengths.sum()
    more = work.recomputed + work.scorings
    passes = 2 if work.frozen else 3
    return (
        (passes + more) * products + (3.5 + more) * attention + (passes + 1 + work.scorings) * head
    )


def _triangle(length: np.ndarray) -> np.ndarray:
    return length * (length + 1) / 2


class Speed:
    """Throughput since the last report, from what the plan says was done and the clock."""

    def __init__(
        self, shape: ModelShape, ranks: int, device: torch.device, work: Work = FULL_TRAINING
    ) -> None:
        self.shape, self.ranks, self.device, self.work = shape, ranks, device, work
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since the last report (an evaluation, a checkpoint)."""
        self._began = time.perf_counter()
        self._pairs = self._tokens = self._slots = self._filled = 0.0
        self._needed = self._executed = 0.0  # FLOPs

    def count(self, lengths: np.ndarray, filled: int, division: Plan) -> None:
        """One step: its pairs' lengths [pairs, 3], the slots they fill, and their division."""
        self._pairs += len(lengths)
        self._tokens += int(slots_of(lengths, prefix_sharing=False).sum())
        slots = division.slots * len(division.bins) * self.ranks
        self._needed += model_flops(self.shape, lengths, self.work.frozen)
        self._executed += hardware_flops(self.shape, lengths, slots, self.work)
        self._filled += filled
        self._slots += slots

    def report(self) -> dict[str, float]:
        """The perf/ metrics since the last call; utilisation where the GPU's peak is known."""
        seconds = time.perf_counter() - self._began
        report = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/packing": self._filled / self._slots,
            "perf/peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            report["perf/mfu"] = self._needed / seconds / (peak * self.ranks)
            report["perf/hfu"] = self._executed / seconds / (peak * self.ranks)
        self.restart()
        return report


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of this device's data sheet, or None if it is not in hardware.GPUS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu = gpu_of_device(name)
    return None if gpu is None else gpu.peak_flops


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


class MetricsLog:
    """metrics.jsonl, nonfinite.jsonl, TensorBoard and the progress bar, on rank 0 alone.

    Lines that a run which begins or resumes at `step` will write again are removed first. Where
    there is no space, lines wait in memory; TensorBoard gets nothing more until the next start.
    Raises UserError when the files cannot be opened.
    """

    def __init__(self, folder: Path, *, step: int, total: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        # A run that begins evaluates at step 0 again.
        self.lines = LinesFile(folder / "metrics.jsonl", step or -1)
        self.nonfinite = LinesFile(folder / NONFINITE_FILE, step)
        board = folder / "tensorboard"
        try:
            self.board = SummaryWriter(str(board), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"{board}: cannot be written ({error.strerror})") from None
        self._problem = ""  # the last that was said of TensorBoard
        self.bar = progress(total, step, "step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics after `step` steps under their names, if there are any."""
        if not self.active:
            return
        if metrics:
            self.lines.add({"step": step, **metrics})
            self.show(lambda board: [board.add_scalar(n, v, step) for n, v in metrics.items()])
        shown = {
            "loss": metrics.get("loss"),
            "accuracy": metrics.get("rewards/accuracies"),
            "margin": metrics.get("rewards/margins"),
        }
        shown = {name: f"{value:.4f}" for name, value in shown.items() if value is not None}
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def show(self, action: Callable[[SummaryWriter], object]) -> None:
        """Call `action` with TensorBoard's writer; what the file system refuses is left out."""
        try:
            action(self.board)
        except OSError as error:  # and of the writer's thread again every time: it has ended
            problem = f"{error.filename or self.board.log_dir}: {error.strerror}"
            if problem != self._problem:
                warn(f"{problem}; it is left out, training goes on")
            self._problem = problem

    def close(self) -> None:
        if self.active:
            self.show(SummaryWriter.close)
            self.bar.close()
            for lines in (self.lines, self.nonfinite):
                if not lines.flush():
                    warn(f"{lines.path} lacks its last lines: there was no space for them")
