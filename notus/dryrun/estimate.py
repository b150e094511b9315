"""The cost of a run: the rows of its steps, the memory of a GPU, FLOPs and hours.

Sizes are in bytes, speeds in FLOP/s, times in hours.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from notus.build import Models, build_plan, step_work
from notus.config import Config
from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.data.token_arrays import TokenizedPairs
from notus.dryrun.memory import (
    MemoryBudget,
    MemorySettings,
    ParameterCounts,
    memory_budget,
    parameter_counts,
)
from notus.engine.flops import GIB, GPU, forward_flops, hardware_flops, model_flops
from notus.model.hf_config import ModelShape
from notus.objective.loss import Loss

# The part of a GPU's memory that tensors cannot have, an estimate: CUDA's context, NCCL's buffers
# and the workspaces of matrix products take about a fixed amount, and the allocator's gaps a share.
RESERVED = int(1.5 * GIB)
USABLE_SHARE = 0.95
# Share of the data-sheet peak at which all FLOPs are assumed to be done, whether they count for the
# MFU or not: published 7B trainings are between the outer two.
UTILISATION = (0.35, 0.45, 0.55)
MOST_GPUS = 256  # tried
SHORTEST_ROW = 1024  # slots: below, matrix products wait for the weights to be gathered

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes


def usable(gpu: GPU | int) -> int:
    """Bytes of the GPU's memory (or of so many bytes) that tensors can have."""
    return int(USABLE_SHARE * (gpu if isinstance(gpu, int) else gpu.memory)) - RESERVED


class RowCounts(NamedTuple):
    """The rows of all steps, for one number of ranks and one token budget."""

    slots: int  # of the longest row
    scored: int  # the most scored tokens of any row
    total: int  # slots of all rows of all ranks
    microbatches: int  # of all steps, on one rank
    most: int  # microbatches of one step


def count_rows(plan: Plan, pairs: TokenizedPairs, steps: Sequence[np.ndarray]) -> RowCounts:
    """The rows of the optimiser steps on these pairs, indices for each step."""
    responses = pairs.lengths[:, 1:].sum(1)
    slots = scored = total = microbatches = most = 0
    for chosen in steps:
        division = plan.division(chosen)
        slots = max(slots, division.slots)
        scored = max(scored, *(int(responses[bin].sum()) for bin in chain(*division.bins)))
        total += division.slots * len(division.bins) * plan.ranks
        microbatches += len(division.bins)
        most = max(most, len(division.bins))
    return RowCounts(slots, scored, total, microbatches, most)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A run on `gpus` GPUs, and what it takes.

    steps: the pairs of every step. reference_is_base: the frozen base of adapters is the reference,
    so that an online one takes no memory.
    """

    config: Config
    gpus: int
    shape: ModelShape
    counts: ParameterCounts
    loss: Loss
    reference_is_base: bool
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    steps: Sequence[np.ndarray]
    # Rows by ranks and token budget, kept by all estimates that are derived from one.
    counted: dict[tuple[int, int], RowCounts] = field(default_factory=dict)

    def with_setting(self, key: str, value: Any) -> "Estimate":
        """The same run with another value of a configuration key, "section.name"."""
        section, name = key.split(".")
        changed = replace(getattr(self.config, section), **{name: value})
        return replace(self, config=replace(self.config, **{section: changed}))

    def on_gpus(self, gpus: int) -> "Estimate":
        """The same run on another number of GPUs, over all of which each copy is divided."""
        return replace(self.with_setting("parallel.shard", None), gpus=gpus)

    @property
    def reference(self) -> str:
        """reference.log_probs, "none" for a loss that uses no reference."""
        return self.config.reference.log_probs if self.loss.uses_reference else "none"

    @property
    def shard(self) -> int:
        """Ranks that divide one copy of the parameters."""
        return max(1, self.gpus // self.config.parallel.replicate)

    @property
    def rows(self) -> RowCounts:
        """The rows of all steps."""
        # With a rank for each pair, every further rank's rows are empty, and as long.
        ranks = min(self.gpus, self.config.train.pairs_per_step)
        key = ranks, self.config.data.tokens_per_microbatch
        if key not in self.counted:
            plan = build_plan(self.config, self.pairs, ranks)
            self.counted[key] = count_rows(plan, self.pairs, self.steps)
        rows = self.counted[key]
        return rows._replace(total=rows.total // ranks * self.gpus)

    @property
    def memory(self) -> MemoryBudget:
        """The memory of one rank, on the CPU if parallel.device says so."""
        return self.memory_with(self.rows.slots, self.rows.scored)

    def gathers_once(self, limit: int) -> bool:
        """parallel.keep_gathered; "auto" is on where rows of the full budget fit `limit` with it.

        limit: bytes of a GPU that tensors can have.
        """
        wanted, slots = self.config.parallel.keep_gathered, self.config.data.tokens_per_microbatch
        if wanted != "auto":
            return wanted
        kept = self.with_setting("parallel.keep_gathered", True)
        on_cpu = self.config.parallel.device == "cpu"
        return not on_cpu and kept.memory_with(slots, slots).peak <= limit

    def memory_with(self, slots: int, scored: int) -> MemoryBudget:
        """The memory of one rank whose longest row has so many slots and scored tokens."""
        config, parallel = self.config, self.config.parallel
        on_cpu = parallel.device == "cpu"
        width = WIDTHS[config.model.compute_dtype]
        resident = self.reference == "online" and not self.reference_is_base
        reference_width = 4 if config.reference.sync_every else width
        datasets = [self.pairs] if self.held_out is None else [self.pairs, self.held_out]
        responses = sum(int(pairs.response_starts[-1]) for pairs in datasets)
        return memory_budget(
            MemorySettings(
                shape=self.shape,
                shard=self.shard,
                counts=self.counts,
                compute_width=width,
                slots=slots,
                scored=scored,
                scoring_slots=config.data.tokens_per_microbatch,
                optimizer=config.optimizer.name,
                state_width=WIDTHS[config.optimizer.state_dtype],
                activation_checkpointing=parallel.activation_checkpointing,
                reference_width=reference_width if resident else 0,
                kept_log_probs=0 if self.reference == "online" else responses,
                cpu_offload=parallel.cpu_offload,
                keep_gathered=parallel.keep_gathered is True,
                compiled=parallel.compile is True or (parallel.compile == "auto" and not on_cpu),
                triton=parallel.kernels != "plain" and not on_cpu,
                on_cpu=on_cpu,
            )
        )

    def fits(self, gpu: GPU) -> bool:
        """Whether the memory of each of these GPUs is enough."""
        return self.memory.peak <= usable(gpu)

    @property
    def evaluations(self) -> int:
        """How often the held-out pairs are scored: at the start, when due, and at the end."""
        every = self.config.evaluation.every
        due = range(every, len(self.steps), every) if every else ()
        return 0 if self.held_out is None else 2 + len(due)

    @property
    def flops(self) -> dict[str, float]:
        """The FLOPs of the complete run, by what they are spent on.

        model: see `model_flops`. overhead: all else in the steps: padding, recomputation, an online
        reference, scoring the pairs first for a loss that couples them. reference: the pass for
        cached log-probs. evaluation: the held-out pairs, by the policy and an online reference.
        """
        shape, online = self.shape, self.reference == "online"
        trained = self.pairs.lengths[np.concatenate(self.steps)]
        work = step_work(self.config, self.loss)
        model = model_flops(shape, trained, work.frozen)
        held_out = sum(forward_flops(shape, self.held_out.lengths)) if self.held_out else 0.0
        once = held_out + sum(forward_flops(shape, self.pairs.lengths))
        return {
            "model": model,
            "overhead": hardware_flops(shape, trained, self.rows.total, work) - model,
            "reference": once if self.reference == "cached" else 0.0,
            "evaluation": self.evaluations * (1 + online) * held_out,
        }

    def hours(self, gpu: GPU, utilisation: float = UTILISATION[1]) -> float:
        """The duration if the FLOPs are done at this share of the GPUs' peak."""
        return sum(self.flops.values()) / (self.gpus * gpu.peak_flops * utilisation) / 3600


