"""The speed benchmark at its smallest, with train.py only, and how it compares two sides."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import speed_runs, train_speed
from benchmarks.speed_case import (
    PARITY_STEPS,
    TINY,
    Case,
    grouped_order,
    random_pairs,
    write_policy,
)
from benchmarks.train_speed import check_memory, compare_start, ratios, verdict
from notus.errors import UserError
from ranks import call

CASE = Case("tiny", 4, 1, 2, "float32", "adamw", 1e-5)


def forked(command, stdout, **_):
    """In place of subprocess.run of a module's `main`."""
    assert command[1:3] == ["-m", "benchmarks.speed_runs"]
    code, _ = call(speed_runs.main, Path(command[3]), log=Path(stdout.name))
    return subprocess.CompletedProcess(command, code)


def test_ours_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed.subprocess, "run", forked)
    path = tmp_path / "speed.json"
    options = ["--pairs-per-step", "3", "--warm", "4", "--steps", "2", "--sides", "notus"]
    assert train_speed.main(["--model", "tiny", *options, "--trace", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "notus / TRL" not in printed and "pairs/s, MFU" in printed
    report = json.loads(path.read_text())
    assert report["ratios"] == {} and report["parity"] is None
    (run,) = report["results"]
    # At the start policy and reference are the same: ln 2.
    assert run["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert 0 < run["trace"]["products"] < run["trace"]["step"]
    lengths = random_pairs("uf", 18, 512).lengths[12:]
    assert len(run["step_seconds"]) == 2 and min(run["step_seconds"]) > 0
    assert run["pairs_per_second"] == pytest.approx(6 / sum(run["step_seconds"]))
    unshared = lengths.sum() + lengths[:, 0].sum()
    assert run["real_tokens_per_second"] == pytest.approx(unshared / sum(run["step_seconds"]))
    assert run["processed"]["scored"] == lengths[:, 1:].sum()
    assert lengths.sum() <= run["processed"]["slots"] < lengths.sum() + 2 * 3 * 2048
    assert 0 < run["mfu_of_matmul"] <= run["hfu_of_matmul"]
    assert run["peak_memory_bytes"] >= run["memory_at_start_bytes"] > 0


def test_log_probs_at_parity(tmp_path, monkeypatch):
    """Random weights: ln 512 per token."""
    monkeypatch.setattr(train_speed.subprocess, "run", forked)
    options = train_speed.parse(["--model", "tiny", "--json", str(tmp_path / "speed.json")])
    pairs = random_pairs("uf", 6, 512)
    write_policy(tmp_path / "policy", TINY, torch.float32)
    case = Case("tiny", PARITY_STEPS, 0, 3, "float32", "adamw", 1e-5)
    found = train_speed.start(case, "notus", {}, tmp_path, pairs, options)
    per_token = np.array(found["log_probs"]).reshape(3, 2) / pairs.lengths[:3, 1:]
    assert per_token == pytest.approx(np.full((3, 2), -np.log(512)), rel=0.05)


def test_a_failed_run_keeps_what_it_printed(tmp_path, monkeypatch, capsys):
    """And the runs before it are in the report."""

    def run(command, stdout, **_):
        stdout.write(b"Traceback\nfirst\nsecond\nValueError: odd\n")
        stdout.flush()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(train_speed.subprocess, "run", run)
    path = tmp_path / "speed.json"
    assert train_speed.main(["--model", "tiny", "--sides", "notus", "--json", str(path)]) == 1
    (kept,) = tmp_path.glob("speed.failed-notus-*.txt")
    assert kept.read_text().startswith("Traceback\nfirst")
    assert f"ValueError: odd\nall that it printed: {kept}" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    assert "ValueError: odd" in result["failed"]


def stand_in(case, side, settings, *_):
    """In place of `start`: a run that took no time to make."""
    start = {"log_probs": [-10.0], "loss": [0.7], "grad_norm": [1.0], "settings": settings}
    times = ("median_seconds", "iqr_seconds", "real_tokens_per_second")
    values = dict.fromkeys((*times, "processed_tokens_per_second"), 1.0) | {"mfu": 0.1, "hfu": 0.1}
    return start | values | run_of(side, {"notus": 3.0, "trl": 2.0}[side])


def test_the_report_is_written_after_every_run_and_parity_read_back(tmp_path, monkeypatch, capsys):
    begun = []

    def start(case, side, *others):
        begun.append((side, case.steps, path.exists()))
        return stand_in(case, side, *others)

    monkeypatch.setattr(train_speed, "start", start)
    path = tmp_path / "parity.json"
    command = ["--model", "tiny", "--sides", "both", "--pairs-per-step", "2"]
    assert train_speed.main([*command, "--repeats", "0", "--json", str(path)]) == 0
    assert begun == [("trl", 2, False), ("notus", 2, True)]
    begun.clear()
    again = [*command, "--parity", str(path), "--json", str(tmp_path / "speed.json")]
    assert train_speed.main(again) == 0
    assert [entry[:2] for entry in begun] == [("trl", 5), ("notus", 5)]
    printed = capsys.readouterr().out
    assert "notus / TRL: 1.50 x pairs/s" in printed and "NOT VALID" not in printed
    with pytest.raises(UserError, match="optimizer: found adamw, expected rmsprop"):
        train_speed.main([*again, "--optimizer", "rmsprop"])


def test_a_gpu_that_cannot_hold_the_model_is_refused():
    case = Case("B", 9, 3, 64, "bfloat16", "rmsprop", 1e-5)
    with pytest.raises(UserError, match="86,900,785,152 bytes before any activation"):
        check_memory(case, "float32", 80 * 2**30)
    check_memory(case, "bfloat16", 80 * 2**30)
    check_memory(case, "float32", 139 * 2**30)


def test_grouped_order_keeps_the_timed_pairs_and_sorts_within():
    lengths = random_pairs("uf", 8, 512).lengths
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


def test_a_ratio_without_parity_is_marked(capsys):
    ours = {"log_probs": [-10.0, -20.0], "loss": [0.7, 0.6], "grad_norm": [1.0, 2.0]}
    near = compare_start(ours, ours | {"loss": [0.7, 0.6003]}, "float32")
    assert near["holds"] and near["loss"] == pytest.approx(0.0003 / 0.6003)
    far = compare_start(ours, ours | {"log_probs": [-10.0, -20.01]}, "float32")
    assert not far["holds"]
    norms = compare_start(ours, ours | {"grad_norm": [1.025, 2.0]}, "bfloat16")
    assert norms["holds"]
    runs = [stand_in(CASE, "trl", {}), stand_in(CASE, "notus", {})]
    report = {"starts": {}, "results": runs, "parity": far, "ratios": ratios(runs)}
    assert verdict(report, True) == 1
    printed = capsys.readouterr().out
    assert "NOT VALID: notus / TRL: 1.50 x pairs/s" in printed
    assert "parity DOES NOT HOLD (log_probs 5.0e-04" in printed


def test_options_that_contradict_each_other(tmp_path, capsys):
    for words, told in (
        (["--pairs", str(tmp_path)], "--pairs and --tokenizer"),
        (["--trace", "--warm", "3"], "found --warm 3, expected 4"),
    ):
        with pytest.raises(SystemExit):
            train_speed.main(words)
        assert told in capsys.readouterr().err
