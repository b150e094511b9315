"""Data of a run, for the moment."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from notus.agreement import agree
from notus.config import Config, Holdout, Source
from notus.data.packing import slots_of
from notus.data.preferences import Pair, load_preferences
from notus.data.tokenization import Tokenized, TokenizedPairs, load_tokenizer, tokenize_pairs
from notus.data.tokenized import WORTH_KEEPING, tokenize_once, tokens_file
from notus.dryrun.tokens import DataSet, token_report
from notus.engine.distributed import Ranks, divide
from notus.errors import UserError
from notus.model.mistral import ModelShape


def read_data(
    config: Config, source: Path, shape: ModelShape, ranks: Ranks, describe: bool
) -> tuple[TokenizedPairs, list[str], TokenizedPairs | None, dict[str, Any]]:
    """The training pairs as tokens, where each comes from, the held-out ones, if any, and counts.

    describe: whether to print what they are.
    """
    tokenizer = agree(lambda: load_tokenizer(source))
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is "
            f"{shape.vocab_size}; expected at least as many"
        )
    seed, wanted = config.train.seed, config.data.eval
    holdout = wanted if isinstance(wanted, Holdout) else None
    alone = config.train.objective == "sft"
    other = None
    if wanted and not holdout:
        other = agree(lambda: load_preferences(wanted, seed=seed, responses_only=alone))
    found = agree(
        lambda: load_preferences(
            config.data.train,
            seed=seed,
            holdout=holdout.holdout if holdout else 0,
            holdout_seed=holdout.seed if holdout else None,
            evaluation=other.train if other else (),
            drop_leaks=config.data.leaks == "drop",
            responses_only=alone,
        )
    )
    sets, dropped = {"train": found.train}, {"train": found.dropped}
    if holdout:
        sets["eval"] = found.holdout
    elif other:
        sets["eval"], dropped["eval"] = other.train, other.dropped

    settings = {
        "style": config.data.tokenization,
        "truncation": config.data.truncation,
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "system_prompt": config.data.system_prompt,
    }
    tokenized, described, recorded = {}, {}, {}
    for name, pairs in sets.items():
        result = tokenize_shared(pairs, tokenizer, settings, ranks)
        earlier = dropped.get(name, {})  # a holdout's are counted with the training data's
        counts = {f"dropped: {reason}": n for reason, n in earlier.items()} | result.counts
        notes = "".join(f"; {n:,} {reason}" for reason, n in counts.items())
        ranks.say(f"{name} data: {len(result.pairs):,} {config.train.unit}{notes}")
        if not len(result.pairs):
            raise UserError(f"data.{name}: no pair is left after tokenization{notes}")
        slots = slots_of(result.pairs.lengths, config.data.prefix_sharing)
        if slots.max() > config.data.tokens_per_microbatch:
            longest = pairs[result.kept[slots.argmax()]]
            raise UserError(
                f"{longest.where}: the pair takes {slots.max()} tokens, but "
                f"data.tokens_per_microbatch is {config.data.tokens_per_microbatch}; raise it, or "
                "lower data.max_length"
            )
        origins = [pairs[index].where for index in result.kept]
        tokenized[name] = result.pairs, origins
        described[name] = DataSet(pairs, result, earlier)
        recorded[name] = {"pairs": len(result.pairs), "counts": counts}
    if describe and ranks.first:
        style, colours = config.data.tokenization, sys.stdout.isatty()
        report = token_report(described, tokenizer, style=style, colours=colours)
        print(f"\n{report}\n", flush=True)
    held_out, _ = tokenized.get("eval", (None, None))
    return *tokenized["train"], held_out, recorded


def data_sources(config: Config) -> list[Source]:
    """Every configured dataset, to train on and to evaluate on."""
    held_out = config.data.eval
    return [*config.data.train, *(held_out if isinstance(held_out, tuple) else ())]


def tokenize_shared(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], ranks: Ranks
) -> Tokenized:
    """The pairs' tokens, on every rank.

    Few pairs are divided over the ranks. Of many, one process of each machine makes a file, unless
    an earlier start has left it, and all ranks map it.
    """
    if len(pairs) < WORTH_KEEPING:
        parts = divide(pairs, lambda share: tokenize_pairs(share, tokenizer, **settings))
        return Tokenized.join(parts)
    file = tokens_file(pairs, tokenizer, settings)
    ranks.say(f"tokens: {'read from' if file.is_file() else 'to be kept in'} {file}")
    make = partial(tokenize_once, file, pairs, tokenizer, settings, progress=ranks.first)
    agree(make if os.environ.get("LOCAL_RANK", "0") == "0" else lambda: None)
    return agree(make)
