"""Signals are noted, handed out and given back."""

import signal

import pytest

from notus.engine.signals import Interrupts, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(number):
    with Interrupts() as interrupts:
        assert interrupts.take() == (False, False)
        signal.raise_signal(number)
        assert interrupts.take() == (True, False)
        assert interrupts.take() == (True, False)
        # A second Ctrl-C must not wait for this process to look.
        default = number == signal.SIGINT
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == default


def test_a_save_is_handed_out_once():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        assert interrupts.take() == (False, True)
        assert interrupts.take() == (False, False)


def test_the_handlers_of_before_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Interrupts():
        assert all(signal.getsignal(n) != b for n, b in zip(numbers, before, strict=True))
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_stop_is_obeyed_before_the_first_step(group):
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        interrupts.obey_stop()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            interrupts.obey_stop()
        assert interrupts.take() == (True, True)
