"""The head benchmark at toy size: it says what is right, what is wrong and what it skips."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import head
from conftest import needs_interpreter

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


def test_out_of_memory_and_table():
    rows = [
        {"N": 1, "V": 2, "D": 3, "dtype": "bfloat16", "logits": "random", "method": "matmul"},
        {"method": "eager", "out_of_memory": True},
    ]
    assert "out of memory" in head.table(rows)


@needs_interpreter
def test_the_triton_kernels_in_their_interpreter(tmp_path):
    path = tmp_path / "head.json"
    command = [sys.executable, "-m", "benchmarks.head", "--toy", "--json", str(path)]
    done = subprocess.run(
        [*command, "--methods", "eager-float32", "triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(head.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(path.read_text())["results"] if "log_prob_error" in row]
    assert [row["method"] for row in rows] == ["eager-float32", "triton"] * 2
    for widened, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["log_prob_error"] <= 2 * widened["log_prob_error"]
