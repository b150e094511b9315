"""The protocol of a run's start and of its end.

`open_run` is called once, by train.py, on every rank: nothing is written before data, models and
output_dir have been found usable. `finish` exports the model and closes the run's records.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from notus import build
from notus.build import Setup
from notus.config import Config, to_dict
from notus.console import counted
from notus.data.packing import pack_division
from notus.data.planning import idle_text
from notus.engine import checkpoint, history
from notus.engine.best import Best
from notus.engine.distributed import Ranks
from notus.engine.flops import Speed
from notus.engine.host_memory import check_host_memory
from notus.engine.lock import OutputLock
from notus.engine.log import MetricsLog, warn
from notus.engine.metrics import Meter, Progress
from notus.engine.pair_records import Record, describe_pairs
from notus.engine.saver import Saver
from notus.engine.signals import Interrupts, Stopped
from notus.engine.sinks import open_sinks
from notus.engine.warmup import longest_row, warm_up
from notus.errors import UserError, agreed
from notus.files import Plain
from notus.final import complete_final, export, holds_final, write_model_card
from notus.masking import MASK, masked_keys
from notus.model.attention import check_segments
from notus.model.hf_config import has_vision
from notus.model.lora import adapter_parameters, adapters_off, initialize_adapters
from notus.model.mistral import MistralForCausalLM, count_parameters
from notus.model.weights import hash_weights, load_weights
from notus.objective.logprobs import pair_log_probs, token_log_probs
from notus.objective.reference import Reference, check_start
from notus.resume import check_checkpoint, what_must_match
from notus.run_folder import claim_output_dir, find_beginning, merge_adapter


@dataclass(frozen=True, kw_only=True)
class Run(Setup):
    """Everything that a run consists of, ready to start or resume from `progress`."""

    interrupts: Interrupts
    origins: list[str]  # where each of the pairs comes from, for messages
    policy: MistralForCausalLM
    reference: Reference
    held_out_reference: Reference | None
    held_out_about: list[Record]  # the held-out pairs' origins, labels and lengths, for records
    following: MistralForCausalLM | None  # the reference model, if it follows the policy
    reference_answers: list[str]  # to the first prompts of evaluation.samples
    optimizer: Optimizer
    keep_gathered: bool  # parallel.keep_gathered, with "auto" decided
    facts: Plain  # for checkpoints: what a resumed run must share, and more
    best: Best | None  # the best checkpoint, if evaluation.best names a metric
    progress: Progress = Progress(step=0, totals={}, skipped=0)


def open_run(
    config: Config, ranks: Ranks, lock: OutputLock, interrupts: Interrupts, options: Namespace
) -> Run | None:
    """Check and open everything; None if there is nothing to train, or a signal asks to stop.

    options: resume and model_only of the command line. Collective. Raises UserError, on every rank,
    for what a user can get wrong; nothing but caches is written before data, models and output_dir
    have been found usable.
    """
    setup, data = build.set_up(config, ranks)
    check_predicate(setup)
    setup = find_beginning(setup, lock, options.resume, options.model_only)
    announce(setup)
    if holds_final(setup):
        ranks.say(f"{setup.output / 'final'} holds the model of this run: nothing left to do")
        complete_final(setup)
        return None
    if config.model.lora is None:
        check_host_memory(count_parameters(setup.models.shape), ranks)
    setup = merge_adapter(setup, lock)
    facts = state_facts(setup)
    if setup.checkpoint:
        with agreed():
            check_checkpoint(setup.checkpoint, facts["common"], facts["settings"])
    policy = load_policy(setup)
    claim_output_dir(setup, facts["settings"], lock, data)

    try:
        interrupts.obey_stop()
        references, model = build.build_references(
            setup, policy, facts["reference"], interrupts.obey_stop
        )
        interrupts.obey_stop()
    except Stopped:
        ranks.say("stopped by a signal before the first step; the same command resumes the run")
        with agreed():
            if ranks.first:
                history.record_end(setup.output)
        return None
    answers = []
    if config.evaluation.samples is not None:
        with adapters_off(policy):
            answers = build.answer_samples(setup, model)
    run = Run(
        **vars(setup),
        interrupts=interrupts,
        origins=[pair.where for pair in data["train"].kept],
        policy=policy,
        reference=references["train"],
        held_out_reference=references.get("eval"),
        held_out_about=describe_pairs(data["eval"]) if "eval" in data else [],
        following=model if config.reference.sync_every else None,
        reference_answers=answers,
        optimizer=build.build_optimizer(config, policy),
        keep_gathered=decide_gathering(setup),
        facts=facts,
        best=open_best(setup),
    )
    if run.checkpoint or run.initial_weights:
        run = load_beginning(run)
    elif facts["reference"] and run.models.reference_is_policy:
        check_first_batch(run)
    if ranks.device.type == "cuda" or build.compiles(config, ranks.device):
        batch = longest_row(run.plan, run.pairs, run.rows)
        slots = len(batch.tokens)
        ranks.say(f"first the longest row, {slots:,} slots: to compile, and to see that it fits")
        warm_up(policy, batch, ranks, run.keep_gathered, run.loss.uses_weights)
    return run


def decide_gathering(setup: Setup) -> bool:
    """parallel.keep_gathered; "auto" is what a dry run on these GPUs would choose. Collective.

    Results do not depend on it, so a resumed run may choose otherwise.
    """
    config, ranks, wanted = setup.config, setup.ranks, setup.config.parallel.keep_gathered
    if wanted != "auto" or ranks.device.type == "cpu":
        return wanted is True
    from notus.dryrun.estimate import estimate_run, gathering_text, usable

    memory = torch.tensor(torch.cuda.mem_get_info(ranks.device)[1], device=ranks.device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    sets = setup.pairs, setup.held_out
    estimate = estimate_run(config, ranks.count, setup.models, setup.loss, *sets, steps=())
    try:
        kept = estimate.gathers_once(usable(int(memory)))
    except UserError as error:  # a model that was edited since the memory formula was written
        ranks.say(f"parallel.keep_gathered: off, because {error}")
        return False
    ranks.say(gathering_text(kept))
    return kept


def check_predicate(setup: Setup) -> None:
    """Refuse FlashAttention on CUDA for an edited `may_attend`, which it would ignore. Collective.

    Compares the two on the first packed row, on the CPU. Raises UserError on every rank.
    """
    plan, shape, device = setup.plan, setup.models.shape, setup.ranks.device
    backend = build.attention_backend(setup.config, shape, device)
    if backend != "varlen" or device.type == "cpu":  # segments on the CPU ask may_attend
        return
    rows = setup.rows._replace(device=torch.device("cpu"))
    row = next(pack_division(plan.division(plan.pairs_of(0)), setup.pairs, 0, rows))
    with agreed():
        check_segments(row.layout, shape.sliding_window)


def announce(setup: Setup) -> None:
    """Print the size of the run, the ranks that will idle, and the settings that are masked."""
    plan, ranks, unit = setup.plan, setup.ranks, setup.config.train.unit
    ranks.say(
        f"{counted(plan.steps, 'steps')} of {counted(plan.pairs_per_step, unit)}, "
        f"{plan.steps_per_epoch:,} per epoch; {count_parameters(setup.models.shape):,} parameters "
        f"on {ranks.count} x {ranks.device.type}"
    )
    if has_vision(setup.models.source):
        ranks.say(
            f"{setup.models.source}: its vision tower is left out; the language model is trained, "
            "and written as a folder of its own"
        )
    if idle := idle_text(plan.pairs_per_step, ranks.count, unit):
        ranks.say(idle)
    if ranks.first and (keys := ", ".join(masked_keys(to_dict(setup.config)))):
        warn(f"{keys}: looks like a secret, and is recorded as {MASK}")


def state_facts(setup: Setup) -> Plain:
    """The entries of a checkpoint's state.json that do not change during a run.

    "common" holds what a resumed run must share. Hashes the weights of the models that matter.
    """
    config, models, plan = setup.config, setup.models, setup.plan
    settings, identity, policy = build.settings_of(config), None, config.model.policy
    if setup.loss.uses_reference:
        identity = hash_weights(config.model.reference or policy, models.reference)
    common = what_must_match(
        settings, models.shape, setup.pairs, identity, setup.initial_weights, plan.steps
    )
    if config.model.lora is not None and not (identity and models.reference_is_policy):
        # No checkpoint holds the adapters' base. As the reference it would be in `identity`.
        common["base_sha256"] = hash_weights(policy, models.source)["sha256"]
    return {
        "common": common,
        "settings": settings,
        "reference": identity,
        "start": setup.initial_weights,
        "pairs": len(setup.pairs),
        "steps_per_epoch": plan.steps_per_epoch,
        "ranks": plan.ranks,
    }


def load_policy(setup: Setup) -> MistralForCausalLM:
    """The sharded policy with its initial weights. Collective."""
    policy = build.build_model(setup, setup.models.shape, frozen=False)
    with agreed():
        load_weights(policy, setup.models.source, others=adapter_parameters(policy))
    initialize_adapters(policy, setup.config.train.seed)
    return policy


def open_best(setup: Setup) -> Best | None:
    """The record of the run's best checkpoint; None without evaluation.best. Collective."""
    metric = setup.config.evaluation.best
    if metric is None or setup.held_out is None:
        return None
    best = Best(metric, setup.held_out)
    if setup.checkpoint:
        record = checkpoint.read_state(setup.checkpoint).get("best")
        best.resume(record, setup.output / "checkpoints")
    return best


