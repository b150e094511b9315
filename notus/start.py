"""The protocol of a run's start and of its end.

`open_run` is called once, by train.py, on every rank: nothing is written before data, models and
output_dir have been found usable. `finish` exports the model and closes the run's records.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from notus import build
from notus.build import Models
from notus.config import Config
from notus.data.dataset import Dataset
from notus.data.packing import Rows, pack_division
from notus.data.planning import Plan, idle_text
from notus.data.tokenization import TokenizedPairs
from notus.engine import checkpoint, distributed, history
from notus.engine import resume as resuming
from notus.engine.distributed import Ranks
from notus.engine.flops import Speed
from notus.engine.lock import OutputLock
from notus.engine.log import MetricsLog
from notus.engine.metrics import Meter, Progress
from notus.engine.saver import Saver, export_model
from notus.errors import UserError, agreed
from notus.kernels.dispatch import check_backend
from notus.model.attention import check_segments
from notus.model.lora import adapter_parameters, adapters_off, initialize_adapters
from notus.model.mistral import MistralForCausalLM, count_parameters
from notus.model.peft import export_adapter, merge
from notus.model.weights import hash_weights, load_weights
from notus.objective.logprobs import pair_log_probs, token_log_probs
from notus.objective.loss import Loss
from notus.objective.reference import Reference, check_start


class Run(NamedTuple):
    """Everything that a run consists of, ready to start or resume from `progress`."""

    config: Config
    ranks: Ranks
    output: Path
    source: Path  # the folder of the initial policy
    loss: Loss
    plan: Plan
    rows: Rows
    pairs: TokenizedPairs
    origins: list[str]  # where each of the pairs comes from, for messages
    held_out: TokenizedPairs | None
    policy: MistralForCausalLM
    reference: Reference
    held_out_reference: Reference  # unused without held-out pairs
    following: MistralForCausalLM | None  # the reference model, if it follows the policy
    reference_answers: list[str]  # to the first prompts of evaluation.samples
    optimizer: Optimizer
    progress: Progress
    facts: dict[str, Any]  # for checkpoints: what a resumed run must share, and more


class Beginning(NamedTuple):
    """What a run begins from.

    checkpoint: the one to resume from, if any. start: the content of start.json, the checkpoint
    whose weights a new run takes (--model-only); None where it takes those of model.policy.
    """

    checkpoint: Path | None
    start: dict[str, str] | None


NEW = Beginning(None, None)


def open_run(
    config: Config, ranks: Ranks, lock: OutputLock, *, resume: str, model_only: bool
) -> Run | None:
    """Check and open everything; None if there is nothing to train.

    model_only: a new run whose policy starts from the weights of the checkpoint `resume`.
    Collective. Raises UserError, on every rank, for what a user can get wrong; nothing but caches
    is written before data, models and output_dir have been found usable.
    """
    output = Path(config.output_dir)
    with agreed():
        check_backend(config.parallel.kernels, ranks.device)
        models = build.find_models(config, weights=True)
        build.attention_backend(config, models.shape, ranks.device)
    mesh = distributed.make_mesh(ranks, config.parallel.shard, config.parallel.replicate)
    loss = build.make_loss(config)
    data = build.load_data(config, models, ranks)
    pairs, held_out = data["train"].pairs, data["eval"].pairs if "eval" in data else None
    plan = build.build_plan(config, pairs, ranks.count)
    rows = build.build_rows(config, ranks)
    check_predicate(config, models, plan, pairs, rows)
    begin = find_beginning(config, ranks, lock, resume=resume, model_only=model_only)
    announce(config, ranks, plan, models)
    if (output / "final").exists():
        say_finished(output, ranks)
        return None
    if config.model.lora is None:
        distributed.check_host_memory(count_parameters(models.shape), ranks)
    models = merge_adapter(config, models, ranks, lock)
    facts = state_facts(config, loss, models, pairs, plan, begin)
    if begin.checkpoint:
        settings = facts["settings"]
        with agreed():
            resuming.check_checkpoint(
                begin.checkpoint, facts["common"], settings, build.settings_now
            )
    policy = load_policy(config, models, mesh, ranks)
    claim_output_dir(output, facts["settings"], lock, begin)
    record_start(config, models, ranks, begin, data)

    sets = [pairs] if held_out is None else [pairs, held_out]
    references, model = build.build_references(
        config, models, policy, facts["reference"], mesh, ranks, sets
    )
    following = model if config.reference.sync_every else None
    answers = []
    if config.evaluation.samples is not None:
        with adapters_off(policy):
            answers = build.answer_samples(config, ranks, model, models.source)
    optimizer = build.build_optimizer(config, policy)
    progress = restore(begin, policy, optimizer, following, ranks)
    if begin == NEW and facts["reference"] and models.reference_is_policy:
        check_first_batch(config, ranks, loss, plan, pairs, rows, policy, references[0])
    return Run(
        config=config,
        ranks=ranks,
        output=output,
        source=models.source,
        loss=loss,
        plan=plan,
        rows=rows,
        pairs=pairs,
        origins=[pair.where for pair in data["train"].kept],
        held_out=held_out,
        policy=policy,
        reference=references[0],
        held_out_reference=references[-1],
        following=following,
        reference_answers=answers,
        optimizer=optimizer,
        progress=progress,
        facts=facts,
    )


def check_predicate(
    config: Config, models: Models, plan: Plan, pairs: TokenizedPairs, rows: Rows
) -> None:
    """Refuse FlashAttention on CUDA for an edited `may_attend`, which it would ignore. Collective.

    Compares the two on the first packed row, on the CPU. Raises UserError on every rank.
    """
    backend = build.attention_backend(config, models.shape, rows.device)
    if backend != "varlen" or rows.device.type == "cpu":  # segments on the CPU ask may_attend
        return
    division = plan.division(plan.pairs_of(0))
    row = next(pack_division(division, pairs, 0, rows._replace(device=torch.device("cpu"))))
    with agreed():
        check_segments(row.layout, models.shape.sliding_window)


def find_beginning(
    config: Config, ranks: Ranks, lock: OutputLock, *, resume: str, model_only: bool
) -> Beginning:
    """What the run in output_dir begins from; the lock is taken if the folder holds a run.

    resume, model_only: as for `open_run`. Collective. Raises UserError, on every rank, for an
    output_dir or a checkpoint that cannot be used.
    """
    output, given = Path(config.output_dir), Path(resume) if model_only else None
    with agreed():
        resuming.check_output_dir(output, build.settings_of(config), resume, build.settings_now)
        start = resuming.recorded_start(output, given)
        if resuming.holds_run(output):
            lock.take()
    found = checkpoint.find_checkpoint(
        output / "checkpoints", "auto" if model_only else resume, ranks.say
    )
    if given and not found:
        checkpoint.check_sound(given)
    if given and not start:
        start = checkpoint.checkpoint_identity(given)
    return Beginning(found, start)


def state_facts(
    config: Config,
    loss: Loss,
    models: Models,
    pairs: TokenizedPairs,
    plan: Plan,
    begin: Beginning,
) -> dict[str, Any]:
    """The entries of a checkpoint's state.json that do not change during a run.

    "common" holds what a resumed run must share. Hashes the weights of the models that matter.
    """
    settings, identity = build.settings_of(config), None
    if loss.uses_reference:
        identity = hash_weights(models.reference_path, models.reference)
    common = resuming.what_must_match(
        settings, models.shape, pairs, identity, begin.start, plan.steps
    )
    if config.model.lora is not None and not (identity and models.reference_is_policy):
        # No checkpoint holds the adapters' base. As the reference it would be in `identity`.
        common["base_sha256"] = hash_weights(config.model.policy, models.source)["sha256"]
    return {
        "common": common,
        "settings": settings,
        "reference": identity,
        "start": begin.start,
        "pairs": len(pairs),
        "steps_per_epoch": plan.steps_per_epoch,
        "ranks": plan.ranks,
    }


def load_policy(
    config: Config, models: Models, mesh: DeviceMesh, ranks: Ranks
) -> MistralForCausalLM:
    """The sharded policy with its initial weights. Collective."""
    policy = build.build_model(config, models.shape, mesh, ranks, frozen=False)
    with agreed():
        load_weights(policy, models.source, others=adapter_parameters(policy))
    initialize_adapters(policy, config.train.seed)
    return policy


def restore(
    begin: Beginning,
    policy: MistralForCausalLM,
    optimizer: Optimizer,
    following: MistralForCausalLM | None,
    ranks: Ranks,
) -> Progress:
    """Load what the run begins from into policy, optimiser and reference; the run's position."""
    if begin.checkpoint:
        progress = checkpoint.load_checkpoint(begin.checkpoint, policy, optimizer, following)
        ranks.say(f"resumed from {begin.checkpoint} after {progress.step:,} steps")
        return progress
    if begin.start:
        with agreed():
            checkpoint.load_trained(Path(begin.start["path"]), policy)
        ranks.say(f"the policy starts from the weights of {begin.start['path']}")
    return Progress(step=0, totals={}, skipped=0)


