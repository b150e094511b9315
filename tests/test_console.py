"""Output that cannot be written is lost, and nothing else."""

import errno
import io
import os
import sys
import time

import datasets
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from transformers.utils import logging

import eval as evaluation_commands
import train
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
    registered = []
    monkeypatch.setattr(console, "_register", lambda: registered.append(True))
    stream = io.StringIO()
    stream.close()
    console.emit("text", stream)
    assert registered


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


def test_lines_wrap_below_their_text():
    text = "  steps      one two three four five six seven\nshort  line\n\n    " + "a/" * 30 + " b"
    assert console.wrap(text, 40).splitlines() == [
        "  steps      one two three four five six",
        "             seven",
        "short  line",
        "",
        "    " + "a/" * 30,
        "      b",
    ]


def test_only_a_terminal_wraps_and_commands_remain_whole(monkeypatch, capsys, narrow):
    monkeypatch.setenv("COLUMNS", "80")  # of a shell, perhaps, and not of this output
    text = "error: " + "word " * 30 + "end\n  python -m notus.look " + "a " * 40 + "b"
    console.emit(text)
    assert capsys.readouterr().out == f"{text}\n"
    narrow(80)
    console.emit(text)
    *wrapped, command = capsys.readouterr().out.splitlines()
    assert command == text.splitlines()[1] and max(map(len, wrapped)) <= 80
    assert len(wrapped) == 3 and " ".join(" ".join(wrapped).split()) == text.splitlines()[0]
    console.emit(text, verbatim=True)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_line_is_above_a_progress_bar(monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress(3, 0, "step")
    bar.update(1)
    bar.refresh()
    console.emit("stopped")
    line, *rest = screen.getvalue().split("\n")
    bar.close()
    assert [state for state in line.split("\r") if state.strip()][-1] == "stopped"
    assert len(rest) == 1 and "1/3" in rest[0]  # and the bar is drawn again


def test_one_is_no_plural():
    assert [console.counted(n, "pairs") for n in (0, 1, 2000)] == [
        "0 pairs",
        "1 pair",
        "2,000 pairs",
    ]


FILE = "TORCHELASTIC_ERROR_FILE"


@pytest.mark.parametrize("command", [train.main, evaluation_commands.main])
def test_an_error_is_left_for_torchrun(tmp_path, monkeypatch, capsys, command):
    """torchrun's own class reads the file, of a rank that prints and of one that does not."""
    told, words = "", ["nowhere.json"]
    if command == evaluation_commands.main:
        words = "preferences model --data nowhere.jsonl --out out --beta -1".split()
    for rank in ("0", "1"):
        file = tmp_path / f"{rank}.json"
        for name, value in {"LOCAL_RANK": rank, "RANK": rank, FILE: str(file)}.items():
            monkeypatch.setenv(name, value)
        assert command(words) == 2
        printed = capsys.readouterr().err.strip()
        assert bool(printed) == (rank == "0")
        told = printed or told
        failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=2, error_file=str(file))
        assert failure.message == told and told.startswith("error: ")
        assert 0 <= time.time() - failure.timestamp < 60
    monkeypatch.setenv(FILE, str(tmp_path / "none/e.json"))  # cannot be written
    assert command(words) == 2


def test_libraries_show_bars_on_a_terminal_only(monkeypatch):
    try:
        for terminal in (True, False):
            monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
            logging.enable_progress_bar()
            datasets.enable_progress_bars()
            console.quiet_libraries()
            assert logging.is_progress_bar_enabled() == terminal
            assert datasets.are_progress_bars_disabled() != terminal
    finally:
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
