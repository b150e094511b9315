"""Whose output_dir it is, and what a run must have in common with the one that it continues."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from notus.data.tokenization import TokenizedPairs
from notus.engine import lock
from notus.errors import UserError
from notus.model.hf_config import ModelShape

Plain = dict[str, Any]

SETTINGS = "config.json"
START = "start.json"  # {"path", "sha256"}: the checkpoint whose weights a run began from, if any

# Settings that may change between a run and its continuation: none of them changes what is learnt.
FREE = (
    "output_dir",
    "parallel",
    "log",
    "checkpoint",
    "evaluation",
    "data.eval",
    "data.tokens_per_microbatch",
    "data.prefix_sharing",
    "reference.log_probs",
    "train.max_nonfinite",
)
# Where things lie; a checkpoint holds the hashes of what they are instead.
PATHS = ("model.policy", "model.reference", "data.train")


def essence(settings: Plain, ignored: tuple[str, ...] = FREE) -> Plain:
    """The resolved configuration by dotted key, without the `ignored` sections and keys."""
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values if isinstance(values, dict) else {section: values}).items()
    }
    return {
        key: value
        for key, value in flat.items()
        if key not in ignored and key.split(".")[0] not in ignored
    }


POLICY = "policy"  # of output_dir: the initial policy, where an adapter had to be merged


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this output_dir: its settings are there."""
    return (folder / SETTINGS).is_file()


def check_output_dir(folder: Path, settings: Plain, resume: str) -> None:
    """Refuse an output_dir that holds anything but an earlier part of this same run.

    Raises UserError that names the first differing setting, or what was found there.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder} cannot be used: {nearest} {found}; give another one")
    # What a run leaves that was killed before its settings were written.
    begun = {lock.NAME, START, _partial(Path(START)).name, _partial(Path(SETTINGS)).name}
    begun |= {POLICY, f".partial-{POLICY}"}
    if not folder.exists() or {path.name for path in folder.iterdir()} <= begun:
        return
    advice = "give another output_dir or remove it"
    try:
        earlier = json.loads((folder / SETTINGS).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        earlier = None
    if not isinstance(earlier, dict) or earlier.keys() != settings.keys():
        raise UserError(f"output_dir: {folder} is not empty and holds no run; {advice}")
    different = differences(essence(earlier), essence(settings))
    if different:
        raise UserError(f"output_dir: {folder} holds another run ({different}); {advice}")
    if resume == "never":
        raise UserError(f"output_dir: {folder} holds a run, and --resume is never; {advice}")


def recorded_start(folder: Path, given: Path | None) -> Plain | None:
    """What START of this output_dir says; None if it is not there.

    given: the checkpoint whose weights this run is to begin from, or None. Raises UserError when
    the run in the folder began otherwise.
    """
    try:
        record = json.loads((folder / START).read_text()) if holds_run(folder) else None
    except FileNotFoundError:
        record = None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{folder / START}: not valid JSON; give another output_dir") from None
    if given is not None and holds_run(folder):
        began = record["path"] if record else "model.policy"
        if began != str(given.resolve()):
            raise UserError(
                f"output_dir: {folder} holds a run that began from the weights of {began}, not "
                f"of {given}; give another output_dir"
            )
    return record


def write_settings(folder: Path, settings: Plain, start: Plain | None) -> None:
    """Write START, if there is one, and the settings into output_dir; rank 0 alone does it.

    Raises UserError on rank 0 when the folder cannot be written to.
    """
    if dist.get_rank() == 0:
        try:
            if start is not None:
                write_json(folder / START, start)
            write_json(folder / SETTINGS, settings)
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written ({error.strerror})") from None


def make_output_dir(folder: Path) -> None:
    """Create output_dir; rank 0 alone does it, and raises UserError when it cannot."""
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be made ({error.strerror})") from None


def check_shared(folder: Path) -> None:
    """Refuse an output_dir that rank 0 wrote to and this rank does not see."""
    if not holds_run(folder):
        raise UserError(
            f"output_dir: rank {dist.get_rank()} does not see {folder.resolve()}/{SETTINGS}, "
            "which rank 0 wrote; expected a folder on a file system that all machines share"
        )


def common_ground(
    settings: Plain,
    shape: ModelShape,
    pairs: TokenizedPairs,
    reference: Mapping[str, Any] | None,
    start: Mapping[str, Any] | None,
    steps: int,
) -> Plain:
    """What a run and its continuation must share: settings, model, tokens, reference, steps."""
    return essence(settings, FREE + PATHS) | {
        "model_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "reference_sha256": reference["sha256"] if reference else None,
        "start_sha256": start["sha256"] if start else None,
        "steps": steps,
    }


# A hash tells a reader nothing but that something differs; this says what.
HASHED = {
    "tokens_sha256": "the training pairs' tokens differ (the data, its order or the tokenizer)",
    "reference_sha256": "the reference's weights differ",
    "base_sha256": "the weights under the adapters differ",
    "start_sha256": "the checkpoint whose weights the run began from differs",
}


def differences(before: Plain, now: Plain) -> str:
    """The first entries that differ, in words, and how many more do; empty if none do."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    words = [
        HASHED.get(key, f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}")
        for key in keys[:3]
    ]
    return "; ".join([*words, f"and {len(keys) - 3} more"] if len(keys) > 3 else words)


def write_json(path: Path, value: Plain) -> None:
    """Write a JSON file that is there whole or not at all, whenever the process is killed."""
    partial = _partial(path)
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
