"""The command line of eval.py."""

import json

import pytest
from lines import write_lines

import eval as command_line
from notus.engine.history import START_KEYS
from notus.evals.published import DPO_RUNS, METRICS

ANNOTATIONS = [
    {
        "instruction": f"Question {i}",
        "generator_1": "text_davinci_003",
        "generator_2": "mine",
        "output_2": "yes",
        "preference": preference,
    }
    for i, preference in enumerate((2.0, 2.0, 1.0, 1.5, None))
]


def run(capsys, *arguments):
    code = command_line.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["scor"], ["score", "alpaca"], ["compare", "a", "--to"]])
def test_an_unknown_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_every_command_has_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # argparse breaks lines by it
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for command in ("preferences", "generate", "samples", "score", "harness", "compare"):
        assert f"\n    {command}" in listed
        with pytest.raises(SystemExit):
            command_line.main([command, "--help"])
        assert f" {command} " in capsys.readouterr().out


def test_a_users_mistake_is_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    code, out, err = run(capsys, "score", "mt_bench", tmp_path / "no.jsonl")
    assert (code, out, err) == (2, "", f"error: {tmp_path / 'no.jsonl'}: no such file or folder\n")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "score", "mt_bench", tmp_path / "no.jsonl") == (2, "", "")


def test_score_shows_the_row_next_to_the_published_ones(tmp_path, capsys):
    file, kept = tmp_path / "annotations.json", tmp_path / "row.json"
    file.write_text(json.dumps(ANNOTATIONS))
    code, out, _ = run(capsys, "score", "alpaca_eval", file, "--json", kept)
    header, mine, notus, zephyr, *notes = out.splitlines()
    assert code == 0
    assert mine.split()[:6] == ["mine", "62.50", "23.94", "2", "1", "1"]
    assert notus.split()[:4] == ["notus-7b-v1", "(published)", "91.42", "0.99"]
    assert zephyr.split()[:4] == ["zephyr-7b-beta", "(published)", "90.60", "1.03"]
    assert notes[1] == "mine: 4 of 5 rows hold a preference."
    assert "5 rows, AlpacaEval has 805 prompts" in notes[2]
    assert json.loads(kept.read_text())["measured"][0]["win_rate"] == 62.5

    before = kept.read_bytes()
    code, out, err = run(capsys, "score", "alpaca_eval", file, "--json", kept)
    assert (code, out) == (2, "") and "row.json: exists already and is not overwritten" in err
    assert kept.read_bytes() == before
    new = tmp_path / "a" / "b.json"
    code, *_ = run(capsys, "score", "alpaca_eval", file, "--json", new)
    assert code == 0 and new.read_bytes() == before


def test_the_second_alpaca_eval_has_other_published_rows(tmp_path, capsys):
    file = tmp_path / "annotations.json"
    for baseline, published in [
        ("gpt4_1106_preview", "zephyr-7b-beta (published) 10.99 0.96 78 725 2 805 1444 13.20"),
        ("another", "No published row was compared with another."),
    ]:
        rows = [row | {"generator_1": baseline} for row in ANNOTATIONS]
        file.write_text(json.dumps(rows))
        code, out, _ = run(capsys, "score", "alpaca_eval", file)
        assert code == 0 and published in " ".join(out.split())
        assert "notus-7b-v1" not in out


def test_score_lm_eval_keeps_what_is_no_leaderboards_task(tmp_path, capsys):
    results = {
        "gsm8k": {"exact_match,strict-match": 0.395, "exact_match_stderr,strict-match": 0.013},
        "my_task": {"acc,none": 0.25, "acc_stderr,none": 0.125, "alias": "my_task"},
    }
    rest = {"n-shot": {"gsm8k": 8, "my_task": 1}, "config": {"limit": 10}}
    (tmp_path / "results.json").write_text(json.dumps({"results": results} | rest))
    kept = tmp_path / "kept"
    code, out, _ = run(capsys, "score", "lm_eval", tmp_path, "--json", kept)
    assert code == 0
    assert out.splitlines()[1].split() == [
        *("this", "model", "these", "results", "-", "-", "-", "-", "-", "39.50", "-", "-", "-")
    ]
    assert "my_task  acc,none  0.2500  0.1250      1" in out
    assert "gsm8k was measured with 8 examples, the published with 5: not comparable." in out
    assert "gsm8k was measured on a part (limit 10): not comparable." in out
    content = json.loads(kept.read_text())
    assert content["measured"]["tasks"]["gsm8k"]["standard_error"] == 0.013
    assert [round(row["average"], 2) for row in content["published"]] == [52.89, 54.09, 52.15]


def test_compare_says_what_differs_and_by_how_much(tmp_path, capsys):
    published = DPO_RUNS["notus-7b-v1"]
    rows = [
        {
            "step": step,
            **{name: metrics[metric] for metric, name in METRICS.items()},
            "eval_rewards/accuracies": accuracy,
        }
        for step, metrics, accuracy in [
            (100, published.step_100, 0.7183),
            (2889, published.end, 0.74),
        ]
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    config = {"data": {"eval": {"holdout": 2000}}, "loss": {"name": "sigmoid", "beta": 0.01}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = tmp_path / "kept.json"
    code, out, _ = run(capsys, "compare", tmp_path, "--to", "notus-7b-v1", "--json", kept)
    assert code == 0
    assert "1 of 6 differ (in standard errors): accuracy at end (-2.3)." in out
    assert "The run has not ended: step 2889 is taken as its end." in out
    assert "loss.beta is 0.01, in the published run 0.1." in out
    differences = json.loads(kept.read_text())["differences"]
    lower = [row for row in differences if row["verdict"] == "lower"]
    assert [(row["at"], row["metric"], row["pairs"]) for row in lower] == [
        ("end", "accuracy", 2000)
    ]
    assert lower[0]["in_standard_errors"] == pytest.approx(-2.31, abs=0.005)

    (tmp_path / "config.json").write_text("{}")
    assert "give --pairs" in run(capsys, "compare", tmp_path)[1]
    start = dict.fromkeys(START_KEYS) | {"event": "start", "time": "2026-01-01T00:00:00+00:00"}
    start["data"] = {"eval": {"pairs": 900}}
    (tmp_path / "history.jsonl").write_text(json.dumps(start) + "\n")
    assert "means over 900 pairs" in run(capsys, "compare", tmp_path)[1]
    code, out, _ = run(capsys, "compare", tmp_path, "--pairs", "1000")
    assert code == 0 and "(-2.2)" in out and "give --pairs" not in out
    code, _, err = run(capsys, "compare", tmp_path / "no")
    assert code == 2 and "expected the output_dir of a run" in err
