"""The objects that the configuration names: one or two functions for each of its sections.

These functions are where the configuration ends: they hand plain arguments to the libraries below.
After adding a key, pass it on here. `Setup` holds what they share.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from notus.config import Config, Holdout, to_dict
from notus.console import counted
from notus.data.dataset import Dataset, load_datasets
from notus.data.packing import Rows, slots_of
from notus.data.planning import Plan
from notus.data.token_arrays import TokenizedPairs
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.engine.best import check_metric
from notus.engine.distributed import Ranks
from notus.engine.flops import Work
from notus.engine.log import progress
from notus.engine.optim import make_optimizer, schedule_factor
from notus.engine.sinks import check_installed
from notus.errors import UserError, agreed
from notus.generate.prompts import Prompt, check_template, read_prompt_set
from notus.generate.samples import write_samples
from notus.kernels.dispatch import check_backend
from notus.masking import masked
from notus.model.hf_config import ModelShape, read_shape
from notus.model.lora import add_adapters
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights
from notus.models import Models, attention_backend, compiles, find_models
from notus.objective.loss import Loss, build_loss
from notus.objective.reference import CachedReference, OnlineReference, Reference, no_reference
from notus.objective.reference_cache import cache_identity, cached_log_probs
from notus.strict import parse


def settings_of(config: Config) -> dict[str, Any]:
    """Every key with its resolved value as JSON, the loss's options included, secrets masked."""
    return masked(to_dict(config) | {"loss": make_loss(config).settings})


def settings_now(earlier: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier start recorded, with today's keys: a key they lack has its default.

    Raises UserError for a key that no longer exists, or a value it no longer takes.
    """
    return settings_of(parse(earlier, Config))


def make_loss(config: Config) -> Loss:
    """The configured loss; supervised fine-tuning has only one."""
    return build_loss({"name": "sft"} if config.train.objective == "sft" else config.loss.section)


def check_loss(config: Config, options: argparse.Namespace) -> None:
    """Check the `loss` section and what depends on it. Raises UserError that names its origin."""
    try:
        loss = make_loss(config)
    except UserError as error:
        overrides = [word for word in options.overrides if word.startswith("loss")]
        origin = f"command line, {' '.join(overrides)}" if overrides else options.config
        raise UserError(f"{origin}: {error}") from None
    if loss.uses_reference and config.reference.log_probs == "none":
        raise UserError(
            f'reference.log_probs: found "none", but the loss {loss.name} compares the policy with '
            'a reference; expected "cached" or "online"'
        )
    if not loss.uses_reference and config.model.reference is not None:
        raise UserError(f"model.reference: has no effect, because {loss.name} uses no reference")
    if not loss.uses_reference and config.reference.log_probs == "online":
        raise UserError(
            f'reference.log_probs: "online" has no effect, because {loss.name} uses no reference; '
            "leave it out"
        )


def load_data(
    config: Config, models: Models, ranks: Ranks, purpose: str = "train"
) -> dict[str, Dataset]:
    """The data sets "train", named `purpose` in the log, and perhaps "eval". Collective."""
    data, evaluation = config.data, config.evaluation
    with agreed():
        tokenizer = load_tokenizer(models.tokenizer, models.shape.vocab_size)
        if evaluation.samples is not None:
            path = evaluation.samples.prompts
            check_template(read_prompt_set(path).prompts, path, tokenizer)
    holdout = data.eval if isinstance(data.eval, Holdout) else None
    datasets = load_datasets(
        data.train,
        data.eval_sources,
        tokenizer,
        tokenization={
            "style": data.tokenization,
            "truncation": data.truncation,
            "max_length": data.max_length,
            "max_prompt_length": data.max_prompt_length,
            "system_prompt": data.system_prompt,
        },
        prefix_sharing=data.prefix_sharing,
        tokens_per_microbatch=data.tokens_per_microbatch,
        map_over_ranks=distributed.map_over_ranks,
        seed=config.train.seed if data.seed is None else data.seed,
        holdout=holdout.holdout if holdout else 0,
        holdout_seed=holdout.seed if holdout else None,
        drop_leaks=data.leaks == "drop",
        responses_only=config.train.objective == "sft",
    )
    for name, found in datasets.items():
        for remark in found.remarks:
            ranks.say(remark)
        sets = ", ".join(f"{len(places):,} {each}" for each, places in found.sets.items())
        size = f"{counted(len(found.pairs), config.train.unit)}{f' ({sets})' if sets else ''}"
        ranks.say(f"{purpose if name == 'train' else name} data: {size}{found.notes}")
    return datasets


MOST_STEPS = 10**7  # of a run; a start looks at each of them, for the longest row


def build_plan(config: Config, pairs: TokenizedPairs, ranks: int) -> Plan:
    """The pairs of every step, and their division over `ranks` ranks and microbatches.

    Raises UserError for more than MOST_STEPS.
    """
    plan = Plan(
        slots_of(pairs.lengths, config.data.prefix_sharing),
        pairs_per_step=config.train.pairs_per_step,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        ranks=ranks,
        budget=config.data.tokens_per_microbatch,
    )
    if plan.steps > MOST_STEPS:
        raise UserError(
            f"train.epochs: found {plan.epochs:,}, which makes {plan.steps:,} steps; expected at "
            f"most {MOST_STEPS:,} (train.max_steps limits them)"
        )
    return plan


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run that are found and checked before any weights are loaded."""

    config: Config
    ranks: Ranks
    mesh: DeviceMesh
    models: Models
    loss: Loss
    plan: Plan
    rows: Rows
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    checkpoint: Path | None = None  # the one to resume from
    held_out_sets: Mapping[str, range] = field(default_factory=dict)  # places in `held_out`
    # {"path", "sha256"} of the checkpoint whose weights the policy starts with (--model-only)
    initial_weights: dict[str, str] | None = None

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.compute_dtype)


