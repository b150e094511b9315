"""The host's memory: what is free, and whether training on the CPU fits into it."""

import os
from pathlib import Path

import torch

from notus.engine.distributed import Ranks
from notus.errors import UserError


def free_host_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory available without swapping, within the limit of this process's control group.

    Containers and batch systems set such limits (version 2); a group's cached files count as free.
    On systems other than Linux: half of the physical memory.
    """
    try:
        information = Path("/proc/meminfo").read_text().splitlines()
        membership = Path("/proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (free,) = (int(line.split()[1]) * 1024 for line in information if "MemAvailable:" in line)
    name = next((line[3:].lstrip("/") for line in membership if line.startswith("0::")), "")
    limit, used, counts = (groups / name / f"memory.{key}" for key in ("max", "current", "stat"))
    if limit.is_file() and limit.read_text().strip() != "max":
        cached = dict(line.split() for line in counts.read_text().splitlines())["file"]
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(cached))
    return max(0, free)


def check_host_memory(parameters: int, ranks: Ranks) -> None:
    """Raise UserError for a model whose training on the CPU does not fit into memory.

    parameters: their number in the complete model. Counts 12 bytes each (float32 weight, gradient
    and one optimiser moment) for this machine's share of the ranks.
    """
    if ranks.device.type != "cpu":
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / ranks.count
    needed = 12 * parameters * here / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > memory:
        raise UserError(
            f"no CUDA device was found (PyTorch {torch.__version__}), and {parameters:,} "
            f"parameters take at least {needed:.0f} GiB of this machine's {memory:.0f} GiB to "
            "train on the CPU; start on a machine with GPUs and a CUDA build of PyTorch, or check "
            "everything else here with --dry-run"
        )