def announce(config: Config, ranks: Ranks, plan: Plan, models: Models) -> None:
    """Print the size of the run, and how many ranks will have no pairs, if any."""
    ranks.say(
        f"{plan.steps:,} steps of {plan.pairs_per_step} {config.train.unit}, "
        f"{plan.steps_per_epoch:,} per epoch; {count_parameters(models.shape):,} parameters on "
        f"{ranks.count} x {ranks.device.type}",
    )
    if idle := idle_text(plan.pairs_per_step, ranks.count, config.train.unit):
        ranks.say(idle)


def say_finished(output: Path, ranks: Ranks) -> None:
    """Print that output_dir holds the model of the finished run, and what it may lack."""
    final = output / "final"
    ranks.say(f"{final} holds the model of this run: nothing left to do")
    if not (final / "README.md").is_file():  # killed after the export
        ranks.say(f"its model card is missing: python -m notus.card {output} writes it")


def merge_adapter(config: Config, models: Models, ranks: Ranks, lock: OutputLock) -> Models:
    """The same models, with the policy's adapter merged into a folder of output_dir. Collective.

    Raises UserError, on every rank, when that cannot be written.
    """
    if models.adapter is None:
        return models
    output = Path(config.output_dir)
    folder = output / resuming.POLICY
    with agreed():
        resuming.make_output_dir(output)
        lock.take()
    with agreed():
        if ranks.first and not resuming.holds_run(output):
            shutil.rmtree(folder, ignore_errors=True)  # of a start that was cut short
        if ranks.first and not folder.exists():
            ranks.say(f"merging {models.adapter} into {models.source}: {folder}")
            merge(models.source, models.adapter, folder)
    models = models._replace(source=folder, adapter=None)
    return models if config.model.reference else models._replace(reference=folder)


