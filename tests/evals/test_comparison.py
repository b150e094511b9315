"""A run compared with a published one."""

import json
import math

import numpy as np
import pytest
from lines import write_lines

from notus.errors import UserError
from notus.evals.comparison import (
    differences_at,
    pair_spreads,
    read_evaluations,
    recipe_notes,
    summary,
)
from notus.evals.published import DPO_RUNS, DpoRun

NAMES = {
    "eval_loss": 0.4730,
    "eval_rewards/accuracies": 0.8016,
    "eval_rewards/margins": 3.8412,
    "eval_rewards/chosen": -3.5289,
    "eval_rewards/rejected": -7.3700,
    "eval_logps/chosen": -334.31,
    "eval_logps/rejected": -316.38,
}


def test_the_published_run_agrees_with_itself():
    run = DPO_RUNS["notus-7b-v1"]
    rows = differences_at("end", NAMES, run.end, run, 2000)
    assert [row.value - row.published for row in rows] == [0] * 7
    assert [row.verdict for row in rows] == ["agrees"] * 3 + [""] * 4
    assert [row.published_pairs for row in rows] == [2000] + [252] * 6


def test_accuracies_differ_by_the_binomial_error():
    """74 % of 2,000 against 202 of 252: -0.0616 / sqrt(0.8016 * 0.1984 * (1/252 + 1/2000))."""
    run = DPO_RUNS["notus-7b-v1"]
    rows = differences_at("end", NAMES | {"eval_rewards/accuracies": 0.74}, run.end, run, 2000)
    assert rows[1].in_standard_errors == pytest.approx(-2.31, abs=0.005)
    assert rows[1].verdict == "lower"
    unknown = differences_at("end", NAMES, run.end, run, None)[1]
    assert unknown.standard_error == pytest.approx(math.sqrt(0.8016 * 0.1984 / 252))
    text = summary(rows)
    assert text.startswith("1 of 3 differ") and "accuracy at end (-2.3)" in text


def test_spreads_are_those_of_sampled_normal_margins():
    """Margins of mean 0.7 and deviation 1.3 are above 0 in 70.49 % of cases."""
    margins = 0.7 + 1.3 * np.random.default_rng(0).standard_normal(400_000)
    losses = np.log1p(np.exp(-margins))
    spreads = pair_spreads({"loss": 0, "accuracy": 0.70487, "margin": 0.7})
    assert spreads["margin"] == pytest.approx(1.3, rel=1e-3)
    assert spreads["loss"] == pytest.approx(losses.std(), rel=0.01)


def test_every_published_run_has_a_spread():
    for run in DPO_RUNS.values():
        for metrics in (run.end, run.step_100):
            assert metrics is None or all(s > 0 for s in pair_spreads(metrics).values())


def test_only_what_was_published_is_compared():
    run = DpoRun("a card", 5, end={"loss": 0.5, "accuracy": 0.8, "margin": 1.0})
    assert [row.metric for row in differences_at("end", NAMES, run.end, run, 10)] == [
        *("loss", "accuracy", "margin")
    ]


def test_recipes_are_compared_key_by_key():
    recipe = DPO_RUNS["notus-7b-v1"].recipe
    settings = {
        "loss": {"name": "sigmoid", "beta": 0.01},
        "optimizer": {"learning_rate": 5e-7},
        "schedule": {"name": "linear"},
        "train": {"epochs": 3, "pairs_per_step": 64, "max_steps": 10},
    }
    assert recipe_notes(settings, recipe) == [
        "loss.beta is 0.01, in the published run 0.1.",
        "train.max_steps is 10: a shorter run.",
    ]


def test_evaluations_are_the_lines_that_have_them(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 0} | NAMES, {"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6} | NAMES]
    write_lines(file, rows)
    assert list(read_evaluations(file)) == [2]
    for broken, message in [
        ({"step": 2, "eval_loss": 0.5}, "metrics.jsonl:1: eval_rewards/accuracies is None"),
        ({"step": 2} | NAMES | {"eval_loss": math.nan}, "eval_loss is nan"),
        ({"step": 1, "loss": 0.7}, "no evaluation after step 0"),
    ]:
        file.write_text(json.dumps(broken) + "\n")
        with pytest.raises(UserError, match=message):
            read_evaluations(file)
    with pytest.raises(UserError, match="expected the output_dir of a run"):
        read_evaluations(tmp_path / "other.jsonl")
