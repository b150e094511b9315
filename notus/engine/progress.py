"""How far something is, and how long it will still take: a bar in a terminal, else plain lines."""

import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

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
