"""Ranks of train.py as processes that start at once: forked from one that has imported it.

A test can kill them at any moment, and let one of the FAULTS happen in them.
"""

import errno
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# For the process that all others are forked from; it reads neither pytest's sys.path nor its flags.
os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["PYTHONFAULTHANDLER"] = "1"  # should native code crash: where each thread was
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def launch(
    arguments: list[str], log: Path, ranks: int = 1, fault: str | None = None
) -> list[BaseProcess]:
    """Start train.py; what its ranks print goes to the end of `log`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, ranks, port, arguments, str(log), fault))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], timeout: float = 60.0) -> int:
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


def run_ranks(
    arguments: list[str], log: Path, ranks: int = 1, fault: str | None = None
) -> tuple[int, str]:
    """Run train.py to its end; its exit code, and what it printed."""
    before = log.stat().st_size if log.exists() else 0
    processes = launch(arguments, log, ranks, fault)
    try:
        code = finish(processes)
    finally:
        told = log.read_bytes()[before:].decode() if log.exists() else ""
        print(told)  # pytest shows it where a test fails
    return code, told


def wait_for(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Return once the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.005)


def wait_for_words(log: Path, words: str) -> None:
    """Return once the ranks have printed them."""
    wait_for(lambda: log.exists() and words in log.read_text())


def _rank(
    rank: int, ranks: int, port: int, arguments: list[str], log: str, fault: str | None
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    sys.modules["matplotlib"] = None  # as if it were not there: curves take longer than the run
    import train

    if fault is not None:
        FAULTS[fault]()
    sys.exit(train.main(arguments))


def _slow_disk() -> None:
    """Every file of a checkpoint takes a while, so that a save is under way most of the time."""
    from notus.engine import saver

    to_disk, sync = saver._to_disk, saver.sync
    saver._to_disk = lambda path: (time.sleep(0.03), to_disk(path))[1]
    saver.sync = lambda path: (time.sleep(0.01), sync(path))[1]


def _disk_full() -> None:
    """The second checkpoint finds no space for its optimiser state."""
    from notus.engine import saver

    write = saver._save_file

    def refuse(path: Path, tensors: dict) -> None:
        if "step-00000004" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"as much as there was space for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)

    saver._save_file = refuse


def _no_space_for_adapters() -> None:
    """PEFT's file of adapters finds no space after its first bytes."""
    from notus.model import peft

    def refuse(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"as much as there was space for")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    peft.save_file = refuse


def _wait_in_step(number: int, obeys: bool = True) -> None:
    """The last rank stays in that step of this start until it is signalled, or for ever."""
    from notus.engine.signals import Interrupts

    if int(os.environ.get("RANK", 0)) < int(os.environ.get("WORLD_SIZE", 1)) - 1:
        return
    take, steps = Interrupts.take, iter(range(1, 1000))

    def wait(interrupts: Interrupts) -> tuple[bool, bool]:
        if next(steps) == number:
            print(f"waits in step {number}", flush=True)
            while not (interrupts._stop or interrupts._save):
                time.sleep(0.005)
            print("was signalled", flush=True)
            while not obeys:
                time.sleep(0.005)
        return take(interrupts)

    Interrupts.take = wait


def _small_files() -> None:
    """The kernel refuses files above 250 kB, as a full disk or a quota would."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))


def _spoil_pair(factor: float) -> None:
    """Pair 5's loss, or with a factor that is 0 only its gradient, is infinite."""
    import torch

    import train

    loss_function = train.step_loss_function

    def spoilt(*arguments):
        losses_of = loss_function(*arguments)

        def losses(scored, indices):
            clean = losses_of(scored, indices)
            hit = indices == 5
            if factor:
                return clean + hit * torch.where(hit, torch.inf, 0.0)
            root = (scored.policy.chosen[hit] * 0).sqrt()  # 0, and its slope is not finite
            return clean + root.sum()

        return losses

    train.step_loss_function = spoilt


def _spoil_steps(first: int) -> None:
    """Every loss is NaN from step `first` on, counted from where the process began."""
    import train

    loss_function, steps = train.step_loss_function, iter(range(1, 1000))

    def spoilt(*arguments):
        losses_of, factor = loss_function(*arguments), float("nan") if next(steps) >= first else 1.0
        return lambda scored, indices: losses_of(scored, indices) * factor

    train.step_loss_function = spoilt


def _small_parts(refused: int | None = None) -> None:
    """The reference pass writes every 8 pairs, slowly; there is no space for the `refused`th."""
    from notus.objective import reference_cache

    append, writes = reference_cache._append, iter(range(1, 1000))

    def slow(*arguments) -> None:
        time.sleep(0.05)
        if next(writes) == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(*arguments)

    reference_cache.PART, reference_cache._append = 8, slow


FAULTS = {
    "small parts": _small_parts,
    "small parts, the third refused": partial(_small_parts, 3),
    "small files": _small_files,
    "infinite loss": partial(_spoil_pair, 1.0),
    "infinite gradient": partial(_spoil_pair, 0.0),
    "nothing finite from step 3": partial(_spoil_steps, 3),
    "nothing finite from step 1": partial(_spoil_steps, 1),
    "slow disk": _slow_disk,
    "disk full": _disk_full,
    "no space for adapters": _no_space_for_adapters,
    "waits in step 2": partial(_wait_in_step, 2),
    "waits in step 3": partial(_wait_in_step, 3),
    "waits in step 7": partial(_wait_in_step, 7),
    "never ends step 2": partial(_wait_in_step, 2, obeys=False),
}
