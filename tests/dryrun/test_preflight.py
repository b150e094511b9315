import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import train
from benchmarks.memory import model_shape
from notus import opening
from notus.config import load_config
from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.data.tokenization import TokenizedPairs
from notus.dryrun.memory import Counts
from notus.dryrun.preflight import (
    Answers,
    Question,
    Setup,
    alternatives,
    changes,
    hours,
    plan_rows,
    run_work,
    shard_size,
    size_text,
)
from notus.engine.flops import GPUS, gpu_named, gpu_of_device, model_flops
from notus.errors import UserError
from notus.model import weights
from notus.model.weights import open_model

ROOT = Path(__file__).parents[2]
MISTRAL_7B = model_shape(layers=32, hidden=4096, inner=14_336, heads=32, vocabulary=32_000)
PARAMETERS = 7_241_732_096
BLOCK = 218_112_000


def test_gpus():
    names = {
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100 80GB PCIe": "a100-80gb",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA L40S": "l40s",
        "NVIDIA A40": "a40",
    }
    assert {name: gpu_of_device(name).name for name in names} == names
    for name in ("Tesla T4", "NVIDIA RTX A4000", "NVIDIA GH200 480GB"):
        assert gpu_of_device(name) is None
    assert gpu_named("H100") is next(gpu for gpu in GPUS if gpu.name == "h100")
    with pytest.raises(UserError, match="--gpu v100: no such GPU is known.*a100-40gb, .*h200"):
        gpu_named("v100")


def test_shard_size():
    assert (shard_size(8, None, 1), shard_size(16, None, 2), shard_size(16, 8, 2)) == (8, 8, 8)
    with pytest.raises(UserError, match=r"parallel.shard \(8\).*--gpus is 8"):
        shard_size(8, 8, 2)


def some_pairs(lengths: list[list[int]]) -> TokenizedPairs:
    array = np.array(lengths, np.int64)
    total = int(array.sum())
    return TokenizedPairs(np.full(total, 5, np.int32), np.zeros(total, bool), array)


def plan_of(pairs: TokenizedPairs, **settings) -> Plan:
    given = {
        "pairs_per_step": 64,
        "epochs": 1,
        "max_steps": None,
        "seed": 0,
        "shuffle": False,
        "ranks": 1,
        "budget": 8192,
    }
    return Plan(slots_of(pairs.lengths, True), **(given | settings))


def test_plan_rows_by_hand():
    """Two ranks with room for 300 slots. Step 0: 280 | 200 + 90; step 1: 250 | 240, then 130."""
    lengths = [[80, 100, 100], [100, 40, 60], [30, 30, 30], [50, 150, 50], [40, 100, 100]]
    pairs = some_pairs([*lengths, [10, 60, 60]])
    plan = plan_of(pairs, pairs_per_step=3, ranks=2, budget=300)
    rows = plan_rows(plan, pairs, [plan.pairs_of(step) for step in range(2)])
    # The longest row of step 0 is 290, rounded up to 300; step 1 takes two of 256.
    assert rows.slots == 300
    assert rows.scored == 200
    assert rows.total == 2 * 300 + 2 * 2 * 256
    assert (rows.steps, rows.microbatches, rows.most) == (2, 3, 2)


def test_work_by_hand():
    """One pair of 10 + 20 + 30 tokens, twice, in rows a quarter longer; three evaluations."""
    lengths, held_out = np.array([[10, 20, 30]]), np.array([[1, 2, 3]])
    head = 2 * 4096 * 32_000 * 50
    held_head = 2 * 4096 * 32_000 * 5
    pairs_attended = 55 + 10 * 20 + 210 + 10 * 30 + 465
    blocks = 2 * 32 * (BLOCK - 2 * 4096) * 60 + 4 * 4096 * 32 * pairs_attended
    held_blocks = 2 * 32 * (BLOCK - 2 * 4096) * 6 + 4 * 4096 * 32 * (1 + 2 + 3 + 3 + 6)
    work = run_work(
        MISTRAL_7B,
        np.repeat(lengths, 2, axis=0),
        lengths,
        held_out,
        slots=150,
        activation_checkpointing="full",
        reference="cached",
        evaluations=3,
    )
    once = partial(
        run_work,
        MISTRAL_7B,
        lengths,
        lengths,
        held_out,
        slots=60,
        activation_checkpointing="none",
        reference="online",
        evaluations=3,
    )
    assert work.model == pytest.approx(2 * 3 * (blocks + head))
    assert work.recomputation == pytest.approx(2 * (blocks + head))
    assert work.padding == pytest.approx(0.25 * 2 * 4 * blocks)
    assert work.reference == pytest.approx(blocks + head + held_blocks + held_head)
    assert work.evaluation == pytest.approx(3 * (held_blocks + held_head))
    assert work.total == pytest.approx(sum(work))
    adapters = once(frozen_base=True)
    products = 2 * 32 * (BLOCK - 2 * 4096) * 60
    attention = 4 * 4096 * 32 * pairs_attended  # both of its factors are activations
    assert adapters.model == pytest.approx(2 * (products + head) + 3 * attention)
    assert adapters.reference == pytest.approx(blocks + head + 3 * (held_blocks + held_head))
    coupled = once(couples_pairs=True)
    assert coupled.coupling == pytest.approx(blocks + head) and work.coupling == 0
    assert coupled.reference == pytest.approx(2 * (blocks + head) + 3 * (held_blocks + held_head))
    # 989.4 TFLOP/s at half of the peak, on two of them
    expected = work.total / (2 * 989.4e12 * 0.5) / 3600
    assert hours(work, 2, gpu_named("h100"), 0.5) == pytest.approx(expected)


