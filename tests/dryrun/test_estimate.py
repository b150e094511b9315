import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import MISTRAL_7B
from notus.build import build_plan, make_loss
from notus.config import load_config
from notus.data.packing import slots_of
from notus.data.planning import Plan
from notus.data.token_arrays import TokenizedPairs
from notus.dryrun.estimate import Estimate, count_rows, fewest_gpus, remedies, usable
from notus.dryrun.memory import ParameterCounts
from notus.dryrun.report import report
from notus.engine.flops import GPUS, gpu_named, gpu_of_device, model_flops
from notus.errors import UserError

ROOT = Path(__file__).parents[2]
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


def some_pairs(lengths: list[list[int]]) -> TokenizedPairs:
    array = np.array(lengths, np.int64)
    total = int(array.sum())
    return TokenizedPairs(np.full(total, 5, np.int32), np.zeros(total, bool), array)


def estimate_of(pairs: TokenizedPairs, *overrides: str, gpus: int = 1, **settings) -> Estimate:
    """The published recipe with these overrides, on Mistral-7B."""
    config = load_config(ROOT / "configs/notus.json", ["train.epochs=1", *overrides])
    plan = build_plan(config, pairs, gpus)
    given = {
        "counts": ParameterCounts(PARAMETERS, 0),
        "reference_is_base": False,
        "held_out": None,
        "steps": [plan.pairs_of(step) for step in range(plan.steps)],
    }
    return Estimate(
        config, gpus, MISTRAL_7B, loss=make_loss(config), pairs=pairs, **(given | settings)
    )


def test_rows_by_hand():
    """Two ranks with room for 300 slots. Step 0: 280 | 200 + 90; step 1: 250 | 240, then 130."""
    lengths = [[80, 100, 100], [100, 40, 60], [30, 30, 30], [50, 150, 50], [40, 100, 100]]
    pairs = some_pairs([*lengths, [10, 60, 60]])
    plan = Plan(
        slots_of(pairs.lengths, True),
        pairs_per_step=3,
        epochs=1,
        max_steps=None,
        seed=0,
        shuffle=False,
        ranks=2,
        budget=300,
    )
    rows = count_rows(plan, pairs, [plan.pairs_of(step) for step in range(2)])
    # The longest row of step 0 is 290, rounded up to 300; step 1 takes two of 256.
    assert rows.slots == 300
    assert rows.scored == 200
    assert rows.total == 2 * 300 + 2 * 2 * 256
    assert (rows.microbatches, rows.most) == (3, 2)


# FLOPs of one forward pass of Mistral-7B over a pair of 10 + 20 + 30 tokens and one of 1 + 2 + 3.
PRODUCTS = 2 * 32 * (BLOCK - 2 * 4096) * 60
ATTENTION = 4 * 4096 * 32 * (55 + 10 * 20 + 210 + 10 * 30 + 465)
HEAD = 2 * 4096 * 32_000 * 50
ONCE = PRODUCTS + ATTENTION + HEAD
HELD_OUT = (
    2 * 32 * (BLOCK - 2 * 4096) * 6 + 4 * 4096 * 32 * (1 + 2 + 3 + 3 + 6) + 2 * 4096 * 32_000 * 5
)
STEPPED = 3 * PRODUCTS * 128 / 60 + 3.5 * ATTENTION + 4 * HEAD  # a row is at least 128 slots


