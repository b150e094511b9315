"""Processes that start at once: forked from one that has imported train.py, they form its ranks.

A test can kill them at any moment, and let a fault of integration/faults.py happen in them.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# Of the process that all others are forked from, which reads neither pytest's sys.path nor flags.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONFAULTHANDLER": "1",  # should native code crash: where each thread was
    "TRITON_INTERPRET": "1",  # read when Triton is imported; nothing on the CPU asks for Triton
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "train", "eval"])
LAUNCHES = count()

Fault = Callable[[], None]


def start(
    function: Callable[..., int | None], *arguments: object, log: Path, ranks: int = 1
) -> list[BaseProcess]:
    """Call a function in each of `ranks` processes, whose exit code is what it returns.

    The environment is torchrun's where there are several. What they print is appended to `log`.
    """
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(_store().port),
        # As under torchrun the store outlives the ranks; the count keeps launches apart in it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(next(LAUNCHES)),
    }
    processes = []
    for rank in range(ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = CONTEXT.Process(target=_rank, args=(function, arguments, own, str(log)))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], timeout: float = 120.0) -> int:
    """The exit code of all ranks, which must be one; negative: the signal that killed them."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    running = [process for process in processes if process.exitcode is None]
    kill(running)
    assert not running, "the ranks did not end in time"
    codes = {process.exitcode for process in processes}
    assert len(codes) == 1, f"the ranks ended with {codes}"
    return codes.pop()


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL to every rank."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def call(
    function: Callable[..., int | None], *arguments: object, log: Path, ranks: int = 1
) -> tuple[int, str]:
    """`start` a function and wait for its end; the exit code, and what the ranks printed."""
    before = log.stat().st_size if log.exists() else 0
    processes = start(function, *arguments, log=log, ranks=ranks)
    try:
        code = finish(processes)
    finally:
        told = log.read_bytes()[before:].decode() if log.exists() else ""
        print(told)  # pytest shows it where a test fails
    return code, told


def launch(
    arguments: list[str], log: Path, ranks: int = 1, fault: Fault | None = None
) -> list[BaseProcess]:
    """`start` train.py."""
    return start(train_each, [arguments], fault, log=log, ranks=ranks)


def run_ranks(
    arguments: list[str], log: Path, ranks: int = 1, fault: Fault | None = None
) -> tuple[int, str]:
    """`call` train.py."""
    return call(train_each, [arguments], fault, log=log, ranks=ranks)


def train_each(runs: list[list[str]], fault: Fault | None = None) -> int:
    """train.py once for each list of arguments, in this process; the first exit code but 0."""
    sys.modules["matplotlib"] = None  # as if it were not there: curves take longer than the run
    import train

    if fault is not None:
        fault()
    # The ranks remain one group between runs: a new one costs time, and what PyTorch caches of the
    # first would name groups that are gone.
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: leave(group) if group else None
    code = next((code for code in map(train.main, runs) if code), 0)
    if dist.is_initialized():
        leave()
    return code


def wait_for(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Return once the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.005)


def wait_for_words(log: Path, words: str) -> None:
    """Return once the ranks have printed them."""
    wait_for(lambda: log.exists() and words in log.read_text())


@cache
def _store() -> dist.TCPStore:
    """Where the ranks of all launches meet."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def _rank(
    function: Callable[..., int | None],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    log: str,
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    sys.exit(function(*arguments))
