"""A torch profiler trace of a few steps, and a record of their memory."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP = 2  # first steps, which compile and fill caches; the trace leaves them out


@contextmanager
def profiled(folder: Path, steps: int | None, rank: int) -> Iterator[Callable[[], None]]:
    """Trace `steps` optimiser steps after two of warm-up; yields a function to call after each.

    Writes two files per rank into `folder`: trace-<rank>.json.gz, for chrome://tracing and
    ui.perfetto.dev, and on CUDA memory-<rank>.json, the allocator's segments, blocks and history in
    the format of torch.cuda.memory's snapshots. A shorter run is traced to its end. None: no trace.
    """
    if steps is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / f"trace-{rank}.json.gz"))
        if cuda:
            (folder / f"memory-{rank}.json").write_text(json.dumps(torch.cuda.memory._snapshot()))
            torch.cuda.memory._record_memory_history(enabled=None)

    if cuda:
        torch.cuda.memory._record_memory_history()
    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=WARMUP - 1, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    ) as profiler:
        yield profiler.step