@pytest.mark.parametrize(
    ("overrides", "settings", "expected"),
    [
        (
            ["parallel.activation_checkpointing=full", "train.epochs=2"],
            {},
            {
                "model": 2 * 3 * ONCE,
                "overhead": 2 * (STEPPED + PRODUCTS * 128 / 60 + ATTENTION - 3 * ONCE),
                "reference": ONCE + HELD_OUT,
                "evaluation": 2 * HELD_OUT,
            },
        ),
        (
            ["parallel.activation_checkpointing=selective", "reference.log_probs=online"],
            {},
            {
                "model": 3 * ONCE,
                "overhead": STEPPED + PRODUCTS * 128 / 60 + ATTENTION + HEAD - 3 * ONCE,
                "reference": 0,
                "evaluation": 2 * 2 * HELD_OUT,
            },
        ),
        (  # the policy and the online reference score the pairs first
            ["parallel.activation_checkpointing=none", "reference.log_probs=online", "loss=aot"],
            {},
            {
                "model": 3 * ONCE,
                "overhead": STEPPED + 3 * (PRODUCTS * 128 / 60 + ATTENTION + HEAD) - 3 * ONCE,
                "reference": 0,
                "evaluation": 2 * 2 * HELD_OUT,
            },
        ),
        (  # both factors of attention's products are activations
            ["parallel.activation_checkpointing=none", 'model.lora={"rank":8,"alpha":8}'],
            {"counts": ParameterCounts(1000, PARAMETERS)},
            {
                "model": 2 * (PRODUCTS + HEAD) + 3 * ATTENTION,
                "overhead": PRODUCTS * 2 * 68 / 60 + 0.5 * ATTENTION + HEAD,
                "reference": ONCE + HELD_OUT,
                "evaluation": 2 * HELD_OUT,
            },
        ),
    ],
    ids=["cached", "online", "coupled", "adapters"],
)
def test_flops_by_hand(overrides, settings, expected):
    overrides = [word.replace("loss=aot", 'loss={"name":"aot"}') for word in overrides]
    estimate = estimate_of(
        some_pairs([[10, 20, 30]]), *overrides, held_out=some_pairs([[1, 2, 3]]), **settings
    )
    assert estimate.rows.slots == 128 and estimate.evaluations == 2
    assert estimate.flops == pytest.approx(expected)
    # 989.4 TFLOP/s at half of the peak, on two of them
    hours = replace(estimate, gpus=2).hours(gpu_named("h100"), 0.5)
    total = sum(replace(estimate, gpus=2).flops.values())
    assert hours == pytest.approx(total / (2 * 989.4e12 * 0.5) / 3600)


def test_mfu_and_estimate_count_the_same_model_flops():
    pairs = some_pairs([[168, 314, 277], [10, 5, 7]])
    flops = estimate_of(pairs).flops
    assert flops["model"] == pytest.approx(model_flops(MISTRAL_7B, pairs.lengths))


def words_of(estimate: Estimate, gpu: str) -> list[str]:
    return [words for words, _ in remedies(estimate, gpu_named(gpu))]


def test_the_usual_changes_come_by_their_cost():
    pairs = some_pairs([[500, 500, 500]] * 4)
    overrides = [
        "optimizer={}",
        "reference.log_probs=online",
        "parallel.keep_gathered=true",
        "parallel.activation_checkpointing=selective",
        "data.tokens_per_microbatch=4096",
    ]
    cheap = [
        "parallel.keep_gathered=false",
        "parallel.activation_checkpointing=full",
        "data.tokens_per_microbatch=2048",
    ]
    dear = ["optimizer.state_dtype=bfloat16", "parallel.cpu_offload=true"]
    estimate = estimate_of(pairs, *overrides)
    assert words_of(estimate, "h100") == ["reference.log_probs=cached", *cheap, *dear, "--gpus 4"]
    # A row is not shorter than the longest pair; a reference that follows is never cached.
    follows = estimate.with_setting("reference.sync_every", 2)
    follows = follows.with_setting("data.tokens_per_microbatch", 2048)
    assert words_of(follows, "h100")[:3] == [*cheap[:2], dear[0]]
    assert words_of(estimate_of(pairs, "parallel.shard=1"), "a100-40gb")[-1].startswith(
        "--gpus 4 parallel.shard=4"
    )


def test_each_change_is_made_by_itself():
    gpu = gpu_named("h100")
    estimate = estimate_of(some_pairs([[500, 500, 500]] * 4), "optimizer={}")
    peaks = {words: changed.memory.peak for words, changed in remedies(estimate, gpu)}
    assert estimate.memory.peak > usable(gpu)
    halved = estimate.memory.peak - peaks["optimizer.state_dtype=bfloat16"]
    assert halved == 4 * PARAMETERS  # two moments, two bytes less each
    assert peaks["parallel.cpu_offload=true"] < usable(gpu)


@pytest.mark.parametrize(("replicate", "gpus"), [(1, 4), (3, 12)])
def test_the_fewest_gpus(replicate, gpus):
    """81 GiB of weights, gradients and state in all, 35.9 GiB on each."""
    estimate = estimate_of(
        some_pairs([[50, 50, 50]] * 4), f"parallel.replicate={replicate}", gpus=replicate
    )
    found = fewest_gpus(estimate, gpu_named("a100-40gb"))
    assert (found.gpus, found.shard) == (gpus, 4)
    tiny = gpu_named("a100-40gb")._replace(memory=2 * 2**30)
    assert fewest_gpus(estimate, tiny) is None


