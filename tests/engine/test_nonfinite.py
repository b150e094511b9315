"""What is agreed about a step, and how one that is not finite is left out of the means."""

import json

import pytest
import torch
import torch.distributed as dist

from notus.engine.metrics import (
    Totals,
    append_line,
    drop_later_lines,
    judge_step,
    nonfinite_pairs,
)

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, scope="module")
def group():
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", [6.0, INF, NAN])
@pytest.mark.parametrize("norm", [0.5, INF, NAN])
def test_a_step_is_finite_when_loss_and_gradient_are(loss, norm):
    total = torch.tensor(loss, dtype=torch.float64)
    verdict = judge_step(total, torch.tensor(norm), 3, False, True)
    assert verdict.finite == (loss == 6.0 and norm == 0.5)
    assert (verdict.stop, verdict.save) == (False, True)
    if verdict.finite:
        assert (verdict.loss, verdict.grad_norm) == (2.0, 0.5)


def test_pairs_whose_loss_is_not_finite():
    seen = [
        (torch.tensor([9, 4]), torch.tensor([1.0, NAN])),
        (torch.tensor([], dtype=torch.int64), torch.tensor([])),
        (torch.tensor([3, 7]), torch.tensor([-INF, 2.0])),
    ]
    assert nonfinite_pairs(seen) == [3, 4]


def step_of(*losses: float) -> Totals:
    step = Totals()
    for loss in losses:
        step.add({"loss": (torch.tensor(loss, dtype=torch.float64), torch.tensor(2.0).double())})
    return step


def test_a_step_that_is_not_finite_counts_for_nothing_but_itself():
    totals = Totals()
    totals.add_step(step_of(1.0, 3.0), True)
    totals.add_step(step_of(NAN, 3.0), False)
    totals.add_step(step_of(5.0), True)
    resumed = Totals()
    resumed.restore(json.loads(json.dumps(totals.snapshot())), torch.device("cpu"))
    expected = {"loss": (1.0 + 3.0 + 5.0) / 6, "nonfinite": 1 / 3}
    assert totals.means() == resumed.means() == expected
    totals.add_step(step_of(NAN), False)
    assert totals.means() == {"nonfinite": 1.0}


def test_sums_of_more_ranks_than_there_are_now():
    totals = Totals()
    totals.restore({"loss": [[1.0, 2.0], [3.0, 2.0], [5.0, 4.0]]}, torch.device("cpu"))
    assert totals.means() == {"loss": 9.0 / 8.0}


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "lines.jsonl"
    drop_later_lines(file, 3)  # there is none yet
    for step in (1, 2, 3):
        append_line(file, {"step": step, "loss": NAN if step == 2 else 0.5, "pairs": [1]})
    with file.open("a") as handle:
        handle.write('{"step": 4, "lo')
    drop_later_lines(file, 2)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == [
        {"step": 1, "loss": 0.5, "pairs": [1]},
        {"step": 2, "loss": None, "pairs": [1]},
    ]
    assert "NaN" not in file.read_text()
