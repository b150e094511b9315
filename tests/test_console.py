"""Output that cannot be written is lost, and nothing else."""

import errno
import io
import os
import sys

import pytest

from notus import console
from notus.engine.distributed import Ranks
from notus.engine.log import progress, warn


class Refusing(io.StringIO):
    """A file on a full disk, or a pipe that nobody reads."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.refused = number, 0

    def flush(self) -> None:
        self.refused += 1
        raise OSError(self.number, os.strerror(self.number))

    write = lambda self, text: self.flush()  # noqa: E731


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_lines_warnings_and_progress_that_are_refused_are_lost(number, monkeypatch):
    refusing = Refusing(number)
    monkeypatch.setattr(console, "_register", lambda: None)
    monkeypatch.setattr(sys, "stdout", refusing)
    monkeypatch.setattr(sys, "stderr", refusing)
    Ranks(0, 1, None).say("a line")
    warn("a warning")
    bar = progress(3, 0, "step")
    bar.update(3)
    bar.close()
    assert refusing.refused >= 3


def test_a_closed_stream(monkeypatch):
    monkeypatch.setattr(console, "_register", lambda: None)
    stream = io.StringIO()
    stream.close()
    console.emit("text", stream)


def test_what_is_refused_does_not_fail_again_at_the_end(tmp_path, monkeypatch):
    """Python flushes standard output once more when it ends, and exits with 120 if that fails."""
    monkeypatch.setattr(console, "_register", lambda: None)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console.emit("text")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        console._discard()
        full.flush()


def test_lines_wrap_below_their_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "  steps      one two three four five six seven\nshort  line\n\n    " + "a/" * 30 + " b"
    assert console.wrap(text).splitlines() == [
        "  steps      one two three four five six",
        "             seven",
        "short  line",
        "",
        "    " + "a/" * 30,
        "    b",
    ]
