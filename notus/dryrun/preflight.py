"""Before a GPU is rented: whether a run fits, how long it takes and what it costs.

The answer to `train.py CONFIG --dry-run`. Sizes are in bytes, speeds in FLOP/s, times in hours.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from notus.config import Config
from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.data.tokenization import TokenizedPairs
from notus.dryrun.memory import MODES, OPTIMIZER_STATES, Budget, Counts, Line, Load, memory_budget
from notus.engine.flops import GIB, GPU, GPUS, forward_flops, model_flops
from notus.errors import UserError
from notus.model.hf_config import ModelShape

# Of a GPU's memory, what tensors cannot have: CUDA's context, NCCL's buffers and the workspaces of
# matrix products take about a fixed amount, and the allocator's gaps a share. Estimates.
RESERVED = int(1.5 * GIB)
USABLE_SHARE = 0.95
# Share of the data-sheet peak at which all the FLOPs of a run are assumed to be done, whether they
# count for the MFU or not. An assumption: published 7B trainings lie between the outer two.
UTILISATION = (0.35, 0.45, 0.55)
MOST_GPUS = 256  # looked at
SHORTEST_ROW = 1024  # slots: below, matrix products wait for the weights to be gathered

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes


def usable(gpu: GPU) -> int:
    """Bytes of the GPU's memory that tensors can have."""
    return int(USABLE_SHARE * gpu.memory) - RESERVED


class Rows(NamedTuple):
    """What a plan makes of some of its steps, for one number of GPUs and one token budget.

    steps: looked at. slots, scored: of the longest row and the most scored tokens of any. total:
    slots of all rows of all ranks. microbatches: of all these steps, on one rank; most: of one.
    """

    steps: int
    slots: int
    scored: int
    total: int
    microbatches: int
    most: int


def plan_rows(plan: Plan, pairs: TokenizedPairs, steps: Sequence[np.ndarray]) -> Rows:
    """The rows of optimiser steps on these pairs, indices for each step."""
    responses = pairs.lengths[:, 1:].sum(1)
    slots = scored = total = microbatches = most = 0
    for chosen in steps:
        division = plan.division(chosen)
        slots = max(slots, division.slots)
        scored = max(scored, *(int(responses[bin].sum()) for bin in chain(*division.bins)))
        total += division.slots * len(division.bins) * plan.ranks
        microbatches += len(division.bins)
        most = max(most, len(division.bins))
    return Rows(len(steps), slots, scored, total, microbatches, most)


@dataclass(frozen=True)
class Setup:
    """The settings that decide what fits, under their names in the configuration.

    gpus: ranks; shard of them divide one copy.
    """

    gpus: int
    shard: int
    tokens_per_microbatch: int
    keep_gathered: bool
    optimizer: str
    state_dtype: str
    activation_checkpointing: str
    reference: str
    cpu_offload: bool