@pytest.mark.parametrize(
    ("every", "scored"), [(3, [0, 3, 6, 9, 10]), (5, [0, 5, 10]), (None, [0, 10])]
)
def test_evaluations(every, scored):
    """At the start, when due, and after the last of ten steps."""
    pairs = some_pairs([[1, 1, 1]] * 20)
    overrides = ("train.pairs_per_step=2", f"evaluation.every={json.dumps(every)}")
    estimate = estimate_of(pairs, *overrides, held_out=pairs)
    assert estimate.evaluations == len(scored)
    assert replace(estimate, held_out=None).evaluations == 0


def test_the_head_is_counted_with_the_kernels_of_the_settings():
    """Triton's chunk of 2,048 rows holds all scored tokens; the plain one of 1,048 does not."""
    pairs = some_pairs([[1, 1000, 1000]])
    for kernels, rows in (("auto", 2000), ("triton", 2000), ("plain", 1048)):
        phases = estimate_of(pairs, f"parallel.kernels={kernels}").memory.phases
        logits = phases["backward pass of the head"]["logits of one chunk of rows"]
        assert logits == rows * ((4 if rows == 2000 else 6) * 32_000 + 4 * 4096)


def test_idle_ranks_are_counted_as_the_plan_has_them():
    """Three pairs a step on five ranks: the shortcut of `Estimate` equals the plan itself."""
    pairs = some_pairs([[10, 200, 60], [100, 40, 60], [30, 30, 30], [50, 150, 50]])
    overrides = ("train.pairs_per_step=3", "data.tokens_per_microbatch=300", "data.shuffle=false")
    estimate = estimate_of(pairs, *overrides, gpus=5)
    plan = build_plan(estimate.config, pairs, 5)
    assert plan.ranks == 5
    assert estimate.rows == count_rows(plan, pairs, estimate.steps)
    # Rows of 300 and of 256 slots, on each of the five.
    assert estimate.rows.total == 5 * 300 + 5 * 256


def test_the_published_recipe():
    """61,619 pairs are 963 steps of 64 an epoch; 8 x A100-40GB is enough."""
    # UltraFeedback's, about: prompts, chosen and rejected responses, in tokens.
    sizes = np.array([[40, 110, 300], [120, 300, 500], [90, 260, 480]])
    drawn = np.random.default_rng(0).integers(0, 3, (61_619, 3))
    pairs = some_pairs(np.take_along_axis(sizes.T, drawn, 0))
    estimate = estimate_of(pairs, "train.max_steps=963", "train.epochs=3", gpus=8)
    text = report(estimate, gpu_named("a100-40gb"), None)
    assert "61,619 to train on" in text and "of 64 pairs; 963 per epoch x 3" in text
    assert "FITS on 8 x a100-40gb: the limit is 35.9 GiB" in text


def test_auto_keeps_the_model_gathered_where_a_full_row_fits():
    """Of 3,072 slots, all scored, although the pairs fill fewer."""
    pairs = some_pairs([[500, 500, 500]] * 2)
    estimate = estimate_of(pairs, "data.tokens_per_microbatch=3072", gpus=8)
    kept = estimate.with_setting("parallel.keep_gathered", True)
    needed = kept.memory_with(3072, 3072).peak
    assert estimate.gathers_once(needed) and not estimate.gathers_once(needed - 1)
    assert kept.gathers_once(0)
    assert not estimate.with_setting("parallel.keep_gathered", False).gathers_once(needed)
    assert not estimate.with_setting("parallel.device", "cpu").gathers_once(needed)
    # Without a GPU to decide by, the least that the run needs.
    off = estimate.with_setting("parallel.keep_gathered", False)
    assert estimate.memory == off.memory != kept.memory


@pytest.mark.parametrize(
    ("gpu", "words", "line"),
    [
        ("h200", "on, because rows of the full budget fit", True),
        ("a100-40gb", "off: the memory is not enough", False),
    ],
)
def test_the_report_says_what_auto_means(gpu, words, line):
    estimate = estimate_of(some_pairs([[500, 500, 500]] * 2), gpus=4)
    text = report(estimate, gpu_named(gpu), None)
    assert f"parallel.keep_gathered: {words}" in text
    assert ("gathered model, kept for the step" in text) == line
