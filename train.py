"""Direct preference optimisation of a Mistral-architecture model.

    torchrun --nproc_per_node 8 train.py configs/notus.json [section.key=value ...]
    python train.py configs/demo.json                        # one process, the same path

`train` is the loop, the line that a pair of responses travels: pairs -> plan -> packed microbatch
-> response log-probs -> loss -> step. `open_run`, below it, opens what the configuration names.
README.md says where to change what.
"""

import argparse
import gc
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from notus.config import Config, Holdout, Source, load_config, to_dict
from notus.data.packing import slots_of
from notus.data.planning import RunPlan, random_seed
from notus.data.preferences import Pair, load_preferences
from notus.data.tokenization import Tokenized, TokenizedPairs, load_tokenizer, tokenize_pairs
from notus.data.tokenized import WORTH_KEEPING, tokenize_once, tokens_file
from notus.engine import checkpoint, continuation, distributed, history
from notus.engine.checkpoint import Progress, Saver
from notus.engine.distributed import Ranks, accumulate, agree, divide
from notus.engine.evaluation import evaluate
from notus.engine.hardware import gpu_named
from notus.engine.interrupt import Interrupts
from notus.engine.lock import OutputLock
from notus.engine.metrics import (
    MetricsLog,
    Speed,
    Totals,
    Verdict,
    append_line,
    drop_later_lines,
    judge_step,
    nonfinite_pairs,
    pair_metrics,
)
from notus.engine.optim import make_optimizer, schedule_factor
from notus.engine.profiling import profiled
from notus.errors import UserError
from notus.evals.prompts import Prompt, check_prompts, read_prompts
from notus.kernels.dispatch import check_backend
from notus.model.lora import (
    LoraSettings,
    adapter_parameters,
    adapters_off,
    add_adapters,
    export_adapter,
    initialize_adapters,
    is_adapter,
    merge,
    read_adapter,
    tokenizer_folder,
)
from notus.model.mistral import MistralForCausalLM, ModelShape, read_shape
from notus.model.weights import load_weights, model_folder, open_model, weights_identity
from notus.objective.logprobs import (
    Scorer,
    couple_step,
    pack_plan,
    pair_log_probs,
    scorer,
    token_log_probs,
)
from notus.objective.losses import Loss, PairLogProbs, build_loss
from notus.objective.reference import (
    Reference,
    cache_identity,
    cached_log_probs,
    cached_reference,
    check_start,
    follow,
    no_reference,
    online_reference,
    without_adapters,
)
from notus.report.card import write_card
from notus.report.memory import parameter_counts
from notus.report.preflight import Question, preflight, shard_size
from notus.report.samples import record_samples, show_result, write_samples
from notus.report.tokens import DataSet, token_report

NONFINITE = "nonfinite.jsonl"  # of output_dir: steps that were skipped, and their pairs


class Run(NamedTuple):
    """All that a run consists of, opened and ready to go on from `progress`."""

    output: Path
    source: Path  # the folder of the initial policy
    loss: Loss
    plan: RunPlan
    pairs: TokenizedPairs
    origins: list[str]  # where each of the pairs comes from, for messages
    held_out: TokenizedPairs | None
    policy: MistralForCausalLM
    reference: Reference
    held_out_reference: Reference | None
    following: MistralForCausalLM | None  # the reference model, if it follows the policy
    reference_answers: list[str]  # to the first prompts of evaluation.samples
    optimizer: Optimizer
    progress: Progress
    facts: dict[str, Any]  # for checkpoints: what a continuation must have in common, and more


class Inputs(NamedTuple):
    """What a run starts from: data and models, without the weights."""

    loss: Loss
    source: Path  # the folder of the initial policy, or of its base
    adapter: Path | None  # what is to be merged into the base before anything else
    shape: ModelShape
    reference_path: str  # as configured
    reference_folder: Path
    pairs: TokenizedPairs
    origins: list[str]  # where each of the pairs comes from, for messages
    held_out: TokenizedPairs | None
    counts: dict[str, Any]  # what became of each data set, for the model card


