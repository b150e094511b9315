"""`train.py CONFIG --dry-run`: whether a run fits, how long it takes and what it costs.

Everything is checked as at the start of a run, on the CPU and without the models' weights.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from notus.build import (
    attention_backend,
    build_plan,
    find_models,
    load_data,
    make_loss,
    settings_of,
)
from notus.config import Config
from notus.console import counted
from notus.data.dataset import Dataset
from notus.data.oddities import oddities
from notus.data.packing import slots_of
from notus.data.planning import idle_text
from notus.data.tokenizer import load_tokenizer
from notus.dryrun.estimate import (
    MOST_GPUS,
    RESERVED,
    USABLE_SHARE,
    UTILISATION,
    Estimate,
    estimate_run,
    fewest_gpus,
    gathering_text,
    remedies,
    usable,
)
from notus.dryrun.memory import MODES
from notus.dryrun.tokens import token_report
from notus.engine import checkpoint
from notus.engine.distributed import Ranks
from notus.engine.flops import GIB, GPU, GPUS, gpu_named
from notus.errors import UserError, agreed
from notus.look.look import command_for
from notus.model.attention import flex_tiles
from notus.model.hf_config import ModelShape
from notus.run_folder import check_output_dir
from notus.tables import text_table


def dry_run(config: Config, ranks: Ranks, options: argparse.Namespace) -> int:
    """Check everything and print what the run would take; the exit code, 1 if it does not fit.

    options: gpus, gpu, price, resume and model_only of train.py's command line. Collective. Raises
    UserError, on every rank, for all that a run would refuse.
    """
    gpu = None if options.gpu is None else gpu_named(options.gpu)
    if gpu is not None and config.parallel.device == "cpu":
        raise UserError(f'--gpu {gpu.name}: parallel.device is "cpu"; expected another device')
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: expected at least 1")
    if options.price is not None and (gpu is None or not 0 < options.price < math.inf):
        raise UserError(
            f"--price {options.price:g}: expected the price of one GPU for one hour, with --gpu"
        )
    replicate, shard = config.parallel.replicate, config.parallel.shard
    gpus = options.gpus or max(ranks.count, (shard or 1) * replicate)
    shard = shard or max(1, gpus // replicate)
    if shard * replicate != gpus:
        raise UserError(
            f"parallel.shard ({shard}) x parallel.replicate ({replicate}) is {shard * replicate}, "
            f"but --gpus is {gpus}; expected the same number"
        )
    with agreed():
        models = find_models(config, weights=False)
        if gpu is not None:
            attention_backend(config, models.shape, torch.device("cuda"))
    data = load_data(config, models, ranks)
    with agreed():
        if ranks.first:
            show_data(config, ranks, data, load_tokenizer(models.tokenizer))
    refusal = refusal_of(config, ranks, options)
    pairs, held_out = data["train"].pairs, data["eval"].pairs if "eval" in data else None
    plan = build_plan(config, pairs, gpus)
    steps = [plan.pairs_of(step) for step in range(plan.steps)]
    estimate = estimate_run(config, gpus, models, make_loss(config), pairs, held_out, steps)
    ranks.say(preflight(estimate, gpu, options.price))
    if refusal:
        ranks.say(f"\nWOULD NOT START: {refusal}")
    return 0 if not refusal and (gpu is None or estimate.fits(gpu)) else 1


def show_data(
    config: Config,
    ranks: Ranks,
    data: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Print what was read and tokenized, how to look at it, and what is odd about it."""
    style, unit = config.data.tokenization, config.train.unit
    ranks.say(f"\n{token_report(data, tokenizer, style, unit)}\n", verbatim=True)
    if config.train.objective == "dpo":  # the page shows pairs
        seed = config.train.seed if config.data.seed is None else config.data.seed
        commands = [command_for(source, seed) for source in config.data.train]
        ranks.say("\n  ".join(["look at the rows", *commands]) + "\n")
    rows = data["train"].rows
    for line in oddities(config.data.train, rows, tokenizer.chat_template is not None):
        ranks.say(f"warning: {line}\n")


def refusal_of(config: Config, ranks: Ranks, options: argparse.Namespace) -> str:
    """Why a run would refuse output_dir or --resume, or "". Collective."""
    output = Path(config.output_dir)
    try:
        with agreed():
            check_output_dir(output, settings_of(config), options.resume)
        if options.model_only:
            checkpoint.check_sound(Path(options.resume))
        else:
            checkpoint.find_checkpoint(output / "checkpoints", options.resume, ranks.say)
    except UserError as error:
        return str(error)
    return ""


