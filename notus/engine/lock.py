"""One run per output_dir: a lock that names its owner."""

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import torch.distributed as dist

from notus.errors import UserError

NAME = "lock"


class OutputLock:
    """`<folder>/lock`, held by rank 0 from `take` until the context ends or the process dies.

    The kernel holds the lock (flock) and frees it with the process, however that ends, so one that
    a killed run left behind is free. The text in the file is for people: JSON with "host", "pid"
    (of rank 0) and "started". On a file system without locks the text decides: its owner is taken
    to be running unless it is a process of this host that no longer exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Hold the lock from now on; the folder must exist. On ranks other than 0 it does nothing.

        Raises UserError, on rank 0, that names the run which holds it.
        """
        if dist.get_rank() > 0 or self._file is not None:
            return
        path = self.folder / NAME
        try:
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        file.seek(0)
        text = file.read()
        advice = "wait for it, stop it, or give another output_dir"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"output_dir: {self.folder} is in use by {_owner(text)}; {advice}"
            ) from None
        except OSError:  # not a file system that can lock
            if _may_run(text):
                file.close()
                raise UserError(
                    f"output_dir: {self.folder} is in use by {_owner(text)}; {advice}, or remove "
                    f"{path} if that run is no more"
                ) from None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        try:
            file.truncate(0)
            os.write(file.fileno(), json.dumps(about).encode())
        except OSError as error:  # no space
            file.close()
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._file = file


def _read(text: str) -> dict[str, str | int]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # empty, or caught while it was being written
        return {}
    return found if isinstance(found, dict) else {}


def _owner(text: str) -> str:
    about = _read(text)
    if not about:
        return "a run that has just started"
    host, pid, started = (about.get(key, "?") for key in ("host", "pid", "started"))
    return f"process {pid} on host {host}, started {started}"


def _may_run(text: str) -> bool:
    about = _read(text)
    if not about or about.get("host") != socket.gethostname():
        return bool(about)
    try:
        os.kill(int(about["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
