"""Where a run writes what it measures: metrics.jsonl, TensorBoard, the progress on the console."""

import errno
import json
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from notus.console import emit
from notus.engine.sinks import NoBoard, Sink, begin_hparams, begin_pictures, end_hparams, shown_name
from notus.files import set_aside, write_whole, writing

NONFINITE_FILE = "nonfinite.jsonl"  # in output_dir: steps without an update, and their pairs
# By the bar, so that it fits 80 columns: name, metric, format.
SHOWN = (
    ("loss", "loss", ".3f"),
    ("acc", "rewards/accuracies", ".2f"),
    ("margin", "rewards/margins", ".2f"),
)


class LinesFile:
    """A file of JSON objects, one per line.

    Opening it removes a torn last line and the lines of steps after `step`; a file with other
    damage is kept under another name, and its sound lines here, with a warning. Raises UserError
    when that fails. A line that the file system refuses (no space) is left out, and the first one
    is reported. last: the step of the last line that was kept, -1 without one.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.last = path, -1
        if not os.path.lexists(path):
            return
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError:  # a folder, a link to nowhere
            lines = [b"\n"]
        steps = [_step_of(line) for line in lines]
        kept = {n: of for n, of in enumerate(steps) if of is not None and of <= step}
        self.last = max(kept.values(), default=-1)
        with writing(path):
            if None in steps[:-1] or (lines and lines[-1].endswith(b"\n") and steps[-1] is None):
                warn(f"{path} is damaged: kept as {set_aside(path).name}, its sound lines here")
            write_whole(path, "".join(lines[n].decode() for n in kept))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a line; numbers that JSON does not have become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        line = json.dumps(finite).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) < len(line):  # the space that was left held a part of it
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            _warn_once(f"{self.path}: {error.strerror}; lines are lost, training continues")


def _step_of(line: bytes) -> int | None:
    """The step that a line is about; None for a torn or damaged one."""
    try:
        return operator.index(json.loads(line.decode())["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def warn(text: str) -> None:
    """Print a warning to standard error."""
    emit(f"warning: {text}", sys.stderr)


_warn_once = cache(warn)


class _Lines:
    """Standard error as a file for tqdm, in which each state of a bar is a line of its own."""

    _last = ""

    def write(self, text: str) -> None:
        state = text.strip()  # without the carriage return
        place = state.split(" of ")[0]
        if place and place != self._last:  # closing the bar repeats a state that was due
            emit(state, sys.stderr)
            self._last = place

    def flush(self) -> None:
        pass


def progress(
    total: int, initial: int, unit: str, delay: float = 0.0, disable: bool = False
) -> tqdm:
    """A bar on standard error if that is a terminal; otherwise a line every 15 seconds at most.

    Closing it prints the last state. The time left follows from the mean pace since the start.
    delay: seconds before which nothing is shown, so that short work leaves no trace.
    disable: nothing is shown at all.
    """
    common = {"total": total, "initial": initial, "unit": unit, "smoothing": 0}
    common |= {"delay": delay, "disable": disable}
    if sys.stderr.isatty():
        bar = "{n:,}/{total:,} |{bar}| {elapsed} < {remaining}{postfix}"
        return tqdm(**common, mininterval=0.5, dynamic_ncols=True, bar_format=bar)
    line = "{unit} {n:,} of {total:,}{postfix} in {elapsed}, {remaining} left"
    return tqdm(**common, file=_Lines(), mininterval=15, miniters=1, bar_format=line)


class MetricsLog:
    """metrics.jsonl, nonfinite.jsonl, TensorBoard, sinks and the progress bar, on rank 0 only.

    Opening it removes the lines that a run from `step` on will write again; raises UserError when
    that fails. A full disk costs metrics, never the run: lines that find no space are left out, and
    TensorBoard gets nothing more until the next start. every: the steps between two lines.
    tensorboard: whether it is written to. sinks: what else gets metrics; one that fails is named
    once, and the run continues. settings: the configuration, for TensorBoard's HParams tab.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total: int,
        active: bool,
        every: int = 1,
        tensorboard: bool = True,
        sinks: Sequence[Sink] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.active = active
        if not active:
            return
        # A run that starts from step 0 evaluates there again.
        self.lines = LinesFile(folder / "metrics.jsonl", step or -1)
        if max(self.lines.last, 0) < step - step % every:
            warn(f"{self.lines.path}: lines of steps up to {step:,} are missing")
        self.nonfinite = LinesFile(folder / NONFINITE_FILE, step)
        self._hook_before, threading.excepthook = threading.excepthook, self._hook
        self.sinks, self._place, self.board = sinks, folder / "tensorboard", NoBoard()
        if tensorboard:
            with writing(self._place):
                self.board = SummaryWriter(str(self._place), purge_step=step + 1)
        self.show(lambda board: begin_hparams(board, settings))
        self.show(lambda board: begin_pictures(board, settings))
        self.bar, self.most = progress(total, step, "step"), 0  # most pairs of a line

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics after `step` steps under their names, if there are any."""
        if not self.active:
            return
        if metrics:
            self.lines.add({"step": step, **metrics})
            shown = {shown_name(name): value for name, value in metrics.items()}
            self.show(lambda board: [board.add_scalar(n, v, step) for n, v in shown.items()])
            self._to_sinks(lambda sink: sink.scalars(step, metrics))
        told = [f"{name} {metrics[key]:{form}}" for name, key, form in SHOWN if key in metrics]
        # Less than half of a step, at an epoch's end, would look like a change of the model.
        if told and 2 * metrics.get("pairs", self.most) >= self.most:
            self.most = max(self.most, metrics.get("pairs", 0))
            self.bar.set_postfix_str(" ".join(told), refresh=False)
        if step == self.bar.n:  # the evaluation before the first step: not part of its pace
            self.bar.unpause()
        self.bar.update(step - self.bar.n)

    def show(self, action: Callable[[SummaryWriter], object]) -> None:
        """Call `action` with TensorBoard's writer; what the file system refuses is left out.

        Without TensorBoard the writer writes nothing.
        """
        try:
            action(self.board)
        except OSError as error:  # raised again by every later call: the writer's thread has ended
            place = error.filename or self._place
            _warn_once(f"{place}: {error.strerror}; later ones are lost too, training continues")

    def samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Give the sinks a table of prompts, the reference's and the policy's responses."""
        self._to_sinks(lambda sink: sink.samples(step, rows))

    def _to_sinks(self, action: Callable[[Sink], object]) -> None:
        for sink in self.sinks:
            try:
                action(sink)
            except Exception as error:  # of the network, the service, the library
                _warn_once(f"log.to: {sink.name}: {error}; metrics.jsonl has all of it")

    def _hook(self, ended: threading.ExceptHookArgs) -> None:
        """threading.excepthook, which prints nothing of what `show` reports."""
        of_board = type(ended.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(ended.exc_value, OSError)):
            self._hook_before(ended)

    def close(self) -> None:
        if self.active:
            self.show(end_hparams)
            self.show(lambda board: board.close())
            self._to_sinks(lambda sink: sink.close())
            threading.excepthook = self._hook_before
            self.bar.close()