def preflight(estimate: Estimate, gpu: GPU | None, price: float | None) -> str:
    """The report: plan, memory, and verdict and time on `gpu`, or how many of each GPU it takes.

    price: of one GPU for one hour. A run on the CPU has neither verdict nor time.
    """
    on_cpu = estimate.config.parallel.device == "cpu"
    kind = "CPU" if on_cpu else "GPU" if gpu is None else gpu.name
    chosen = []
    if gpu is not None:
        if estimate.config.parallel.keep_gathered == "auto":
            kept = estimate.gathers_once(usable(gpu))
            estimate = estimate.with_setting("parallel.keep_gathered", kept)
            chosen = ["  " + gathering_text(kept)]
        chosen += [*faster_text(estimate, gpu), attention_text(estimate.config, estimate.shape)]
    memory = f"memory of one rank, on {estimate.gpus} x {kind}"
    parts = [*plan_text(estimate), "", memory, *memory_text(estimate)]
    if gpu is not None:
        parts += [*chosen, *verdict_text(estimate, gpu), "", *time_text(estimate, gpu, price)]
    elif not on_cpu:
        parts += ["", *table_text(estimate)]
    return "\n".join(parts)


def size_text(size: int) -> str:
    """Bytes in the unit of their size."""
    for unit, bytes_each in (("GiB", GIB), ("MiB", 2**20)):
        if size >= bytes_each / 10:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def hours_text(time: float) -> str:
    """Hours, with two decimals at most."""
    return "< 0.01" if time < 0.01 else f"{time:,.2f}" if time < 1 else f"{time:,.1f}"


def plan_text(estimate: Estimate) -> Iterator[str]:
    """The pairs (in supervised fine-tuning, responses), steps, tokens and rows of the run."""
    train, data, rows = estimate.config.train, estimate.config.data, estimate.rows
    steps, unit = len(estimate.steps), train.unit
    lengths = estimate.pairs.lengths[np.concatenate(estimate.steps)]
    separate = int(slots_of(lengths, prefix_sharing=False).sum())
    filled = int(slots_of(lengths, data.prefix_sharing).sum())
    held = "none" if estimate.held_out is None else f"{len(estimate.held_out):,}"
    limit = "" if train.max_steps is None else f", at most {train.max_steps:,} steps"
    per_epoch = math.ceil(len(estimate.pairs) / train.pairs_per_step)
    saved = "" if filled == separate else f", {1 - filled / separate:.1%} fewer by prefix sharing"
    yield "plan"
    yield f"  {unit:<13}{len(estimate.pairs):,} to train on, {held} held out"
    yield (
        f"  steps        {steps:,} of {counted(train.pairs_per_step, unit)}; "
        f"{per_epoch:,} per epoch x {train.epochs}{limit}"
    )
    yield f"  tokens       {filled:,}{saved}; {filled / rows.total:.1%} of slots filled"
    yield f"  microbatches {rows.microbatches / steps:.2f} per rank and step, at most {rows.most}"
    yield f"  longest row  {rows.slots:,} of {data.tokens_per_microbatch:,} slots"
    if idle := idle_text(train.pairs_per_step, estimate.gpus, unit):
        yield f"  {idle}"


def memory_text(estimate: Estimate) -> Iterator[str]:
    """The budget line by line: what is always held, then the fullest moment, then the peak."""
    budget = estimate.memory
    lines = budget.resident | {f"and in the fullest moment, {budget.fullest}:": None}
    lines |= budget.phases[budget.fullest] | {"peak": budget.peak}
    lines |= {"in the host's memory (CPU offload)": budget.host}
    for name, size in lines.items():
        if estimate.reference == "none" and name == "reference log-probs (float32)":
            name = "zeros that stand for a reference (float32)"
        if size != 0:
            yield f"  {name:<54}{'' if size is None else size_text(size):>11}".rstrip()


def faster_text(estimate: Estimate, gpu: GPU) -> Iterator[str]:
    """The settings that trade memory for speed, and what the next faster ones would take."""
    mode = estimate.config.parallel.activation_checkpointing
    if faster := MODES[: MODES.index(mode)][::-1]:
        peaks = [estimate.with_setting("parallel.activation_checkpointing", m) for m in faster]
        found = ", ".join(f"{m} {peak_text(p, gpu)}" for m, p in zip(faster, peaks, strict=True))
        yield f"  parallel.activation_checkpointing: {mode}; to recompute less, {found}"
    budget = estimate.config.data.tokens_per_microbatch
    doubled = estimate.with_setting("data.tokens_per_microbatch", 2 * budget)
    rows, fewer = estimate.rows.microbatches, doubled.rows.microbatches
    found = "no fewer microbatches"
    if fewer < rows:
        found = f"{1 - fewer / rows:.0%} fewer microbatches, {peak_text(doubled, gpu)}"
    yield f"  data.tokens_per_microbatch: {budget:,}; with {2 * budget:,}, {found}"


