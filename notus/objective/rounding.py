"""How far two honest computations of the same log-probs may differ.

Rows that are packed otherwise add in another order. In bfloat16 that moves a token's log-prob by
some hundredths of a nat, so sums over n tokens drift apart by about sqrt(n) of that: relative to
their length, short responses differ most. Over many responses the drift averages out, and a wrong
template, model or cache does not: the mean is held ten times as tightly as one response.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Bounds in nats: a response of n tokens may differ by token * n + root * sqrt(n), all N
    tokens together by mean * N + root * sqrt(N)."""

    token: float
    root: float
    mean: float


# bfloat16: 112 responses of UltraFeedback under SmolLM2-135M, packed here and one by one in
# transformers, had |difference| / sqrt(n) of 0.06 rms and 0.19 at most, and a mean below 1e-3 nats
# per token. float32: a hundred times what rounding gives.
TOLERANCES = {
    torch.float32: Tolerance(token=1e-4, root=1e-3, mean=1e-5),
    torch.bfloat16: Tolerance(token=2e-2, root=0.3, mean=2e-3),
}


class Comparison(NamedTuple):
    """within: whether the differences are rounding. words: the largest, and the mean."""

    within: bool
    words: str


def compare(differences_R: Tensor, lengths_R: Tensor, compute_dtype: torch.dtype) -> Comparison:
    """Compare the differences of R responses' log-prob sums (nats) with what rounding explains.

    lengths_R: the responses' tokens. Anything not a number is not within.
    """
    if not differences_R.numel():
        return Comparison(True, "no responses to compare")
    tolerance = TOLERANCES[compute_dtype]
    sums, lengths = differences_R.double(), lengths_R.double().clamp(min=1)
    allowed = tolerance.token * lengths + tolerance.root * lengths.sqrt()
    worst = int((sums.abs() / allowed).argmax())  # a NaN counts as the largest
    tokens = lengths.sum()
    mean_allowed = tolerance.mean + tolerance.root / tokens.sqrt()
    mean = sums.sum().abs() / tokens
    within = bool(sums.abs()[worst] <= allowed[worst]) and bool(mean <= mean_allowed)
    words = (
        f"at most {float(sums[worst].abs()):.2g} nats apart over {int(lengths[worst])} tokens "
        f"(rounding explains {float(allowed[worst]):.2g}), {float(mean):.2g} per token over "
        f"{int(tokens):,} ({float(mean_allowed):.2g})"
    )
    return Comparison(within, words)
