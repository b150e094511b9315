"""What is agreed about a step, and how one that is not finite is left out of the means."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from notus.engine.log import LinesFile, MetricsLog
from notus.engine.metrics import Totals, judge_step, nonfinite_pairs

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
    path = tmp_path / "lines.jsonl"
    file = LinesFile(path, 3)  # there is none yet
    for step in (1, 2, 3):
        file.add({"step": step, "loss": NAN if step == 2 else 0.5, "pairs": [1]})
    with path.open("ab") as handle:
        handle.write(b'{"step": 1, "lo{"step": 2}\n[]\n\0\0\0\n{"step": 4, "lo')
    LinesFile(path, 2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [
        {"step": 1, "loss": 0.5, "pairs": [1]},
        {"step": 2, "loss": None, "pairs": [1]},
    ]
    assert "NaN" not in path.read_text()


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


def test_lines_wait_until_there_is_space(tmp_path, capsys):
    with small_files():
        file = LinesFile(tmp_path / "lines.jsonl", 0)
        for step in range(5):
            file.add({"step": step, "text": "30 bytes of it"})
        assert not file.flush()
    assert file.path.read_text().count("\n") == 2 and file.path.read_text().endswith("}\n")
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: {file.path}: File too large; ")
    file.add({"step": 5})
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_log_without_space(tmp_path, capsys):
    with small_files():
        log = MetricsLog(tmp_path, step=0, total=9, active=True)
        for step in range(1, 9):
            log.write(step, {"loss": 0.5, "learning_rate": 0.1})
        log.close()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 3 and {line.split(": ")[1] for line in told} == {
        str(tmp_path / "tensorboard"),
        str(tmp_path / "metrics.jsonl"),
        f"{tmp_path / 'metrics.jsonl'} lacks its last lines",
    }
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
