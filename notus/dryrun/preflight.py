"""`train.py CONFIG --dry-run`: whether a run fits, how long it takes and what it costs.

Everything is checked as at the start of a run, on the CPU and without the models' weights.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

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
from notus.data.dataset import Dataset
from notus.data.oddities import oddities
from notus.data.tokenizer import load_tokenizer
from notus.dryrun.estimate import estimate_run
from notus.dryrun.report import report
from notus.dryrun.tokens import token_report
from notus.engine import checkpoint
from notus.engine.distributed import Ranks
from notus.engine.flops import gpu_named
from notus.errors import UserError, agreed
from notus.look.look import command_for
from notus.run_folder import check_output_dir


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
    ranks.say(report(estimate, gpu, options.price))
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
