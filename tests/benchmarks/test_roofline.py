"""The formulae behind the predicted speeds."""

import json

import numpy as np
import pytest
import torch

from benchmarks import roofline
from benchmarks.memory import model_shape
from notus.data.packing import slots_of
from notus.data.planning import Plan

MISTRAL = roofline.MODELS["B"]


def test_packed_rows_are_full():
    """benchmarks/RESULTS.md: 1.02 slots per token at these lengths and rows of 8,192 slots."""
    lengths = roofline.PROFILES["uf"](64 * 40, np.random.default_rng(0))
    filled = slots_of(lengths, prefix_sharing=True)
    order = {"pairs_per_step": 64, "epochs": 1, "max_steps": None, "seed": 0, "shuffle": True}
    plan = Plan(filled, **order, ranks=1, budget=8192)
    divisions = [plan.division(plan.pairs_of(step)) for step in range(plan.steps)]
    slots = sum(division.slots * len(division.bins) for division in divisions)
    assert 1.01 < slots / filled.sum() < 1.03


def test_flops_by_hand():
    """One pair of Mistral-7B, packed, and the same in a padded microbatch of two sequences."""
    lengths = np.array([[3, 2, 4]])
    # 3 + 2 + 1 in the prompt; each response token sees the prompt and its own branch; one pads.
    counts = roofline.packed(lengths, 10)
    assert counts == roofline.Processed(10, (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7) + 1, 6)
    assert roofline.padded([(2, 7)], 6) == roofline.Processed(14, 2 * 49, 6)
    blocks = 2 * 6_979_321_856 * 10 + 4 * 4096 * 32 * counts.attended
    head = 2 * 4096 * 32_000 * 6
    assert counts.forward_flops(MISTRAL) == (blocks, head)
    options = {"recomputed_blocks": True, "online_reference": True}
    found = roofline.hardware_flops(MISTRAL, counts, **options)
    assert found == 4 * blocks + 4 * head + blocks + head


def test_profiles_have_the_published_means():
    """Tokens per pair, with each prompt twice and once, of 20,000 pairs; facts of the profile."""
    wanted = {"uf": (927, 759), "longprompt": (1442, 859), "equal": (1024, 768)}
    for name, (apart, shared) in wanted.items():
        lengths = roofline.PROFILES[name](20_000, np.random.default_rng(0))
        assert lengths.sum(1).mean() == pytest.approx(shared, rel=0.01)
        assert (lengths.sum(1) + lengths[:, 0]).mean() == pytest.approx(apart, rel=0.01)
        assert (lengths[:, :1] + lengths[:, 1:]).max() <= roofline.MAX_LENGTH
        assert lengths.min() >= 8


def test_roofline(tmp_path, capsys):
    """At infinite copying speed only products are left: the FLOPs by the rate."""
    path = tmp_path / "roofline.json"
    given = ["--tflops", "1", "--gigabytes-per-second", "1e30", "--model", "A", "--pairs", "2"]
    assert roofline.main([*given, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    (rows,) = report["tables"].values()
    lengths = roofline.PROFILES["uf"](20_000, np.random.default_rng(0))[:2]
    counts = roofline.packed(lengths, float(lengths.sum()))
    linear = 2 * 6_979_321_856 / 32 * 8 * counts.slots
    attention = 4 * 4096 * 8 * counts.attended
    head = 2 * 4096 * 32_000 * counts.scored
    expected = (3 * linear + 6 * attention + 4 * head) / 1e12
    assert rows[0]["step s"] == pytest.approx(expected, rel=1e-9)
    assert rows[0]["pairs/s"] == pytest.approx(2 / expected, rel=1e-9)
    assert "TFLOP/s" in capsys.readouterr().out


def test_rates_are_those_of_real_work():
    rates = roofline.measure_rates(torch.device("cpu"), size=256, at_least=0.0)
    assert 1e8 < rates.matmul < 1e14 and 1e8 < rates.copy < 1e13


def test_bytes_between_products():
    shape = model_shape(1, 8, 16, 4, 8)  # queries 8 wide, keys 2
    assert roofline.elementwise_bytes(shape, 2) == 2 * (22 * 8 + 4 * (8 + 2) + 8 * 16)
