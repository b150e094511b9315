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
        _register()


@cache
def _register() -> None:
    atexit.register(_discard)


def _discard() -> None:
    """Drop what is still refused: Python's own last flush would fail, and exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
