"""history.jsonl in output_dir: each start and end of a run, for its model card.

One line of JSON when the program starts and one when it ends by itself. Times are UTC, ISO 8601.
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

from notus.errors import UserError
from notus.files import write_whole, writing

NAME = "history.jsonl"
PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "numpy")


def record_start(
    folder: Path,
    *,
    continues: str | None,
    device: torch.device,
    data: Mapping[str, Any],
    paths: Sequence[str],
) -> None:
    """Record a start and what it runs on, on rank 0 only.

    continues: the name of the checkpoint it resumes, if any. data: the counts of each data set,
    plain JSON. paths: of models and data, as configured; those on this machine are recorded as
    local, the rest are hub ids. Raises UserError on rank 0 when the file cannot be written.
    """
    if dist.get_rank() == 0:
        _append(
            folder,
            "start",
            {
                "continues": continues,
                "command": command(sys.argv, os.environ),
                "ranks": dist.get_world_size(),
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"CPU ({platform.machine()})",
                "versions": versions(),
                "data": data,
                "local": [path for path in dict.fromkeys(paths) if Path(path).exists()],
            },
        )


def record_end(folder: Path) -> None:
    """Record the end of the last start, on rank 0 only. Raises UserError as above."""
    if dist.get_rank() == 0:
        _append(folder, "end", {})


def read_history(folder: Path) -> list[dict[str, Any]]:
    """All events, oldest first; none if the folder has no such file.

    Raises UserError for a file that holds something else.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path}: a line is not valid JSON ({error})") from None


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


def _append(folder: Path, event: str, facts: Mapping[str, Any]) -> None:
    path, now = folder / NAME, datetime.now(UTC).isoformat(timespec="seconds")
    events = [*read_history(folder), {"event": event, "time": now, **facts}]
    with writing(path):
        write_whole(path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events))
