"""history.jsonl in output_dir: each start and end of a run, for its model card.

One line of JSON when the program starts and one when it ends by itself. Times are UTC, ISO 8601.
Secrets in commands and paths are masked.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from notus.engine.log import warn
from notus.errors import UserError
from notus.files import set_aside, write_whole, writing
from notus.masking import mask_text, mask_word

NAME = "history.jsonl"
START_KEYS = {"continues", "command", "ranks", "device", "versions", "data", "local"}
PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "numpy")


def record_start(
    folder: Path,
    *,
    continues: str | None,
    device: torch.device,
    data: Mapping[str, Any],
    paths: Sequence[str],
) -> None:
    """Record a start and what it runs on.

    continues: the name of the checkpoint it resumes, if any. data: the counts of each data set,
    plain JSON. paths: of models and data, as configured; those on this machine are recorded as
    local, the rest are hub ids. Raises UserError when the file cannot be written.
    """
    on_gpu = device.type == "cuda"
    facts = {
        "continues": continues,
        "command": [mask_word(word) for word in command(sys.argv, os.environ)],
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "versions": versions(),
        "data": data,
        "local": [mask_text(path) for path in dict.fromkeys(paths) if Path(path).exists()],
    }
    _append(folder, "start", facts)


def record_end(folder: Path, missing: float | None = None) -> None:
    """Record the end of the last start. Raises UserError as above.

    missing: the time since 1970 of an end that is recorded only if none was.
    """
    last = (_events(folder) or [None])[-1]
    if missing is None:
        _append(folder, "end", {})
    elif last and last["event"] == "start":
        _append(folder, "end", {}, datetime.fromtimestamp(missing, UTC))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """All events, oldest first; none if the folder has no such file.

    Raises UserError for a file that holds something else.
    """
    path, events = folder / NAME, _events(folder)
    if None in events:
        number = events.index(None) + 1
        raise UserError(f"{path}:{number}: not valid JSON, or not an event of a run")
    return events


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command that starts this program again, from sys.argv and torchrun's environment.

    torchrun does not set the address at which several machines meet: HOST:PORT stands in for it.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["python", *arguments]
    machines, processes = (environment[f"{kind}_WORLD_SIZE"] for kind in ("GROUP", "LOCAL"))
    meet = f"--nnodes {machines} --rdzv_backend c10d --rdzv_endpoint HOST:PORT".split()
    more = meet if machines != "1" else []
    return ["torchrun", *more, "--nproc_per_node", processes, *arguments]


def versions() -> dict[str, str]:
    """Versions by name, with the commit of this project if it is a git checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # Triton exists for Linux only
            found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    commit = _commit(Path(__file__).parents[2])
    return found | ({"notus": commit} if commit else {})


def _commit(root: Path) -> str | None:
    """The checked-out commit, with -dirty if tracked files differ from it."""
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    with suppress(FileNotFoundError):
        done = subprocess.run([*describe, "--exclude", "*"], capture_output=True, text=True)
        return done.stdout.strip() or None


def _events(folder: Path) -> list[dict[str, Any] | None]:
    """The event in each line; None for a damaged line, or for a file that cannot be read."""
    path, events = folder / NAME, []
    if not os.path.lexists(path):
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [None]
    for line in lines:
        event = None
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(line.decode())
            datetime.fromisoformat(found["time"])
            complete = found["event"] == "start" and found.keys() >= START_KEYS
            if complete or (found["event"] == "end" and any(events)):
                event = found
        events.append(event)
    return events


def _append(
    folder: Path, event: str, facts: Mapping[str, Any], when: datetime | None = None
) -> None:
    """Add an event to the sound ones; a file with damaged lines is kept under another name."""
    path, now = folder / NAME, (when or datetime.now(UTC)).isoformat(timespec="seconds")
    before = _events(folder)
    events = [*filter(None, before), {"event": event, "time": now, **facts}]
    with writing(path):
        if None in before:
            warn(f"{path} is damaged: kept as {set_aside(path).name}, its sound lines in {NAME}")
        write_whole(path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events))
