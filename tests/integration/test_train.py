"""Whole runs of train.py: ranks agree, runs resume, folders load, every kind of loss trains."""

import json
import shutil

import pytest
import torch
import transformers

from conftest import flat_log_probs
from notus.config import load_config
from notus.data.tokenizer import load_tokenizer
from runs import base_config, metrics, pairs_of, run, stored

STEPS = 5
LOSSES = {
    "sigmoid": [],
    "coupled": ["loss.name=aot_unpaired"],
    "weighted": ["loss.name=wpo"],
    "mixed": ['loss.mix=[{"name":"ipo","weight":1},{"name":"sft","weight":0.5}]'],
    "free of a reference": ["loss.name=simpo", "loss.beta=2.0"],
    "following": ["reference.log_probs=online", "reference.sync_every=2"],
    "seldom logged": ["log.every=3", "loss.name=ipo"],
    "rmsprop": ["optimizer.name=rmsprop", "optimizer.learning_rate=1e-4"],
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
    """Runs of every loss on one and on two ranks, and one that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("train")
    config = long_config(demo, other)
    for ranks in (1, 2, 4):
        losses = LOSSES if ranks < 4 else {"sigmoid": []}
        runs = []
        for name, keys in losses.items():
            output = folder / f"{name}-{ranks}"
            if name == "free of a reference":
                keys = [*keys, "model.reference=null"]
            runs.append([*keys, f"output_dir={output}"])
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
    assert logged == ([3, 5] if name == "seldom logged" else [1, 2, 3, 4, 5])
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
def test_metrics_at_the_start_have_their_known_values(demo, tmp_path):
    config = base_config(demo)
    config["train"] |= {"max_steps": 1}
    run(config, [[f"output_dir={tmp_path / 'out'}"]], tmp_path)
    (line,) = metrics(tmp_path / "out")
    assert line["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(line[key]) < 1e-5
    assert line["learning_rate"] == 0 and line["grad_norm"] > 0


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(demo, other, folder, tmp_path):
    outputs = {}
    for name in ("sigmoid", "seldom logged", "following"):
        whole, broken = folder / f"{name}-2", tmp_path / name
        kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
        assert kept == ["step-00000004", "step-00000005"]
        # The run as it stood after step 4: no final model, later metrics to be written again.
        shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("final", "step-00000005"))
        outputs[name] = whole, broken
    runs = [[*LOSSES[name], f"output_dir={broken}"] for name, (_, broken) in outputs.items()]
    run(long_config(demo, other), runs, tmp_path, ranks=2)
    for whole, broken in outputs.values():
        assert_same_metrics(metrics(whole), metrics(broken), rel=0)
        for prefix in ("model", "optimizer", "reference"):
            expected, resumed = (
                stored(path / "checkpoints/step-00000005", prefix) for path in (whole, broken)
            )
            assert expected.keys() == resumed.keys()
            assert len(expected) > 10 or prefix == "reference"
            assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_with_one(demo, other, folder, tmp_path):
    whole, broken = folder / "sigmoid-2", tmp_path / "broken"
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("final", "step-00000005"))
    run(long_config(demo, other), [[f"output_dir={broken}"]], tmp_path, ranks=1)
    assert len(list((broken / "checkpoints/step-00000005").glob("model-*.safetensors"))) == 1
    assert_same_metrics(metrics(whole), metrics(broken), rel=1e-4)
    for prefix in ("model", "optimizer"):
        expected, resumed = (
            stored(path / "checkpoints/step-00000005", prefix) for path in (whole, broken)
        )
        for key, value in expected.items():
            torch.testing.assert_close(resumed[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checkpoint_and_final_load_with_transformers(demo, folder):
    output = folder / "sigmoid-2"
    trained = stored(output / "checkpoints/step-00000005", "model")
    for path, dtype in (("checkpoints/step-00000005", torch.float32), ("final", torch.bfloat16)):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            output / path, dtype="auto", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.dtype == dtype
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained[name].to(dtype)), name
        tokenizer = load_tokenizer(output / path)
        assert tokenizer("a b")["input_ids"] == load_tokenizer(demo / "sft")("a b")["input_ids"]
    initial = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft").state_dict()
    assert all(not torch.equal(initial[name], trained[name]) for name in trained)


@pytest.mark.slow
def test_files_of_a_run(folder):
    output = folder / "sigmoid-1"
    assert json.loads((output / "config.json").read_text())["loss"] == {
        "name": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
    }
    cached = sorted(p.suffix for p in (output / "reference").iterdir())
    assert cached == [".json", ".json", ".safetensors", ".safetensors"]
    assert any((output / "tensorboard").iterdir())
    assert not list(output.glob(".partial*")) and not list(output.glob("**/*.partial"))