def set_up(
    config: Config, ranks: Ranks, purpose: str = "train"
) -> tuple[Setup, dict[str, Dataset]]:
    """Find and check what the configuration names; its data sets too, with their text. Collective.

    purpose: as for `load_data`. Raises UserError, on every rank.
    """
    loss, best, sets = make_loss(config), config.evaluation.best, config.data.eval_sources
    with agreed():
        if best is not None and config.data.eval is not None:
            check_metric(best, loss, sets if isinstance(sets, dict) else ())
        check_installed(config.log.to or ())
        check_backend(config.parallel.kernels, ranks.device)
        models = find_models(config, weights=True)
        attention_backend(config, models.shape, ranks.device)
    mesh = distributed.make_mesh(ranks, config.parallel.shard, config.parallel.replicate)
    data = load_data(config, models, ranks, purpose)
    pairs = data["train"].pairs
    setup = Setup(
        config=config,
        ranks=ranks,
        mesh=mesh,
        models=models,
        loss=loss,
        plan=build_plan(config, pairs, ranks.count),
        rows=Rows(config.data.tokens_per_microbatch, config.data.prefix_sharing, ranks.device),
        pairs=pairs,
        held_out=data["eval"].pairs if "eval" in data else None,
        held_out_sets=data["eval"].sets if "eval" in data else {},
    )
    return setup, data


def build_model(setup: Setup, shape: ModelShape, *, frozen: bool) -> MistralForCausalLM:
    """A sharded model without weights: float32 if they will change, else compute_dtype."""
    config, device = setup.config, setup.ranks.device
    lora = None if frozen else config.model.lora
    constant = frozen and config.reference.sync_every is None
    with torch.device("meta"):
        model = MistralForCausalLM(
            shape, config.parallel.kernels, attention_backend(config, shape, device)
        )
        model.to(setup.compute_dtype if constant or lora else torch.float32)
        model.requires_grad_(not frozen)
        if lora:
            add_adapters(model, lora)
    distributed.shard_model(
        model,
        setup.mesh,
        device,
        compute_dtype=setup.compute_dtype,
        activation_checkpointing="none" if frozen else config.parallel.activation_checkpointing,
        compile_blocks=compiles(config, device),
        cpu_offload=config.parallel.cpu_offload,
        dropout=lora is not None and lora.dropout > 0,
    )
    return model.eval()


