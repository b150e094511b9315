"""What a run says of its progress where there is no terminal."""

import sys
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from notus.engine.log import MetricsLog, ProgressLines, progress


def steps_at(times: list[float], total: int, initial: int) -> None:
    """One step at each of the times, in seconds; the first is when the run starts."""
    clock: Iterator[float] = iter(times)
    lines = ProgressLines(total, initial, "step", lambda: next(clock))
    for step in range(1, len(times)):
        lines.set_postfix({"loss": f"{1 / step:.2f}"}, refresh=False)
        lines.update(1)


def test_lines_are_whole_and_tell_the_time_left(capsys):
    """Resumed after 1,000 of 1,006 steps: 10, 15, 30, 45, 46 and 60 seconds after the start."""
    steps_at([100, 110, 115, 130, 145, 146, 160], total=1006, initial=1000)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "step 1,001 of 1,006, loss 1.00, 00:10 so far, 00:50 left",
        "step 1,003 of 1,006, loss 0.33, 00:30 so far, 00:30 left",
        "step 1,004 of 1,006, loss 0.25, 00:45 so far, 00:22 left",
        "step 1,006 of 1,006, loss 0.17, 01:00 so far, 00:00 left",
    ]


def test_nothing_is_said_before_the_first_step(capsys):
    steps_at([0], total=3, initial=0)
    ProgressLines(3, 0, "step").update(0)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    assert isinstance(progress(3, 0, "step"), ProgressLines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress(3, 0, "step")
    assert isinstance(bar, tqdm)
    bar.close()


@pytest.mark.parametrize("active", [True, False])
def test_rank_0_alone_writes_lines_with_the_last_metrics(tmp_path, capsys, active):
    log = MetricsLog(tmp_path, step=0, total=2, active=active)
    log.write(0, {"eval_loss": 0.6931})
    log.write(1, {"loss": 0.6931, "rewards/accuracies": 0.25, "rewards/margins": 0.0})
    log.write(2, {"loss": 0.5, "eval_loss": 0.4})
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if active else 0)
    if active:
        assert lines[0].startswith("step 1 of 2, loss 0.6931, accuracy 0.2500, margin 0.0000, ")
        assert lines[1].startswith("step 2 of 2, loss 0.5000, ")
        assert all(line.endswith(" left") for line in lines)
