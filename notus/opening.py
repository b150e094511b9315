"""From a configuration to a run that is ready to go: data, plan, models, reference, checkpoint.

`open_run` is called once, by train.py, on every rank. Nothing here is part of a step.
"""

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from notus.agreement import agree
from notus.config import Config, Holdout, Source, to_dict
from notus.data.packing import slots_of
from notus.data.planning import RunPlan
from notus.data.preferences import Pair, load_preferences
from notus.data.tokenization import Tokenized, TokenizedPairs, load_tokenizer, tokenize_pairs
from notus.data.tokenized import WORTH_KEEPING, tokenize_once, tokens_file
from notus.dryrun.preflight import idle_text
from notus.dryrun.tokens import DataSet, token_report
from notus.engine import checkpoint, distributed, history
from notus.engine import resume as resuming
from notus.engine.checkpoint import Progress
from notus.engine.distributed import Ranks, divide
from notus.engine.lock import OutputLock
from notus.engine.optim import make_optimizer
from notus.engine.progress import progress
from notus.errors import UserError
from notus.generate.prompts import Prompt, check_prompts, read_prompt_set
from notus.generate.samples import write_samples
from notus.kernels.dispatch import check_backend
from notus.model.attention import default_backend
from notus.model.lora import (
    LoraSettings,
    adapter_parameters,
    adapters_off,
    add_adapters,
    check_fits,
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
    pack_plan,
    pair_log_probs,
    scorer,
    token_log_probs,
)
from notus.objective.losses import Loss, build_loss
from notus.objective.reference import (
    Reference,
    cache_identity,
    cached_log_probs,
    cached_reference,
    check_start,
    no_reference,
    online_reference,
    without_adapters,
)


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
    samples = config.evaluation.samples
    return read_prompt_set(samples.prompts).prompts[: samples.count]


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
    loss, shape, pairs, held_out = inputs.loss, inputs.shape, inputs.pairs, inputs.held_out
    agree(lambda: attention_backend(config, shape, ranks.device))
    plan = plan_run(config, pairs, ranks.count)
    output = Path(config.output_dir)
    settings = to_dict(config) | {"loss": loss.settings}
    found, start = find_beginning(
        output, settings, ranks, lock, resume=resume, model_only=model_only
    )
    ranks.say(
        f"{plan.steps:,} steps of {plan.pairs_per_step} {config.train.unit}, "
        f"{plan.steps_per_epoch:,} per epoch; {shape.num_parameters:,} parameters on "
        f"{ranks.count} x {ranks.device.type}",
    )
    if idle := idle_text(plan.pairs_per_step, ranks.count, config.train.unit):
        ranks.say(idle)
    if (output / "final").exists():
        say_finished(output, ranks)
        return None
    if config.model.lora is None:
        distributed.check_host_memory(shape.num_parameters, ranks)
    source, reference_folder = inputs.source, inputs.reference_folder
    if inputs.adapter:
        agree(lambda: resuming.make_output_dir(output))
        agree(lock.take)
        source = agree(lambda: merged_policy(inputs, output, ranks))
        if config.model.reference is None:
            reference_folder = source
    reference_is_source = loss.uses_reference and reference_folder.resolve() == source.resolve()

    identity = None
    if loss.uses_reference:
        identity = weights_identity(inputs.reference_path, reference_folder)
    common = resuming.common_ground(settings, shape, pairs, identity, start, plan.steps)
    if config.model.lora is not None and not reference_is_source:
        # No checkpoint holds the adapters' base. As the reference it would be in `identity`.
        common["base_sha256"] = weights_identity(config.model.policy, source)["sha256"]
    if found:
        agree(lambda: checkpoint.check_checkpoint(found, common))
    policy = build_model(config, shape, mesh, ranks, frozen=False)
    agree(lambda: load_weights(policy, source, others=adapter_parameters(policy)))
    initialize_adapters(policy, config.train.seed)
    claim_output_dir(output, settings, ranks, lock, start=start)
    record_start(config, inputs, ranks, found)

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
    elif reference_is_source:
        check_first_batch(config, ranks, loss, plan, pairs, policy, references[0])
    return Run(
        output=output,
        source=source,
        loss=loss,
        plan=plan,
        pairs=pairs,
        origins=inputs.origins,
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


def find_beginning(
    output: Path,
    settings: dict[str, Any],
    ranks: Ranks,
    lock: OutputLock,
    *,
    resume: str,
    model_only: bool,
) -> tuple[Path | None, dict[str, str] | None]:
    """The checkpoint to go on from, and what start.json says of the weights the policy began with.

    resume, model_only: as for `open_run`. The first is None without a checkpoint, the second for a
    run that began with the policy's folder. The lock is taken if output_dir holds a run.
    Collective. Raises UserError, alike on all ranks, for an output_dir or a checkpoint that cannot
    be used.
    """
    agree(lambda: resuming.check_output_dir(output, settings, resume))
    given = Path(resume) if model_only else None
    start = agree(lambda: resuming.recorded_start(output, given))
    if resuming.holds_run(output):
        agree(lock.take)
    found = checkpoint.find_checkpoint(
        output / "checkpoints", "auto" if model_only else resume, ranks.say
    )
    if given and not found:
        checkpoint.check_sound(given)
    if given and not start:
        start = checkpoint.weights_identity(given)
    return found, start


def say_finished(output: Path, ranks: Ranks) -> None:
    """That output_dir holds the model of the finished run, and what its folder may lack."""
    final = output / "final"
    ranks.say(f"{final} holds the model of this run: nothing left to do")
    if not (final / "README.md").is_file():  # killed after the export
        ranks.say(f"its model card is missing: python -m notus.card {output} writes it")


def claim_output_dir(
    output: Path,
    settings: dict[str, Any],
    ranks: Ranks,
    lock: OutputLock,
    *,
    start: dict[str, str] | None,
) -> None:
    """Make output_dir, lock it, and write down what runs in it.

    start: as from `find_beginning`. Collective. Raises UserError, alike on all ranks, for a folder
    that cannot be made, that another run has taken, or that not all machines see.
    """
    agree(lambda: resuming.make_output_dir(output))
    agree(lock.take)
    agree(lambda: resuming.write_settings(output, settings, start))
    agree(lambda: resuming.check_shared(output))


def record_start(config: Config, inputs: Inputs, ranks: Ranks, found: Path | None) -> None:
    """Add this start to the run's history; found: the checkpoint it goes on from. Collective."""
    sources = (source.path for source in data_sources(config))
    paths = [config.model.policy, inputs.reference_path, *sources]
    agree(
        lambda: history.record_start(
            Path(config.output_dir),
            continues=found.name if found else None,
            device=ranks.device,
            data=inputs.counts,
            paths=paths,
        )
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
    spoken = source if adapter is None else tokenizer_folder(source, adapter)
    if config.evaluation.samples is not None:
        agree(lambda: check_prompts(config.evaluation.samples.prompts, spoken))
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
    adapter = read_adapter(folder)
    if adapter.base_name is None:
        raise UserError(f"{path}: its adapter_config.json names no base; expected a path or hub id")
    base, shape = open_model(adapter.base_name, weights)
    check_fits(adapter, shape)
    return base, shape, folder


def merged_policy(inputs: Inputs, output: Path, ranks: Ranks) -> Path:
    """The folder of the initial policy, in `output` when an adapter has to be merged first."""
    if inputs.adapter is None:
        return inputs.source
    folder = output / resuming.POLICY
    if ranks.first and not resuming.holds_run(output):
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was cut short
    if ranks.first and not folder.exists():
        ranks.say(f"merging {inputs.adapter} into {inputs.source}: {folder}")
        merge(inputs.source, inputs.adapter, folder)
    return folder


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


def build_model(
    config: Config, shape: ModelShape, mesh: DeviceMesh, ranks: Ranks, *, frozen: bool
) -> MistralForCausalLM:
    """A sharded model without weights: float32 if they will change, else compute_dtype."""
    compute_dtype = getattr(torch, config.model.compute_dtype)
    lora = None if frozen else lora_settings(config)
    constant = frozen and config.reference.sync_every is None
    with torch.device("meta"):
        model = MistralForCausalLM(
            shape, config.parallel.kernels, attention_backend(config, shape, ranks.device)
        )
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
        compile_blocks=compiles(config, ranks.device),
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
                show=partial(progress, unit="reference: pair") if ranks.first else None,
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


def compiles(config: Config, device: torch.device) -> bool:
    """Whether transformer blocks are compiled."""
    wanted = config.parallel.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def attention_backend(config: Config, shape: ModelShape, device: torch.device) -> str:
    """The backend of attention. Raises UserError for one that cannot train on the device."""
    wanted, compiled = config.parallel.attention, compiles(config, device)
    if wanted == "auto":
        return default_backend(device, shape.head_dim, compiled)
    reason = None
    if device.type == "cuda":
        if wanted == "varlen" and config.model.compute_dtype == "float32":
            reason = 'with model.compute_dtype "float32": FlashAttention computes in bfloat16'
        elif wanted == "flex" and shape.head_dim < 16:
            reason = f"for heads of {shape.head_dim}, which its kernels do not hold"
    elif wanted == "flex":
        reason = "on the CPU, where it has no backward pass"
    elif wanted == "varlen" and compiled:
        reason = "with parallel.compile on the CPU, where segments are not compiled"
    if reason:
        raise UserError(f'parallel.attention: found "{wanted}" {reason}; expected another')
    return wanted
