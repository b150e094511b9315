"""The demo's rounds: the script's stages, run here in this process, and their table."""

import json
import math
import os
import stat
import statistics
import subprocess

import pytest

import eval as evaluation
from notus.feedback import check
from notus.rounds import ROOT, gain, rounds_table
from ranks import call, train_each

RECORD = """#!/bin/sh
printf '%s\\n' "$#" "$@" >> "$RECORDED"
"""


def stages(out, demo, record, reference="last"):
    """The arguments of every command that the script would start, in order."""
    record.parent.mkdir(exist_ok=True)
    stub = record.with_suffix(".sh")
    stub.write_text(RECORD)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    record.write_text("")
    given = {"RUN": str(stub), "PYTHON": str(stub), "RECORDED": str(record), "SAMPLES": "3"}
    given |= {"MAX_NEW_TOKENS": "6", "REFERENCE": reference}
    files = [str(demo / "sft")]
    for name in ("questions.jsonl", "prompts.jsonl"):
        few = record.with_name(name)
        few.write_text("".join((demo / name).read_text().splitlines(keepends=True)[:6]))
        files.append(str(few))
    command = ["bash", str(ROOT / "configs/rounds.sh"), "2", str(out), *files, "CONFIG"]
    subprocess.run(command, check=True, env=os.environ | given)
    lines = record.read_text().splitlines()
    found = []
    while lines:
        count = int(lines[0])
        found.append(lines[1 : count + 1])
        lines = lines[count + 1 :]
    return found


def test_the_stages_of_two_rounds_follow_each_other_and_are_not_repeated(demo, tmp_path):
    out = tmp_path / "rounds"
    config = json.loads((ROOT / "configs/demo-round.json").read_text())
    config["train"] |= {"max_steps": 1, "pairs_per_step": 2}
    (tmp_path / "round.json").write_text(json.dumps(config))
    mark = tmp_path / "mark.py"  # the untrained policy is never right
    mark.write_text("def last(response, row):\n    return ord(response[-1]) if response else 0\n")
    commands = stages(out, demo, tmp_path / "record.txt")
    assert len(commands) == 12
    for number, command in enumerate(commands):
        if command[0] == "eval.py":
            assert evaluation.main(command[1:]) == 0
        elif command[0] == "train.py":
            arguments = [str(tmp_path / "round.json"), *command[2:]]
            code, told = call(train_each, [arguments], log=tmp_path / f"{number}.log", ranks=1)
            assert code == 0, told
        else:
            assert command[:2] == ["-m", "notus.feedback.check"]
            assert check.main([*command[2:], "--check", f"{mark}:last"]) == 0
    assert stages(out, demo, tmp_path / "record.txt") == []

    first, second = (out / f"round-{number}/run" for number in (1, 2))
    runs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert [run["model"]["policy"] for run in runs] == [str(demo / "sft"), str(first / "final")]
    assert [run["model"]["reference"] for run in runs] == [run["model"]["policy"] for run in runs]
    table = rounds_table(out, 2).splitlines()
    assert len(table) == 4 and table[1].split()[:3] == ["round", "0", "0"]


def test_the_reference_may_stay_the_first_model(demo, tmp_path):
    trained = [c for c in stages(tmp_path, demo, tmp_path / "record", "sft") if c[0] == "train.py"]
    given = [{word.split("=")[0]: word for word in command} for command in trained]
    assert [one["model.reference"] for one in given] == [f"model.reference={demo / 'sft'}"] * 2
    assert given[1]["model.policy"] == f"model.policy={tmp_path}/round-1/run/final"


def test_a_gain_s_standard_error_is_that_of_paired_changes():
    after, before = [1.0, 0.5, 0.75, 1.0], [0.5, 0.5, 0.0, 0.25]
    changes = [0.5, 0.0, 0.75, 0.75]
    error = statistics.stdev(changes) / math.sqrt(4)
    assert gain(after, before) == pytest.approx((0.5, error))