def train(
    config: Config,
    ranks: Ranks,
    run: Run,
    saver: Saver,
    interrupts: Interrupts,
    step_done: Callable[[], None],
) -> bool:
    """The loop: from the pairs of each step to the weight update.

    step_done: called after each step, for a profiler. Returns whether all steps were done: False
    when a signal ended it, after a save.
    """
    policy, reference, loss, plan, pairs = run.policy, run.reference, run.loss, run.plan, run.pairs
    tokens = slots_of(pairs.lengths, prefix_sharing=False)  # as two sequences: 2P + C + R
    tokens_seen = sum(int(tokens[plan.pairs_of(done)].sum()) for done in range(run.progress.step))
    log = MetricsLog(run.output, step=run.progress.step, total=plan.steps, active=ranks.first)
    totals = Totals()
    frozen = config.model.lora is not None
    speed = Speed(policy.shape, ranks.count, ranks.device, frozen)
    totals.restore(run.progress.totals, ranks.device)
    skipped, stopped = run.progress.skipped, False
    if ranks.first:
        drop_later_lines(run.output / NONFINITE, run.progress.step)
    if run.progress.step == 0:
        log.write(0, evaluate_held_out(config, ranks, run))

    for step in range(run.progress.step, plan.steps):
        chosen = plan.pairs_of(step)
        division = plan.division(chosen)
        mean_chosen_length = float(pairs.lengths[chosen, 1].mean())
        pair_losses = step_loss_function(config, ranks, run, chosen)
        policy.train()  # dropout in adapters; scoring turns it off
        torch.manual_seed(random_seed(config.train.seed, step, ranks.rank))
        step_loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        step_totals, seen = Totals(), []
        batches = pack_plan(division, pairs, config.data.prefix_sharing, ranks.device)
        for batch in accumulate(policy, batches, len(division.bins), config.parallel.keep_gathered):
            reference_log_probs = reference.of_batch(batch)
            log_probs = token_log_probs(policy, batch, loss.uses_weights)
            scored = pair_log_probs(
                log_probs, reference_log_probs, batch.lengths, mean_chosen_length
            )
            losses = pair_losses(scored, batch.pairs)
            # The step's gradient is the mean over its pairs, whatever the packing and the number
            # of ranks: FSDP sums over ranks and never divides, so this is the only division.
            (losses.sum() / len(chosen)).backward()
            step_loss += losses.detach().sum()
            step_totals.add(pair_metrics(losses.detach(), scored, loss))
            seen.append((batch.pairs, losses.detach()))

        grad_norm = clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm)
        verdict = judge_step(step_loss, grad_norm.full_tensor(), len(chosen), *interrupts.take())
        totals.add_step(step_totals, verdict.finite)
        rate = config.optimizer.learning_rate * schedule_factor(
            step,
            total=plan.steps,
            name=config.schedule.name,
            warmup_ratio=config.schedule.warmup_ratio,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        done = step + 1
        if verdict.finite:
            run.optimizer.step()
            skipped = 0
        else:
            skipped += 1
            report_skipped(config, ranks, run, done, verdict, chosen, seen, skipped)
        run.optimizer.zero_grad()

        # once in a while: let the reference follow (TR-DPO)
        if is_due(done, config.reference.sync_every):
            follow(run.following, policy, config.reference.sync_share)
        tokens_seen += int(tokens[chosen].sum())
        speed.count(pairs.lengths[chosen], int(plan.slot_counts[chosen].sum()), division)
        metrics: dict[str, float] = {}

        # once in a while: log
        if done == plan.steps or is_due(done, config.log.every):
            metrics |= totals.means() | speed.report()
            metrics |= {
                "grad_norm": verdict.grad_norm,
                "learning_rate": rate,
                "epoch": done / plan.steps_per_epoch,
                "num_tokens": tokens_seen,
            }
        # once in a while: evaluate
        if done == plan.steps or is_due(done, config.evaluation.every):
            metrics |= evaluate_held_out(config, ranks, run)
            show_samples(config, ranks, run, log, done)
            speed.restart()
        log.write(done, metrics)
        step_done()
        # once in a while, and when a signal asks for it: save, behind the next steps
        asked = verdict.save or verdict.stop
        if asked or done == plan.steps or is_due(done, config.checkpoint.every):
            progress = Progress(done, totals.snapshot(), skipped)
            saver.save(policy, run.optimizer, run.following, progress)
            speed.restart()
        if verdict.stop:
            stopped = True
            ranks.say(f"stopped by a signal after {done:,} steps; started again, it goes on")
            break
    log.close()
    return not stopped


def report_skipped(
    config: Config,
    ranks: Ranks,
    run: Run,
    done: int,
    verdict: Verdict,
    chosen: np.ndarray,
    seen: list[tuple[Tensor, Tensor]],
    skipped: int,
) -> None:
    """Record which pairs made step `done` not finite: those with such a loss, or else all.

    Raises UserError after train.max_nonfinite such steps in a row, `skipped` counting this one.
    """
    pairs = nonfinite_pairs(seen) or sorted(chosen.tolist())
    path = run.output / NONFINITE
    values = {"loss": f"{verdict.loss:g}", "grad_norm": f"{verdict.grad_norm:g}"}
    what = " and ".join(f"{name} {value}" for name, value in values.items())
    if ranks.first:
        named = [{"index": index, "where": run.origins[index]} for index in pairs]
        append_line(path, {"step": done, **values, "pairs": named})
    ranks.say(f"step {done:,}: {what}: no update; {len(pairs):,} pairs are named in {path}")
    if skipped >= config.train.max_nonfinite:
        raise UserError(
            f"step {done:,}: {what}, the last of {skipped} steps in a row without an update "
            f"(train.max_nonfinite); {path} names the pairs, the first is {run.origins[pairs[0]]}"
        )


def step_loss_function(
    config: Config, ranks: Ranks, run: Run, chosen: np.ndarray
) -> Callable[[PairLogProbs, Tensor], Tensor]:
    """From a microbatch's log-probs and pair indices to its losses [B], within one step.

    Most losses look at one pair at a time. One that sorts the step's pairs needs them all first,
    in a pass without gradient.
    """
    if not run.loss.couples_pairs:
        return lambda scored, indices: run.loss(scored)
    score_pairs = make_scorer(config, run.policy, run.pairs, ranks, run.loss.uses_weights)
    policy, reference = score_pairs(chosen), run.reference.of_pairs(chosen)
    return couple_step(run.loss, policy, reference, run.pairs, chosen)


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after `step` steps; None: never."""
    return every is not None and step % every == 0


def evaluate_held_out(config: Config, ranks: Ranks, run: Run) -> dict[str, float]:
    """The eval_ metrics of the policy as it is now; none without held-out pairs."""
    if run.held_out is None:
        return {}
    score_pairs = make_scorer(config, run.policy, run.held_out, ranks, run.loss.uses_weights)
    reference = run.held_out_reference.of_pairs(range(len(run.held_out)))
    return evaluate(score_pairs, run.held_out, reference, run.loss)


def show_samples(config: Config, ranks: Ranks, run: Run, log: MetricsLog, done: int) -> None:
    """The policy's answers as it is now beside the reference's: samples.md and TensorBoard."""
    if config.evaluation.samples is None:
        return
    answers = answer_samples(config, ranks, run.policy, run.source)
    if ranks.first:
        prompts = sample_prompts(config)
        record_samples(run.output, log.board, done, prompts, run.reference_answers, answers)


def answer_samples(
    config: Config, ranks: Ranks, model: MistralForCausalLM, source: Path
) -> list[str]:
    """The model's answers to the first prompts of evaluation.samples; collective."""
    samples = config.evaluation.samples
    return write_samples(
        model.eval(),
        load_tokenizer(source),
        sample_prompts(config),
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        seed=config.train.seed,
        system_prompt=config.data.system_prompt,
        device=ranks.device,
    )


def sample_prompts(config: Config) -> list[Prompt]:
    """The prompts of evaluation.samples that are shown."""
    return read_prompts(config.evaluation.samples.prompts)[: config.evaluation.samples.count]


def open_run(
    config: Config,
    ranks: Ranks,
    lock: OutputLock,
    *,
    resume: str,
    model_only: bool,
) -> Run | None:
    """Check and open everything; None if there is nothing to train.

    model_only: the policy begins with the weights of the checkpoint `resume`, in a run of its own.
    Raises UserError, alike on all ranks, for what the user can get wrong. Nothing is written before
    data, models and output_dir have been found usable.
    """
    agree(lambda: check_backend(config.parallel.kernels, ranks.device))
    mesh = distributed.make_mesh(ranks, config.parallel.shard, config.parallel.replicate)
    inputs = open_inputs(config, ranks, weights=True)
    loss, source, shape = inputs.loss, inputs.source, inputs.shape
    reference_path, reference_folder = inputs.reference_path, inputs.reference_folder
    pairs, origins, held_out = inputs.pairs, inputs.origins, inputs.held_out
    plan = plan_run(config, pairs, ranks.count)
    output = Path(config.output_dir)
    settings = to_dict(config) | {"loss": loss.settings}
    agree(lambda: continuation.check_output_dir(output, settings, resume))
    given = Path(resume) if model_only else None
    start = agree(lambda: continuation.recorded_start(output, given))
    if continuation.holds_run(output):
        agree(lock.take)
    found = checkpoint.find_checkpoint(
        output / "checkpoints", "auto" if model_only else resume, ranks.say
    )
    if given and not found:
        checkpoint.check_sound(given)
    if given and not start:
        start = weights_identity(str(given.resolve()), given)
    ranks.say(
        f"{plan.steps:,} steps of {plan.pairs_per_step} pairs, {plan.steps_per_epoch:,} per epoch; "
        f"{shape.num_parameters:,} parameters on {ranks.count} x {ranks.device.type}",
    )
    if (output / "final").exists():
        ranks.say(f"{output / 'final'} holds the model of this run: nothing left to do")
        return None
    distributed.check_host_memory(shape.num_parameters, ranks)
    if inputs.adapter:
        agree(lambda: continuation.make_output_dir(output))
        agree(lock.take)
        source = agree(lambda: merged_policy(inputs, output, ranks))
        if config.model.reference is None:
            reference_folder = source

    identity = weights_identity(reference_path, reference_folder) if loss.uses_reference else None
    common = continuation.common_ground(settings, shape, pairs, identity, start, plan.steps)
    if found:
        agree(lambda: checkpoint.check_checkpoint(found, common))
    policy = build_model(config, shape, mesh, ranks, frozen=False)
    agree(lambda: load_weights(policy, source, others=adapter_parameters(policy)))
    initialize_adapters(policy, config.train.seed)
    agree(lambda: continuation.make_output_dir(output))
    agree(lock.take)
    agree(lambda: continuation.write_settings(output, settings, start))
    agree(lambda: continuation.check_shared(output))
    agree(
        lambda: history.record_start(
            output,
            continues=found.name if found else None,
            device=ranks.device,
            data=inputs.counts,
            paths=[
                *(config.model.policy, reference_path),
                *(source.path for source in data_sources(config)),
            ],
        )
    )
    sets = [pairs] if held_out is None else [pairs, held_out]
    references, following = [no_reference(data, ranks.device) for data in sets], None
    if loss.uses_reference:
        ranks.say(f"reference log-probs: {config.reference.log_probs}")
        references, model = open_reference(
            config, policy, source, reference_folder, identity, mesh, ranks, sets
        )
        following = model if config.reference.sync_every else None
    reference_answers = []
    if config.evaluation.samples is not None:
        with adapters_off(policy):
            speaker = model if loss.uses_reference else policy
            reference_answers = answer_samples(config, ranks, speaker, source)
    optimizer = build_optimizer(config, policy)
    progress = Progress(step=0, totals={}, skipped=0)
    if found:
        progress = checkpoint.load_checkpoint(found, policy, optimizer, following)
        ranks.say(f"resumed from {found} after {progress.step:,} steps")
    elif start:
        agree(lambda: checkpoint.load_trained(Path(start["path"]), policy))
        ranks.say(f"the policy begins with the weights of {start['path']}")
    elif loss.uses_reference and reference_folder.resolve() == source.resolve():
        check_first_batch(config, ranks, loss, plan, pairs, policy, references[0])
    return Run(
        output=output,
        source=source,
        loss=loss,
        plan=plan,
        pairs=pairs,
        origins=origins,
        held_out=held_out,
        policy=policy,
        reference=references[0],
        held_out_reference=references[1] if held_out is not None else None,
        following=following,
        reference_answers=reference_answers,
        optimizer=optimizer,
        progress=progress,
        facts={
            "common": common,
            "settings": settings,
            "reference": identity,
            "start": start,
            "pairs": len(pairs),
            "steps_per_epoch": plan.steps_per_epoch,
            "ranks": ranks.count,
        },
    )


def open_inputs(config: Config, ranks: Ranks, *, weights: bool, describe: bool = False) -> Inputs:
    """Check and read what a run starts from, on any device, for any number of ranks.

    weights: whether those of the models must be there. describe: whether to print what the data
    are. Writes nothing but cached tokens. Raises UserError, alike on all ranks.
    """
    loss = make_loss(config)
    check_settings(config, loss)
    source, shape, adapter = agree(lambda: open_policy(config.model.policy, weights))
    reference_path, reference_folder = config.model.policy, source
    if config.model.reference:
        reference_path = config.model.reference
        reference_folder, other = agree(lambda: open_model(reference_path, weights))
        if other.vocab_size != shape.vocab_size:
            raise UserError(
                f"model.reference: {reference_path} has a vocabulary of {other.vocab_size} tokens, "
                f"the policy one of {shape.vocab_size}; expected the same"
            )
    if config.evaluation.samples is not None:
        agree(lambda: check_prompts(config.evaluation.samples.prompts, source))
    spoken = source if adapter is None else tokenizer_folder(source, adapter)
    pairs, origins, held_out, counts = read_data(config, spoken, shape, ranks, describe)
    return Inputs(
        loss=loss,
        source=source,
        adapter=adapter,
        shape=shape,
        reference_path=reference_path,
        reference_folder=reference_folder,
        pairs=pairs,
        origins=origins,
        held_out=held_out,
        counts=counts,
    )


def open_policy(path: str, weights: bool) -> tuple[Path, ModelShape, Path | None]:
    """The policy's folder and shape; of an adapter its base's, and the adapter's folder."""
    folder = model_folder(path, weights)
    if not is_adapter(folder):
        return *open_model(path, weights), None
    base = read_adapter(folder).base_name
    if base is None:
        raise UserError(f"{path}: its adapter_config.json names no base; expected a path or hub id")
    return *open_model(base, weights), folder


def merged_policy(inputs: Inputs, output: Path, ranks: Ranks) -> Path:
    """The folder of the initial policy, in `output` when an adapter has to be merged first."""
    if inputs.adapter is None:
        return inputs.source
    folder = output / "policy"
    if ranks.first and not folder.exists():
        ranks.say(f"merging {inputs.adapter} into {inputs.source}: {folder}")
        merge(inputs.source, inputs.adapter, folder)
    return folder


def dry_run(config: Config, ranks: Ranks, options: argparse.Namespace) -> int:
    """Check everything, report what the run would be; the exit code, 1 if it does not fit."""
    gpu = None if options.gpu is None else gpu_named(options.gpu)
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: expected at least 1")
    if options.price is not None and not 0 < options.price < math.inf:
        raise UserError(f"--price {options.price:g}: expected the price of one GPU for one hour")
    shard, replicate = config.parallel.shard, config.parallel.replicate
    gpus = options.gpus or max(ranks.count, (shard or 1) * replicate)
    shard_size(gpus, shard, replicate)
    inputs = open_inputs(config, ranks, weights=False, describe=True)
    output = Path(config.output_dir)
    settings = to_dict(config) | {"loss": inputs.loss.settings}
    agree(lambda: continuation.check_output_dir(output, settings, options.resume))
    if not options.model_only:
        checkpoint.find_checkpoint(output / "checkpoints", options.resume, ranks.say)
    else:
        checkpoint.check_sound(Path(options.resume))
    counts = parameter_counts(inputs.shape, lora_settings(config))
    same_model = inputs.reference_folder.resolve() == inputs.source.resolve()
    report, fits = preflight(
        Question(
            config=config,
            shape=inputs.shape,
            counts=counts,
            plan=plan_run(config, inputs.pairs, gpus),
            pairs=inputs.pairs,
            held_out=inputs.held_out,
            uses_reference=inputs.loss.uses_reference,
            reference_is_base=counts.frozen > 0 and same_model,
        ),
        gpu,
        options.price,
    )
    ranks.say(report)
    return 0 if fits else 1


def make_loss(config: Config) -> Loss:
    """The configured loss; supervised fine-tuning is one by itself."""
    return build_loss({"name": "sft"} if config.train.objective == "sft" else config.loss.section)


def check_loss(config: Config, options: argparse.Namespace) -> None:
    """Check the section that only the losses know, naming where it was written."""
    try:
        make_loss(config)
    except UserError as error:
        overrides = [word for word in options.overrides if word.startswith("loss")]
        origin = f"command line, {' '.join(overrides)}" if overrides else options.config
        raise UserError(f"{origin}: {error}") from None


def check_settings(config: Config, loss: Loss) -> None:
    """What can only be said once the loss is known."""
    if loss.uses_reference and config.reference.log_probs == "none":
        raise UserError(
            f'reference.log_probs: found "none", but the loss {loss.name} compares the policy with '
            'a reference; expected "cached" or "online"'
        )
    if not loss.uses_reference and config.model.reference is not None:
        raise UserError(f"model.reference: does nothing, because {loss.name} uses no reference")
    if not loss.uses_reference and config.reference.log_probs == "online":
        raise UserError(
            f'reference.log_probs: "online" does nothing, because {loss.name} uses no reference; '
            "leave it out"
        )


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
        ranks.say(f"{name} data: {len(result.pairs):,} pairs{notes}")
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


def build_model(
    config: Config, shape: ModelShape, mesh: DeviceMesh, ranks: Ranks, *, frozen: bool
) -> MistralForCausalLM:
    """A sharded model without weights: float32 if they will change, else compute_dtype."""
    compute_dtype = getattr(torch, config.model.compute_dtype)
    lora = None if frozen else lora_settings(config)
    constant = frozen and config.reference.sync_every is None
    with torch.device("meta"):
        model = MistralForCausalLM(shape, config.parallel.kernels)
        model.to(compute_dtype if constant or lora else torch.float32)
        model.requires_grad_(not frozen)
        if lora:
            add_adapters(model, lora)
    distributed.shard_model(
        model,
        mesh,
        ranks.device,
        compute_dtype=compute_dtype,
        activation_checkpointing="none" if frozen else config.parallel.activation_checkpointing,
        compile_blocks=compiles(config, ranks),
        cpu_offload=config.parallel.cpu_offload,
        dropout=lora is not None and lora.dropout > 0,
    )
    return model.eval()


def lora_settings(config: Config) -> LoraSettings | None:
    """The adapters' settings; None where every parameter is trained."""
    lora = config.model.lora
    if lora is None:
        return None
    return LoraSettings(lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.rslora)


def open_reference(
    config: Config,
    policy: MistralForCausalLM,
    source: Path,
    folder: Path,
    identity: dict[str, str],
    mesh: DeviceMesh,
    ranks: Ranks,
    sets: list[TokenizedPairs],
) -> tuple[list[Reference], MistralForCausalLM]:
    """The reference, whose weights lie in `folder`, over each of `sets`, and the model itself.

    `policy` must hold its initial weights, those of `source`: they are the reference when that is
    the same folder, and stay it under adapters. What a checkpoint restored never is.
    """
    model = policy
    online = config.reference.log_probs == "online"
    same = folder.resolve() == source.resolve()
    if not same or (online and config.model.lora is None):
        model = build_model(config, agree(lambda: read_shape(folder)), mesh, ranks, frozen=True)
        agree(lambda: load_weights(model, folder))
    references = []
    compute_dtype = getattr(torch, config.model.compute_dtype)
    for pairs in sets:
        score_pairs = without_adapters(model, make_scorer(config, model, pairs, ranks))
        if online:
            references.append(online_reference(model, score_pairs))
        else:
            flat = cached_log_probs(
                Path(config.output_dir) / "reference",
                pairs,
                cache_identity(pairs, identity, model.shape, compute_dtype),
                score_pairs,
                ranks.device,
            )
            references.append(cached_reference(flat, pairs))
    return references, model


def check_first_batch(
    config: Config,
    ranks: Ranks,
    loss: Loss,
    plan: RunPlan,
    pairs: TokenizedPairs,
    policy: MistralForCausalLM,
    reference: Reference,
) -> None:
    """Refuse to start when policy and reference, the same weights, disagree on the first batch."""
    division = plan.division(plan.pairs_of(0))
    batch = next(iter(pack_plan(division, pairs, config.data.prefix_sharing, ranks.device)))
    with torch.no_grad():
        log_probs = token_log_probs(policy, batch, loss.uses_weights)
    scored = pair_log_probs(log_probs, reference.of_batch(batch), batch.lengths, 1.0)
    agree(lambda: check_start(loss, scored, getattr(torch, config.model.compute_dtype)))


def make_scorer(
    config: Config,
    model: MistralForCausalLM,
    pairs: TokenizedPairs,
    ranks: Ranks,
    sum_squares: bool = False,
) -> Scorer:
    """Scores pairs of a data set under `model`, without gradient, the work shared by all ranks."""
    return scorer(
        model,
        pairs,
        budget=config.data.tokens_per_microbatch,
        prefix_sharing=config.data.prefix_sharing,
        device=ranks.device,
        sum_squares=sum_squares,
    )


def plan_run(config: Config, pairs: TokenizedPairs, ranks: int) -> RunPlan:
    """Which pairs every step trains on, and how they are divided."""
    return RunPlan(
        slots_of(pairs.lengths, config.data.prefix_sharing),
        pairs_per_step=config.train.pairs_per_step,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        ranks=ranks,
        budget=config.data.tokens_per_microbatch,
    )


def build_optimizer(config: Config, policy: MistralForCausalLM) -> Optimizer:
    """The configured optimiser over the policy's trained parameters, sharded and float32."""
    return make_optimizer(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        name=config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        betas=config.optimizer.betas,
        alpha=config.optimizer.alpha,
        eps=config.optimizer.eps,
        state_dtype=getattr(torch, config.optimizer.state_dtype),
    )


def compiles(config: Config, ranks: Ranks) -> bool:
    """Whether transformer blocks are compiled."""
    wanted = config.parallel.compile
    return ranks.device.type == "cuda" if wanted == "auto" else wanted


def run_to_end(config: Config, ranks: Ranks, run: Run, profile: int | None) -> bool:
    """Train, save and export; whether the run is finished, and not stopped by a signal.

    Raises UserError when its last checkpoint could not be saved.
    """
    saver = Saver(
        run.output / "checkpoints",
        keep=config.checkpoint.keep,
        source=run.source,
        facts=run.facts,
    )
    trace = profiled(run.output / "profile", profile, ranks.rank)
    with Interrupts() as interrupts, saver, trace as step_done:
        finished = train(config, ranks, run, saver, interrupts, step_done)
        unsaved = saver.wait()
    if finished:
        export(config, run)
        ranks.say(f"wrote {run.output / 'final'}")
    agree(lambda: history.record_end(run.output))
    if finished:
        agree(lambda: write_card(run.output) if ranks.first else None)
    if unsaved:
        raise UserError(f"the last checkpoint was not saved: {unsaved}")
    return finished


def export(config: Config, run: Run) -> None:
    """Write final/: the trained model, or its adapters and, if wanted, their sum with the base."""
    final, lora = run.output / "final", lora_settings(config)
    if lora is None:
        checkpoint.export(final, run.policy, run.source)
        return
    agree(
        lambda: export_adapter(
            final,
            run.policy,
            lora,
            base_name=config.model.policy if run.source.parent != run.output else str(run.source),
            base=run.source,
            merged=config.model.lora.merge,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Direct preference optimisation.")
    parser.add_argument("config", help="a JSON file, see configs/ and notus/config.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--gpus", type=int, help="dry run: for how many GPUs; default: as started")
    parser.add_argument("--gpu", metavar="NAME", help="dry run: which, such as a100-40gb")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="trace so many steps")
    parser.add_argument("--price", type=float, help="dry run: of one GPU for one hour")
    parser.add_argument(
        "--resume", default="auto", help="auto (the newest checkpoint), never, or a checkpoint"
    )
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="a new run, whose policy begins with the weights of the checkpoint --resume names",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.model_only and options.resume in ("auto", "never"):
        parser.error("--model-only needs --resume with the folder of a checkpoint")
    if options.profile is not None and options.profile < 1:
        parser.error(f"--profile: found {options.profile}, expected at least 1")
    planned = (options.gpus, options.gpu, options.price)
    if not options.dry_run and planned != (None, None, None):
        parser.error("--gpus, --gpu and --price need --dry-run")
    ranks = None
    try:
        config = load_config(options.config, options.overrides)
        check_loss(config, options)
        ranks = distributed.start("cpu" if options.dry_run else config.parallel.device)
        if options.dry_run:
            return dry_run(config, ranks, options)
        if config.parallel.device == "auto" and ranks.device.type == "cpu":
            ranks.say(f"no CUDA device was found (PyTorch {torch.__version__}): using the CPU")
        with OutputLock(Path(config.output_dir)) as lock:
            run = open_run(
                config,
                ranks,
                lock,
                resume=options.resume,
                model_only=options.model_only,
            )
            if run is not None and run_to_end(config, ranks, run, options.profile):
                source, output = run.source, run.output
                del run  # the models that now answer need the memory
                gc.collect()
                show_result(config, ranks, source, output)
    except UserError as error:
        # Before the ranks have met, the first process of each machine speaks.
        if ranks.first if ranks else os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
