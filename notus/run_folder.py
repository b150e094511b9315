"""output_dir when a run starts: what is found there, and what is written before the first step."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from notus.build import Setup, settings_now, settings_of
from notus.data.dataset import Dataset
from notus.engine import history
from notus.engine.checkpoint import check_sound, checkpoint_identity, find_checkpoint
from notus.engine.lock import OutputLock
from notus.engine.resume import (
    POLICY,
    check_output_dir,
    check_shared,
    holds_run,
    make_output_dir,
    recorded_start,
    remove_leftovers,
    restore_settings,
    write_settings,
)
from notus.errors import agreed
from notus.files import Plain
from notus.model.peft import merge


def find_beginning(setup: Setup, lock: OutputLock, resume: str, model_only: bool) -> Setup:
    """The setup with the checkpoint or the weights that the run begins from; locks a run's folder.

    resume, model_only: options of the command line. Collective. Raises UserError, on every rank,
    for an output_dir or a checkpoint that cannot be used.
    """
    output, ranks, given = setup.output, setup.ranks, Path(resume) if model_only else None
    with agreed():
        settings = settings_of(setup.config)
        check_output_dir(output, settings, resume, settings_now)
    with agreed():
        if ranks.first:
            restore_settings(output, settings, settings_now)
    with agreed():
        start = recorded_start(output, given)
        if holds_run(output):
            lock.take()
    wanted = "auto" if model_only else resume
    found = find_checkpoint(output / "checkpoints", wanted, ranks.say)
    if given and not found:
        check_sound(given)
    if given and not start:
        start = checkpoint_identity(given)
    return replace(setup, checkpoint=found, start=start)


def merge_adapter(setup: Setup, lock: OutputLock) -> Setup:
    """The setup after a policy that is an adapter has been merged into output_dir/policy.

    Collective. Raises UserError, on every rank, when that cannot be written.
    """
    models, output, folder = setup.models, setup.output, setup.output / POLICY
    if models.adapter is None:
        return setup
    with agreed():
        if setup.ranks.first:
            make_output_dir(output)
            lock.take()
            if not holds_run(output):
                shutil.rmtree(folder, ignore_errors=True)  # of a start that was cut short
            if not folder.exists():
                setup.ranks.say(f"merging {models.adapter} into {models.source}: {folder}")
                merge(models.source, models.adapter, folder)
    reference = models.reference if setup.config.model.reference else folder
    models = models._replace(source=folder, adapter=None, reference=reference)
    return replace(setup, models=models)


def claim_output_dir(
    setup: Setup, settings: Plain, lock: OutputLock, data: Mapping[str, Dataset]
) -> None:
    """Make output_dir, lock it, and record the run and this start in it.

    Collective. Raises UserError, on every rank, for a folder that cannot be made, that another run
    has taken, or that not all machines see.
    """
    model, held_out = setup.config.model, setup.config.data.eval_sources
    with agreed():
        if setup.ranks.first:
            make_output_dir(setup.output)
            lock.take()
            remove_leftovers(setup.output)
            write_settings(setup.output, settings, setup.start)
    with agreed():
        check_shared(setup.output)
    held_out = held_out.values() if isinstance(held_out, dict) else held_out
    sources = [*setup.config.data.train, *held_out]
    with agreed():
        if setup.ranks.first:
            history.record_start(
                setup.output,
                continues=setup.checkpoint.name if setup.checkpoint else None,
                device=setup.ranks.device,
                data={n: {"pairs": len(d.pairs), "counts": d.counts} for n, d in data.items()},
                paths=[model.policy, model.reference or model.policy, *(s.path for s in sources)],
            )
