"""The measurements of a run: exact means over all pairs, in training and on held-out ones."""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data.packing import Microbatch, slots_of
from notus.data.planning import Division, Plan
from notus.data.token_arrays import TokenizedPairs
from notus.engine.flops import Speed
from notus.objective.logprobs import gather_pairs, pair_log_probs
from notus.objective.loss import Loss
from notus.objective.losses import PairLogProbs, log_ratios

Quotient = Sequence[float]  # a metric's numerator and denominator, to be divided at the end
Snapshot = dict[str, list[list[float]]]  # quotients by name, of one part or more


@torch.no_grad()
def pair_metrics(
    losses: Tensor, pairs: PairLogProbs, loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator of every metric over these pairs, 0-d float64 on their device.

    losses: float [B], the values of `loss`. Rewards are beta x (log-prob under the policy - under
    the reference), summed over the response, in nats. Accuracy is strict: a tie is not a win.
    Without a reference there are no displacement metrics. A loss that ignores rejected responses
    (SFT) has the negative log-likelihood per chosen token and `logps/chosen`.
    """
    # torch.tensor(number) would copy from the host and wait for the forward pass; this does not.
    count = torch.full((), len(losses), dtype=torch.float64, device=losses.device)

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum(), count

    def per_token(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum(), lengths.double().sum()

    if not loss.uses_rejected:
        return {
            "loss": per_token(-pairs.policy.chosen, pairs.chosen_length),
            "logps/chosen": mean(pairs.policy.chosen),
        }
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
    if loss.uses_reference:
        metrics |= {
            "displacement/chosen_falling": mean(chosen_ratio < 0),
            "displacement/chosen_per_token": per_token(chosen_ratio, pairs.chosen_length),
            "displacement/rejected_per_token": per_token(rejected_ratio, pairs.rejected_length),
        }
    return metrics


@torch.no_grad()
def evaluate(
    policy: Tensor,
    reference: Tensor,
    pairs: TokenizedPairs,
    loss: Loss,
    sets: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, float]:
    """Metrics over all of `pairs`, under the names of training with the prefix `eval_`.

    policy, reference: log-probs of every response token on every rank, flat, as of `score`. sets:
    the places in `pairs` of each named set, whose own metrics have the prefix `eval_NAME/`.
    """
    found = {"eval_": summarize(all_log_probs(policy, reference, pairs), loss)}
    for name, places in sets.items():
        own = [gather_pairs(flat, pairs, places) for flat in (policy, reference)]
        found[f"eval_{name}/"] = summarize(all_log_probs(*own, pairs.select(places)), loss)
    return {f"{prefix}{name}": v for prefix, values in found.items() for name, v in values.items()}


def all_log_probs(policy: Tensor, reference: Tensor, pairs: TokenizedPairs) -> PairLogProbs:
    """The inputs of losses and metrics for every pair; both tensors flat, see `score`."""
    lengths = torch.from_numpy(pairs.lengths[:, 1:]).to(reference.device)
    return pair_log_probs(policy, reference, lengths, float(pairs.lengths[:, 1].mean()))


def summarize(scored: PairLogProbs, loss: Loss) -> dict[str, float]:
    """The means of `pair_metrics`; for supervised fine-tuning also the perplexity per token."""
    sums = pair_metrics(loss(scored), scored, loss)
    metrics = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    if not loss.uses_rejected:  # the loss is the negative log-likelihood per token
        loss_per_token = metrics["loss"]
        # math.exp raises an error where a float has no room.
        metrics["perplexity"] = math.inf if loss_per_token > 709 else math.exp(loss_per_token)
    return metrics


class Totals:
    """Running sums of metrics over steps: of all pairs of all ranks, on the host of every rank.

    `means` divides once, so a mean does not depend on how pairs were divided over microbatches and
    ranks. snapshot: sums to continue from, of one part or more (earlier versions: of each rank).
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._sums: dict[str, Quotient] = {}
        for name, parts in (snapshot or {}).items():
            for part in parts:
                self._add({name: part})

    def add_step(self, sums: Mapping[str, Quotient], finite: bool) -> None:
        """Add numerators and denominators; of a step that is not finite, only `nonfinite`."""
        counted = sums if finite else dict.fromkeys(sums, (0.0, 0.0))
        self._add({**counted, "nonfinite": (float(not finite), 1.0)})

    def _add(self, sums: Mapping[str, Quotient]) -> None:
        for name, (top, bottom) in sums.items():
            before = self._sums.get(name)
            self._sums[name] = (before[0] + top, before[1] + bottom) if before else (top, bottom)

    def snapshot(self) -> Snapshot:
        """The sums by name, for a checkpoint between two reports."""
        return {name: [list(pair)] for name, pair in self._sums.items()}

    @property
    def pairs(self) -> int:
        """The pairs that the means are over: those of steps that were finite."""
        return int(self._sums.get("logps/chosen", (0.0, 0.0))[1])  # a mean per pair in every run

    def means(self) -> dict[str, float]:
        """The exact means since the last call. A metric whose denominator is 0 is left out."""
        sums, self._sums = self._sums, {}
        return {name: top / bottom for name, (top, bottom) in sums.items() if bottom}


class Verdict(NamedTuple):
    """The facts about a step that decide on its update, equal on all ranks."""

    loss: float  # the mean over the step's pairs
    grad_norm: float
    finite: bool  # loss and grad_norm are
    stop: bool  # a signal has asked some rank to stop
    save: bool  # a signal has asked some rank to save


def judge_step(
    step_loss: Tensor, grad_norm: Tensor, pairs: int, stop: bool, save: bool, metrics: Tensor
) -> tuple[Verdict, list[list[float]]]:
    """The verdict of all ranks on a step, and their sums of its metrics.

    One reduction, and the step's only wait for the device. step_loss: 0-d float64, the sum over
    this rank's pairs. grad_norm: 0-d, of the complete gradient. pairs: their number in the step,
    over all ranks. stop, save: whether a signal has asked this rank for it. metrics: float64
    [names, 2], of this rank's pairs.
    """
    grad_norm = grad_norm.to(step_loss)
    # torch.tensor(flag) would copy from the host, a wait of its own.
    flags = [torch.full_like(step_loss, float(flag)) for flag in (stop, save)]
    facts = torch.stack([step_loss, (~grad_norm.isfinite()).to(step_loss), *flags])
    sums = torch.cat((facts, metrics.flatten()))
    dist.all_reduce(sums)
    norm, total, broken, stops, saves, *flat = torch.cat((grad_norm[None], sums)).tolist()
    finite = math.isfinite(total) and broken == 0
    verdict = Verdict(total / pairs, norm, finite, stops > 0, saves > 0)
    return verdict, [flat[i : i + 2] for i in range(0, len(flat), 2)]


def nonfinite_pairs(seen: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """The pairs, over all ranks, whose loss is not finite, ascending. Collective.

    seen: this rank's pair indices [B] and losses [B], by microbatch.
    """
    own = [i for pairs, losses in seen for i in pairs[~losses.isfinite()].tolist()]
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return sorted(index for part in found for index in part)


class Progress(NamedTuple):
    """The place of a run in its plan, apart from weights and optimiser state."""

    step: int  # optimiser steps done
    totals: Snapshot  # sums of metrics since the last report
    skipped: int  # last steps in a row without an update, because they were not finite


class Meter:
    """The measurements of a run: sums that stay on the device until the step's end, and speed.

    lengths: int64 [pairs, 3], the training pairs' tokens. progress: the place the run starts from.
    skipped: steps in a row, up to now, without an update. last_seen: pairs and losses of this
    rank's last step, by microbatch.
    """

    def __init__(
        self, loss: Loss, plan: Plan, lengths: np.ndarray, speed: Speed, progress: Progress
    ) -> None:
        self._loss, self._plan, self._lengths, self._speed = loss, plan, lengths, speed
        self.restart_clock = speed.restart
        self._tokens = slots_of(lengths, prefix_sharing=False)  # as two sequences: 2P + C + R
        done = range(progress.step)
        self._tokens_seen = sum(int(self._tokens[plan.pairs_of(step)].sum()) for step in done)
        self.skipped = progress.skipped
        self._totals = Totals(progress.totals)
        self._names: list[str] = []
        self._step: list[Tensor] = []  # float64 [names, 2] of each of the step's microbatches
        self._seen: list[tuple[Tensor, Tensor]] = []  # the step's pairs and losses

    def add(self, batch: Microbatch, losses: Tensor, scored: PairLogProbs) -> None:
        """Add a microbatch with its losses [B], without waiting for the device."""
        losses = losses.detach()
        metrics = pair_metrics(losses, scored, self._loss)
        self._names = list(metrics)
        self._step.append(torch.stack([torch.stack(pair) for pair in metrics.values()]))
        self._seen.append((batch.pairs, losses))

    def end_step(
        self,
        grad_norm: Tensor,
        chosen: np.ndarray,
        division: Division,
        asked: tuple[bool, bool],
    ) -> Verdict:
        """`judge_step` of the step with the pairs `chosen`, which is then counted. Collective.

        asked: whether a signal has asked this rank to stop, and to save.
        """
        stop, save = asked
        total = torch.zeros((), dtype=torch.float64, device=self._speed.device)
        for _, losses in self._seen:
            total += losses.sum()
        # Added one by one, in the order of the microbatches.
        metrics = functools.reduce(torch.add, self._step)
        verdict, sums = judge_step(total, grad_norm, len(chosen), stop, save, metrics)
        self._totals.add_step(dict(zip(self._names, sums, strict=True)), verdict.finite)
        self.skipped = 0 if verdict.finite else self.skipped + 1
        self._tokens_seen += int(self._tokens[chosen].sum())
        filled = int(self._plan.slot_counts[chosen].sum())
        self._speed.count(self._lengths[chosen], filled, division)
        self.last_seen, self._seen, self._step = self._seen, [], []
        return verdict

    def report(self) -> dict[str, float]:
        """Means and speed since the last report, their pairs, and all tokens so far."""
        counts = {"pairs": self._totals.pairs, "num_tokens": self._tokens_seen}
        return self._totals.means() | self._speed.report() | counts

    def progress(self, done: int) -> Progress:
        """The place of the run after `done` steps, for a checkpoint."""
        return Progress(done, self._totals.snapshot(), self.skipped)
