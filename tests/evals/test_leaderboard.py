"""Rows of the leaderboard from the harness's files, against the published numbers."""

import json

import pytest

from notus.errors import UserError
from notus.evals.leaderboard import averages, leaderboard_results, read_results, result_files
from notus.evals.published import LEADERBOARD


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