def reference_folder(setup: Setup) -> Path:
    """The folder of cached reference log-probs, which runs share; see `reference.cache`."""
    given, output = setup.config.reference.cache, setup.output
    if given is not None:
        return Path(given).expanduser()
    runs = Path(os.path.normpath(output / ".."))
    usable = os.access(runs, os.W_OK) and not output.is_mount()
    return runs / "reference-cache" if usable else output / "reference"


def build_references(
    setup: Setup,
    policy: MistralForCausalLM,
    identity: dict[str, str] | None,
    after_part: Callable[[], object],
) -> tuple[dict[str, Reference], MistralForCausalLM]:
    """The reference over the data sets "train" and, if pairs are held out, "eval"; and its model.

    identity: the reference's, or None for a loss that uses none. `policy` must hold its initial
    weights. It serves as the reference if both are the same folder; its adapters, if it has any,
    are turned off for that. after_part: as for `cached_log_probs`. Collective.
    """
    sets = {"train": setup.pairs} | ({} if setup.held_out is None else {"eval": setup.held_out})
    if identity is None:
        return {n: no_reference(pairs, setup.ranks.device) for n, pairs in sets.items()}, policy
    config, models, model = setup.config, setup.models, policy
    online = config.reference.log_probs == "online"
    if not models.reference_is_policy or (online and config.model.lora is None):
        with agreed():
            shape = read_shape(models.reference)
        model = build_model(setup, shape, frozen=True)
        with agreed():
            load_weights(model, models.reference)
    found = {name: OnlineReference(model, pairs, setup.rows) for name, pairs in sets.items()}
    if not online:
        found = {n: _cached(setup, each, identity, after_part) for n, each in found.items()}
    return found, model


def _cached(
    setup: Setup,
    online: OnlineReference,
    identity: dict[str, str],
    after_part: Callable[[], object],
) -> CachedReference:
    """The reference's log-probs, read from disk or computed once and kept there."""
    pairs, ranks, shared = online.pairs, setup.ranks, setup.rows.prefix_sharing
    flat = cached_log_probs(
        reference_folder(setup),
        setup.output / "reference",
        cache_identity(pairs, identity, online.model.shape, setup.compute_dtype, shared),
        online,
        show=partial(progress, unit="reference: pair", delay=5.0, disable=not ranks.first),
        say=ranks.say,
        after_part=after_part,
    )
    return CachedReference(flat, pairs)


def build_optimizer(config: Config, policy: MistralForCausalLM) -> Optimizer:
    """The configured optimiser over the policy's trained parameters, sharded and float32."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    offloaded = config.parallel.cpu_offload
    return make_optimizer(
        trained,
        name=config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        betas=config.optimizer.betas,
        alpha=config.optimizer.alpha,
        eps=config.optimizer.eps,
        state_dtype=getattr(torch, config.optimizer.state_dtype),
        offloaded=offloaded,
        compiled=compiles(config, trained[0].device) and not offloaded,
    )


def set_learning_rate(config: Config, plan: Plan, optimizer: Optimizer, step: int) -> float:
    """Set the learning rate of optimiser step `step`, counted from 0, and return it."""
    name, warmup = config.schedule.name, config.schedule.warmup_ratio
    factor = schedule_factor(step, total=plan.steps, name=name, warmup_ratio=warmup)
    rate = config.optimizer.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def step_work(config: Config, loss: Loss) -> Work:
    """The work of a step apart from the policy's forward and backward passes, for its FLOPs."""
    online = loss.uses_reference and config.reference.log_probs == "online"
    return Work(
        frozen=config.model.lora is not None,
        recomputed=config.parallel.activation_checkpointing == "full",
        scorings=online + loss.couples_pairs * (1 + online),
    )


def sample_prompts(config: Config) -> list[Prompt]:
    """The prompts of evaluation.samples that are shown."""
    samples = config.evaluation.samples
    return read_prompt_set(samples.prompts).prompts[: samples.count]


def answer_samples(setup: Setup, model: MistralForCausalLM) -> list[str]:
    """The model's answers to the prompts of evaluation.samples that are shown. Collective."""
    samples = setup.config.evaluation.samples
    return write_samples(
        model.eval(),
        load_tokenizer(setup.models.source),
        sample_prompts(setup.config),
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        seed=setup.config.train.seed,
        system_prompt=setup.config.data.system_prompt,
        device=setup.ranks.device,
    )