def test_changes_come_by_their_cost():
    setup = Setup(
        gpus=2,
        shard=2,
        tokens_per_microbatch=4096,
        keep_gathered=False,
        optimizer="adamw",
        state_dtype="float32",
        activation_checkpointing="selective",
        reference="online",
        cpu_offload=False,
    )
    said = [" ".join(changes(setup, o)) for o in alternatives(setup, 1500, may_cache=True)]
    assert said[:5] == [
        "",
        "reference.log_probs=cached",
        "parallel.activation_checkpointing=full",
        "parallel.activation_checkpointing=full reference.log_probs=cached",
        "data.tokens_per_microbatch=2048",
    ]
    first = [
        next(i for i, text in enumerate(said) if part in text)
        for part in (
            "data.tokens_per_microbatch=2048",
            "--gpus 4",
            "--gpus 8",
            "optimizer.state_dtype=bfloat16",
            "optimizer.name=rmsprop",
            "parallel.cpu_offload=true",
        )
    ]
    assert first == sorted(first)
    assert not any("1024" in text for text in said)  # shorter than the longest pair
    assert len(set(said)) == len(said)


@pytest.mark.parametrize(
    ("every", "scored"), [(3, [0, 3, 6, 9, 10]), (5, [0, 5, 10]), (None, [0, 10])]
)
def test_evaluations(every, scored):
    """At the start, when due, and after the last of ten steps."""
    pairs = some_pairs([[1, 1, 1]] * 20)
    config = load_config(ROOT / "configs/notus.json", [f"evaluation.every={json.dumps(every)}"])
    plan = plan_of(pairs, pairs_per_step=2)
    question = Question(
        config, MISTRAL_7B, Counts(PARAMETERS, 0, 0), plan, pairs, pairs, True, False
    )
    assert question.evaluations == len(scored)
    assert question._replace(held_out=None).evaluations == 0


def test_the_head_is_counted_with_the_kernels_of_the_settings():
    pairs = some_pairs([[1, 1, 1]] * 2)
    plan = plan_of(pairs, pairs_per_step=2)
    for kernels, triton in (("auto", True), ("triton", True), ("plain", False)):
        config = load_config(ROOT / "configs/notus.json", [f"parallel.kernels={kernels}"])
        question = Question(
            config, MISTRAL_7B, Counts(PARAMETERS, 0, 0), plan, pairs, None, True, False
        )
        rows = plan_rows(plan, pairs, [plan.pairs_of(0)])
        assert question.load(question.setup, rows).triton == triton


# train.py --dry-run


