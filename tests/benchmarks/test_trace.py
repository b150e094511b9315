"""The time of a traced step, by hand."""

import gzip
import json

import pytest

from benchmarks.trace import summarize_trace


def event(name: str, start: float, length: float, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


def test_kinds_and_idle_time(tmp_path):
    """A kernel on a second stream overlaps the first; 30 of 100 microseconds nothing runs."""
    events = [
        event("ProfilerStep#2", 0, 100, "user_annotation"),
        event("aten::mm", 0, 1, "cpu_op"),
        event("nvjet_tst_128x256_64x4", 10, 30),
        event("void at::native::direct_copy_kernel_cuda", 30, 20),
        event("triton_tem_fused_flex_attention_0", 60, 10),
        event("Memcpy HtoD", 80, 20, "gpu_memcpy"),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = summarize_trace(path)
    microseconds = {name: found[name] * 1e6 for name in ("step", "products", "copies", "attention")}
    wanted = {"step": 100, "products": 30, "copies": 40, "attention": 10}
    assert microseconds == pytest.approx(wanted)
    assert found["idle"] * 1e6 == pytest.approx(30)
    assert "attention 10.0%, products 30.0%, copies 40.0%, idle 30.0%" in found["words"]
