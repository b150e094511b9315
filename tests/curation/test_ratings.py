import hashlib
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notus.curation.rated_rows import RATED
from notus.curation.ratings import (
    ASPECTS_DISAGREE,
    TIED_RATINGS,
    TOO_FEW_RATED,
    UNCLEAR_TEN,
    Choice,
    RatedRow,
    choose_pairs,
    mean_rating,
    overall_score,
    overall_score_fixed,
    rating,
    shortcoming,
)
from notus.errors import UserError

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def row_of(*completions, prompt="?"):
    return RatedRow(prompt, list(completions), None)


def choose_pair(*arguments):
    """The only pair, or the reason why there is none."""
    found = choose_pairs(*arguments)
    if isinstance(found, str):
        return found
    (choice,) = found
    return choice


def rated(*ratings, response="answer", **fields):
    annotations = {
        aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=False)
    }
    return {"response": response, "annotations": annotations, **fields}


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "4"}}, 4.5),
        ({"helpfulness": {"Rating": 5}, "honesty": {"Rating": 2.0}}, 3.5),
        ({"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "N/A"}}, 5.0),
        ({"helpfulness": {"Rating": "5"}, "honesty": {"Rationale": "none"}}, 5.0),
        ({"helpfulness": {"Rating": "5"}, "honesty": {"Rating": None}}, 5.0),
        ({"helpfulness": [{"Rating": "3"}], "honesty": [{"Rating": "4"}]}, 3.5),
        ({"helpfulness": {"Rating": "2"}, "honesty": None}, 2.0),
        ({"helpfulness": {"Rating": "N/A"}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_mean_rating_of_every_published_shape(annotations, expected):
    assert mean_rating({"annotations": annotations}) == expected


@pytest.mark.parametrize("rating", ["0", "6", 5.5, "high", "nan", ["5"], True, 10**400])
def test_a_rating_outside_one_to_five_is_an_error(rating):
    with pytest.raises(UserError, match="rating of honesty is .*expected a number from 1 to 5"):
        mean_rating(rated("5", rating))


@pytest.mark.parametrize("annotations", [["5"], {"honesty": "5"}, {"honesty": ["5"]}])
def test_annotations_of_another_shape_are_an_error(annotations):
    with pytest.raises(UserError, match="expected an object"):
        mean_rating({"annotations": annotations})


@pytest.mark.parametrize(
    ("found", "expected"),
    [(7.5, 7.5), ("8", 8.0), ("8/10", 8.0), (10, 10.0), (None, None), ("N/A", None)],
)
def test_overall_score(found, expected):
    assert overall_score({"overall_score": found}) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (rated(1, 1, 1, 2, overall_score=10.0), 1.0),
        (rated(2, 2, 2, 2, overall_score="10"), 1.0),  # a mean of 2 is still a 1
        (rated(4, 4, 4, 4, overall_score=10), None),  # a mean of 4 is still unclear
        (rated(2, 2, 2, 3, overall_score=10), None),
        (rated(overall_score=10), None),
        (rated(5, 4, 4, 4, overall_score=10), 10.0),
        (rated(1, overall_score=9.5), 9.5),
    ],
)
def test_the_published_correction_of_the_tens(completion, expected):
    assert overall_score_fixed(completion) == pytest.approx(expected or math.nan, nan_ok=True)


def test_a_row_with_an_unclear_ten_gives_no_pair_under_the_corrected_score():
    unclear, good, bad = (
        rated(3, overall_score=10),
        rated(5, overall_score=9),
        rated(1, overall_score=10),
    )
    assert choose_pair(row_of(good, bad, unclear), "overall-score-fixed", 0) == UNCLEAR_TEN
    assert choose_pair(row_of(good, bad), "overall-score-fixed", 0) == (good, bad, 9.0, 1.0)
    assert choose_pair(row_of(good, bad), "overall-score", 0) == (bad, good, 10.0, 9.0)


def test_rating_is_any_number_of_the_response():
    assert [rating({"rating": found}) for found in (-3, "0.5", 117, None)] == [-3.0, 0.5, 117, None]
    for found in ("good", "nan", "inf"):
        with pytest.raises(UserError, match=f"rating is '{found}'; expected a number$"):
            rating({"rating": found})


def test_lowest_is_the_first_with_the_lowest_score():
    worst = rated(1, response="worst")
    row = row_of(rated(2), rated(5), worst, rated(1, response="too"))
    for seed in range(5):
        assert choose_pair(row, "mean-rating", seed, "lowest")[1] is worst


@pytest.mark.parametrize("seed", [0, 7])
def test_all_lower_gives_a_pair_with_each_lower_response_in_their_order(seed):
    low, best, tied, middle = rated(1), rated(5), rated(5, response="too"), rated(3)
    row = row_of(low, best, rated("N/A"), tied, middle)
    found = choose_pairs(row, "mean-rating", seed, "all-lower")
    assert found == [(best, low, 5.0, 1.0), (best, middle, 5.0, 3.0)]
    assert choose_pairs(row_of(best, tied), "mean-rating", seed, "all-lower") == TIED_RATINGS


def test_the_reasons_to_leave_a_pair_out():
    thirds = Choice(rated(5, 4, 4), rated(3, 3, 4), 13 / 3, 10 / 3)  # rounded: 0.9999999999999996
    assert shortcoming(thirds, None, None, True) is None
    assert shortcoming(thirds, 1, 13 / 3, False) is None
    assert shortcoming(thirds, 1.1, None, False) == "margin below 1.1"
    assert shortcoming(thirds, 1.1, 4.5, True) == "chosen score below 4.5"
    crossed = Choice(rated(5, 3), rated(2, 4), 4.0, 3.0)
    assert shortcoming(crossed, 1, 4, True) == ASPECTS_DISAGREE
    assert shortcoming(crossed, 1, 4, False) is None
    # An aspect that only one of them is rated on says nothing about the two.
    unrated = Choice(rated(5, "N/A"), rated(2, 4), 5.0, 3.0)
    assert shortcoming(unrated, None, None, True) is None


def test_zephyr_draws_among_all_others_anew_for_every_row():
    """`random.seed(42)` in the row's function, then draws until one is not the chosen."""
    completions = [rated(4, response=letter) for letter in "abcd"]
    random.seed(42)
    expected = random.choice(completions)
    while expected is completions[0]:
        expected = random.choice(completions)
    for prompt in ("one", "another"):
        found = choose_pair(row_of(*completions, prompt=prompt), "mean-rating", 42, "zephyr")
        assert found == (completions[0], expected, 4.0, 4.0)
    seeds = {
        choose_pair(row_of(*completions), "mean-rating", seed, "zephyr")[1]["response"]
        for seed in range(40)
    }
    assert seeds == {"b", "c", "d"}
    same = row_of(rated(4), rated(4))
    assert choose_pair(same, "mean-rating", 42, "zephyr") == TIED_RATINGS


def test_rows_of_responses_and_ratings_beside_each_other():
    row = {"prompt": "?", "responses": ["a", "b", "c"], "ratings": [1, 7, None], "source": "s"}
    found = RATED["rated"].read(row, "here:1")
    assert (found.prompt, found.source) == ("?", "s")
    chosen, rejected, *scores = choose_pair(found, "rating", 0)
    assert (chosen["response"], rejected["response"], scores) == ("b", "a", [7.0, 1.0])
    for change, message in (
        ({"ratings": [1]}, "here:1: 3 responses, but 1 ratings"),
        ({"responses": "a"}, 'here:1: "responses" is text; expected a list'),
        ({"prompt": None}, 'here:1: "prompt" is null; expected text'),
        ({"source": 3}, 'here:1: "source" is a number; expected text'),
    ):
        broken = {**row, **change}
        with pytest.raises(UserError, match=message):
            RATED["rated"].read(broken, "here:1")


def test_overall_score_out_of_range_is_an_error():
    with pytest.raises(UserError, match="overall_score is 0; expected a number from 1 to 10"):
        overall_score({"overall_score": 0})


@pytest.mark.parametrize("seed", range(8))
def test_chosen_is_the_first_maximum_and_rejected_the_draw_of_the_prompt(seed):
    completions = [
        rated(5, 3),  # mean 4, tied with the next but one
        rated(1, 2),
        rated(4, 4),
        rated("N/A"),
        rated(3, 3),
        rated(2, 2),
    ]
    lower = [completions[1], completions[4], completions[5]]
    draw = int(hashlib.sha256(f"{seed}:What is up?".encode()).hexdigest(), 16) % 3
    row = row_of(*completions, prompt="What is up?")
    chosen, rejected, *scores = choose_pair(row, "mean-rating", seed)
    assert chosen is completions[0]
    assert rejected is lower[draw]
    assert scores == [4.0, [1.5, 3.0, 2.0][draw]]


def test_the_rule_decides_which_score_counts():
    wrong_ten = rated(1, overall_score=10)
    good = rated(5, overall_score=9)
    row = row_of(wrong_ten, good)
    assert choose_pair(row, "mean-rating", 0) == (good, wrong_ten, 5.0, 1.0)
    assert choose_pair(row, "overall-score", 0) == (wrong_ten, good, 10.0, 9.0)


@pytest.mark.parametrize(
    ("completions", "reason"),
    [
        ([], TOO_FEW_RATED),
        ([rated(3)], TOO_FEW_RATED),
        ([rated(3), rated("N/A")], TOO_FEW_RATED),
        ([rated(4, 4), rated(5, 3)], TIED_RATINGS),
    ],
)
def test_rows_without_a_pair_say_why(completions, reason):
    assert choose_pair(row_of(*completions), "mean-rating", 0) == reason
    assert choose_pair(row_of(*completions), "mean-rating", 0, "lowest") == reason


ratings = st.lists(st.sampled_from(["1", "2", "3", "4", "5", "N/A"]), min_size=4, max_size=4)
rows = st.builds(
    lambda prompt, all_ratings: row_of(
        *(rated(*one, response=str(index)) for index, one in enumerate(all_ratings)), prompt=prompt
    ),
    st.text(max_size=20),
    st.lists(ratings, max_size=5),
)


def plain_means(row):
    """Means computed apart from the code under test; None where nothing is rated."""
    means = []
    for completion in row.completions:
        values = [a["Rating"] for a in completion["annotations"].values() if a["Rating"] != "N/A"]
        means.append(sum(map(int, values)) / len(values) if values else None)
    return means


@given(rows, st.integers(0, 2**32))
def test_lowest_and_random_agree_on_the_chosen(row, seed):
    drawn, lowest = (choose_pair(row, "mean-rating", seed, way) for way in ("random", "lowest"))
    if isinstance(drawn, str):
        assert lowest == drawn
    else:
        assert lowest[0] is drawn[0]
        assert lowest[3] == min(mean for mean in plain_means(row) if mean is not None) <= drawn[3]


@given(rows, st.integers(0, 2**32))
def test_chosen_has_the_maximum_and_rejected_strictly_less(row, seed):
    means = plain_means(row)
    scores = [mean for mean in means if mean is not None]
    choice = choose_pair(row, "mean-rating", seed)
    if len(scores) < 2:
        assert choice == TOO_FEW_RATED
    elif len(set(scores)) == 1:
        assert choice == TIED_RATINGS
    else:
        chosen, rejected, chosen_score, rejected_score = choice
        assert int(chosen["response"]) == means.index(max(scores))
        assert chosen_score == max(scores)
        assert rejected_score == means[int(rejected["response"])] < max(scores)


@given(rows, st.integers(0, 2**32), st.randoms())
def test_order_among_equally_rated_completions_does_not_change_the_scores(row, seed, random):
    means = plain_means(row)
    shuffled = list(row.completions)
    for mean in set(means):
        places = [index for index, other in enumerate(means) if other == mean]
        sources = random.sample(places, len(places))
        for place, source in zip(places, sources, strict=True):
            shuffled[place] = row.completions[source]
    before = choose_pair(row, "mean-rating", seed)
    after = choose_pair(row._replace(completions=shuffled), "mean-rating", seed)
    assert after[2:] == before[2:]


@given(st.lists(rows, max_size=6), st.integers(0, 2**32))
def test_row_order_does_not_change_any_choice(all_rows, seed):
    forwards = [choose_pair(row, "mean-rating", seed) for row in all_rows]
    backwards = [choose_pair(row, "mean-rating", seed) for row in reversed(all_rows)]
    assert forwards == backwards[::-1]


def test_the_draw_reaches_every_candidate_evenly():
    completions = [rated(5), *(rated(rating) for rating in (1, 2, 3, 4))]
    counts = dict.fromkeys([1.0, 2.0, 3.0, 4.0], 0)
    for number in range(4000):
        row = row_of(*completions, prompt=f"question {number}")
        counts[choose_pair(row, "mean-rating", 42)[3]] += 1
    # 1,000 each, with a standard deviation of 27
    assert all(880 < count < 1120 for count in counts.values()), counts
