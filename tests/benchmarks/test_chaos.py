"""A few kills and damages of the large sweep, and its judgement of runs that went wrong."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos_runs import Base, Ended, differs, misbehaved, record
from ranks import call


def test_a_part_of_the_sweep(tmp_path):
    cases = "--variants full --kills 1 --damages 8 --disks 1".split()
    code, told = call(chaos.main, cases, log=tmp_path / "log")
    assert code == 0, told
    assert re.search(r"2 kills in 1 cases, 8 damages \(\d refused\), 1 disks: 0 failures", told)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder that looks like a run."""
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/final/model.safetensors").write_bytes(b"weights")
    lines = [{"step": step, "loss": 0.5, "perf/seconds": 0.1} for step in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    return tmp_path


def spoil_weights(run: Path) -> str:
    (run / "final/model.safetensors").write_bytes(b"weightz")
    return "wrong bits in ['run/final/model.safetensors']"


def leave_half(run: Path) -> str:
    (run / ".partial-final").touch()
    return "left ['run/.partial-final'], lacks []"


def lose_model(run: Path) -> str:
    (run / "final/model.safetensors").unlink()
    return "left [], lacks ['run/final/model.safetensors']"


def change_loss(run: Path) -> str:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.5", "0.25"))
    return "wrong metrics"


def change_speed(run: Path) -> str:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.1", "0.2"))
    return ""


@pytest.mark.parametrize(
    "change", [spoil_weights, leave_half, lose_model, change_loss, change_speed]
)
def test_what_differs(place, change):
    base = Base(record(place), events=1, seconds=1.0, size=1)
    assert differs(base, place, "") == ""
    expected = change(place / "run")
    assert differs(base, place, "") == expected


def test_lines_are_lost_with_a_warning_only(place):
    base = Base(record(place), events=1, seconds=1.0, size=1)
    file = place / "run/metrics.jsonl"
    file.write_text(file.read_text().splitlines()[1] + "\n")
    lost = "lines of metrics.jsonl are lost without a warning"
    assert differs(base, place, "", "run/metrics.jsonl") == lost
    assert differs(base, place, "warning: metrics.jsonl is damaged", "run/metrics.jsonl") == ""


def test_how_a_start_may_end():
    assert misbehaved(Ended([0], "")) == "" == misbehaved(Ended([2], "error: config.json: bad"))
    assert misbehaved(Ended([0], "Traceback (most recent call last)")) == "a traceback"
    advice = Ended([2], "error: holds no run; give another output_dir or remove it")
    assert misbehaved(advice) == "advice to remove a run"
    for codes, told in (([1], ""), ([2], ""), ([2], "error: a\nerror: b"), ([0, 2], "error: a")):
        assert misbehaved(Ended(codes, told)).startswith("exit codes")
