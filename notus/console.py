"""Text for people: on a terminal, in a pipe or in a file, and never worth a run."""

import atexit
import os
import sys
from contextlib import suppress
from functools import cache
from typing import TextIO


def emit(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output by default; it is lost if that has no space or no reader."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        _discard_at_exit()


@cache
def _discard_at_exit() -> None:
    """Let Python's own last flush of what was refused not fail: the exit code would be 120."""

    def discard() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                with suppress(OSError, ValueError):
                    os.dup2(nowhere, stream.fileno())

    atexit.register(discard)
