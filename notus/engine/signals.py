"""Signals that ask a run to save, noted when they come and obeyed after the step they come in.

SIGTERM (a preempted machine, a scheduler's time limit) and SIGINT (Ctrl-C): save and exit with
code 0. SIGUSR1: save and go on. A signal to one process is enough, the ranks agree: `kill -TERM` of
the process that `<output_dir>/lock` names ends the whole run. Another SIGINT kills at once.

torchrun passes SIGTERM and SIGINT on to its processes, and kills them when they have not ended
after 30 s: where a step and a save take longer, set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the seconds
(PyTorch 2.12; before, signal one of the processes instead). Its own exit code is then 1, though
theirs is 0. SIGUSR1 it does not pass on: it dies of it.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT)
ASK_TO_SAVE = signal.SIGUSR1


class Interrupts:
    """What signals have asked of this process since the context began; the main thread's alone."""

    def __init__(self) -> None:
        self._stop = self._save = False

    def __enter__(self) -> Self:
        numbers = (*ASK_TO_STOP, ASK_TO_SAVE)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> tuple[bool, bool]:
        """(stop, save): what was asked for. A save is handed out once."""
        save = self._save
        if save:  # not cleared otherwise: a signal may come in between
            self._save = False
        return self._stop, save

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == ASK_TO_SAVE:
            self._save = True
            return
        self._stop = True
        if number == signal.SIGINT:
            # The next one must not wait for Python, which may be waiting for other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
