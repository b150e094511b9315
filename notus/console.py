"""Text for people: on a terminal, in a pipe or in a file, and never worth a run."""

import atexit
import json
import math
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

from tqdm import tqdm

from notus.errors import UserError

COMMAND = re.compile(" *(python|torchrun|pip) ")


def emit(text: str, stream: TextIO | None = None, verbatim: bool = False) -> None:
    """Print lines, on standard output by default; they are lost if it has no space or no reader.

    On a terminal they are wrapped, unless `verbatim`, and do not end up in the line of a progress
    bar; in a pipe and a file they remain as they are.
    """
    stream = stream or sys.stdout
    try:
        with tqdm.external_write_mode(stream):
            print(text if verbatim else wrap(text, width(stream)), file=stream, flush=True)
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


def width(stream: TextIO | None = None) -> float:
    """The columns of a terminal; infinite for a pipe and a file.

    stream: what is printed to, standard output by default.
    """
    if (stream or sys.stdout).isatty():  # COLUMNS by itself is often inherited by mistake
        return max(40, shutil.get_terminal_size((80, 24)).columns)
    return math.inf


def wrap(text: str, width: float) -> str:
    """The text with lines of at most `width` characters; longer words, such as paths, remain.

    What continues a line is indented by two more spaces, or is below the text behind a first word
    that two or more spaces set off. A line that is a command is not wrapped: it can be copied.
    """
    lines = []
    for line in text.split("\n"):
        if len(line) <= width or COMMAND.match(line):
            lines.append(line)
            continue
        found = re.match(r" *(\S+ {2,}(?=\S))?", line)
        start, more = found.end(), 0 if found[1] else 2
        indents = {"initial_indent": line[:start], "subsequent_indent": " " * (start + more)}
        unbroken = {"break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line[start:], width, **indents, **unbroken)
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """The number and `noun`, a plural, which loses its s after 1: "1 step", "2,000 steps"."""
    return f"{number:,} {noun.removesuffix('s') if number == 1 else noun}"


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
