"""The best checkpoint: which one it is, and what of it a resumed run takes over."""

import json

import pytest
from saving import one_process, saver, updated  # noqa: F401

from conftest import random_pairs
from notus.engine.best import Best, best_step, check_metric, metric_names
from notus.engine.checkpoint import Progress, checkpoints
from notus.errors import UserError
from notus.objective.loss import build_loss
from notus.objective.losses import LOSSES

PAIRS = random_pairs(4)
NAN, INF = float("nan"), float("inf")


def judged(metric, values):
    """The best steps after each of the values, of the steps 2, 4, 6, ..."""
    best, found = Best(metric, PAIRS), []
    for step, value in zip(range(2, 99, 2), values, strict=False):
        best.note(step, {metric: value, "eval_other": 0.0})
        best.record = best.after(step)
        found.append(best.record and best.record["step"])
    return found


@pytest.mark.parametrize(
    ("metric", "values", "steps"),
    [
        ("eval_loss", [0.7, 0.5, 0.6, 0.4], [2, 4, 4, 8]),
        ("eval_rewards/accuracies", [0.7, 0.5, 0.7, 0.8], [2, 2, 2, 8]),  # the first of a tie
        ("eval_far/rewards/margins", [-1.0, 0.0, 2.0, 1.0], [2, 4, 6, 6]),
        ("eval_far/loss", [NAN, INF, 0.5, NAN], [None, None, 6, 6]),
    ],
)
def test_the_best_of_some_steps(metric, values, steps):
    assert judged(metric, values) == steps


def test_a_checkpoint_without_an_evaluation_is_not_judged():
    """As one that a signal has asked for."""
    best = Best("eval_loss", PAIRS)
    assert best.after(3) is None
    best.note(2, {"eval_loss": 0.5})
    assert best.after(3) is None and best.after(2)["value"] == 0.5


def test_a_record_of_others_or_of_what_is_gone_is_dropped(tmp_path, capsys):
    best = Best("eval_loss", PAIRS)
    best.note(2, {"eval_loss": 0.5})
    record = best.after(2)
    best.resume(record, tmp_path)
    assert best.record is None and "step-00000002, the best checkpoint, is gone" in str(
        capsys.readouterr().err
    )
    (tmp_path / "step-00000002").mkdir()
    for other in (Best("eval_logps/chosen", PAIRS), Best("eval_loss", random_pairs(5))):
        other.resume(record, tmp_path)
        assert other.record is None
    best.resume(json.loads(json.dumps(record)), tmp_path)
    assert best.record == record and best.folder(tmp_path).name == "step-00000002"


def test_every_loss_has_metrics_with_a_direction():
    for name in LOSSES:
        names = metric_names(build_loss({"name": name}))
        assert "loss" in names
        for metric in names:
            check_metric(f"eval_{metric}", build_loss({"name": name}), ())


@pytest.mark.parametrize("metric", ["loss", "eval_lss", "eval_near/loss", "eval_perplexity"])
def test_a_metric_that_no_evaluation_has(metric):
    loss = build_loss({"name": "sigmoid"})
    check_metric("eval_far/loss", loss, ["far"])
    with pytest.raises(UserError, match=f'found "{metric}", expected one of eval_loss, .*far/loss'):
        check_metric(metric, loss, ["far"])


def test_the_best_stays_next_to_the_newest(tiny_folder, tiny_model, tmp_path):
    """Also after a kill before an older one was removed."""
    values = dict(enumerate([0.9, 0.5, 0.6, 0.7, 0.4, 0.8], start=1))
    best, kept = Best("eval_loss", PAIRS), []
    optimizer = updated(tiny_model, 0)
    with saver(tmp_path, tiny_folder, keep=1, best=best) as saving:
        for step, value in values.items():
            best.note(step, {"eval_loss": value})
            saving.save(tiny_model, optimizer, None, Progress(step, {}, 0))
            assert saving.wait() is None
            kept.append([int(path.name[-1]) for path in checkpoints(tmp_path)])
    assert kept == [[1], [2], [2, 3], [2, 4], [5], [5, 6]]
    assert best_step(tmp_path) == 5
    (tmp_path / "step-00000004").mkdir()
    again = Best("eval_loss", PAIRS)
    again.resume(json.loads((tmp_path / "step-00000006/state.json").read_text())["best"], tmp_path)
    with saver(tmp_path, tiny_folder, keep=1, best=again, previous=6):
        assert [int(path.name[-1]) for path in checkpoints(tmp_path)] == [5, 6]


def test_a_save_that_failed_is_not_the_best(tiny_folder, tiny_model, tmp_path, monkeypatch):
    best, optimizer = Best("eval_loss", PAIRS), updated(tiny_model, 0)
    with saver(tmp_path, tiny_folder, best=best) as saving:
        for step, value in ((1, 0.5), (2, 0.4)):
            best.note(step, {"eval_loss": value})
            if step == 2:
                monkeypatch.setattr("notus.engine.saver.write_whole", refuse)
            saving.save(tiny_model, optimizer, None, Progress(step, {}, 0))
            assert (saving.wait() is None) == (step == 1)
    assert best.record["step"] == 1


def refuse(*arguments, **options):
    raise OSError(28, "No space left on device")
