"""Rows of the table from the evaluators' files, against hand-computed and published numbers."""

import json
import math
import statistics

import pytest
from lines import write_lines

from notus.errors import UserError
from notus.evals.leaderboard import averages, leaderboard_results, read_results, result_files
from notus.evals.published import ALPACA_EVAL, LEADERBOARD, MT_BENCH_TURNS
from notus.evals.scores import (
    bench_score,
    mt_bench_scores,
    read_annotations,
    read_questions,
    win_rate,
)

# ------------------------------------------------------------------------------------ AlpacaEval


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


# -------------------------------------------------------------------------------------- MT-Bench


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
    questions = read_questions(write_lines(tmp_path / "q.jsonl", rows))
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
        read_questions(tmp_path / "q.jsonl")


# -------------------------------------------------------------------------- Open LLM Leaderboard


def results_file(file, results, **rest):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"results": results} | rest))
    return file


def shares(files):
    found = leaderboard_results(read_results(files)[1])
    return {name: (m.metric, m.value) for name, m in found.items()}


def test_published_averages():
    assert [round(averages(row.scores)[0], 2) for row in LEADERBOARD] == [52.89, 54.09, 52.15]
    assert averages((1, 2, 3, 4, 5, 6, None)) == [None, 3.5]


# As the leaderboard published Notus's results, and Argilla its own, measured with version 0.4.0.
OLD = {
    "harness|arc:challenge|25": {"acc": 0.61, "acc_norm": 0.6459},
    "harness|hellaswag|10": {"acc": 0.6, "acc_norm": 0.8478},
    "harness|truthfulqa:mc|0": {"mc1": 0.3, "mc2": 0.5437},
    "harness|winogrande|5": {"acc": 0.7940},
    "harness|gsm8k|5": {"acc": 0.1516},
    "harness|drop|3": {"em": 0.001, "f1": 0.0891},
    "all": {"acc": 0.6},
}
SUBJECTS = {
    f"harness|hendrycksTest-{i}|5": {"acc": 0.6303 + (i - 28) / 100, "acc_norm": 0.1}
    for i in range(57)
}
NEW = {
    "arc_challenge": {"acc,none": 0.6, "acc_norm,none": 0.6425, "acc_norm_stderr,none": 0.014},
    "hellaswag": {"acc,none": 0.65, "acc_norm,none": 0.8490},
    "mmlu": {"acc,none": 0.6169, "alias": "mmlu"},
    "mmlu_virology": {"acc,none": 0.5, "alias": "  - virology"},
    "truthfulqa_mc1": {"acc,none": 0.35, "alias": " - truthfulqa_mc1"},
    "truthfulqa_mc2": {"acc,none": 0.5277, "alias": " - truthfulqa_mc2"},
    "winogrande": {"acc,none": 0.7451},
    "gsm8k": {"exact_match,get-answer": 0.3950},
    "drop": {"em,none": 0.0, "f1,none": 0.0098},
}


def test_the_leaderboards_own_results(tmp_path):
    file = results_file(tmp_path / "results_2023-11-29.json", OLD | SUBJECTS)
    board = leaderboard_results(read_results([file])[1])
    scores = [100 * measured.value for measured in board.values()]
    assert scores == pytest.approx(LEADERBOARD[0].scores)
    assert round(averages(scores)[0], 2) == 52.89
    assert [m.few_shot for m in board.values()] == [25, 10, 5, 0, 5, 5, 3]


def test_one_file_per_task_each_with_its_own_metric(tmp_path):
    for name, row in NEW.items():
        results_file(tmp_path / "out" / name / "results.json", {name: row}, **{"n-shot": {name: 5}})
    files = result_files(tmp_path)
    board = leaderboard_results(read_results(files)[1])
    scores = [100 * measured.value for measured in board.values()]
    assert scores == pytest.approx(LEADERBOARD[1].scores)
    assert (board["arc_challenge"].standard_error, board["arc_challenge"].few_shot) == (0.014, 5)


def test_todays_gsm8k_is_the_strict_match(tmp_path):
    row = {"exact_match,flexible-extract": 0.5, "exact_match,strict-match": 0.4}
    file = results_file(tmp_path / "results_1.json", {"gsm8k": row})
    assert shares([file]) == {"gsm8k": ("exact_match,strict-match", 0.4)}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"results": {"drop": {"f1,none": 0.2}}}, "drop is measured here and in .*results_1.json"),
        (
            {"results": {"gsm8k": {"flexible": 0.2}}},
            "gsm8k has no exact_match,strict-match",
        ),
        ({"results": {}, "model_name": "b"}, "results_2.json: results of b, expected those of a"),
        ({"results": {}, "config_general": {"model_name": "c"}}, "results of c, expected"),
        ({"result": 3}, 'no table "results"'),
        ([], "expected a JSON object, found list"),
    ],
)
def test_wrong_results_are_named(second, message, tmp_path):
    results_file(tmp_path / "results_1.json", {"drop": {"f1,none": 0.1}}, model_name="a")
    (tmp_path / "results_2.json").write_text(json.dumps(second))
    with pytest.raises(UserError, match=message):
        shares(result_files(tmp_path))


def test_results_cut_off_or_absent(tmp_path):
    with pytest.raises(UserError, match="found no file results"):
        result_files(tmp_path)
    with pytest.raises(UserError, match="found no file results"):
        result_files(tmp_path / "x")
    file = tmp_path / "results_1.json"
    file.write_text('{"results": {"drop": {"f1,no')
    with pytest.raises(UserError, match="results_1.json: not valid JSON"):
        shares([file])
