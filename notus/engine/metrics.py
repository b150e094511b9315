"""What a run measures: exact means over all pairs of all ranks, and speed."""

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data.packing import Microbatch, slots_of
from notus.data.planning import Division, Plan
from notus.engine.flops import FULL_TRAINING, Work, hardware_flops, model_flops, peak_flops
from notus.model.hf_config import ModelShape
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs, log_ratios


@torch.no_grad()
def pair_metrics(
    losses: Tensor, pairs: PairLogProbs, loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator of every metric over these pairs, 0-d float64 on their device.

    losses: float [B], the values of `loss`. Rewards are beta x (log-prob under the policy - under
    the reference), summed over the response. Accuracy is strict: a tie is not a win. Log-probs in
    nats. Without a reference its log-probs are 0, and the displacement metrics are left out. A loss
    that ignores rejected responses (SFT) has no rewards either: its metrics are the negative
    log-likelihood per chosen token, over any number of steps, and `logps/chosen`.
    """
    # torch.tensor(number) would copy from the host and wait for the forward pass; this does not.
    count = torch.full((), len(losses), dtype=torch.float64, device=losses.device)

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum(), count

    if not loss.uses_rejected:
        per_token = (-pairs.policy.chosen.double().sum(), pairs.chosen_length.double().sum())
        return {"loss": per_token, "logps/chosen": mean(pairs.policy.chosen)}
    chosen_ratio, rejected_ratio = log_ratios(pairs)
    beta = loss.beta
    metrics = {
        "loss": mean(losses),
        "rewards/chosen": mean(beta * chosen_ratio),
        "rewards/rejected": mean(beta * rejected_ratio),
        "rewards/accuracies": mean(chosen_ratio > rejected_ratio),
        "rewards/margins": mean(beta * (chosen_ratio - rejected_ratio)),
        "logps/chosen": mean(pairs.policy.chosen),
        "logps/rejected": mean(pairs.policy.rejected),
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
    """Running sums of metrics, on the device until they are reported.

    `means` divides once, after one reduction over all ranks, so a mean does not depend on how
    pairs were divided over microbatches and ranks.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add numerators and denominators; every call must have the same names."""
        values = torch.stack([torch.stack(pair) for pair in metrics.values()])
        self._names = list(metrics)
        self._sums = values if self._sums is None else self._sums + values

    def add_step(self, step: "Totals", finite: bool) -> None:
        """Add a step's sums; a step that is not finite only counts as `nonfinite`."""
        sums = step._sums if finite else torch.zeros_like(step._sums)
        counted = torch.ones_like(sums[:1])
        counted[0, 0] = float(not finite)
        sums = torch.cat((sums, counted))
        self._names = [*step._names, "nonfinite"]
        self._sums = sums if self._sums is None else self._sums + sums

    def snapshot(self) -> dict[str, list[list[float]]]:
        """The sums of each rank by name, for a checkpoint between two reports. Collective."""
        if self._sums is None:
            return {}
        parts = [torch.empty_like(self._sums) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self._sums)
        return dict(zip(self._names, torch.stack(parts, 1).tolist(), strict=True))

    def restore(self, snapshot: Mapping[str, list[list[float]]], device: torch.device) -> None:
        """Continue from `snapshot`, whose sums may be of more or fewer ranks."""
        if snapshot:
            parts = torch.tensor(list(snapshot.values()), dtype=torch.float64)
            own = parts[:, dist.get_rank() :: dist.get_world_size()].sum(1)
            self._names, self._sums = list(snapshot), own.to(device)

    def means(self) -> dict[str, float]:
        """The exact means over all ranks since the last call. Collective.

        A metric whose denominator is 0 is left out.
        """
        sums, self._sums = self._sums, None
        dist.all_reduce(sums)
        numerators, denominators = sums.T.tolist()
        pairs = zip(self._names, numerators, denominators, strict=True)
        return {name: top / bottom for name, top, bottom in pairs if bottom}


class Verdict(NamedTuple):
    """The facts about a step that decide on its update, equal on all ranks.

    loss: the mean over the step's pairs. finite: whether it and the gradient's norm are. stop,
    save: whether a signal has asked any rank for it.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    save: bool


def judge_step(step_loss: Tensor, grad_norm: Tensor, pairs: int, stop: bool, save: bool) -> Verdict:
    """Agree on a step over all ranks: one reduction, and the step's only wait for the device.

    step_loss: 0-d float64, the sum over this rank's pairs. grad_norm: 0-d, of the complete
    gradient. pairs: their number in the step, over all ranks.
    """
    grad_norm = grad_norm.to(step_loss)
    # torch.tensor(flag) would copy from the host, a wait of its own.
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


class Speed:
    """Throughput since the last report, from the plan's counts and the clock."""

    def __init__(
        self, shape: ModelShape, ranks: int, device: torch.device, work: Work = FULL_TRAINING
    ) -> None:
        self.shape, self.ranks, self.device, self.work = shape, ranks, device, work
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last report (an evaluation, a checkpoint)."""
        self._began = time.perf_counter()
        self._pairs = self._tokens = self._slots = self._filled = 0.0
        self._needed = self._executed = 0.0  # FLOPs

    def count(self, lengths: np.ndarray, filled: int, division: Division) -> None:
        """One step: its pairs' lengths [pairs, 3], the slots they fill, and their division."""
        self._pairs += len(lengths)
        self._tokens += int(slots_of(lengths, prefix_sharing=False).sum())
        slots = division.slots * len(division.bins) * self.ranks
        self._needed += model_flops(self.shape, lengths, self.work.frozen)
        self._executed += hardware_flops(self.shape, lengths, slots, self.work)
        self._filled += filled
        self._slots += slots

    def report(self) -> dict[str, float]:
        """The perf/ metrics since the last call; utilisation if the GPU's peak is known."""
        seconds = time.perf_counter() - self._began
        report = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/packing": self._filled / self._slots,
            "perf/peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            report["perf/reserved_memory_gib"] = reserved / 2**30
        peak = peak_flops(self.device)
        if peak is not None:
            report["perf/mfu"] = self._needed / seconds / (peak * self.ranks)
            report["perf/hfu"] = self._executed / seconds / (peak * self.ranks)
        self.restart()
        return report


class Progress(NamedTuple):
    """The place of a run in its plan, apart from weights and optimiser state.

    step: optimiser steps done. totals: each rank's sums of metrics since the last report, by name.
    skipped: how many of the last steps in a row had no update because they were not finite.
    """

    step: int
    totals: dict[str, list[list[float]]]
    skipped: int


class Meter:
    """The measurements of a run: sums that stay on the device until they are logged, and speed.

    lengths: int64 [pairs, 3], the training pairs' tokens. progress: the place the run starts from.
    skipped: steps in a row, up to now, without an update.
    """

    def __init__(
        self, loss: Loss, plan: Plan, lengths: np.ndarray, speed: Speed, progress: Progress
    ) -> None:
        self._loss, self._plan, self._lengths, self._speed = loss, plan, lengths, speed
        self._tokens = slots_of(lengths, prefix_sharing=False)  # as two sequences: 2P + C + R
        done = range(progress.step)
        self._tokens_seen = sum(int(self._tokens[plan.pairs_of(step)].sum()) for step in done)
        self.skipped = progress.skipped
        self._totals = Totals()
        self._totals.restore(progress.totals, speed.device)
        self._begin_step()

    def _begin_step(self) -> None:
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self._speed.device)
        self._step_totals = Totals()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Microbatch, losses: Tensor, scored: PairLogProbs) -> None:
        """Add a microbatch with its losses [B], without waiting for the device."""
        losses = losses.detach()
        self._step_loss += losses.sum()
        self._step_totals.add(pair_metrics(losses, scored, self._loss))
        self._seen.append((batch.pairs, losses))

    def end_step(
        self, grad_norm: Tensor, chosen: np.ndarray, division: Division, stop: bool, save: bool
    ) -> Verdict:
        """The verdict of all ranks on the step: one reduction, the step's only wait for the device.

        grad_norm: 0-d, of the whole gradient. chosen: the step's pairs. stop, save: whether a
        signal has asked this rank for it. Collective.
        """
        verdict = judge_step(self._step_loss, grad_norm, len(chosen), stop, save)
        self._totals.add_step(self._step_totals, verdict.finite)
        self.skipped = 0 if verdict.finite else self.skipped + 1
        self._tokens_seen += int(self._tokens[chosen].sum())
        filled = int(self._plan.slot_counts[chosen].sum())
        self._speed.count(self._lengths[chosen], filled, division)
        self._last_seen = self._seen
        self._begin_step()
        return verdict

    def nonfinite_pairs(self) -> list[int]:
        """The last step's pairs, on all ranks, whose loss is not finite. Collective."""
        return nonfinite_pairs(self._last_seen)

    def report(self) -> dict[str, float]:
        """Means and speed since the last report, and all tokens so far. Collective."""
        return self._totals.means() | self._speed.report() | {"num_tokens": self._tokens_seen}

    def restart_clock(self) -> None:
        """Leave the time since the last report (an evaluation, a save) out of the speed."""
        self._speed.restart()

    def progress(self, done: int) -> Progress:
        """The place of the run after `done` steps, for a checkpoint. Collective."""
        return Progress(done, self._totals.snapshot(), self.skipped)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
