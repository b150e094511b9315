"""A torch profiler trace of a few steps, and where their memory went."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP = 2  # steps that compile, fill caches and are left out of the trace


@contextmanager
def profiled(folder: Path, steps: int | None, rank: int) -> Iterator[Callable[[], None]]:
    """Trace `steps` optimiser steps, after two of warm-up; yields what is to be called after each.

    Writes into `folder`, one file of each kind for every rank: trace-<rank>.json.gz, which
    chrome://tracing and ui.perfetto.dev show, and on CUDA memory-<rank>.json, the allocator's
    segments, blocks and history in the form of torch.cuda.memory's snapshots. A run of fewer steps
    is traced as far as it goes. With None nothing is traced.
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
