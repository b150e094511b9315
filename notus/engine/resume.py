"""The output_dir of a run, and what a run must have in common with the one that it resumes.

The settings of an earlier start and today's are compared after both have been resolved, so that a
key which the earlier program did not have counts with its default.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from notus.data.token_arrays import TokenizedPairs
from notus.engine import checkpoint, lock
from notus.engine.log import warn
from notus.errors import UserError
from notus.files import PARTIAL, Plain, read_object, remove_partial, write_json, writing
from notus.model.hf_config import ModelShape
from notus.strict import show

Resolve = Callable[[Plain], Plain]

SETTINGS = "config.json"
START = "start.json"  # {"path", "sha256"}: the checkpoint whose weights a run started with, if any
POLICY = "policy"  # the initial policy, where an adapter had to be merged

# Settings that may change between a run and its resumption: none of them changes what is learnt.
MAY_CHANGE = (
    "output_dir",
    "parallel",
    "log",
    "checkpoint",
    "evaluation",
    "data.eval",
    "data.tokens_per_microbatch",
    "data.prefix_sharing",
    "reference.log_probs",
    "reference.cache",
    "train.max_nonfinite",
)
# Places of models and data; a checkpoint holds the hashes of their contents instead.
PATHS = ("model.policy", "model.reference", "data.train")


def settings_that_matter(settings: Plain, ignored: tuple[str, ...] = MAY_CHANGE) -> Plain:
    """The resolved settings by dotted key, without the `ignored` sections and keys."""
    flat = {}
    for section, values in settings.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return {key: v for key, v in flat.items() if not {key, key.split(".")[0]} & set(ignored)}


def holds_run(folder: Path) -> bool:
    """Whether a run has started in this output_dir: its settings are there."""
    return (folder / SETTINGS).is_file()


def check_output_dir(folder: Path, settings: Plain, resume: str, resolve: Resolve) -> None:
    """Refuse an output_dir that holds anything except an earlier part of this same run.

    resolve: `build.settings_now`. Raises UserError that names the first settings that differ, or
    what was found there.
    """
    with writing(folder):  # a name that is too long
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder} cannot be used: {nearest} {found}; give another one")
    # The files of a run that was killed before its settings were written.
    begun = {lock.NAME, START, POLICY}
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if all(name in begun or name.startswith(PARTIAL) for name in names):
        return
    advice = "give another output_dir"
    saves = folder / "checkpoints"
    if os.path.lexists(saves) and not saves.is_dir():  # training would restart, and save nothing
        raise UserError(f"{saves}: found no folder, expected the run's checkpoints; restore them")
    earlier, _ = recorded_settings(folder, settings, resolve)
    if not _are_settings(earlier, settings):
        raise UserError(f"output_dir: {folder} is not empty and holds no run; {advice}")
    if different := _other_run(earlier, settings, resolve):
        raise UserError(f"output_dir: {folder} holds another run ({different}); {advice}")
    if resume == "never":
        raise UserError(f"output_dir: {folder} holds a run, and --resume is never; {advice}")


def recorded_settings(folder: Path, settings: Plain, resolve: Resolve) -> tuple[Plain, Path | None]:
    """The settings of the run in output_dir, {} if there is none; and the checkpoint they are from.

    A checkpoint's take the place of damaged ones in SETTINGS (then None): unreadable ones, or
    others than today's where the checkpoint has today's. settings, resolve: as above.
    """
    try:
        earlier = read_object(folder / SETTINGS)
    except UserError:
        earlier = {}
    known = _are_settings(earlier, settings)
    if not known or _other_run(earlier, settings, resolve):
        place, state = checkpoint.newest_state(folder / "checkpoints") or (None, {})
        if place and not (known and _other_run(state["settings"], settings, resolve)):
            return state["settings"], place
    return earlier, None


def restore_settings(folder: Path, settings: Plain, resolve: Resolve) -> None:
    """Restore damaged settings of a run. Raises UserError when that cannot be written."""
    if folder.exists():
        earlier, place = recorded_settings(folder, settings, resolve)
        if place:
            write_settings(folder, earlier, None)
            warn(f"{folder / SETTINGS} is damaged: restored from {place / checkpoint.STATE}")


def _are_settings(found: Plain, settings: Plain) -> bool:
    """Whether a JSON object can be a run's settings, by today's keys and types."""
    shared = found.keys() & settings.keys()
    return bool(shared) and all(type(found[key]) is type(settings[key]) for key in shared)


def _other_run(earlier: Plain, settings: Plain, resolve: Resolve) -> str:
    """How an earlier start's settings differ from today's, in words; "" if none that matter do."""
    try:
        before = _resolved(earlier, settings, MAY_CHANGE, resolve)
        return differences(before, settings_that_matter(settings))
    except UserError as error:
        return str(error)


def check_checkpoint(folder: Path, common: Plain, settings: Plain, resolve: Resolve) -> None:
    """Refuse a checkpoint of a run that differs in `common`, which `what_must_match` gave.

    settings, resolve: as for `check_output_dir`. Raises UserError that names what differs.
    """
    state = checkpoint.read_state(folder)
    earlier = state["common"]
    try:
        earlier |= _resolved(state["settings"], settings, MAY_CHANGE + PATHS, resolve)
        defaults = {f.name: f.default for f in fields(ModelShape) if f.default is not MISSING}
        earlier["model_shape"] = defaults | earlier["model_shape"]
        different = differences(earlier, common)
    except UserError as error:
        different = str(error)
    if different:
        raise UserError(
            f"{folder}: made by another run ({different}); resume with the settings it was made "
            "with, or start a new run in another output_dir"
        )


def _resolved(earlier: Plain, settings: Plain, ignored: tuple[str, ...], resolve: Resolve) -> Plain:
    """The settings that matter of an earlier start, under today's keys.

    Those that are `ignored` do not have to be readable: today's take their place.
    """
    matter = settings_that_matter(settings, ignored)
    today = {k: v for k, v in settings_that_matter(settings, ()).items() if k not in matter}
    nested: Plain = {}
    for key, value in (settings_that_matter(earlier, ignored) | today).items():
        section, _, name = key.partition(".")
        nested[section] = nested.get(section, {}) | {name: value} if name else value
    return settings_that_matter(resolve(nested), ignored)


def what_must_match(
    settings: Plain,
    shape: ModelShape,
    pairs: TokenizedPairs,
    reference: Mapping[str, Any] | None,
    start: Mapping[str, Any] | None,
    steps: int,
) -> Plain:
    """The facts a run and its resumption must share: settings, model, data, reference, steps."""
    return settings_that_matter(settings, MAY_CHANGE + PATHS) | {
        "model_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "reference_sha256": reference["sha256"] if reference else None,
        "start_sha256": start["sha256"] if start else None,
        "steps": steps,
    }


# A reader learns nothing from two hashes; these words say what differs.
HASH_WORDS = {
    "tokens_sha256": "the training pairs' tokens differ (the data, its order or the tokenizer)",
    "reference_sha256": "the reference's weights differ",
    "base_sha256": "the weights under the adapters differ",
    "start_sha256": "the checkpoint whose weights the run began from differs",
}


def differences(before: Plain, now: Plain) -> str:
    """The first three entries that differ, in words, and how many more do; "" if none do."""
    found = list(_differing(before, now))
    words = [
        HASH_WORDS.get(key, f"{key} was {show(one)} and is {show(other)}")
        for key, one, other in found[:3]
    ]
    return "; ".join([*words, f"and {len(found) - 3} more"] if len(found) > 3 else words)


def _differing(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, earlier and present value of each entry of nested objects or lists that differs.

    An entry that one side lacks counts as null there.
    """
    if isinstance(before, list) and isinstance(now, list):
        before, now = ({str(i): item for i, item in enumerate(x)} for x in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            at = f"{key}.{name}" if key else name
            yield from _differing(before.get(name), now.get(name), at)
    elif before != now:
        yield key, before, now


def recorded_start(folder: Path, given: Path | None) -> Plain | None:
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


def make_output_dir(folder: Path) -> None:
    """Create output_dir. Raises UserError when the file system refuses."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what kills have left half-written in output_dir, for the holder of the lock.

    Raises UserError when the file system refuses.
    """
    for place in (folder, folder / "checkpoints", folder / "final"):
        remove_partial(place)


def write_settings(folder: Path, settings: Plain, start: Plain | None) -> None:
    """Write START, if there is one, and the settings. Raises UserError."""
    with writing(folder):
        if start is not None:
            write_json(folder / START, start, durable=True)
        write_json(folder / SETTINGS, settings, durable=True)


def check_shared(folder: Path) -> None:
    """Refuse an output_dir that rank 0 wrote to and this rank does not see."""
    if not holds_run(folder):
        raise UserError(
            f"output_dir: rank {dist.get_rank()} does not see {folder.resolve()}/{SETTINGS}, "
            "which rank 0 wrote; expected a folder on a file system that all machines share"
        )
