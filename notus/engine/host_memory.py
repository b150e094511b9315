"""How much of the host's memory is left."""

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Memory that can be had without swapping, within the limit of this process's control group.

    Limits of control groups, version 2, are what containers and batch systems set. Other systems
    than Linux do not tell: half of the memory there is.
    """
    try:
        information = Path("/proc/meminfo").read_text().splitlines()
        membership = Path("/proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (free,) = (int(line.split()[1]) * 1024 for line in information if "MemAvailable:" in line)
    for line in membership:
        if line.startswith("0::"):
            free = min(free, _left_in_group(GROUPS / line[3:].lstrip("/"), free))
    return max(0, free)


def _left_in_group(folder: Path, otherwise: int) -> int:
    """Bytes below the group's limit, cached files counted as free; `otherwise` without a limit."""
    limit = folder / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return otherwise
    used = int((folder / "memory.current").read_text())
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - used + int(counts["file"])
