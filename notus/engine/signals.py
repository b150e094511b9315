"""Signals that ask a run to save: noted when they arrive, obeyed after the current step.

Before the first step, a request to stop is obeyed before the reference pass, after each of its
parts and after it; a request to save waits for the first step. The export is not cut short.

SIGTERM (a preempted machine, a scheduler's time limit) and SIGINT (Ctrl-C): save and exit with
code 0. SIGUSR1: save and continue. One signalled process is enough, because the ranks agree:
`kill -TERM` of the process that `<output_dir>/lock` names ends the run on every rank. A second
SIGINT kills at once.

torchrun passes SIGTERM and SIGINT on, and kills processes that have not ended after 30 s: if a step
and a save take longer, set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the seconds (PyTorch 2.12; before,
signal one of the processes). Its own exit code is then 1, theirs 0. SIGUSR1 ends torchrun itself.
When torchrun is gone without having passed anything on (SIGKILL, out of memory), the kernel sends
its processes SIGTERM, on Linux.
"""

import ctypes
import os
import signal
import sys
from contextlib import AbstractContextManager
from types import FrameType
from typing import Self

import torch.distributed as dist

ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT)
ASK_TO_SAVE = signal.SIGUSR1
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends


class Stopped(Exception):
    """A signal has asked for the end of a run before its first step."""


class Interrupts(AbstractContextManager):
    """The requests of signals to this process since the context began; for the main thread only."""

    def __init__(self) -> None:
        self._stop = self._save = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        numbers = (*ASK_TO_STOP, ASK_TO_SAVE)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        # Only under torchrun: a process that a shell has started may outlive it.
        if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey_stop(self) -> None:
        """Raise Stopped on every rank if a signal has asked any of them to stop. Collective."""
        asked = [self._stop] * dist.get_world_size()
        dist.all_gather_object(asked, self._stop)
        if any(asked):
            raise Stopped

    def take(self) -> tuple[bool, bool]:
        """(stop, save): whether each was asked for. A request to save is handed out once."""
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
            # The next SIGINT must not wait for Python, which may be waiting for other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
