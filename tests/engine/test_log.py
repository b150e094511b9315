"""The files that a run writes its metrics to, on a full disk too, and its progress in a pipe."""

import json
import resource
import sys
from contextlib import contextmanager

import pytest
from lines import read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from notus.engine.log import LinesFile, MetricsLog, progress
from runs import metrics

INF, NAN = float("inf"), float("nan")


def write(folder, steps, *, step=0, active=True):
    log = MetricsLog(folder, step=step, total=10, active=active)
    for done in steps:
        log.write(done, {"loss": 1.0 / (done + 1), "rewards/margins": float(done)})
    log.close()


def test_log_writes_lines_and_events(tmp_path):
    write(tmp_path, [0, 2, 4])
    assert metrics(tmp_path) == [
        {"step": 0, "loss": 1.0, "rewards/margins": 0.0},
        {"step": 2, "loss": 1 / 3, "rewards/margins": 2.0},
        {"step": 4, "loss": 1 / 5, "rewards/margins": 4.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/rewards/margins"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(0, 1.0), (2, pytest.approx(1 / 3)), (4, pytest.approx(1 / 5))]


def test_resumed_log_replaces_later_steps(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn when the run was killed
    write(tmp_path, [3, 4, 5], step=2)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_other_ranks_and_empty_reports_write_nothing(tmp_path):
    write(tmp_path, [1, 2], active=False)
    assert not list(tmp_path.iterdir())
    log = MetricsLog(tmp_path, step=0, total=10, active=True)
    log.write(1, {})
    assert log.bar.n == 1
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_of_a_file(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    file = LinesFile(path, 3)  # there is none yet
    for step in (1, 2, 3):
        file.add({"step": step, "loss": NAN if step == 2 else 0.5, "pairs": [1]})
    with path.open("ab") as handle:
        handle.write(b'{"step": 4, "lo')
    assert LinesFile(path, 2).last == 2
    kept = read_lines(path)
    assert kept == [
        {"step": 1, "loss": 0.5, "pairs": [1]},
        {"step": 2, "loss": None, "pairs": [1]},
    ]
    assert "NaN" not in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line",
    [b'{"step": 1, "lo{"step": 2}', b"[]", b"\0\0\0", b"\xff", b"[" * 99_999, b'{"step": "a"}'],
)
def test_a_file_with_a_damaged_line_is_set_aside(tmp_path, capsys, line):
    path = tmp_path / "lines.jsonl"
    content = b'{"step": 1}\n' + line + b'\n{"step": 2}\n'
    path.write_bytes(content)
    LinesFile(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "lines.jsonl.damaged").read_bytes() == content
    assert f"{path} is damaged: kept as lines.jsonl.damaged" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")])
def test_a_file_that_is_none_is_set_aside(tmp_path, make):
    path = tmp_path / "lines.jsonl"
    make(path)
    LinesFile(path, 2).add({"step": 3})
    assert path.is_file() and not path.is_symlink()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("kept", "every", "missing"), [(3, 1, True), (4, 1, False), (3, 3, False), (None, 1, True)]
)
def test_lines_that_are_missing_are_said(tmp_path, capsys, kept, every, missing):
    """Resumed from step 4, with or without a file that ends too early."""
    if kept is not None:
        write(tmp_path, range(1, kept + 1))
    capsys.readouterr()
    MetricsLog(tmp_path, step=4, total=9, active=True, every=every).close()
    assert ("lines of steps up to 4 are missing" in capsys.readouterr().err) == missing


@contextmanager
def small_files():
    """The kernel refuses files of more than 100 bytes, as a full disk would.

    Only around what is tested: pytest's own output may go to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_whole_lines_and_is_reported_once(tmp_path, capsys):
    with small_files():
        file = LinesFile(tmp_path / "lines.jsonl", 0)
        for step in range(5):
            file.add({"step": step, "text": "30 bytes of it"})
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: {file.path}: No space left on device; ")
    file.add({"step": 5})
    lines = read_lines(file.path)
    assert [line["step"] for line in lines] == [0, 1, 5]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_without_space(tmp_path, capsys):
    """TensorBoard's thread ends, but not with a traceback."""
    with small_files():
        log = MetricsLog(tmp_path, step=0, total=9, active=True)
        for step in range(1, 9):
            log.write(step, {"loss": 0.5, "learning_rate": 0.1})
        log.close()
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1] for line in told if not line.startswith("step ")) == [
        str(tmp_path / "metrics.jsonl"),
        str(tmp_path / "tensorboard"),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_pipe_gets_whole_lines_with_the_time_left(capsys, monkeypatch):
    """Resumed after 1,000 of 1,006 steps: 10, 15, 30, 45, 46 and 54 seconds after the start."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = progress(1006, 1000, "step")
    for step, seconds in enumerate((10, 15, 30, 45, 46, 54), start=1):
        now[0] = 100.0 + seconds
        bar.set_postfix_str(f"loss {1 / step:.2f}", refresh=False)
        bar.update(1)
    bar.close()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "step 1,000 of 1,006 in 00:00, ? left",
        "step 1,002 of 1,006, loss 0.50 in 00:15, 00:30 left",
        "step 1,003 of 1,006, loss 0.33 in 00:30, 00:30 left",
        "step 1,004 of 1,006, loss 0.25 in 00:45, 00:22 left",
        "step 1,006 of 1,006, loss 0.17 in 00:54, 00:00 left",
    ]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress(3, 0, "step").close()
    assert "0/3" in capsys.readouterr().err


@pytest.mark.parametrize("active", [True, False])
def test_only_rank_0_prints_lines_with_the_last_metrics(tmp_path, capsys, active):
    log = MetricsLog(tmp_path, step=0, total=2, active=active)
    log.write(0, {"eval_loss": 0.6931})
    log.write(1, {"loss": 0.6931, "rewards/accuracies": 0.25, "rewards/margins": 0.0})
    log.write(2, {"loss": 0.5, "eval_loss": 0.4})
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if active else 0)
    if active:
        assert lines[0].startswith("step 0 of 2 in ")
        assert lines[1].startswith("step 2 of 2, loss 0.500 in ") and lines[1].endswith(" left")


LINE = {"loss": 0.5312, "rewards/accuracies": 0.96875, "rewards/margins": -12.341}


def test_the_last_state_fits_80_columns(tmp_path, capsys, monkeypatch):
    """The length of Notus, ten hours; in a pipe, and as the bar of a terminal."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (80, 24))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        now[0] = 0.0
        log = MetricsLog(tmp_path / str(terminal), step=0, total=2889, active=True)
        now[0] = 36000.0
        log.write(2000, {**LINE, "pairs": 64})
        log.close()
        last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
        assert "loss 0.531 acc 0.97 margin -12.34" in last and "4:26:42" in last
        assert len(last) <= 80


def test_a_partial_step_is_not_shown_and_the_first_evaluation_not_in_the_pace(
    tmp_path, capsys, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    log = MetricsLog(tmp_path, step=0, total=3, active=True)
    for step, seconds, loss, pairs in ((1, 20, 0.6, 32), (2, 30, 0.1, 3), (3, 40, 0.4, 16)):
        if step == 1:
            now[0] = 100.0
            log.write(0, {"eval_loss": 0.7})
        now[0] = 100.0 + seconds
        log.write(step, {"loss": loss, "pairs": pairs})
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 0 of 3 in 00:00, ? left",
        "step 1 of 3, loss 0.600 in 00:20, 00:40 left",
        "step 3 of 3, loss 0.400 in 00:40, 00:00 left",
    ]
    assert [line["loss"] for line in metrics(tmp_path)[1:]] == [0.6, 0.1, 0.4]
