"""A run's eval_pairs.jsonl: its means are the logged metrics, and its pairs the held-out ones."""

import json

import numpy as np
import pytest
import torch

import train
from notus.engine import pair_records
from notus.objective.loss import build_loss
from notus.objective.losses import PairLogProbs, Sums

RULES = {"mean": "mean-rating", "overall": "overall-score"}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """A run of one step with two named evaluation sets."""
    folder = tmp_path_factory.mktemp("recorded")

    def source(name, rule):
        return {"path": str(demo / f"{name}.jsonl"), "curation": {"rule": rule}}

    config = {
        "model": {"policy": str(demo / "sft"), "compute_dtype": "float32"},
        "data": {
            "train": [source("preferences", "mean-rating")],
            "eval": {name: source("heldout", rule) for name, rule in RULES.items()},
            "tokens_per_microbatch": 1024,
        },
        "loss": {"name": "ipo", "beta": 0.3},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"pairs_per_step": 24, "max_steps": 1},
        "parallel": {"activation_checkpointing": "none", "device": "cpu"},
        "checkpoint": {"every": None},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert train.main([str(folder / "config.json")]) == 0
    return folder / "run"


def test_the_records_means_are_the_logged_metrics(run):
    records, logged = lines(run / "eval_pairs.jsonl"), lines(run / "metrics.jsonl")[-1]
    assert logged["step"] == 1
    for prefix, chosen in [
        ("eval_", records),
        *((f"eval_{name}/", [r for r in records if r["set"] == name]) for name in RULES),
    ]:
        for column, metric in [
            ("loss", "loss"),
            ("right", "rewards/accuracies"),
            ("margin", "rewards/margins"),
            ("policy_rejected", "logps/rejected"),
        ]:
            mean = np.mean([record[column] for record in chosen])
            assert mean == pytest.approx(logged[prefix + metric], rel=1e-12), (prefix, metric)


def test_a_pair_is_the_same_in_both_sets_if_its_tokens_are(run):
    by_set = {name: {} for name in RULES}
    for record in lines(run / "eval_pairs.jsonl"):
        by_set[record["set"]][record["where"]] = record
    one, other = by_set.values()
    assert one.keys() == other.keys()
    agree = [one[where]["sha256"] == other[where]["sha256"] for where in one]
    scored = [one[where]["policy_rejected"] == other[where]["policy_rejected"] for where in one]
    assert 0 < sum(agree) < len(agree)  # the planted 10s make other pairs
    assert all(same for same, equal in zip(scored, agree, strict=True) if equal)
    assert len({record["sha256"] for record in one.values()}) == len(one)


def test_numbers_that_json_lacks_are_null_and_a_disk_that_refuses_is_no_error(
    group, tmp_path, monkeypatch, capsys
):
    ones = torch.ones(2)
    policy = Sums(torch.tensor([float("nan"), -1.0]), -2 * ones, -ones, -ones)
    reference = Sums(*[-ones] * 4)
    scored = PairLogProbs(policy, reference, ones, ones, mean_chosen_length=ones[0])
    loss = build_loss({"name": "sigmoid", "beta": 0.5})
    found = list(pair_records.pair_records([{}, {}], scored, loss, True))
    assert (found[0]["margin"], found[0]["loss"], found[0]["right"]) == (None, None, False)
    assert found[1]["margin"] == 0.5 and found[1]["right"]
    assert found[1]["loss"] == pytest.approx(np.log1p(np.exp(-0.5)))

    def full(path, content):
        raise OSError(28, "No space left on device")

    (tmp_path / "eval_pairs.jsonl").mkdir()
    pair_records.record_pairs(tmp_path, [{}, {}], scored, loss)
    assert "a folder: kept as eval_pairs.jsonl.damaged" in capsys.readouterr().err
    assert lines(tmp_path / "eval_pairs.jsonl") == found

    monkeypatch.setattr(pair_records, "write_whole", full)
    pair_records.record_pairs(tmp_path, [{}, {}], scored, loss)
    assert "eval_pairs.jsonl: No space left on device" in capsys.readouterr().err
