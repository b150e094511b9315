"""The speed benchmark at its smallest, with train.py alone, and how it compares two sides."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import train_speed
from benchmarks.train_speed import Case, compare_start, grouped_order, ratios, verdict
from ranks import call

CASE = Case("tiny", 4, 1, 2, "float32", "adamw", 1e-5)


def forked(command, **_):
    """In place of subprocess.run of a module's `main`."""
    assert command[1:4] == ["-m", "benchmarks.train_speed", "--task"]
    log = Path(command[4]).with_name("log")
    code, told = call(train_speed.main, command[3:], log=log)
    return subprocess.CompletedProcess(command, code, told, told)


def test_ours_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "find_spec", lambda name: None)
    monkeypatch.setattr(train_speed.subprocess, "run", forked)
    path = tmp_path / "speed.json"
    options = ["--pairs-per-step", "3", "--warm", "1", "--steps", "2", "--repeats", "1"]
    assert train_speed.main(["--model", "tiny", *options, "--json", str(path)]) == 0
    assert "nothing to compare with" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["ratios"] is None and report["parity"] is None
    start, run = report["starts"]["notus"], report["results"][0]
    # At the start policy and reference are the same: ln 2. Random weights: ln 512 per token.
    assert start["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    lengths = train_speed.random_pairs("uf", 9, 512).lengths
    per_token = np.array(start["log_probs"]).reshape(3, 2) / lengths[:3, 1:]
    assert per_token == pytest.approx(np.full((3, 2), -np.log(512)), rel=0.05)
    assert len(run["step_seconds"]) == 2 and min(run["step_seconds"]) > 0
    assert run["pairs_per_second"] == pytest.approx(6 / sum(run["step_seconds"]))
    unshared = lengths[3:].sum() + lengths[3:, 0].sum()
    assert run["real_tokens_per_second"] == pytest.approx(unshared / sum(run["step_seconds"]))
    assert run["processed"]["scored"] == lengths[3:, 1:].sum()
    assert lengths[3:].sum() <= run["processed"]["slots"] < lengths[3:].sum() + 2 * 3 * 2048
    assert 0 < run["mfu_of_matmul"] <= run["hfu_of_matmul"]
    assert run["peak_memory_bytes"] >= run["memory_at_start_bytes"] > 0


def test_grouped_order_keeps_the_timed_pairs_and_sorts_within():
    lengths = train_speed.random_pairs("uf", 8, 512).lengths
    order = grouped_order(lengths, CASE)
    assert sorted(order[:2]) == [0, 1] and sorted(order) == list(range(8))
    longer = (lengths[:, 0] + lengths[:, 1:].max(1))[order[2:]].reshape(3, 2)
    spans = sorted(map(tuple, longer[:, ::-1].tolist()))
    assert all(low[1] <= high[0] for low, high in zip(spans, spans[1:], strict=False))


def run_of(system: str, rate: float, **values) -> dict:
    given = {"pairs_per_second": rate, "cpu_pairs_per_second": rate, "peak_memory_bytes": 100}
    return {"system": system, "settings": {}} | given | values


def test_ratios_are_of_medians():
    runs = [run_of("notus", rate) for rate in (4.0, 6.0, 50.0)]
    runs += [run_of("trl", 2.0, peak_memory_bytes=400), {"system": "trl", "failed": "no memory"}]
    found = {"pairs_per_second": 3.0, "cpu_pairs_per_second": 3.0, "peak_memory_bytes": 0.25}
    assert ratios(runs) == found


def test_no_ratio_without_parity(capsys):
    ours = {"log_probs": [-10.0, -20.0], "loss": [0.7, 0.6], "grad_norm": [1.0, 2.0]}
    near = compare_start(ours, ours | {"loss": [0.7, 0.6003]}, "float32")
    assert near["holds"] and near["loss"] == pytest.approx(0.0003 / 0.6003)
    far = compare_start(ours, ours | {"log_probs": [-10.0, -20.01]}, "float32")
    assert not far["holds"]
    report = {"starts": {}, "results": [], "parity": far, "ratios": None}
    assert verdict(report, ["trl", "notus"]) == 1
    printed = capsys.readouterr().out
    assert "no ratio" in printed and " x pairs/s" not in printed


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(train_speed.UserError, match="--pairs and --tokenizer"):
        train_speed.main(["--pairs", str(tmp_path)])
