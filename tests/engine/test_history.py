"""The starts and ends of a run in history.jsonl."""

import json
from importlib.metadata import version

import pytest
import torch

from notus.engine import distributed, history
from notus.errors import UserError


@pytest.fixture
def one_rank():
    yield distributed.start("cpu")
    distributed.stop()


def test_starts_and_ends_are_added(one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "configs/demo.json", "loss.beta=0.2"])
    (tmp_path / "data.jsonl").write_text("")
    for continues in (None, "step-00000500"):
        history.record_start(
            tmp_path,
            continues=continues,
            device=torch.device("cpu"),
            data={"train": {"pairs": 7, "counts": {"cut": 2}}},
            paths=["org/model", str(tmp_path / "data.jsonl"), "org/model"],
        )
    history.record_end(tmp_path)
    first, second, end = history.read_history(tmp_path)
    assert [first["continues"], second["continues"]] == [None, "step-00000500"]
    assert first["command"] == ["python", "train.py", "configs/demo.json", "loss.beta=0.2"]
    assert first["ranks"] == 1 and first["device"].startswith("CPU")
    assert first["data"] == {"train": {"pairs": 7, "counts": {"cut": 2}}}
    assert first["local"] == [str(tmp_path / "data.jsonl")]
    assert first["versions"]["torch"] == version("torch")
    assert end["event"] == "end" and first["time"] <= second["time"] <= end["time"]
    assert [path.name for path in tmp_path.glob(".partial-*")] == []


def test_a_run_without_history_has_none(tmp_path):
    assert history.read_history(tmp_path) == []


LINES = [
    b'{"eve',
    b"3",
    b'{"step": 1, "loss": 2.0}',  # of metrics.jsonl
    b'{"event": "end", "time": "2026-01-01T00:00:00+00:00"}',  # of no start
    b'{"event": "start", "time": "soon"}',
    b'{"event": "start", "time": "2026-01-01T00:00:00+00:00"}',
    b"[" * 100_000,
    b"\xff",
]


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_history_is_named_and_set_aside(one_rank, tmp_path, capsys, line):
    path = tmp_path / "history.jsonl"
    start(tmp_path)
    before = line + b"\n" + path.read_bytes()
    path.write_bytes(before)
    with pytest.raises(UserError, match="history.jsonl:1: not valid JSON, or not an event"):
        history.read_history(tmp_path)
    start(tmp_path)
    assert [event["event"] for event in history.read_history(tmp_path)] == ["start", "start"]
    assert (tmp_path / "history.jsonl.damaged").read_bytes() == before
    assert "history.jsonl is damaged: kept as history.jsonl.damaged" in capsys.readouterr().err
    path.write_bytes(before)
    start(tmp_path)
    assert (tmp_path / "history.jsonl.damaged-2").read_bytes() == before


def test_a_history_that_is_no_file_is_set_aside(one_rank, tmp_path):
    (tmp_path / "history.jsonl").mkdir()
    start(tmp_path)
    assert (tmp_path / "history.jsonl.damaged").is_dir()
    assert len(history.read_history(tmp_path)) == 1


def start(folder):
    history.record_start(
        folder, continues=None, device=torch.device("cpu"), data={"train": {}}, paths=[]
    )


def test_a_folder_that_is_gone_is_named(one_rank, tmp_path):
    with pytest.raises(UserError, match=r"gone/history.jsonl: cannot be written \(No such file"):
        history.record_end(tmp_path / "gone")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python train.py c.json"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc_per_node 8 train.py c.json",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT "
            "--nproc_per_node 8 train.py c.json",
        ),
    ],
)
def test_command_that_starts_it_again(environment, expected):
    assert " ".join(history.command(["train.py", "c.json"], environment)) == expected


def test_the_checkout_is_named(tmp_path):
    assert history._commit(tmp_path) is None
    found = history.versions()
    assert json.dumps(found) and found["python"].startswith("3.")
