"""What only torchrun itself can show: two machines, its console, a start after a rank has died."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import ROOT, run_ranks
from runs import base_config, metrics, stored

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> str:
    """The file of a run of eight steps with a checkpoint after four, on two ranks or machines."""
    settings = base_config(demo)
    settings["train"] = {"pairs_per_step": 12, "epochs": 2, "max_steps": 8}
    settings["checkpoint"] = {"every": 4}
    settings["parallel"] |= {"shard": 1, "replicate": 2}  # as configs/multi-node.json: in a machine
    file = tmp_path_factory.mktemp("torchrun") / "config.json"
    file.write_text(json.dumps(settings))
    return str(file)


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """The output of an uninterrupted run on one machine."""
    output = Path(config).with_name("whole")
    code, told = run_ranks([config, f"output_dir={output}"], output.with_suffix(".log"), ranks=2)
    assert code == 0, told
    return output


def torchrun(*words: str) -> subprocess.Popen:
    """With one thread for each rank, as in the runs compared with: more would add otherwise."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_end(one: Path, other: Path) -> None:
    """Every metric but speed, every weight and moment: equal to the bit."""
    lines = [
        [{k: v for k, v in line.items() if "perf/" not in k} for line in metrics(path)]
        for path in (one, other)
    ]
    assert lines[0] == lines[1]
    last = "checkpoints/step-00000008"
    for folder, prefix in ((last, "model"), (last, "optimizer"), ("final", "model")):
        expected, found = (stored(path / folder, prefix) for path in (one, other))
        assert expected.keys() == found.keys() and len(expected) > 10
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def machines(config) -> tuple[Path, list[tuple[str, str]]]:
    """The output of a run on two machines of one rank, and what each has said: stdout, stderr."""
    output = Path(config).with_name("machines")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    words += [str(ROOT / "train.py"), config, f"output_dir={output}"]
    agents = [torchrun("--node-rank", str(number), *words) for number in (0, 1)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return output, said


def test_two_machines_end_where_one_does(machines, whole):
    assert_same_end(whole, machines[0])


def test_a_run_speaks_once_in_plain_lines(machines):
    """The first rank, to a file here: nothing that would move a terminal's cursor."""
    output, (first, second) = machines
    assert second[0] == "" and "step" not in second[1]
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", first[0] + first[1])
    losses = [line["loss"] for line in metrics(output)]
    steps = [line for line in first[1].splitlines() if line.startswith("step ")]
    shown = [int(line.split()[1]) for line in steps]
    assert shown[0] == 0 and shown[-1] == 8 and sorted(set(shown)) == shown
    for step, line in zip(shown[1:], steps[1:], strict=True):
        assert line.startswith(f"step {step} of 8, loss {losses[step - 1]:.3f} acc ")
        assert re.search(r" in \d\d:\d\d, \d\d:\d\d left$", line)
    lines = [line for line in first[0].splitlines() if line]
    assert len(lines) == len(set(lines)) < 10
    assert f"wrote {output / 'final'}" in lines


def test_torchrun_resumes_after_a_rank_has_died(config, whole, tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    script = str(Path(__file__).with_name("dies_once.py"))
    agent = torchrun(*words, script, config, f"output_dir={tmp_path / 'run'}")
    out, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0, errors[-3000:]
    assert "step-00000004 after 4 steps" in out
    assert_same_end(whole, tmp_path / "run")
