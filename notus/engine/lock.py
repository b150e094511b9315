"""One run per output_dir: a lock that names its owner."""

import fcntl
import json
import os
import socket
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from notus.engine.log import warn
from notus.errors import UserError
from notus.files import writing

NAME = "lock"


class OutputLock(AbstractContextManager):
    """`<folder>/lock`, held by rank 0 from `take` until the context ends or the process dies.

    The kernel holds the lock (flock) and frees it with the process, however that ends. The text in
    the file is for people: JSON with "host", "pid" (of rank 0) and "started". On a file system
    without locks there is a warning and no lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None

    def __exit__(self, *error: object) -> None:
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
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        with writing(path):
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"output_dir: {self.folder} is in use by another run ({path.read_text()}); "
                    "wait for it, stop it, or give another output_dir"
                ) from None
            except OSError as error:
                warn(f"{path}: no lock ({error.strerror}); start no second run in {self.folder}")
            file.truncate(0)
            os.write(file.fileno(), json.dumps(about).encode())
        self._file = file
