"""The head benchmark at toy size: it says what is right, what is wrong and what it skips."""

import json
import math
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import head
from conftest import needs_interpreter
from ranks import call

METHODS = ["eager", "eager-float32", "cce", "plain", "triton"]


def run(options: list[str], path: Path) -> tuple[int, dict]:
    code = head.main(["--toy", "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_results_and_what_is_skipped(tmp_path, capsys):
    code, report = run(["--methods", *METHODS], tmp_path / "head.json")
    assert code == 0 and report["environment"]["device"] == "CPU"
    printed = capsys.readouterr().out
    assert "skipped: cce (its kernels need CUDA)" in printed
    assert "skipped: triton (" in printed
    by_method = {row["method"]: row for row in report["results"] if row["N"] == 70}
    assert list(by_method) == ["matmul", "eager", "eager-float32", "plain"]
    ours, widened, eager = (by_method[name] for name in ("plain", "eager-float32", "eager"))
    assert ours["log_prob_error"] <= 2 * widened["log_prob_error"] < eager["log_prob_error"] / 100
    assert "forward" not in widened
    for label, products in (("forward", 2), ("forward+backward", 6)):
        found = ours[label]
        flops = products * 70 * 300 * 64
        assert math.isclose(found["tflops"] * 1e12 * found["seconds"], flops, rel_tol=1e-9)
        assert found["extra_bytes"] is None  # counted on CUDA only


def test_a_wrong_method_is_named_and_not_timed(tmp_path, monkeypatch, capsys):
    wrong = lambda device: lambda *tensors: 1.1 * head.eager(*tensors)  # noqa: E731
    monkeypatch.setitem(head.METHODS, "eager", wrong)
    code, report = run(["--methods", "eager"], tmp_path / "head.json")
    assert code == 1 and "wrong results from eager" in capsys.readouterr().err
    assert all("forward" not in row for row in report["results"] if row["method"] == "eager")


def test_the_compiled_method_is_compiled_for_every_shape(tmp_path, monkeypatch):
    """Dynamo would run it eagerly after eight: twice four shapes, with and without gradient."""
    counter = CompileCounter()
    compiled = torch.compile(head.eager, dynamic=False, backend=counter)
    monkeypatch.setitem(head.METHODS, "compile", lambda device: compiled)
    monkeypatch.setattr(head, "TOY_CASES", [head.Case(n, 30, 16, "random") for n in range(10, 15)])
    code, _ = run(["--methods", "compile"], tmp_path / "head.json")
    assert code == 0 and counter.frame_count == 2 * 5


def test_out_of_memory_and_table():
    rows = [
        {"N": 1, "V": 2, "D": 3, "dtype": "bfloat16", "logits": "random", "method": "matmul"},
        {"method": "eager", "out_of_memory": True},
    ]
    assert "out of memory" in head.table(rows)


def interpreted(options: list[str], path: Path) -> dict:
    arguments = ["--toy", "--json", str(path), *options]
    code, told = call(head.main, arguments, log=path.with_name("log"))
    assert code == 0, told
    return json.loads(path.read_text())


@needs_interpreter
def test_the_triton_kernels_in_their_interpreter(tmp_path):
    methods = ["eager-float32", "chunked", "descriptors", "triton"]
    options = ["--chunk-rows", "64", "--methods", *methods]
    report = interpreted(options, tmp_path / "head.json")
    assert report["chunk_rows"] == 64
    rows = [row for row in report["results"] if "log_prob_error" in row]
    assert [row["method"] for row in rows] == methods * 2
    for widened, *ours in zip(*(rows[n::4] for n in range(4)), strict=True):
        for row in ours:
            assert row["log_prob_error"] <= 2 * widened["log_prob_error"]


@needs_interpreter
def test_sweep(tmp_path):
    found = interpreted(["--sweep"], tmp_path / "head.json")["sweep"]
    tiles = [tuple(row["tiles"].values()) for row in found if "tiles" in row]
    assert len(set(tiles)) == len(tiles) == 7
    assert [row["chunk_rows"] for row in found if "chunk_rows" in row] == [1024, 2048, 4096, 8192]


def test_a_sweep_needs_triton(tmp_path, capsys):
    assert head.main(["--toy", "--sweep"]) == 2
    assert "skipped: triton (" in capsys.readouterr().out
