"""Statistics against sums written out with fractions, closed forms and simulated truth."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from notus.evals import statistics
from notus.evals.statistics import bootstrap_interval, mcnemar, wilson


def binomial_tail(successes: int, trials: int) -> Fraction:
    """P(X <= successes) for a fair coin, by counting every sequence's probability."""
    half = Fraction(1, 2)
    return sum(
        (math.comb(trials, k) * half**k * half ** (trials - k) for k in range(successes + 1)),
        Fraction(0),
    )


def test_wilson_interval_of_a_textbook():
    """8 of 10: 0.4902 to 0.9433 (e.g. Newcombe 1998's formula worked by hand); bounds stay in."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 5) == pytest.approx((0.0, 0.43448), abs=1e-5)
    assert wilson(5, 5) == pytest.approx((0.56552, 1.0), abs=1e-5)


@pytest.mark.parametrize("n", [3, 4, 10, 31, 1000])
def test_wilson_interval_holds_the_share(n):
    assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1


@pytest.mark.parametrize("first, second", [(0, 0), (3, 3), (1, 9), (9, 1), (0, 5), (12, 30)])
def test_mcnemar_is_the_binomial_sum(first, second):
    expected = min(Fraction(1), 2 * binomial_tail(min(first, second), first + second))
    assert mcnemar(first, second) == pytest.approx(float(expected), rel=1e-15)


def test_mcnemar_equals_counting_all_coin_flips():
    """11 of 2^10 sequences have at most one head, as many at most one tail: 22 / 1024."""
    flips = [sum(heads) for heads in product((0, 1), repeat=10)]
    extreme = sum(n <= 1 or n >= 9 for n in flips)
    assert mcnemar(1, 9) == extreme / 1024 == 22 / 1024
    assert mcnemar(900, 1100) == pytest.approx(8.6e-6, rel=0.05)  # z = 4.45, corrected


def test_interval_of_a_fair_mean_is_the_binomial_quantiles():
    """Of 20 values 0 or 1, half each, a resampled mean is Binomial(20, 1/2) / 20."""
    values = np.array([[0.0], [1.0]] * 10)
    low, high = bootstrap_interval(values, seed=1)[:, 0]
    counts = range(21)
    quantile = next(n for n in counts if binomial_tail(n, 20) >= Fraction(1, 40)) / 20
    assert (low, high) == (quantile, 1 - quantile) == (0.3, 0.7)


def test_the_seed_is_the_result_and_columns_share_the_draws(monkeypatch):
    values = np.random.default_rng(0).standard_normal((50, 1)) * [1.0, 2.0] + [0.0, 3.0]
    found = bootstrap_interval(values, seed=5)
    assert (found == bootstrap_interval(values, seed=5)).all()
    assert (found != bootstrap_interval(values, seed=6)).any()
    np.testing.assert_allclose(found[:, 1], 2 * found[:, 0] + 3.0, rtol=1e-12)
    monkeypatch.setattr(statistics, "CHUNK", 50 * 7)  # draws in parts are the same draws
    assert (found == bootstrap_interval(values, seed=5)).all()
    assert np.isnan(bootstrap_interval(values[:1], seed=5)).all()


def test_the_interval_covers_at_its_rate(monkeypatch):
    """400 samples of 60 skewed differences whose mean is 1: within 3 s.e. of 95 % and of 80 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    draw = np.random.default_rng(7)
    for level in (0.95, 0.8):
        # A shifted gamma of shape 4, mean 1: skewed, as losses are.
        samples = draw.gamma(4.0, 1.0, size=(400, 60)) - 3.0
        found = [
            bootstrap_interval(s[:, None], seed, level)[:, 0] for seed, s in enumerate(samples)
        ]
        covered = np.mean([low <= 1.0 <= high for low, high in found])
        assert abs(covered - level) <= 3 * math.sqrt(level * (1 - level) / 400), covered
