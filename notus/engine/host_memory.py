"""The host's free memory."""

import os
from pathlib import Path


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
