"""Tables of accuracies, by hand."""

import numpy as np
import pytest

from notus.data.formats import Pair
from notus.evals.accuracy import SECTIONS, Row, section_scores, table


def test_table_by_hand():
    """Three pairs: right with a longer answer, a tie that is wrong, wrong with a shorter one."""
    pairs = [
        Pair("p", "c", "r", "a.jsonl:1", 5.0, 4.0, labels={"subset": "x"}),
        Pair("p", "c", "r", "a.jsonl:2", 5.0, 4.8, labels={"subset": "y"}),
        Pair("p", "c", "r", "b.jsonl:1"),
    ]
    lengths = np.array([[3, 90, 10], [3, 7, 7], [3, 5, 6]])
    found = table(pairs, np.array([0.5, 0.0, -0.25]), lengths)
    rows = {(row.kind, row.name): row for row in found}
    everything = rows["all", "all pairs"]
    assert (everything.n, everything.accuracy) == (3, pytest.approx(1 / 3))
    assert everything.margin == pytest.approx(0.25 / 3)
    assert everything.longer_wins == pytest.approx((1 + 0.5 + 0) / 3)
    assert {key: (row.n, row.accuracy) for key, row in rows.items() if key[0] != "all"} == {
        ("file", "a.jsonl"): (2, 0.5),
        ("file", "b.jsonl"): (1, 0.0),
        ("subset", "x"): (1, 1.0),
        ("subset", "y"): (1, 0.0),
        ("chosen longer by (tokens)", "51 to below 201"): (1, 1.0),
        ("chosen longer by (tokens)", "-10 to below 11"): (2, 0.0),
        ("rated higher by", "1 to below 2"): (1, 1.0),
        ("rated higher by", "0 to below 0.5"): (1, 0.0),
    }


def test_sections_weigh_subsets_by_rewardbench_counts():
    names = [name for subsets in SECTIONS.values() for name in subsets]
    rows = [Row("subset", name, 5, float(name == "math-prm"), 0, 1, 0, 0.5) for name in names]
    found = section_scores(rows)
    assert found["Reasoning"] == pytest.approx(0.5)  # 984 of 984 + 6 x 164
    assert (found["Chat"], found["total"]) == (0.0, pytest.approx(0.125))
    assert section_scores(rows[1:]) == {}
