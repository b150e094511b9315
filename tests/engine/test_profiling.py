import gzip
import json

import torch

from notus.engine.profiling import profiled


def test_the_trace_holds_the_asked_steps_and_no_warm_up(tmp_path):
    with profiled(tmp_path / "profile", 2, rank=3) as step_done:
        for size in range(1, 7):
            with torch.profiler.record_function(f"work on {size}"):
                torch.ones(size, size) @ torch.ones(size, size)
            step_done()
    (trace,) = (tmp_path / "profile").iterdir()  # no memory file without CUDA
    assert trace.name == "trace-3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    work = {event["name"] for event in events if event["name"].startswith("work on")}
    assert work == {"work on 3", "work on 4"}


def test_nothing_is_traced_by_default(tmp_path):
    with profiled(tmp_path / "profile", None, rank=0) as step_done:
        step_done()
    assert not (tmp_path / "profile").exists()
