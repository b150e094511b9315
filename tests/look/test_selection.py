"""Which rows a page holds."""

import random

from notus.look.selection import Selection


def select(most, values, seed=3):
    selection = Selection(most, seed)
    for place, value in enumerate(values):
        selection.add({"place": place, "numbers": {} if value is None else {"x": value}})
    records, words = selection.chosen()
    return [record["place"] for record in records], words


def test_all_rows_in_their_order():
    assert select(9, [5, None, 3, 5]) == ([0, 1, 2, 3], "all of them")
    assert select(4, [5, None, 3, 5]) == ([0, 1, 2, 3], "all of them")


def test_extremes_and_a_sample():
    draw = random.Random(0)
    values = [draw.random() for _ in range(1000)]
    chosen, words = select(40, values)
    order = sorted(range(1000), key=values.__getitem__)
    assert len(set(chosen)) == 40 and chosen == sorted(chosen)
    assert set(order[:10] + order[-10:]) <= set(chosen)
    assert "the 10 lowest and the 10 highest of each number (20 rows), and 20 drawn" in words
    assert select(40, values) == (chosen, words)
    assert select(40, values, seed=4)[0] != chosen


def test_the_sample_is_uniform():
    """Each of 20 rows without numbers is in a sample of 5 in a quarter of the draws."""
    counts = [0] * 20
    for seed in range(2000):
        for place in select(5, [None] * 20, seed)[0]:
            counts[place] += 1
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_never_more_than_asked():
    for most in (1, 2, 3):
        assert len(select(most, list(range(50)))[0]) == most
