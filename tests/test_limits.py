import signal
import threading

import pytest

from notus.limits import time_limit


def test_a_loop_is_ended_and_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TimeoutError, match="longer than 0.01 s"), time_limit(0.01):
        while True:
            pass
    with time_limit(10):
        assert signal.getsignal(signal.SIGVTALRM) != before
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_other_threads_have_no_limit():
    done = []

    def work():
        with time_limit(1e-6):
            done.append(sum(range(10**5)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [4999950000]
