"""How often the chosen response wins: by file, source, subset, length and rating difference."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from notus.data.formats import Pair
from notus.evals.statistics import wilson

# RewardBench's sections: a section's accuracy weighs its subsets by these counts, and the total is
# the mean over sections (allenai/reward-bench, constants.py; math-prm counts twice its rows).
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95}
    | {"mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100}
    | {"llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92}
    | {"llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100}
    | {"xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984}
    | dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
}
LENGTH_EDGES = (-200, -50, -10, 11, 51, 201)  # tokens by which the chosen response is longer
RATING_EDGES = (0.0, 0.5, 1.0, 2.0)  # points by which the chosen response is rated higher


class Row(NamedTuple):
    """One line of the table.

    low, high: the 95 % Wilson interval of the accuracy. margin: mean of chosen minus rejected
    score, times beta if there is a reference. longer_wins: share of pairs whose longer response is
    the chosen one, equal lengths counting half; the accuracy of a judge that sees only lengths.
    """

    kind: str
    name: str
    n: int
    accuracy: float
    low: float
    high: float
    margin: float
    longer_wins: float


def table(pairs: Sequence[Pair], margin: np.ndarray, lengths: np.ndarray) -> list[Row]:
    """The row of each group of pairs. margin: float64 [pairs], lengths: int64 [pairs, 3]."""
    right = margin > 0
    longer = np.sign(lengths[:, 1] - lengths[:, 2]) / 2 + 0.5
    return [
        Row(
            kind,
            name,
            n := int(members.sum()),
            right[members].mean(),
            *wilson(int(right[members].sum()), n),
            margin[members].mean(),
            longer[members].mean(),
        )
        for kind, name, members in _groups(pairs, lengths)
    ]


def _groups(pairs: Sequence[Pair], lengths: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, name, members as bool [pairs]) of all pairs, then of each group of each kind.

    A kind with all pairs in one group is left out, and so are the pairs for which a kind is
    unknown.
    """
    yield "all", "all pairs", np.ones(len(pairs), bool)
    origins = [pair.labels | {"file": pair.where.rpartition(":")[0]} for pair in pairs]
    for kind in ("file", "source", "subset"):
        labels = np.array([origin.get(kind, "") for origin in origins])
        names = sorted({*labels} - {""})
        if len(names) > 1 or (names and (labels == "").any()):
            yield from ((kind, name, labels == name) for name in names)
    longer = (lengths[:, 1] - lengths[:, 2]).astype(float)
    yield from ranges("chosen longer by (tokens)", longer, LENGTH_EDGES)
    rated = np.array([(pair.chosen_score, pair.rejected_score) for pair in pairs], float)
    yield from ranges("rated higher by", rated[:, 0] - rated[:, 1], RATING_EDGES)


def ranges(
    kind: str, values: np.ndarray, edges: Sequence[float]
) -> Iterator[tuple[str, str, np.ndarray]]:
    names = [f"{low:g} to below {high:g}" for low, high in pairwise(edges)]
    names = [f"below {edges[0]:g}", *names, f"{edges[-1]:g} or more"]
    for name, (low, high) in zip(names, pairwise((-math.inf, *edges, math.inf)), strict=True):
        members = (values >= low) & (values < high)  # NaN is in no range
        if members.any():
            yield kind, name, members


def section_scores(rows: Sequence[Row]) -> dict[str, float]:
    """RewardBench's section accuracies and their mean; empty unless all its subsets have a row."""
    accuracy = {row.name: row.accuracy for row in rows if row.kind == "subset"}
    if not {name for subsets in SECTIONS.values() for name in subsets} <= accuracy.keys():
        return {}
    scores = {
        section: sum(n * accuracy[name] for name, n in subsets.items()) / sum(subsets.values())
        for section, subsets in SECTIONS.items()
    }
    return scores | {"total": sum(scores.values()) / len(scores)}
