"""Win rates against hand-computed and published numbers."""

import json
import math

import pytest
from lines import write_lines

from notus.errors import UserError
from notus.evals.alpaca_eval import read_annotations, win_rate
from notus.evals.published import ALPACA_EVAL


def annotations(preferences, **columns):
    """Rows as AlpacaEval writes them, the model's answers four characters long."""
    row = {"generator_1": "text_davinci_003", "output_1": "no", "generator_2": "mine"} | columns
    return [
        row | {"instruction": f"Question {i}", "output_2": "yes!", "preference": preference}
        for i, preference in enumerate(preferences)
    ]


@pytest.mark.parametrize("row", ALPACA_EVAL["text_davinci_003"], ids=lambda row: row.model)
def test_published_win_rates_from_their_counts(row, tmp_path):
    """The 804 (803) annotated of 805, whose wins, losses and draws the leaderboard shows."""
    nulls = 805 - row.total
    preferences = [2.0] * row.wins + [1.0] * row.losses + [1.5] * row.draws + [None] * nulls
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(annotations(preferences)))
    baseline, found, rows = read_annotations(file)
    assert (baseline, rows, found.average_length) == ("text_davinci_003", 805, 4)
    assert found.win_rate == pytest.approx(row.win_rate, abs=1e-6)
    assert found.standard_error == pytest.approx(row.standard_error, abs=1e-6)
    assert found[3:7] == row[3:7]


def test_win_rate_by_hand():
    """Draws are half a win, nulls are not there: (1 + 0 + 0.5 + 0.5) / 4."""
    found = win_rate("mine", [2, 1, None, 1.5, 1.5, None])
    assert (found.win_rate, found.wins, found.losses, found.draws, found.total) == (50, 1, 1, 2, 4)
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.5 / 3) / 2)
    assert win_rate("mine", [2]).standard_error is None


def test_graded_preferences_are_averaged():
    found = win_rate("mine", [1.25, 1.9, 1.5, 1.0])
    assert found.win_rate == pytest.approx(100 * (0.25 + 0.9 + 0.5) / 4)
    assert (found.wins, found.losses, found.draws) == (1, 2, 1)


def test_a_preference_of_0_is_a_draw(tmp_path):
    """Old annotations have it; AlpacaEval replaces it with 1.5 to this day."""
    _, found, rows = read_annotations(write_lines(tmp_path / "a.jsonl", annotations([0, 2, None])))
    assert (found.win_rate, found.draws, found.total, rows) == (75, 1, 2, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (annotations([2, 3]), r"a.jsonl:2: preference: found 3.0, expected 0 or a number from 1"),
        (annotations([True]), "preference: found true"),
        (annotations(["2"]), 'preference: found "2"'),
        ([{"instruction": "a"}], "a.jsonl:1: preference: missing"),
        ([{"preference": 2}], "a.jsonl:1: instruction: missing"),
        (annotations([2]) * 2, "a.jsonl:2: the same instruction and answer as .*a.jsonl:1"),
        (annotations([None, None]), "not one row of mine holds a preference"),
        (
            annotations([2]) + annotations([2, 1], generator_1="gpt4_turbo")[1:],
            "a.jsonl:2: compares mine with gpt4_turbo, the first row mine with text_davinci_003;",
        ),
        (
            annotations([2]) + annotations([2, 1], generator_2="other")[1:],
            "a.jsonl:2: compares other with text_davinci_003, the first row mine with",
        ),
    ],
)
def test_wrong_annotations_are_named(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_annotations(write_lines(tmp_path / "a.jsonl", rows))


def test_a_file_cut_off_is_no_result(tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(annotations([2, 1, 2]), indent=1)[:-40])
    with pytest.raises(UserError, match=r"annotations.json:\d+: not JSON"):
        read_annotations(file)
    with pytest.raises(UserError, match="no such file"):
        read_annotations(tmp_path / "other.json")