def attention_text(config: Config, shape: ModelShape) -> str:
    """The attention backend on CUDA and the tiles of its kernels, each with its reason."""
    backend = attention_backend(config, shape, torch.device("cuda"))
    reason = "as configured"
    if config.parallel.attention == "auto":
        reasons = {"flex": "it adds in a fixed order", "dense": "flex needs heads of 16 or more"}
        reason = f"because {reasons[backend]}"
    tiles = ""
    if backend == "flex":
        tiles = "; PyTorch's tiles, because its heads are not of 128 in bfloat16"
        if found := flex_tiles(getattr(torch, config.model.compute_dtype), shape.head_dim):
            sizes = " ".join(str(found[f"bwd_BLOCK_{name}"]) for name in ("M1", "N1", "M2", "N2"))
            tiles = (
                f"; backward tiles {sizes}, {found['bwd_num_stages']} stages, "
                f"{found['bwd_num_warps']} warps, which spill few registers"
            )
    return f"  parallel.attention: {backend}, {reason}{tiles}"


def peak_text(estimate: Estimate, gpu: GPU) -> str:
    """A run's peak and whether it fits, as part of a sentence."""
    return f"{size_text(estimate.memory.peak)} ({'fits' if estimate.fits(gpu) else 'too much'})"


def verdict_text(estimate: Estimate, gpu: GPU) -> Iterator[str]:
    """Whether it fits, and if not, what the usual changes would do."""
    fits = estimate.fits(gpu)
    yield (
        f"  {'FITS' if fits else 'DOES NOT FIT'} on {estimate.gpus} x {gpu.name}: the limit is "
        f"{size_text(usable(gpu))} ({USABLE_SHARE:.0%} of {size_text(gpu.memory)}, less "
        f"{size_text(RESERVED)} for CUDA, NCCL and workspaces)"
    )
    if fits:
        return
    yield "  the usual changes, each by itself, and the peak with it:"
    for words, changed in remedies(estimate, gpu):
        enough, peak = changed.fits(gpu), size_text(changed.memory.peak)
        fits = fits or enough
        yield f"    {words:<52}{peak:>11}{'  fits' if enough else ''}"
    if not fits:
        yield f"    none of them makes it fit, nor do up to {MOST_GPUS} GPUs"


def time_text(estimate: Estimate, gpu: GPU, price: float | None) -> Iterator[str]:
    """Hours and money, and what they were computed from."""
    gpus, flops = estimate.gpus, estimate.flops
    total, (low, share, high) = sum(flops.values()), UTILISATION
    slow, likely, fast = (estimate.hours(gpu, utilisation) for utilisation in UTILISATION)
    yield f"time on {gpus} x {gpu.name}"
    if slow < 1 / 60:
        yield "  less than a minute of computing"
    else:
        yield (
            f"  about {hours_text(likely)} hours ({hours_text(fast)} to {hours_text(slow)}), "
            f"{hours_text(likely * gpus)} GPU-hours"
        )
    if price is not None:
        cost, least, most = (price * gpus * hours for hours in (likely, fast, slow))
        yield f"  about {cost:,.2f} ({least:,.2f} to {most:,.2f}) at {price:g} per GPU-hour"
    if estimate.config.model.compute_dtype == "float32":
        yield "  several times longer, as compute_dtype float32 cannot use the bfloat16 units"
    shares = ", ".join(f"{name} {part / total:.1%}" for name, part in flops.items() if part)
    yield f"  {total:.3g} FLOP: {shares}"
    yield (
        f"  assumed: {share:.0%} ({high:.0%} to {low:.0%}) of {gpu.peak_flops / 1e12:g} TFLOP/s "
        f"for all of it, {share * flops['model'] / total:.0%} for the model's own; "
        "not measured on this GPU"
    )
    yield "  not counted: start, downloads, tokenization, checkpoints, sample answers"


def table_text(estimate: Estimate) -> Iterator[str]:
    """Every known GPU: how many it takes with these settings, and for how long."""
    heads = ("GPU", "memory", f"fits on {estimate.gpus}", "needed", "hours", "GPU-hours")
    rows = []
    for gpu in GPUS:
        cells = [f"more than {MOST_GPUS}", "", ""]
        if needed := fewest_gpus(estimate, gpu):
            hours = needed.hours(gpu)
            cells = [str(needed.gpus), hours_text(hours), hours_text(hours * needed.gpus)]
        fits = "yes" if estimate.fits(gpu) else "no"
        rows.append((gpu.name, size_text(gpu.memory), fits, *cells))
    yield "known GPUs, with these settings"
    yield from (f"  {line}" for line in text_table(heads, rows).splitlines())
    yield f"  hours at {UTILISATION[1]:.0%} of the peak, an assumption; --gpu NAME says more"
