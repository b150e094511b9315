"""Turns at a file that several runs would otherwise compute at the same time."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch.distributed as dist

WAIT = 1.0  # seconds between two attempts


class Turn(AbstractContextManager):
    """The right to compute one file, held by rank 0 from `wait` until the context ends.

    The kernel holds it as a lock (flock) on `path` and frees it with the process. The text in the
    file is for people: JSON with "host" and "pid" of the holder. On a file system without locks, or
    where the file cannot be opened (another user's, no space), everyone has a turn at once. held:
    whether the lock is held.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file, self.held = path, -1, False

    def __exit__(self, *error: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file, self.held = -1, False

    def wait(self, say: Callable[[str], object], check: Callable[[], object]) -> None:
        """Return when it is this run's turn; the folder of `path` must exist. Collective.

        say: prints, once, who has it before. check: called on every rank after each attempt; it may
        raise the same there.
        """
        said = False
        while True:
            state: list[bool | str] = [dist.get_rank() > 0 or self._take()]
            dist.broadcast_object_list(state, 0)
            if state[0] is True:
                return
            if not said:
                say(f"waiting for another run ({state[0]}), which computes the same log-probs")
                said = True
            time.sleep(WAIT)
            check()

    def finish(self) -> None:
        """Remove the file, once nobody needs a turn any more, on rank 0 only."""
        if self.held:
            self.path.unlink(missing_ok=True)

    def _take(self) -> bool | str:
        """Try once: True, or the text of the run whose turn it is."""
        if self._file < 0:
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError:
                return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(self._file, 200, 0).decode(errors="replace") or "just started"
        except OSError:
            return True
        self.held = True
        about = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        with suppress(OSError):  # no space
            os.truncate(self._file, 0)
            os.pwrite(self._file, about.encode(), 0)
        return True
