"""The list of parts, with trivial parts: none hides another, and the report is always there."""

import json

import torch

from benchmarks import first_gpu
from benchmarks.first_gpu import PARTS, Part

SLEEP = "__import__('time').sleep(60)"


def test_every_part_is_run_and_told_of(tmp_path, monkeypatch, capsys):
    failing = Part("failing", 6, "", "-c print('begun');raise(ValueError('odd'))")
    hanging = Part("hanging", 1, "", f"-c print(6);{SLEEP}")
    on_gpu = Part("on a GPU", 0, "-c raise(ValueError)", "")
    fine = Part("fine", 30, "", "-c print('{json}'[-9:]);print(7)")
    monkeypatch.setattr(first_gpu, "PARTS", (failing, hanging, on_gpu, fine))
    assert first_gpu.main(["--toy", "--folder", str(tmp_path / "first")]) == 1
    parts = json.loads((tmp_path / "first/report.json").read_text())["parts"]
    assert [(part["outcome"], part["last line"]) for part in parts] == [
        ("failed (1)", "ValueError: odd"),
        ("cut off", "6"),
        ("ok", "7"),
    ]
    assert (tmp_path / "first/fine.out").read_text() == "fine.json\n7\n"
    assert "Traceback" in (tmp_path / "first/failing.err").read_text()
    assert capsys.readouterr().out.splitlines()[-4].split() == [
        *("part", "seconds", "outcome", "last", "line")
    ]


def test_nine_minutes():
    assert sum(part.limit for part in PARTS) <= 540


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_gpu.main(["--folder", str(tmp_path / "first")]) == 2
    assert "no CUDA GPU was found; --toy" in capsys.readouterr().err
    assert not (tmp_path / "first").exists()
