"""The end of a run, printed."""

import json

from lines import write_lines

from notus.generate.prompts import Prompt
from notus.generate.result import held_out_rows, side_by_side
from notus.tables import text_table


def test_side_by_side_shows_what_differs():
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", None)]
    text = side_by_side(prompts, ["1", "2", "x\ny"], ["1", "3", "z"], 5)
    assert text.splitlines() == [
        "2 of 3 prompts are answered differently",
        "",
        "prompt     b",
        "answer     2",
        "reference  3",
        "policy     2",
        "",
        "prompt     c",
        "reference  z",
        "policy     x / y",
    ]


def test_before_and_after_takes_first_and_last_evaluation(tmp_path):
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    lines = [{"step": step} | {f"eval_{name}": float(step) for name in names} for step in (0, 5, 9)]
    file = tmp_path / "metrics.jsonl"
    write_lines(file, [*lines, {"step": 10}])
    rows = held_out_rows(file)
    assert [row[1:] for row in rows] == [(0.0, 9.0)] * 5
    assert text_table(("", "before", "after"), rows, digits=4).splitlines()[1].split() == [
        "eval_loss",
        "0.0000",
        "9.0000",
    ]
    named = {"eval_far/loss": 0.5, "eval_far/rewards/margins": 2.0, "eval_far/rewards/chosen": 1.0}
    file.write_text(json.dumps(lines[0] | named) + "\n")
    assert held_out_rows(file)[5:] == [
        ("eval_far/loss", 0.5, 0.5),
        ("eval_far/rewards/margins", 2.0, 2.0),
    ]
    file.write_text('{"step": 1}\n')
    assert held_out_rows(file) == []