@pytest.fixture
def place(demo, tmp_path, monkeypatch):
    """A working directory with the demo's data, and Mistral-7B's config.json and no weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "sft", "policy", ignore=shutil.ignore_patterns("*.safetensors"))
    about = json.loads(Path("policy/config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    heads = ("num_attention_heads", "num_key_value_heads")
    about |= {name: getattr(MISTRAL_7B, name) for name in (*sizes, *heads)}
    Path("policy/config.json").write_text(json.dumps(about))
    return [
        str(ROOT / "configs/notus.json"),
        "model.policy=policy",
        f"data.train.0.path={demo / 'preferences.jsonl'}",
        "data.train.0.split=null",
        'data.train.0.curation={"rule":"mean-rating"}',
        "data.eval.holdout=5",
        "train.pairs_per_step=8",
        "--dry-run",
    ]


def test_the_published_recipe_without_gpu_weights_or_network(place, capfd):
    assert train.main([*place, "--gpus", "8", "--gpu", "a100-40gb", "--price", "2.5"]) == 0
    said = capfd.readouterr().out
    for words in (
        "memory of one rank, on 8 x a100-40gb",
        "FITS on 8 x a100-40gb without CPU offload: the limit is 35.9 GiB",
        "take 80.9 GiB, divided over 8 ranks: 10.1 GiB each",
        "the reference's log-probs are computed beforehand",
        "at 2.5 per GPU-hour",
        "assumed: 45%",
    ):
        assert words in said, said
    assert not Path("runs").exists()


def test_what_does_not_fit_says_what_would(place, capfd):
    assert train.main([*place, "--gpu", "a100-40gb", "optimizer.name=adamw"]) == 1
    said = capfd.readouterr().out
    assert "DOES NOT FIT on 1 x a100-40gb" in said
    assert "cheapest change that fits: --gpus 4 (peak" in said
    assert "cheapest change that fits on 1 x a100-40gb: parallel.cpu_offload=true (peak" in said


def test_every_known_gpu_without_one_named(place, capfd):
    assert train.main(place) == 0
    table = capfd.readouterr().out.partition("known GPUs")[2]
    rows = {line.split()[0]: line.split()[3:5] for line in table.splitlines()[2:-1]}
    assert rows.keys() == {gpu.name for gpu in GPUS}
    assert rows["h200"] == ["yes", "1"] and rows["h100"] == ["no", "2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--gpu v100", ("--gpu v100: no such GPU is known", "a100-40gb", "h200")),
        ("--gpus 0", ("--gpus 0: expected at least 1",)),
        ("--price -1", ("--price -1:",)),
        ("--gpus 8 parallel.replicate=3", ("parallel.replicate (3)", "--gpus is 8")),
    ],
)
def test_options_that_cannot_be(place, capfd, options, words):
    assert train.main([*place, *options.split()]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_weights_are_checked_where_there_are_some(place, demo):
    """Those of the demo do not have Mistral-7B's shapes."""
    shutil.copy(demo / "sft/model.safetensors", "policy")
    with pytest.raises(UserError, match="tensor .* has shape"):
        open_model("policy", weights=False)


def test_nothing_large_is_downloaded(place, monkeypatch):
    """Of a model on the hub, config.json and the tokenizer alone."""
    asked = {}

    def download(path: str, allow_patterns: list[str]) -> str:
        asked[path] = allow_patterns
        return "policy"

    monkeypatch.setattr(weights, "snapshot_download", download)
    folder, shape = open_model("some/model", weights=False)
    assert (folder, shape.num_hidden_layers) == (Path("policy"), 32)
    assert "config.json" in asked["some/model"] and "tokenizer.json" in asked["some/model"]
    assert not any("safetensors" in pattern for pattern in asked["some/model"])


def test_planning_options_need_the_dry_run(place, capfd):
    with pytest.raises(SystemExit) as stopped:
        train.main([*place[:-1], "--gpus", "8"])
    assert stopped.value.code == 2
    assert "need --dry-run" in capfd.readouterr().err


def test_mfu_and_work_count_the_same_model_flops():
    lengths = np.array([[168, 314, 277], [10, 5, 7]])
    work = run_work(
        MISTRAL_7B,
        lengths,
        lengths,
        lengths[:0],
        slots=float(lengths.sum()),
        activation_checkpointing="none",
        reference="none",
        evaluations=0,
    )
    assert work.model == pytest.approx(model_flops(MISTRAL_7B, lengths))
    assert work.padding == work.reference == work.evaluation == 0


def test_idle_ranks_are_counted_as_the_plan_has_them():
    """Three pairs a step on five ranks: the shortcut of `Answers` equals the plan itself."""
    pairs = some_pairs([[10, 200, 60], [100, 40, 60], [30, 30, 30], [50, 150, 50]])
    plan = plan_of(pairs, pairs_per_step=3, ranks=5, budget=300)
    config = load_config(ROOT / "configs/notus.json")
    question = Question(
        config, MISTRAL_7B, Counts(PARAMETERS, 0, 0), plan, pairs, None, True, False
    )
    expected = plan_rows(plan, pairs, [plan.pairs_of(step) for step in range(2)])
    assert Answers(question).rows(5, 300) == expected
    # Rows of 300 and of 256 slots, on each of the five.
    assert expected.total == 5 * 300 + 5 * 256