def shard_size(gpus: int, shard: int | None, replicate: int) -> int:
    """Ranks that divide one copy of the parameters. Raises UserError as the real start would."""
    if shard is None:
        shard = max(1, gpus // replicate)
    if shard * replicate != gpus:
        raise UserError(
            f"parallel.shard ({shard}) x parallel.replicate ({replicate}) is {shard * replicate}, "
            f"but --gpus is {gpus}; expected the same number"
        )
    return shard


def alternatives(setup: Setup, longest_pair: int, may_cache: bool) -> Iterator[Setup]:
    """Other setups, cheapest change first.

    By what they cost: nothing much (the reference's log-probs on disk instead of its model in
    memory, nothing kept gathered), some time (recomputed activations, shorter rows), money (more
    GPUs, up to MOST_GPUS), some precision (bfloat16 state), another optimiser, much time (offload).
    All combinations of cheaper changes come before a dearer one, so the first setup that fits holds
    no change that it could do without. longest_pair: slots, which no row can be shorter than;
    may_cache: the reference does not follow the policy.
    """
    rows = [setup.tokens_per_microbatch]
    while rows[-1] // 2 >= max(longest_pair, SHORTEST_ROW):
        rows.append(rows[-1] // 2)
    copies = setup.gpus // setup.shard
    shards = [setup.shard]
    while 2 * shards[-1] * copies <= MOST_GPUS:
        shards.append(2 * shards[-1])
    options: dict[str, Sequence[Any]] = {
        "cpu_offload": (setup.cpu_offload, True),
        "optimizer": (setup.optimizer, "rmsprop"),
        "state_dtype": (setup.state_dtype, "bfloat16"),
        "shard": shards,
        "tokens_per_microbatch": rows,
        "activation_checkpointing": MODES[MODES.index(setup.activation_checkpointing) :],
        "keep_gathered": (setup.keep_gathered, False),
        "reference": (setup.reference, "cached")
        if setup.reference == "online" and may_cache
        else (setup.reference,),
    }
    # The last varies fastest, so that the first, the dearest, decides the order.
    for values in product(*(dict.fromkeys(values) for values in options.values())):
        other = replace(setup, **dict(zip(options, values, strict=True)))
        yield replace(other, gpus=other.shard * copies)


def changes(before: Setup, after: Setup) -> list[str]:
    """How to ask for `after`: options and overrides of the command line."""
    spelled = {
        "gpus": "--gpus {}",
        "tokens_per_microbatch": "data.tokens_per_microbatch={}",
        "keep_gathered": "parallel.keep_gathered=false",
        "optimizer": "optimizer.name={}",
        "state_dtype": "optimizer.state_dtype={}",
        "activation_checkpointing": "parallel.activation_checkpointing={}",
        "reference": "reference.log_probs={}",
        "cpu_offload": "parallel.cpu_offload=true",
    }
    return [
        text.format(getattr(after, name))
        for name, text in spelled.items()
        if getattr(after, name) != getattr(before, name)
    ]


class Work(NamedTuple):
    """The FLOPs of a whole run, by what they are spent on."""

    model: float  # forward and backward on every real token once
    padding: float  # slots without a token, and prompts computed twice without prefix sharing
    recomputation: float  # checkpointed blocks, and the head's logits, run again
    reference: float  # the reference's forward passes
    evaluation: float  # the policy's forward passes over held-out pairs
    coupling: float  # those over a step's pairs before it, for a loss that couples them

    @property
    def total(self) -> float:
        return sum(self)


def run_work(
    shape: ModelShape,
    trained: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    slots: float,
    activation_checkpointing: str,
    reference: str,
    evaluations: int,
    frozen_base: bool = False,
    couples_pairs: bool = False,
) -> Work:
    """FLOPs of a run, after `metrics.model_flops`: 3 x forward for the model itself.

    trained: lengths [.., 3] of the pairs of every step; train, held_out: of the data sets. slots:
    of all rows of all steps. Full checkpointing runs the blocks forward once more, "selective" only
    cheap operations. The head computes its logits again in the backward pass. A cached reference
    runs once over both data sets, an online one with every step and every evaluation. A loss that
    couples a step's pairs has policy and online reference score them before the step. A frozen base
    has no gradient of its weights: 2 x but for attention; its adapters' own work is left out.
    """

    def forward(lengths: np.ndarray) -> tuple[float, float]:
        """Of the blocks and of the head."""
        products, attention, head = forward_flops(shape, lengths)
        return products + attention, head

    blocks, head = forward(trained)
    once, evaluated = sum(forward(train)), sum(forward(held_out))
    again = blocks if activation_checkpointing == "full" else 0.0
    repeated = slots / float(trained.sum()) - 1
    references = {
        "none": 0.0,
        "cached": once + evaluated,
        "online": (1 + couples_pairs) * (blocks + head) + evaluations * evaluated,
    }
    passes = 2 if frozen_base else 3
    return Work(
        model=model_flops(shape, trained, frozen_base),
        padding=repeated * (passes * blocks + again),
        recomputation=again + head,
        reference=references[reference],
        evaluation=evaluations * evaluated,
        coupling=couples_pairs * (blocks + head),
    )


def hours(work: Work, gpus: int, gpu: GPU, utilisation: float) -> float:
    """Hours that the FLOPs take at this share of the GPUs' peak."""
    return work.total / (gpus * gpu.peak_flops * utilisation) / 3600


class Question(NamedTuple):
    """A run on some number of GPUs, and all that its answer depends on.

    plan: of as many ranks as GPUs. uses_reference: the loss does. reference_is_base: the frozen
    base serves as the reference, so that an online one is there anyway. couples_pairs: the loss
    needs a step's log-probs before the step.
    """

    config: Config
    shape: ModelShape
    counts: Counts
    plan: Plan
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    uses_reference: bool
    reference_is_base: bool
    couples_pairs: bool = False

    @property
    def setup(self) -> Setup:
        """The settings as the configuration has them. Raises UserError for a wrong mesh."""
        parallel = self.config.parallel
        return Setup(
            gpus=self.plan.ranks,
            shard=shard_size(self.plan.ranks, parallel.shard, parallel.replicate),
            tokens_per_microbatch=self.plan.budget,
            keep_gathered=parallel.keep_gathered,
            optimizer=self.config.optimizer.name,
            state_dtype=self.config.optimizer.state_dtype,
            activation_checkpointing=parallel.activation_checkpointing,
            reference=self.config.reference.log_probs if self.uses_reference else "none",
            cpu_offload=parallel.cpu_offload,
        )

    def load(self, setup: Setup, rows: Rows) -> Load:
        """What the memory of one GPU depends on under `setup`."""
        config = self.config
        width = WIDTHS[config.model.compute_dtype]
        reference_width = 4 if config.reference.sync_every else width
        sets = [self.pairs] if self.held_out is None else [self.pairs, self.held_out]
        responses = sum(int(data.response_starts[-1]) for data in sets)
        return Load(
            shape=self.shape,
            shard=setup.shard,
            counts=self.counts,
            frozen_width=width,
            compute_width=width,
            slots=rows.slots,
            scored=rows.scored,
            scoring_slots=setup.tokens_per_microbatch,
            optimizer=setup.optimizer,
            state_width=WIDTHS[setup.state_dtype],
            activation_checkpointing=setup.activation_checkpointing,
            reference_width=(
                reference_width if setup.reference == "online" and not self.reference_is_base else 0
            ),
            kept_log_probs=0 if setup.reference == "online" else responses,
            cpu_offload=setup.cpu_offload,
            keep_gathered=setup.keep_gathered,
            compiled=config.parallel.compile is not False,
            triton=config.parallel.kernels != "plain",
            on_cpu=False,
        )

    @property
    def evaluations(self) -> int:
        """How often the held-out pairs are scored: at the start, when due, and at the end."""
        if self.held_out is None:
            return 0
        steps, every = self.plan.steps, self.config.evaluation.every
        due = range(every, steps, every) if every else ()
        return 2 + len(due)


class Answers:
    """Budgets and work of a question under other settings; the rows of each are planned once."""

    def __init__(self, question: Question) -> None:
        self.question = question
        plan = question.plan
        self.chosen = [plan.pairs_of(step) for step in range(plan.steps)]
        self.trained = question.pairs.lengths[np.concatenate(self.chosen)]
        self.rows = lru_cache(maxsize=None)(self._rows)

    def _rows(self, gpus: int, budget: int, every: int = 1) -> Rows:
        # With a rank for each pair every further rank's rows are empty, and as long.
        ranks = min(gpus, self.question.plan.pairs_per_step)
        plan = replace(self.question.plan, ranks=ranks, budget=budget)
        rows = plan_rows(plan, self.question.pairs, self.chosen[::every])
        return rows._replace(total=rows.total // ranks * gpus)

    def budget(self, setup: Setup, every: int = 1) -> Budget:
        """The memory of one GPU, from the rows of all steps, or of each `every`-th."""
        rows = self.rows(setup.gpus, setup.tokens_per_microbatch, every)
        return memory_budget(self.question.load(setup, rows))

    def fits(self, setup: Setup, gpu: GPU) -> bool:
        """Whether `setup` fits on this GPU; most that do not are known from a few steps."""
        few = -(-len(self.chosen) // 50)
        return all(self.budget(setup, every).peak <= usable(gpu) for every in (few, 1))

    def work(self, setup: Setup) -> Work:
        """The FLOPs of the whole run."""
        question = self.question
        none = np.zeros((0, 3), np.int64)
        return run_work(
            question.shape,
            self.trained,
            question.pairs.lengths,
            none if question.held_out is None else question.held_out.lengths,
            slots=self.rows(setup.gpus, setup.tokens_per_microbatch).total,
            activation_checkpointing=setup.activation_checkpointing,
            reference=setup.reference,
            evaluations=question.evaluations,
            frozen_base=question.counts.frozen > 0,
            couples_pairs=question.couples_pairs,
        )

    def other_setups(self, setup: Setup) -> Iterator[Setup]:
        """See `alternatives`."""
        config = self.question.config
        return alternatives(
            setup,
            longest_pair=int(self.question.plan.slot_counts.max()),
            may_cache=config.reference.sync_every is None,
        )


def preflight(question: Question, gpu: GPU | None, price: float | None) -> tuple[str, bool]:
    """The report of a dry run, and whether the run fits on the GPU (True where none is named).

    price: of one GPU for one hour. Without `gpu`, the memory is shown for the question's number of
    GPUs, and then how many of each known kind it takes.
    """
    answers, setup = Answers(question), question.setup
    budget = answers.budget(setup)
    kind = "GPU" if gpu is None else gpu.name
    parts = [
        *plan_text(answers, setup),
        "",
        f"memory of one rank, on {setup.gpus} x {kind}",
        *budget_text(budget, setup),
    ]
    fits = True
    if gpu is None:
        parts += ["", *table_text(answers, setup, price)]
    else:
        fits = answers.fits(setup, gpu)
        parts += (
            reasons_text(answers, setup, budget, gpu) if fits else remedy_text(answers, setup, gpu)
        )
        parts += ["", *time_text(answers, setup, gpu, price)]
    return "\n".join(parts), fits


def size_text(size: int) -> str:
    """Bytes for people."""
    for unit, bytes_each in (("GiB", GIB), ("MiB", 2**20)):
        if size >= bytes_each / 10:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def hours_text(time: float) -> str:
    """Hours for people, to two places; short runs are measured in seconds anyway."""
    return "< 0.01" if time < 0.01 else f"{time:,.2f}" if time < 1 else f"{time:,.1f}"


def idle_text(pairs_per_step: int, ranks: int, unit: str = "pairs") -> str | None:
    """What to say of ranks that no step has anything for; None if there are none.

    Such a run works: its idle ranks compute on empty rows, and hold their share of the model.
    """
    if ranks <= pairs_per_step:
        return None
    return (
        f"warning: a step has {pairs_per_step:,} {unit}, so at least {ranks - pairs_per_step:,} of "
        f"{ranks:,} ranks idle in every step; start fewer, or raise train.pairs_per_step"
    )


def plan_text(answers: Answers, setup: Setup) -> list[str]:
    """What is trained on: pairs (in supervised fine-tuning, responses), steps, tokens, rows."""
    question = answers.question
    plan, held_out, unit = question.plan, question.held_out, question.config.train.unit
    rows = answers.rows(setup.gpus, setup.tokens_per_microbatch)
    real = int(answers.trained.sum())
    filled = int(plan.slot_counts[np.concatenate(answers.chosen)].sum())
    held = "none" if held_out is None else f"{len(held_out):,}"
    per_step = rows.microbatches / rows.steps
    tokens = f"{real:,}"
    if unit == "pairs":
        separate = int(slots_of(answers.trained, prefix_sharing=False).sum())
        off = "" if question.config.data.prefix_sharing else ", but prefix sharing is off"
        tokens = (
            f"{separate:,} in separate sequences, {real:,} with each prompt once "
            f"({1 - real / separate:.1%} saved{off})"
        )
    idle = idle_text(plan.pairs_per_step, setup.gpus, unit)
    return [
        "plan",
        f"  {unit:<12} {len(question.pairs):,} to train on, {held} held out",
        f"  steps        {plan.steps:,} of {plan.pairs_per_step} {unit}; "
        f"{plan.steps_per_epoch:,} per epoch x {plan.epochs}"
        + ("" if plan.max_steps is None else f", at most {plan.max_steps:,} steps"),
        f"  tokens       {tokens}",
        f"  microbatches {per_step:.2f} per rank and step, at most {rows.most}; the longest row "
        f"has {rows.slots:,} of {setup.tokens_per_microbatch:,} slots",
        f"  packing      {filled / rows.total:.1%} of all slots hold a token",
        *([] if idle is None else [f"  {idle}"]),
    ]


def budget_text(budget: Budget, setup: Setup) -> list[str]:
    """The budget line by line, the fullest moment's lines last."""
    names = {}
    if setup.reference == "none":  # which the loop reads from zeros, as many as cached ones
        names["reference log-probs (float32)"] = "zeros that stand for a reference (float32)"

    def table(lines: Iterable[Line]) -> list[str]:
        return [
            f"  {names.get(line.name, line.name):<54}{size_text(line.size):>11}"
            for line in lines
            if line.size
        ]

    host = Line("in the host's memory (CPU offload)", budget.host)
    return [
        *table(budget.resident),
        f"  and in the fullest moment, {budget.fullest.name}:",
        *table(budget.fullest.lines),
        *table([Line("peak", budget.peak)]),
        *table([host]),
    ]


def limit_text(gpu: GPU) -> str:
    """What the peak is compared with."""
    return (
        f"{size_text(usable(gpu))} ({USABLE_SHARE:.0%} of {size_text(gpu.memory)}, less "
        f"{size_text(RESERVED)} for CUDA, NCCL and workspaces)"
    )


def reasons_text(answers: Answers, setup: Setup, budget: Budget, gpu: GPU) -> list[str]:
    """That it fits, and why."""
    question = answers.question
    load = question.load(setup, answers.rows(setup.gpus, setup.tokens_per_microbatch))
    states = OPTIMIZER_STATES[setup.optimizer] * load.state_width
    whole = (8 + states) * load.counts.trainable + load.frozen_width * load.counts.frozen
    reasons = [f"weights, gradients and optimiser state take {size_text(whole)}"]
    if setup.shard > 1:
        each = size_text(whole // setup.shard)
        reasons[0] += f", divided over {setup.shard} ranks: {each} each"
    if setup.reference != "none" and question.reference_is_base:
        reasons.append("the reference is the frozen base itself, so there is no second model")
    elif setup.reference == "cached":
        reasons.append(
            "the reference's log-probs are computed beforehand, so its model is not there"
        )
    if setup.activation_checkpointing == "full":
        reasons.append("blocks keep nothing but their input and run again in the backward pass")
    reasons.append("logits exist for one chunk of rows at a time")
    offload = "with CPU offload" if setup.cpu_offload else "without CPU offload"
    modes = MODES[: MODES.index(setup.activation_checkpointing)]
    others = (replace(setup, activation_checkpointing=mode) for mode in modes)
    faster = next((other for other in others if answers.fits(other, gpu)), None)
    if faster is not None:
        saved = 1 - answers.work(faster).total / answers.work(setup).total
        reasons.append(
            f"it also would with {' '.join(changes(setup, faster))} (peak "
            f"{size_text(answers.budget(faster).peak)}), which saves {saved:.0%} of the FLOPs"
        )
    return [
        f"  FITS on {setup.gpus} x {gpu.name} {offload}: the limit is {limit_text(gpu)}",
        *(f"    - {reason}" for reason in reasons),
    ]


def remedy_text(answers: Answers, setup: Setup, gpu: GPU) -> list[str]:
    """That it does not fit, and the cheapest changes with which it does: any, and without GPUs."""
    lines = [f"  DOES NOT FIT on {setup.gpus} x {gpu.name}: the limit is {limit_text(gpu)}"]
    others = list(answers.other_setups(setup))
    alike = [other for other in others if other.gpus == setup.gpus]
    found = [next((o for o in some if answers.fits(o, gpu)), None) for some in (others, alike)]
    for other in dict.fromkeys(o for o in found if o is not None):
        how = changes(setup, other)
        if other.shard != setup.shard and answers.question.config.parallel.shard is not None:
            how.append(f"parallel.shard={other.shard}")
        where = "" if other.gpus != setup.gpus else f" on {setup.gpus} x {gpu.name}"
        peak = size_text(answers.budget(other).peak)
        lines.append(f"    cheapest change that fits{where}: {' '.join(how)} (peak {peak})")
    if found == [None, None]:
        lines.append(f"    no change that was tried makes it fit, on up to {MOST_GPUS} GPUs")
    return lines


def time_text(answers: Answers, setup: Setup, gpu: GPU, price: float | None) -> list[str]:
    """Hours and money, and what they were computed from."""
    work = answers.work(setup)
    slow, likely, fast = (hours(work, setup.gpus, gpu, share) for share in UTILISATION)
    low, share, high = UTILISATION
    lines = [
        f"time on {setup.gpus} x {gpu.name}",
        f"  about {hours_text(likely)} hours ({hours_text(fast)} to {hours_text(slow)}), "
        f"{hours_text(likely * setup.gpus)} GPU-hours",
    ]
    if slow < 1 / 60:
        lines[1] = "  less than a minute of computing"
    if price is not None:
        cost, least, most = (price * setup.gpus * h for h in (likely, fast, slow))
        lines.append(f"  about {cost:,.2f} ({least:,.2f} to {most:,.2f}) at {price:g} per GPU-hour")
    slower = []
    if answers.question.config.model.compute_dtype == "float32":
        slower = ["  several times longer, as compute_dtype float32 cannot use the bfloat16 units"]
    shares = ", ".join(
        f"{name} {part / work.total:.1%}" for name, part in work._asdict().items() if part
    )
    return [
        *lines,
        *slower,
        f"  {work.total:.3g} FLOP: {shares}",
        f"  assumed: {share:.0%} ({high:.0%} to {low:.0%}) of {gpu.peak_flops / 1e12:g} TFLOP/s "
        f"for all of it, {share * work.model / work.total:.0%} for the model's own; "
        "not measured on this GPU",
        "  not counted: start, downloads, tokenization, checkpoints, sample answers",
    ]


class Need(NamedTuple):
    """What a run takes of one kind of GPU.

    fits: on as many as the setup has. gpus: the fewest on which it does, in powers of two times the
    replicas; None if that is more than MOST_GPUS. hours: on those, at the middle of UTILISATION.
    """

    gpu: GPU
    fits: bool
    gpus: int | None
    hours: float | None


def needs(answers: Answers, setup: Setup) -> Iterator[Need]:
    """Of every known GPU, with these settings but for their number."""
    copies = setup.gpus // setup.shard
    for gpu in GPUS:
        shards = 1
        while not answers.fits(needed := replace(setup, gpus=shards * copies, shard=shards), gpu):
            shards *= 2
            if shards * copies > MOST_GPUS:
                needed = None
                break
        fits = answers.fits(setup, gpu)
        if needed is None:
            yield Need(gpu, fits, None, None)
        else:
            time = hours(answers.work(needed), needed.gpus, gpu, UTILISATION[1])
            yield Need(gpu, fits, needed.gpus, time)


def table_text(answers: Answers, setup: Setup, price: float | None) -> list[str]:
    """Every known GPU: how many it takes with these settings, and for how long."""
    header = f"  {'GPU':<11}{'memory':>10}{f'fits on {setup.gpus}':>13}{'needed':>8}"
    lines = [header + f"{'hours':>8}{'GPU-hours':>11}" + (f"{'cost':>10}" if price else "")]
    for gpu, fits, gpus, time in needs(answers, setup):
        line = f"  {gpu.name:<11}{size_text(gpu.memory):>10}{'yes' if fits else 'no':>13}"
        if gpus is None:
            lines.append(line + f"{'more than ' + str(MOST_GPUS):>20}")
            continue
        line += f"{gpus:>8}{hours_text(time):>8}{hours_text(time * gpus):>11}"
        lines.append(line + (f"{price * time * gpus:>10,.2f}" if price else ""))
    note = f"  hours at {UTILISATION[1]:.0%} of the peak, an assumption; --gpu NAME says more"
    return ["known GPUs, with these settings", *lines, note]