def load_beginning(run: Run) -> Run:
    """The run with its checkpoint, or the weights that it begins from, loaded. Collective."""
    if run.checkpoint:
        models = run.policy, run.optimizer, run.following
        run = replace(run, progress=checkpoint.load_checkpoint(run.checkpoint, *models))
        run.ranks.say(f"resumed from {run.checkpoint} after {counted(run.progress.step, 'steps')}")
    else:
        path = run.initial_weights["path"]
        with agreed():
            checkpoint.load_trained(Path(path), run.policy)
        run.ranks.say(f"the policy starts from the weights of {path}")
    return run


def check_first_batch(run: Run) -> None:
    """Refuse to start when policy and reference, the same weights, disagree on the first batch."""
    division = run.plan.division(run.plan.pairs_of(0))
    batch = next(pack_division(division, run.pairs, run.ranks.rank, run.rows))
    with torch.no_grad():
        log_probs = token_log_probs(run.policy, batch, run.loss.uses_weights)
    scored = pair_log_probs(log_probs, run.reference.of_batch(batch), batch.lengths, 1.0)
    with agreed():
        words = check_start(run.loss, scored, run.compute_dtype)
    run.ranks.say(f"policy and reference agree on the first pairs: {words}")


def open_saver(run: Run) -> Saver:
    """The saver of the run's checkpoints."""
    return Saver(
        run.output / "checkpoints",
        keep=run.config.checkpoint.keep,
        source=run.models.source,
        facts=run.facts,
        previous=run.progress.step,
        best=run.best,
    )