def claim_output_dir(
    output: Path, settings: dict[str, Any], lock: OutputLock, begin: Beginning
) -> None:
    """Make output_dir, lock it, and record the run in it.

    Collective. Raises UserError, on every rank, for a folder that cannot be made, that another run
    has taken, or that not all machines see.
    """
    with agreed():
        resuming.make_output_dir(output)
        lock.take()
        resuming.write_settings(output, settings, begin.start)
    with agreed():
        resuming.check_shared(output)


def record_start(
    config: Config, models: Models, ranks: Ranks, begin: Beginning, data: dict[str, Dataset]
) -> None:
    """Add this start to the run's history. Collective."""
    held_out = config.data.eval if isinstance(config.data.eval, tuple) else ()
    sources = (source.path for source in (*config.data.train, *held_out))
    with agreed():
        history.record_start(
            Path(config.output_dir),
            continues=begin.checkpoint.name if begin.checkpoint else None,
            device=ranks.device,
            data={
                name: {"pairs": len(dataset.pairs), "counts": dataset.counts}
                for name, dataset in data.items()
            },
            paths=[config.model.policy, models.reference_path, *sources],
        )


def check_first_batch(
    config: Config,
    ranks: Ranks,
    loss: Loss,
    plan: Plan,
    pairs: TokenizedPairs,
    rows: Rows,
    policy: MistralForCausalLM,
    reference: Reference,
) -> None:
    """Refuse to start when policy and reference, the same weights, disagree on the first batch."""
    division = plan.division(plan.pairs_of(0))
    batch = next(pack_division(division, pairs, ranks.rank, rows))
    with torch.no_grad():
        log_probs = token_log_probs(policy, batch, loss.uses_weights)
    scored = pair_log_probs(log_probs, reference.of_batch(batch), batch.lengths, 1.0)
    with agreed():
        words = check_start(loss, scored, getattr(torch, config.model.compute_dtype))
    ranks.say(f"policy and reference agree on the first pairs: {words}")


def open_saver(run: Run) -> Saver:
    """The saver of the run's checkpoints."""
    return Saver(
        run.output / "checkpoints",
        keep=run.config.checkpoint.keep,
        source=run.source,
        facts=run.facts,
        previous=run.progress.step,
    )


def open_meter(run: Run) -> Meter:
    """The run's measurements, from where it starts or resumes."""
    work = build.step_work(run.config, run.loss)
    speed = Speed(run.policy.shape, run.ranks.count, run.ranks.device, work)
    return Meter(run.loss, run.plan, run.pairs.lengths, speed, run.progress)


def open_log(run: Run) -> MetricsLog:
    """The run's log files and progress bar. Collective. Raises UserError on every rank."""
    first, done = run.ranks.first, run.progress.step
    with agreed():
        log = MetricsLog(run.output, step=done, total=run.plan.steps, active=first)
    return log


def finish(run: Run, finished: bool, unsaved: str | None) -> None:
    """End a start of a run: export the model and write its card, if the run is `finished`.

    unsaved: why the last checkpoint was not saved, if it was not. Collective. Raises UserError, on
    every rank, when the model could not be exported, and for `unsaved` after everything else.
    """
    if finished:
        export(run)
        run.ranks.say(f"wrote {run.output / 'final'}")
    with agreed():
        history.record_end(run.output)
    if finished:
        from notus.card.card import write_card

        with agreed():
            if run.ranks.first:
                write_card(run.output)
    if unsaved:
        raise UserError(f"the last checkpoint was not saved: {unsaved}")


def export(run: Run) -> None:
    """Write final/: the trained model, or its adapters and, if wanted, their sum with the base."""
    final, lora = run.output / "final", run.config.model.lora
    if lora is None:
        export_model(final, run.policy, run.source)
        return
    merged_here = run.source.parent == run.output
    export_adapter(
        final,
        run.policy,
        lora,
        base_name=str(run.source) if merged_here else run.config.model.policy,
        base=run.source,
    )