def estimate_run(
    config: Config,
    gpus: int,
    models: Models,
    loss: Loss,
    pairs: TokenizedPairs,
    held_out: TokenizedPairs | None,
    steps: Sequence[np.ndarray],
) -> Estimate:
    """The estimate of the configured run on so many GPUs; see Estimate."""
    counts = parameter_counts(models.shape, config.model.lora)
    # An adapter given as the policy is merged into its base, which is then another model.
    merged = models.adapter is not None and config.model.reference is not None
    return Estimate(
        config=config,
        gpus=gpus,
        shape=models.shape,
        counts=counts,
        loss=loss,
        reference_is_base=counts.frozen > 0 and models.reference_is_policy and not merged,
        pairs=pairs,
        held_out=held_out,
        steps=steps,
    )


def gathering_text(kept: bool) -> str:
    """What "auto" means for parallel.keep_gathered in a run, and why."""
    found = "on, because rows of the full budget fit" if kept else "off: the memory is not enough"
    return f"parallel.keep_gathered: {found}"


def fewest_gpus(estimate: Estimate, gpu: GPU) -> Estimate | None:
    """The run on the fewest GPUs on which it fits, in powers of two times the replicas.

    None if these are more than MOST_GPUS.
    """
    gpus = estimate.config.parallel.replicate
    while gpus <= MOST_GPUS and not estimate.on_gpus(gpus).fits(gpu):
        gpus *= 2
    return estimate.on_gpus(gpus) if gpus <= MOST_GPUS else None


def remedies(estimate: Estimate, gpu: GPU) -> Iterator[tuple[str, Estimate]]:
    """The usual changes that save memory: for each its command-line words and the run so changed.

    By what they cost: nothing much, some time, some precision, much time, money. Each is a change
    by itself; the last is the fewest GPUs on which the run fits.
    """
    config = estimate.config
    fixed = estimate.reference == "online" and config.reference.sync_every is None
    longest = slots_of(estimate.pairs.lengths, config.data.prefix_sharing).max()
    half = config.data.tokens_per_microbatch // 2
    changes: list[tuple[str, Any, bool]] = [
        ("reference.log_probs", "cached", fixed),
        ("parallel.keep_gathered", False, config.parallel.keep_gathered is True),
        ("parallel.activation_checkpointing", "full", True),
        ("data.tokens_per_microbatch", half, half >= max(longest, SHORTEST_ROW)),
        ("optimizer.state_dtype", "bfloat16", True),
        ("parallel.cpu_offload", True, True),
    ]
    for key, value, possible in changes:
        changed = estimate.with_setting(key, value)
        if possible and changed.config != config:
            yield f"{key}={value if isinstance(value, str) else json.dumps(value)}", changed
    if found := fewest_gpus(estimate, gpu):
        shard = f" parallel.shard={found.shard}" if config.parallel.shard else ""
        yield f"--gpus {found.gpus}{shard}", found
