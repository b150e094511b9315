"""What can go wrong in a rank: functions that are called in it before train.py's main.

They take hold of what the standard library and PyTorch offer; of notus, of as little as possible.
"""

import builtins
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def slow_disk() -> None:
    """Every file of a checkpoint takes a while, so that a save is under way most of the time."""
    sync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.03), sync(handle))[1]


def disk_full() -> None:
    """The second checkpoint finds no space for its optimiser state."""
    sync = os.fsync

    def refuse(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if "step-00000004" in path and Path(path).name.startswith("optimizer"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        sync(handle)

    os.fsync = refuse


def small_files() -> None:
    """The kernel refuses files above 250 kB, as a full disk or a quota would."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))


def no_space_for_adapters() -> None:
    """PEFT's file of adapters finds no space after its first bytes."""
    from notus.model import peft

    def refuse(path: Path, tensors: dict) -> None:
        path.write_bytes(b"as much as there was space for")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    peft.save_tensors = refuse


def wait_in_step(number: int, obeys: bool = True, held: Path = Path("nowhere")) -> None:
    """The last rank stays in that step of this start, 2 or later, until it is signalled.

    obeys: whether it then goes on, once no file `held` is there; otherwise it stays for ever.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if int(os.environ.get("RANK", 0)) < int(os.environ.get("WORLD_SIZE", 1)) - 1:
        return
    steps = iter(range(2, 1000))

    def wait(*_: object) -> None:
        if next(steps) != number:
            return
        signalled = []
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            handler = signal.getsignal(each)
            signal.signal(each, lambda *given, h=handler: (signalled.append(1), h(*given)))
        print(f"waits in step {number}", flush=True)
        while not signalled:
            time.sleep(0.005)
        print("was signalled", flush=True)
        while not obeys or held.exists():
            time.sleep(0.005)

    register_optimizer_step_post_hook(wait)


def small_parts(refused: int | None = None) -> None:
    """The reference pass writes every 8 pairs, slowly; there is no space for the `refused`th."""
    from notus.objective import cache_files

    plain_open, writes = builtins.open, iter(range(1, 1000))

    def slow(file, mode="r", *others, **options):
        if mode == "ab" and Path(file).suffix == ".parts":
            time.sleep(0.05)
            if next(writes) == refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return plain_open(file, mode, *others, **options)

    cache_files.PART, builtins.open = 8, slow


def spoil_pair(lengths: tuple[int, int], factor: float) -> None:
    """The loss of the pair with these response lengths is infinite, or at factor 0 its gradient."""
    import torch

    def spoil(losses, pairs):
        hit = (pairs.chosen_length == lengths[0]) & (pairs.rejected_length == lengths[1])
        if factor:
            return losses + hit * torch.where(hit, torch.inf, 0.0)
        root = (pairs.policy.chosen[hit] * 0).sqrt()  # 0, and its slope is not finite
        return losses + root.sum()

    _spoil_losses(spoil)


def spoil_steps(first: int) -> None:
    """Every loss is NaN from step `first` on, counted from where the process began."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    updates: list[int] = []
    register_optimizer_step_post_hook(lambda *_: updates.append(1))
    _spoil_losses(
        lambda losses, pairs: losses * (float("nan") if len(updates) >= first - 1 else 1.0)
    )


def _spoil_losses(spoil: Callable) -> None:
    """What a training step computes goes through `spoil`: losses [B], log-probs -> losses [B]."""
    from notus.objective.loss import Loss

    losses_of = Loss.__call__

    def spoilt(loss, pairs, *others):
        losses = losses_of(loss, pairs, *others)
        return spoil(losses, pairs) if losses.requires_grad else losses

    Loss.__call__ = spoilt
