"""A run that is killed or stopped ends, to the bit, where one that is left alone does."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from faults import wait_in_step
from notus.data.tokenizer import load_tokenizer
from ranks import finish, kill, launch, run_ranks, wait_for, wait_for_words
from runs import base_config, checkpoints, metrics, stored

STEPS = 12  # of two epochs
VARIANTS = {
    "cached": ["parallel.activation_checkpointing=full"],
    "following, seldom logged": [
        "reference.log_probs=online",
        "reference.sync_every=3",
        'data.eval={"holdout":9}',
        "evaluation.every=5",
        "parallel.activation_checkpointing=selective",
        "log.every=5",
    ],
}


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> str:
    """The file of a run of twelve steps of 12 pairs, with three checkpoints."""
    settings = base_config(demo)
    settings["train"] = {"pairs_per_step": 12, "epochs": 2}
    settings["checkpoint"] = {"every": 4, "keep": 3}
    file = tmp_path_factory.mktemp("resume") / "config.json"
    file.write_text(json.dumps(settings))
    return str(file)


@pytest.fixture(scope="module")
def whole(config) -> Callable[..., Path]:
    """The output of an uninterrupted run on two ranks, made when it is first asked for."""

    def output(variant: str = "cached") -> Path:
        folder = Path(config).parent / variant.replace(", ", "-").replace(" ", "-")
        if not folder.exists():
            arguments = [config, *VARIANTS[variant], f"output_dir={folder}"]
            assert run_ranks(arguments, folder.with_suffix(".log"), ranks=2)[0] == 0
        return folder

    return output


def assert_same_end(one: Path, other: Path) -> None:
    """Every metric but speed, every weight and moment: equal to the bit."""
    lines = [
        [{k: v for k, v in line.items() if "perf/" not in k} for line in metrics(path)]
        for path in (one, other)
    ]
    assert lines[0] == lines[1]
    last = checkpoints(one)[-1]
    for prefix in ("model", "optimizer", "reference"):
        expected, found = (stored(path / "checkpoints" / last, prefix) for path in (one, other))
        assert expected.keys() == found.keys()
        assert len(expected) > 10 or prefix == "reference"
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    weights = "final/model-00001-of-00002.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_then_stopped_then_finished(config, whole, variant, tmp_path):
    expected, output, log = whole(variant), tmp_path / "run", tmp_path / "log"
    arguments = [config, *VARIANTS[variant], f"output_dir={output}"]

    ranks = launch(arguments, log, ranks=2, fault=partial(wait_in_step, 7))
    wait_for_words(log, "waits in step 7")
    wait_for(lambda: (output / "checkpoints/step-00000004").exists())
    kill(ranks)

    ranks = launch(arguments, log, ranks=2, fault=partial(wait_in_step, 3))
    wait_for_words(log, "waits in step 3")
    ranks[1].terminate()  # one is told, both save and end
    assert finish(ranks) == 0
    told = log.read_text()
    assert "step-00000004 after 4 steps" in told and "stopped by a signal after 7 steps" in told
    assert checkpoints(output) == ["step-00000004", "step-00000007"]
    assert not (output / "final").exists()

    code, told = run_ranks(arguments, log, ranks=2)
    assert code == 0 and "step-00000007 after 7 steps" in told
    assert_same_end(expected, output)
    follows = bool(stored(output / "checkpoints/step-00000012", "reference"))
    assert follows == ("following" in variant)
    assert len(metrics(output)) == (4 if "seldom" in variant else STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "keys"),
    [(1, []), (4, []), (4, ["parallel.replicate=2", "parallel.shard=2"])],
    ids=["one rank", "four ranks", "two by two"],
)
def test_other_numbers_of_ranks_go_on(config, whole, ranks, keys, tmp_path):
    expected, output = whole(), tmp_path / "run"
    later = shutil.ignore_patterns("final", "step-00000012", "step-00000008")
    shutil.copytree(expected, output, ignore=later)
    code, told = run_ranks([config, *keys, f"output_dir={output}"], tmp_path / "log", ranks)
    assert code == 0 and "step-00000004 after 4 steps" in told
    files = (output / "checkpoints/step-00000012").glob("model-*.safetensors")
    assert len(list(files)) == ranks
    for one, other in zip(metrics(expected), metrics(output), strict=True):
        for key, value in one.items():
            if not key.startswith("perf/"):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (one["step"], key)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for prefix in ("model", "optimizer"):
        whole_run, resumed = (
            stored(path / "checkpoints/step-00000012", prefix) for path in (expected, output)
        )
        for name, value in whole_run.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on(config, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    keys = ["checkpoint.every=null", "train.max_steps=4", f"output_dir={output}"]
    (rank,) = launch([config, *keys], log, fault=partial(wait_in_step, 3))
    wait_for_words(log, "waits in step 3")
    owner = json.loads((output / "lock").read_text())
    assert owner["pid"] == rank.pid
    os.kill(owner["pid"], signal.SIGUSR1)
    assert finish([rank]) == 0
    assert checkpoints(output) == ["step-00000003", "step-00000004"]


@pytest.mark.slow
def test_two_interrupts_end_it_at_once(config, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    (rank,) = launch(
        [config, f"output_dir={output}"], log, fault=partial(wait_in_step, 2, obeys=False)
    )
    wait_for_words(log, "waits in step 2")
    os.kill(rank.pid, signal.SIGINT)
    wait_for_words(log, "was signalled")
    assert rank.exitcode is None
    os.kill(rank.pid, signal.SIGINT)
    assert finish([rank]) == -signal.SIGINT


@pytest.mark.slow
def test_the_reference_must_be_the_one_it_began_with(config, other, tmp_path):
    reference, output, log = tmp_path / "reference", tmp_path / "run", tmp_path / "log"
    shutil.copytree(other, reference)
    keys = [f"model.reference={reference}", "train.max_steps=4"]
    arguments = [config, *keys, f"output_dir={output}"]
    (rank,) = launch(arguments, log, fault=partial(wait_in_step, 3))
    wait_for_words(log, "waits in step 3")
    rank.terminate()
    assert finish([rank]) == 0
    original = (reference / "model.safetensors").read_bytes()
    # The policy as it is now: the mistake that would make every reward 0 again.
    save_file(stored(output / "checkpoints" / checkpoints(output)[-1], "model"), reference / "new")
    (reference / "new").replace(reference / "model.safetensors")
    code, told = run_ranks(arguments, log)
    assert code == 2 and "made by another run (the reference's weights differ" in told
    (reference / "model.safetensors").write_bytes(original)
    assert run_ranks(arguments, log)[0] == 0


@pytest.mark.slow
def test_a_new_run_from_the_weights_alone(config, whole, demo, tmp_path):
    start = whole() / "checkpoints/step-00000008"
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, "loss.beta=0.5", 'data.eval={"holdout":9}', f"output_dir={output}"]
    options = ["--resume", str(start), "--model-only"]
    (rank,) = launch([*arguments, *options], log, fault=partial(wait_in_step, 3))
    wait_for_words(log, "waits in step 3")
    rank.terminate()
    assert finish([rank]) == 0
    # The reference is still the policy's initial model, so the first loss is not ln 2.
    first = metrics(output)[0]
    assert first["step"] == 0 and abs(first["eval_rewards/margins"]) > 0.1
    assert json.loads((output / "start.json").read_text())["path"] == str(start)
    code, told = run_ranks([*arguments[:-1], *options, f"output_dir={whole()}"], log)
    assert code == 2 and "holds another run (data.eval" not in told and "loss.beta" in told
    code, told = run_ranks([config, *options, f"output_dir={whole()}"], log)
    assert code == 2 and "began from the weights of model.policy" in told
    # Started again without the options, it knows what it began from and goes on.
    code, told = run_ranks(arguments, log)
    assert code == 0 and "resumed from" in told
    assert [line["step"] for line in metrics(output)] == list(range(len(metrics(output))))


@pytest.mark.slow
def test_metrics_at_the_start_have_their_known_values(whole):
    line = metrics(whole())[0]
    assert line["step"] == 1 and line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(line[key]) < 1e-5
    assert line["learning_rate"] == 0 and line["grad_norm"] > 0


@pytest.mark.slow
def test_what_is_stored_is_open_to_all(whole, demo):
    """JSON and safetensors alone, and a folder that transformers loads."""
    output = whole()
    for file in output.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert all(json.loads(line) for line in file.read_text().splitlines())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                assert handle.keys()
        elif file.is_file():
            known = file.name == "lock" or "tfevents" in file.name
            assert known or file.suffix in (".jinja", ".md"), file
    trained = stored(output / "checkpoints/step-00000012", "model")
    initial = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft").state_dict()
    assert all(not torch.equal(initial[name], trained[name]) for name in trained)
    given = load_tokenizer(demo / "sft")("a b")["input_ids"]
    for folder, dtype in (("checkpoints/step-00000012", torch.float32), ("final", torch.bfloat16)):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            output / folder, dtype="auto", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.dtype == dtype
        assert load_tokenizer(output / folder)("a b")["input_ids"] == given
        assert all(torch.equal(v, trained[n].to(dtype)) for n, v in model.state_dict().items())
    state = json.loads((output / "checkpoints/step-00000012/state.json").read_text())
    assert (state["step"], state["updates"], state["steps_per_epoch"]) == (12, 12, 6)
    moments = stored(output / "checkpoints/step-00000012", "optimizer")
    assert {name.split("/")[0] for name in moments} == {"exp_avg", "exp_avg_sq"}
