"""Where a run writes what it measures: metrics.jsonl, TensorBoard, the progress on the console."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from notus.errors import UserError

NONFINITE_FILE = "nonfinite.jsonl"  # of output_dir: steps without an update, and their pairs


class LinesFile:
    """A file that grows by whole lines of JSON, one object each.

    What the file system refuses (no space) is said once and waits in memory for the next line; the
    file holds no part of it. Lines of steps after `step` are removed first, and torn ones, for a
    run that goes on from there writes them again. Raises UserError when that is refused.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self._waiting, self._refused = path, b"", False
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text("".join(line for line in lines if _step_of(line) <= step))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line, with those that wait; numbers that JSON does not have become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        self._waiting += json.dumps(finite).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Try to write what waits, if anything does; whether nothing does any more."""
        if not self._waiting:
            return True
        try:
            _append_whole(self.path, self._waiting)
        except OSError as error:
            if not self._refused:
                warn(f"{self.path}: {error.strerror}; its lines wait in memory, training goes on")
            self._refused = True
            return False
        self._waiting, self._refused = b"", False
        return True


def _append_whole(path: Path, text: bytes) -> None:
    """Append all of `text`, or, raising OSError, nothing."""
    with path.open("ab", buffering=0) as file:
        size, left = file.tell(), memoryview(text)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _step_of(line: str) -> float:
    """The step that a line is about; infinite for one that is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def warn(text: str) -> None:
    """Say it on the standard error, on a line of its own beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


SECONDS = 15.0  # between two lines


class ProgressLines:
    """tqdm's place where there is no terminal: whole lines, in a file or a pipe that keeps them.

    The first and the last step have a line, and others when the last line is SECONDS old. The time
    left is what the rest takes at the mean pace since the start, in hours, minutes and seconds.
    """

    def __init__(
        self, total: int, initial: int, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.n, self.unit, self.clock = total, initial, unit, clock
        self._initial, self._began, self._printed = initial, clock(), None
        self._postfix = ""

    def set_postfix(self, values: Mapping[str, str], refresh: bool) -> None:
        """What the next lines say beside the steps; tqdm's signature, nothing is written now."""
        assert not refresh
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, steps: int) -> None:
        """Go on by so many steps, and write a line if one is due."""
        self.n += steps
        now = self.clock()
        due = self._printed is None or now - self._printed >= SECONDS or self.n == self.total
        if steps and due:
            self._printed = now
            taken = now - self._began
            left = taken / (self.n - self._initial) * (self.total - self.n)
            print(
                f"{self.unit} {self.n:,} of {self.total:,}{self._postfix}, "
                f"{tqdm.format_interval(taken)} so far, {tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Nothing is left open."""


def progress(total: int, initial: int, unit: str) -> "tqdm | ProgressLines":
    """A bar on the standard error if that is a terminal, and ProgressLines otherwise."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, unit=unit, mininterval=0.5)
    return ProgressLines(total, initial, unit)


class MetricsLog:
    """metrics.jsonl, nonfinite.jsonl, TensorBoard and the progress bar, on rank 0 alone.

    Lines that a run which begins or resumes at `step` will write again are removed first. Where
    there is no space, lines wait in memory; TensorBoard gets nothing more until the next start.
    Raises UserError when the files cannot be opened.
    """

    def __init__(self, folder: Path, *, step: int, total: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        # A run that begins evaluates at step 0 again.
        self.lines = LinesFile(folder / "metrics.jsonl", step or -1)
        self.nonfinite = LinesFile(folder / NONFINITE_FILE, step)
        board = folder / "tensorboard"
        try:
            self.board = SummaryWriter(str(board), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"{board}: cannot be written ({error.strerror})") from None
        self._problem = ""  # the last that was said of TensorBoard
        self.bar = progress(total, step, "step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics after `step` steps under their names, if there are any."""
        if not self.active:
            return
        if metrics:
            self.lines.add({"step": step, **metrics})
            self.show(lambda board: [board.add_scalar(n, v, step) for n, v in metrics.items()])
        shown = {
            "loss": metrics.get("loss"),
            "accuracy": metrics.get("rewards/accuracies"),
            "margin": metrics.get("rewards/margins"),
        }
        shown = {name: f"{value:.4f}" for name, value in shown.items() if value is not None}
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def show(self, action: Callable[[SummaryWriter], object]) -> None:
        """Call `action` with TensorBoard's writer; what the file system refuses is left out."""
        try:
            action(self.board)
        except OSError as error:  # and of the writer's thread again every time: it has ended
            problem = f"{error.filename or self.board.log_dir}: {error.strerror}"
            if problem != self._problem:
                warn(f"{problem}; it is left out, training goes on")
            self._problem = problem

    def close(self) -> None:
        if self.active:
            self.show(SummaryWriter.close)
            self.bar.close()
            for lines in (self.lines, self.nonfinite):
                if not lines.flush():
                    warn(f"{lines.path} lacks its last lines: there was no space for them")
