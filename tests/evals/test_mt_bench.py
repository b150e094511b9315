"""MT-Bench scores against hand-computed numbers."""

import math
import statistics

import pytest
from lines import write_lines

from notus.errors import UserError
from notus.evals.mt_bench import bench_score, mt_bench_scores, read_turns
from notus.evals.published import MT_BENCH_TURNS


def judgments(score_of, model="mine"):
    return [
        {
            "question_id": number,
            "model": model,
            "judge": ["gpt-4", "single-v1"],
            "score": score_of(number, turn),
            "turn": turn,
        }
        for number, turn in MT_BENCH_TURNS
    ]


def test_mt_bench_means_leave_out_what_could_not_be_parsed(tmp_path):
    """Math is 4 and the rest 8, but one math turn of each of two questions is -1 and not a 4."""
    broken = {(111, 2), (112, 1)}

    def score_of(number, turn):
        if (number, turn) in broken:
            return -1
        return 4 if MT_BENCH_TURNS[number, turn] == "math" else 8.0

    file = write_lines(
        tmp_path / "gpt-4_single.jsonl", judgments(score_of) + judgments(lambda n, t: t)
    )
    with pytest.raises(
        UserError, match="single.jsonl:161: question_id 81, turn 1 of mine is judged twice"
    ):
        mt_bench_scores(file, MT_BENCH_TURNS)
    rows = judgments(score_of) + judgments(lambda n, t: 6 + t, model="other")
    found, other = mt_bench_scores(write_lines(file, rows), MT_BENCH_TURNS)
    assert found.score == pytest.approx((18 * 4 + 140 * 8) / 158)
    assert found.turns == pytest.approx([(9 * 4 + 70 * 8) / 79] * 2)
    assert found.categories["math"] == 4 and found.categories["humanities"] == 8
    assert list(found.categories) == [
        *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem"),
        "humanities",
    ]
    assert (found.judged, found.unparsable, found.judge) == (158, 2, "gpt-4")
    assert (other.score, other.turns, other.standard_error) == (7.5, (7, 8), 0)


def test_mt_bench_standard_error_is_that_of_question_means():
    """With nothing left out it is the standard error of the questions' means."""
    questions = {(number, turn): "math" for number in range(5) for turn in (1, 2)}
    scores = {(n, t): (7 * n + 3 * t) % 10 for n in range(5) for t in (1, 2)}
    means = [(scores[n, 1] + scores[n, 2]) / 2 for n in range(5)]
    found = bench_score("mine", "gpt-4", scores, questions)
    assert found.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[:-3],
            "3 of 160 judgments of mine are missing, the first .* 159, turn 2",
        ),
        (lambda rows: rows[:1], "159 of 160 judgments .* question_id 81, turn 2"),
        (
            lambda rows: [rows[0] | {"question_id": 7}],
            "question_id 7, turn 1 of mine is not a turn of the questions",
        ),
        (
            lambda rows: [rows[0] | {"turn": 3}],
            "turn 3 of mine is not a turn of the questions",
        ),
        (lambda rows: [rows[0] | {"score": "9"}], 'score: found "9", expected 0 to 10, or -1'),
        (lambda rows: [rows[0] | {"score": 11}], "score: found 11.0"),
        (lambda rows: [{"model_1": "a"}], "model: missing"),
        (lambda rows: [row | {"score": -1} for row in rows], "not one judgment of mine"),
    ],
)
def test_wrong_judgments_are_named(change, message, tmp_path):
    file = write_lines(tmp_path / "j.jsonl", change(judgments(lambda n, t: 5)))
    with pytest.raises(UserError, match=message):
        mt_bench_scores(file, MT_BENCH_TURNS)


def test_questions_of_ones_own(tmp_path):
    rows = [
        {"question_id": 1, "category": "law", "turns": ["a"]},
        {"question_id": 2, "category": "tax", "turns": ["a", "b"]},
    ]
    questions = read_turns(write_lines(tmp_path / "q.jsonl", rows))
    assert questions == {(1, 1): "law", (2, 1): "tax", (2, 2): "tax"}
    rows = [
        {"question_id": number, "model": "mine", "score": score, "turn": turn, "judge": ["gpt-4"]}
        for number, turn, score in [(1, 1, 2), (2, 1, 4), (2, 2, 9)]
    ]
    [found] = mt_bench_scores(write_lines(tmp_path / "j.jsonl", rows), questions)
    assert (found.score, found.turns, found.judge) == (5, (3, 9), "gpt-4")
    assert found.categories == {"law": 2, "tax": 6.5}
    write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "category": "law", "turns": ["a"]}] * 2)
    with pytest.raises(UserError, match="q.jsonl:2: question_id 1 is also that of .*q.jsonl:1"):
        read_turns(tmp_path / "q.jsonl")