def open_meter(run: Run) -> Meter:
    """The run's measurements, from where it starts or resumes."""
    work = build.step_work(run.config, run.loss)
    speed = Speed(run.policy.shape, run.ranks.count, run.ranks.device, work)
    return Meter(run.loss, run.plan, run.pairs.lengths, speed, run.progress)


def open_log(run: Run) -> MetricsLog:
    """The run's log files and progress bar. Collective. Raises UserError on every rank."""
    log, settings, first = run.config.log, run.facts["settings"], run.ranks.first
    options = {"project": log.project, "name": log.name, "tags": log.tags or ()}
    to = log.to or ()
    with agreed():
        return MetricsLog(
            run.output,
            step=run.progress.step,
            total=run.plan.steps,
            active=first,
            every=log.every,
            tensorboard="tensorboard" in to,
            sinks=open_sinks(to, run.output, **options, settings=settings) if first else [],
            settings=settings,
        )


def finish(run: Run, finished: bool, unsaved: str | None) -> None:
    """End a start of a run: export the model and write its card, if the run is `finished`.

    unsaved: why the last checkpoint was not saved, if it was not. Collective. Raises UserError, on
    every rank, when the model could not be exported, and for `unsaved` after everything else.
    """
    if finished:
        export(run, run.policy, run.best)
        run.ranks.say(f"wrote {run.output / 'final'}")
    with agreed():
        if run.ranks.first:
            history.record_end(run.output)
    if finished:
        write_model_card(run)
    if unsaved:
        raise UserError(f"the last checkpoint was not saved: {unsaved}")