@pytest.mark.parametrize("gpus", [8, 9, 10**9])
def test_more_gpus_than_pairs_in_a_step(place, capfd, gpus):
    assert train.main([*place, "--gpus", str(gpus), "--gpu", "a100-40gb"]) == 0
    said = capfd.readouterr().out
    warning = f"a step has 8 pairs, so at least {gpus - 8:,} of {gpus:,} ranks idle in every step"
    assert (warning in said) == (gpus > 8), said


def test_fine_tuning_is_not_spoken_of_in_pairs(place, capfd):
    """Nor of a reference, which it has not, nor of prompts that two responses share."""
    fine_tuning = [str(ROOT / "configs/sft.json"), *place[1:]]
    assert train.main([*fine_tuning, "--gpus", "16", "--gpu", "h100"]) == 0
    said = capfd.readouterr().out.replace("train.pairs_per_step", "the key")
    kept = re.search(r"train data: (\d+) responses", said)[1]
    assert f"  responses    {kept} to train on, 5 held out" in said
    assert "steps of 8" not in said and " of 8 responses;" in said
    assert "a step has 8 responses, so at least 8 of 16 ranks idle" in said
    assert re.search(r"\n  tokens       [\d,]+\n", said)
    assert "zeros that stand for a reference" in said
    for word in ("pair", "rejected", "reference log-probs", "saved", "prefix"):
        assert word not in said, (word, said)


def test_a_loss_without_reference(place, capfd):
    settings = ["loss.name=simpo", "loss.gamma=0.5", "reference.log_probs=none"]
    assert train.main([*place, *settings, "--gpus", "8", "--gpu", "a100-40gb"]) == 0
    said = capfd.readouterr().out
    assert "with each prompt once" in said and "zeros that stand for a reference" in said
    assert "reference log-probs" not in said and "the reference's" not in said
    assert not re.search(r"FLOP:.*reference", said)


def test_the_reference_of_adapters_is_their_base(place, capfd):
    """Nothing is said of a second model that is not there, online or not."""
    adapters = [*place, 'model.lora={"rank":8,"alpha":8}', "--gpu", "h100"]
    for log_probs in ("cached", "online"):
        assert train.main([*adapters, f"reference.log_probs={log_probs}"]) == 0
        said = capfd.readouterr().out
        assert "the reference is the frozen base itself" in said and "its model is not" not in said
        assert "reference model" not in said


def test_a_loss_that_couples_pairs_scores_them_first(place, capfd):
    for name, coupled in (("sigmoid", False), ("aot", True)):
        assert train.main([*place, f"loss.name={name}", "--gpu", "h200"]) == 0
        assert bool(re.search("FLOP: .*, coupling [1-9]", capfd.readouterr().out)) == coupled


@pytest.mark.parametrize(
    ("size", "text"), [(512, "0.5 KiB"), (300_000, "0.3 MiB"), (2**30 // 5, "0.2 GiB")]
)
def test_sizes_are_told_in_units_of_their_size(size, text):
    assert size_text(size) == text


def test_short_runs_are_not_told_in_hours(place, capfd):
    """A step of few pairs on 256 GPUs: seconds."""
    assert train.main([*place, "train.max_steps=1", "--gpus", "256", "--gpu", "b200"]) == 0
    said = capfd.readouterr().out
    assert "less than a minute of computing" in said and "about < 0.01 hours" not in said


# UltraFeedback's, about: prompts, chosen and rejected responses, in tokens.
LONG_AND_SHORT = ([40, 110, 300], [120, 300, 500], [90, 260, 480])


def test_the_dry_run_of_notus(place, capfd, monkeypatch):
    """On the published recipe's 61,619 pairs: 963 steps of 64 an epoch; 8 x A100-40GB fits."""
    choices = np.random.default_rng(0).integers(0, 3, (61_619, 3))
    lengths = np.stack([np.take(LONG_AND_SHORT[part], choices[:, part]) for part in range(3)], 1)
    pairs = some_pairs(lengths)

    def read_data(*arguments, **options) -> tuple:
        return pairs, [], None, {}

    monkeypatch.setattr(opening, "read_data", read_data)
    recipe = [word for word in place if "pairs_per_step" not in word]
    assert train.main([*recipe, "train.max_steps=963", "--gpus", "8", "--gpu", "a100-40gb"]) == 0
    said = capfd.readouterr().out
    assert "61,619 to train on" in said and "of 64 pairs; 963 per epoch x 3" in said
    assert "FITS on 8 x a100-40gb without CPU offload: the limit is 35.9 GiB" in said
