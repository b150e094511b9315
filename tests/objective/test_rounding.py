"""Honest bfloat16 noise passes at every length; a wrong template, model or cache does not."""

import numpy as np
import pytest
import torch

from conftest import random_pairs
from notus.data.packing import pack
from notus.objective.logprobs import response_sums, token_log_probs
from notus.objective.rounding import TOLERANCES, compare

BF16 = torch.bfloat16


def lengths_and_noise(seed, deviation=0.06, count=2000):
    """Responses of 2 to 500 tokens; each one's sum is off by deviation * sqrt(n) on average."""
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(np.exp(rng.uniform(np.log(2), np.log(500), count)).astype(int))
    return lengths, torch.from_numpy(rng.normal(0, deviation, count)) * lengths.sqrt()


@pytest.mark.parametrize("seed", range(20))
def test_noise_as_it_was_measured_is_rounding(seed):
    lengths, noise = lengths_and_noise(seed)
    assert compare(noise, lengths, BF16).within
    largest = (noise.abs() / lengths).max()
    assert largest > 0.02, "a bound by length only would have refused it"


@pytest.mark.parametrize("shift", [0.01, -0.01])
def test_a_shift_of_a_hundredth_of_a_nat_per_token_is_no_rounding(shift):
    """A wrong template moves all tokens a little; no single response shows it."""
    lengths, noise = lengths_and_noise(0)
    assert not compare(noise + shift * lengths, lengths, BF16).within


def test_the_bounds_written_out():
    allowed = 0.02 * 9 + 0.3 * 3.0
    for difference, within in ((allowed * 0.999, True), (allowed * 1.001, False)):
        differences = torch.tensor([difference, -difference])  # the mean is 0
        found = compare(differences, torch.tensor([9, 9]), BF16)
        assert (
            found.within == within and f"{difference:.2g} nats apart over 9 tokens" in found.words
        )
    mean_allowed = 2e-3 * 2500 + 0.3 * 50.0
    for total, within in ((mean_allowed * 0.999, True), (mean_allowed * 1.001, False)):
        differences = torch.full((100,), total / 100)
        assert compare(differences, torch.full((100,), 25), BF16).within == within


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_within(bad):
    differences, lengths = torch.tensor([0.0, bad, 0.0]), torch.tensor([3, 3, 3])
    assert not compare(differences, lengths, BF16).within


def test_no_responses_and_responses_of_no_tokens():
    assert compare(torch.zeros(0), torch.zeros(0), BF16).within
    assert compare(torch.zeros(2), torch.tensor([3, 0]), BF16).within


# ------------------------------------------------------------------------------- with a real model

PAIRS = random_pairs(60, seed=3, response=(2, 30))
LENGTHS = torch.from_numpy(PAIRS.lengths[:, 1:].copy())


@torch.no_grad()
def sums(model, order=range(60), per_row=60, dtype=BF16):
    """Each response's log-prob, `per_row` pairs to a row in this order: float64 [60, 2]."""
    model, order = model.to(dtype), list(order)
    found = torch.zeros(60, 2, dtype=torch.float64)
    for start in range(0, 60, per_row):
        members = order[start : start + per_row]
        batch = pack(PAIRS, members, 4096, True)
        found[members] = response_sums(token_log_probs(model, batch).float(), batch.lengths)
    return found


def within(one, other, dtype=BF16):
    return compare((one - other).flatten(), LENGTHS.flatten(), dtype).within


def test_other_rows_and_float32_are_rounding_and_another_model_is_not(tiny_model):
    with torch.no_grad():
        exact = sums(tiny_model, dtype=torch.float32)
        assert within(sums(tiny_model, reversed(range(60)), 7, torch.float32), exact, torch.float32)
        honest = sums(tiny_model)
        assert within(sums(tiny_model, reversed(range(60)), 7), honest) and within(honest, exact)
        for parameter in tiny_model.parameters():
            parameter.mul_(1.1)
        assert not within(sums(tiny_model), honest)


def test_a_permuted_cache_is_noticed(tiny_model):
    honest = sums(tiny_model)
    assert not within(honest.roll(1, 0), honest)
    assert not within(honest.flip(1), honest)


def test_float32_is_held_tightly():
    token, root, mean = TOLERANCES[torch.float32]
    assert max(token, root, 10 * mean) <= 1e-3
