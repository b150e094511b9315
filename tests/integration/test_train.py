"""Whole runs of train.py: every number of ranks logs the same, and evaluation is exact."""

import json

import pytest
import torch
import transformers

from conftest import flat_log_probs
from notus.config import load_config
from runs import base_config, metrics, pairs_of, run

STEPS = 5
# Where a step takes another path; what the losses compute is for tests/objective.
LOSSES = {
    "sigmoid": [],
    "coupled": ["loss.name=aot_unpaired"],
    "following": ["reference.log_probs=online", "reference.sync_every=2", "log.every=3"],
}


def long_config(demo, other):
    """Five steps, evaluated over 21 pairs, which 2 and 4 ranks cannot divide."""
    config = base_config(demo)
    config["model"]["reference"] = str(other)
    config["data"]["eval"] = {"holdout": 21}
    config["train"] |= {"epochs": 3, "max_steps": STEPS, "pairs_per_step": 16}
    config["evaluation"] = {"every": 2}
    config["checkpoint"] = {"every": 2}
    return config


@pytest.fixture(scope="module")
def folder(demo, other, tmp_path_factory):
    """Runs of every loss on one and on two ranks, and of one on four."""
    folder = tmp_path_factory.mktemp("train")
    config = long_config(demo, other)
    for ranks in (1, 2, 4):
        losses = LOSSES if ranks < 4 else {"sigmoid": []}
        runs = [
            [*keys, f"output_dir={folder / f'{name}-{ranks}'}"] for name, keys in losses.items()
        ]
        run(config, runs, folder, ranks)
    return folder


def assert_same_metrics(one, other, rel):
    assert len(one) == len(other) > 0
    for line, match in zip(one, other, strict=True):
        assert line.keys() == match.keys()
        for key, value in line.items():
            if not key.startswith("perf/"):
                assert match[key] == pytest.approx(value, rel=rel, abs=1e-5), (line["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_log_what_one_rank_logs(name, folder):
    one, two = (metrics(folder / f"{name}-{ranks}") for ranks in (1, 2))
    logged = [line["step"] for line in one if "loss" in line]
    assert logged == ([3, 5] if name == "following" else [1, 2, 3, 4, 5])
    assert [line["step"] for line in one if "eval_loss" in line] == [0, 2, 4, 5]
    assert_same_metrics(one, two, rel=1e-4)


@pytest.mark.slow
def test_four_ranks_log_what_one_rank_logs(folder):
    one, four = (metrics(folder / f"sigmoid-{ranks}") for ranks in (1, 4))
    assert_same_metrics(one, four, rel=1e-4)


@pytest.mark.slow
def test_evaluation_counts_every_pair_once(demo, other, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(long_config(demo, other)))
    _, pairs = pairs_of(load_config(tmp_path / "config.json"))
    assert len(pairs) % 2 and len(pairs) % 4
    sums = {}
    for name, path in (("policy", demo / "sft"), ("reference", other)):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            flat = flat_log_probs(lambda ids, model=model: model(ids[None]).logits[0], pairs)
        lengths = pairs.lengths[:, 1:].reshape(-1).tolist()
        sums[name] = torch.stack([part.sum() for part in flat.split(lengths)]).view(-1, 2)
    ratio = sums["policy"] - sums["reference"]
    margin = 0.1 * (ratio[:, 0] - ratio[:, 1])
    expected = {
        "eval_loss": -torch.nn.functional.logsigmoid(margin).mean(),
        "eval_rewards/chosen": 0.1 * ratio[:, 0].mean(),
        "eval_rewards/accuracies": (margin > 0).double().mean(),
        "eval_rewards/margins": margin.mean(),
        "eval_logps/rejected": sums["policy"][:, 1].mean(),
    }
    for ranks in (1, 2, 4):
        first = metrics(folder / f"sigmoid-{ranks}")[0]
        for key, value in expected.items():
            assert first[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), (ranks, key)


@pytest.mark.slow
def test_files_of_a_run(folder):
    output = folder / "sigmoid-1"
    assert json.loads((output / "config.json").read_text())["loss"] == {
        "name": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
    }
    cached = sorted(p.suffix for p in (folder / "reference-cache").iterdir())
    assert cached == [".json", ".json", ".safetensors", ".safetensors"]
    assert any((output / "tensorboard").iterdir())
    assert not list(output.glob(".partial*")) and not list(output.glob("**/*.partial"))
