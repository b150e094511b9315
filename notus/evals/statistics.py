"""Wilson's interval of a share, McNemar's exact test, and a paired bootstrap of mean values."""

import math

import numpy as np

RESAMPLES = 10_000
CHUNK = 2**20  # indices drawn at a time


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95 % by default; n at least 1."""
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Of shares 0 and 1 an end is the share itself, which rounding may pass.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value that both are right equally often (McNemar 1947).

    first_only, second_only: the pairs that only one of the two has right. If both are equally good,
    each such pair is a fair coin: twice the binomial probability of the smaller count or less, at
    most 1. Computed with integers.
    """
    discordant, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, tail / 2 ** (discordant - 1)) if discordant else 1.0


def bootstrap_interval(values: np.ndarray, seed: int, level: float = 0.95) -> np.ndarray:
    """The percentile bootstrap interval of each column's mean (Efron 1979), float64 [2, columns].

    values: float64 [pairs, columns], of each pair, such as the second model's loss minus the
    first's: pairs are drawn with replacement, RESAMPLES times, the same ones for all columns. Row
    0 holds the lower ends. nan for a single pair, which says nothing about the spread.
    """
    pairs, columns = values.shape
    if pairs < 2:
        return np.full((2, columns), np.nan)
    draw, means = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, step := max(1, CHUNK // pairs)):
        drawn = draw.integers(pairs, size=(min(step, RESAMPLES - start), pairs))
        # How often each resample holds each pair: one product is quicker than fetching the values.
        places = drawn + pairs * np.arange(len(drawn))[:, None]
        counts = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(counts @ values / pairs)
    tail = (1 - level) / 2
    return np.quantile(np.concatenate(means), (tail, 1 - tail), axis=0)
