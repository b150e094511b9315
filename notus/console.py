"""Text for people: on a terminal, in a pipe or in a file, and never worth a run."""

import atexit
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

from notus.errors import UserError


def emit(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output by default; it is lost if that has no space or no reader."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        _register()


def report_error(error: Exception, prints: bool) -> None:
    """Print an error that ends this process, if it `prints`, and leave it to torchrun.

    torchrun names the file in TORCHELASTIC_ERROR_FILE for each process, and its last lines show the
    message there of the process that failed first. Without a file they show none.
    """
    if prints:
        emit(f"error: {error}", sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": f"error: {error}", "timestamp": int(time.time())}
        with suppress(OSError):
            Path(file).write_text(json.dumps(content))


def run_command(command: Callable[[], str]) -> int:
    """Print the line that `command` returns; the exit code, 2 after a user's mistake.

    Under torchrun one process speaks.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        told = command()
    except UserError as error:
        report_error(error, prints=speaks)
        return 2
    if speaks:
        emit(told)
    return 0


def quiet_libraries() -> None:
    """Turn off Hugging Face's libraries' progress bars, unless standard error is a terminal."""
    if not sys.stderr.isatty():
        import datasets  # here, because not everything that prints needs them
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()  # also huggingface_hub's


def wrap(text: str) -> str:
    """Its lines at the terminal's width, 80 columns where there is none.

    What continues a line is below its text: behind its indentation and a first word that two or
    more spaces set off.
    """
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    lines = []
    for line in text.splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        start = re.match(r" *(\S+ {2,}(?=\S))?", line).end()
        indents = {"initial_indent": line[:start], "subsequent_indent": " " * (start or 2)}
        unbroken = {"break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line[start:], width, **indents, **unbroken)
    return "\n".join(lines)


@contextmanager
def drawing() -> Iterator[None]:
    """Warn, in one line, instead of raising whatever a figure's library meets in the block."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        emit(f"warning: a figure could not be drawn: {reason}", sys.stderr)


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
