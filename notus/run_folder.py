"""output_dir: what is found there when a run starts, and what is written before the first step."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from notus.build import Setup, settings_of
from notus.data.dataset import Dataset
from notus.engine import history
from notus.engine.checkpoint import (
    STATE,
    check_sound,
    checkpoint_identity,
    find_checkpoint,
    newest_state,
)
from notus.engine.lock import NAME as LOCK
from notus.engine.lock import OutputLock
from notus.engine.log import warn
from notus.errors import UserError, agreed
from notus.files import PARTIAL, Plain, read_object, remove_partial, write_json, writing
from notus.model.peft import merge
from notus.resume import are_settings, difference_from

SETTINGS = "config.json"
START = "start.json"  # `Setup.initial_weights`, if there are any
POLICY = "policy"  # the initial policy, where an adapter had to be merged


def find_beginning(setup: Setup, lock: OutputLock, resume: str, model_only: bool) -> Setup:
    """The setup with the checkpoint or the weights that the run begins from; locks a run's folder.

    resume, model_only: options of the command line. Collective. Raises UserError, on every rank,
    for an output_dir or a checkpoint that cannot be used.
    """
    output, ranks, given = setup.output, setup.ranks, Path(resume) if model_only else None
    with agreed():
        settings = settings_of(setup.config)
        check_output_dir(output, settings, resume)
    with agreed():
        if ranks.first:
            _restore_settings(output, settings)
    with agreed():
        initial = _recorded_start(output, given)
        if holds_run(output):
            lock.take()
    wanted = "auto" if model_only else resume
    found = find_checkpoint(output / "checkpoints", wanted, ranks.say)
    if given and not found:
        check_sound(given)
    if given and not initial:
        initial = checkpoint_identity(given)
    return replace(setup, checkpoint=found, initial_weights=initial)


def merge_adapter(setup: Setup, lock: OutputLock) -> Setup:
    """The setup after a policy that is an adapter has been merged into output_dir/policy.

    Collective. Raises UserError, on every rank, when that cannot be written.
    """
    models, output, folder = setup.models, setup.output, setup.output / POLICY
    if models.adapter is None:
        return setup
    with agreed():
        if setup.ranks.first:
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
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
    model, held_out, output = setup.config.model, setup.config.data.eval_sources, setup.output
    with agreed():
        if setup.ranks.first:
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
            lock.take()
            remove_leftovers(output)
            _write_settings(output, settings, setup.initial_weights)
    with agreed():
        if not holds_run(output):
            raise UserError(
                f"output_dir: rank {setup.ranks.rank} does not see {output.resolve()}/{SETTINGS}, "
                "which rank 0 wrote; expected a folder on a file system that all machines share"
            )
    held_out = held_out.values() if isinstance(held_out, dict) else held_out
    sources = [*setup.config.data.train, *held_out]
    with agreed():
        if setup.ranks.first:
            history.record_start(
                output,
                continues=setup.checkpoint.name if setup.checkpoint else None,
                device=setup.ranks.device,
                data={n: {"pairs": len(d.pairs), "counts": d.counts} for n, d in data.items()},
                paths=[model.policy, model.reference or model.policy, *(s.path for s in sources)],
            )


def holds_run(folder: Path) -> bool:
    """Whether a run has started in this output_dir: its settings are there."""
    return (folder / SETTINGS).is_file()


def check_output_dir(folder: Path, settings: Plain, resume: str) -> None:
    """Refuse an output_dir that holds anything except an earlier part of this same run.

    settings: today's, resolved. Raises UserError that names the first settings that differ, or what
    was found there.
    """
    with writing(folder):  # a name that is too long
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder} cannot be used: {nearest} {found}; give another one")
    # The files of a run that was killed before its settings were written.
    begun = {LOCK, START, POLICY}
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if all(name in begun or name.startswith(PARTIAL) for name in names):
        return
    advice = "give another output_dir"
    saves = folder / "checkpoints"
    if os.path.lexists(saves) and not saves.is_dir():  # training would restart, and save nothing
        raise UserError(f"{saves}: found no folder, expected the run's checkpoints; restore them")
    earlier, _ = _recorded_settings(folder, settings)
    if not are_settings(earlier, settings):
        raise UserError(f"output_dir: {folder} is not empty and holds no run; {advice}")
    if different := difference_from(earlier, settings):
        raise UserError(f"output_dir: {folder} holds another run ({different}); {advice}")
    if resume == "never":
        raise UserError(f"output_dir: {folder} holds a run, and --resume is never; {advice}")


def _recorded_settings(folder: Path, settings: Plain) -> tuple[Plain, Path | None]:
    """The settings of the run in output_dir, {} if there is none; and the checkpoint they are from.

    A checkpoint's take the place of damaged ones in SETTINGS (then None): unreadable ones, or
    others than today's where the checkpoint has today's.
    """
    try:
        earlier = read_object(folder / SETTINGS)
    except UserError:
        earlier = {}
    known = are_settings(earlier, settings)
    if not known or difference_from(earlier, settings):
        place, state = newest_state(folder / "checkpoints") or (None, {})
        if place and not (known and difference_from(state["settings"], settings)):
            return state["settings"], place
    return earlier, None


def _restore_settings(folder: Path, settings: Plain) -> None:
    """Restore damaged settings of a run. Raises UserError when that cannot be written."""
    if folder.exists():
        earlier, place = _recorded_settings(folder, settings)
        if place:
            _write_settings(folder, earlier, None)
            warn(f"{folder / SETTINGS} is damaged: restored from {place / STATE}")


def _write_settings(folder: Path, settings: Plain, initial: Plain | None) -> None:
    """Write START, if there is one, and the settings. Raises UserError."""
    with writing(folder):
        if initial is not None:
            write_json(folder / START, initial, durable=True)
        write_json(folder / SETTINGS, settings, durable=True)


def _recorded_start(folder: Path, given: Path | None) -> Plain | None:
    """The contents of START in an output_dir that holds a run; None if it is not there.

    given: the checkpoint whose weights this run is to start with, or None. Raises UserError when
    the run in the folder started with others.
    """
    if not holds_run(folder):
        return None
    record = read_object(folder / START) if (folder / START).exists() else None
    if given is not None:
        began = record["path"] if record else "model.policy"
        if began != str(given.resolve()):
            raise UserError(
                f"output_dir: {folder} holds a run that began from the weights of {began}, not "
                f"of {given}; give another output_dir"
            )
    return record


def remove_leftovers(folder: Path) -> None:
    """Remove what kills have left half-written in output_dir, for the holder of the lock.

    Raises UserError when the file system refuses.
    """
    for place in (folder, folder / "checkpoints", folder / "final"):
        remove_partial(place)
