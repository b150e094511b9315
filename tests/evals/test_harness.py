"""lm-evaluation-harness end to end on local task files, and what is refused before it starts."""

import importlib.util
import json
import sys

import pytest
import torch
import transformers
from lines import write_lines

import eval as command_line
from notus.errors import UserError
from notus.evals.harness import check_not_measured, task_names

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra eval is not installed"
)

DOCUMENTS = [
    {"question": "1 + 1 =", "choices": ["2", "11, or two ones"], "answer": 0},
    {"question": "2 + 1 =", "choices": ["2", "three, as is known"], "answer": 1},
    {"question": "2 + 2 =", "choices": ["4", "22"], "answer": 0},
    {"question": "The largest of 3, 7, 5 is", "choices": ["3", "7", "5"], "answer": 1},
    {"question": "2 + 4 =", "choices": ["6", "five"], "answer": 0},
    {"question": "2 + 5 =", "choices": ["nine", "7"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks_dir(tmp_path):
    """Task files: sums, and one that bears the name of a leaderboard's task."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "documents.jsonl"
    write_lines(data, DOCUMENTS)
    for name in ("sums", "winogrande"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "absent.yaml").write_text(TASK.format(name="absent", data=folder / "no.jsonl"))
    return folder


def best_choice(model, tokenizer, document):
    """The choice with the highest log-prob after the question, without BOS or template."""
    scores = []
    for choice in document["choices"]:
        prompt = tokenizer.encode(document["question"], add_special_tokens=False)
        whole = tokenizer.encode(f"{document['question']} {choice}", add_special_tokens=False)
        log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        rows = range(len(prompt) - 1, len(whole) - 1)
        scores.append(sum(log_probs[row, whole[row + 1]].item() for row in rows))
    return max(range(len(scores)), key=scores.__getitem__)


@needs_harness
def test_a_local_task_from_model_to_score(demo, tasks_dir, tmp_path, capsys):
    """The accuracy equals transformers' own; the leaderboard's task gets its five examples."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo / "sft")
    right = [best_choice(model, tokenizer, row) == row["answer"] for row in DOCUMENTS]

    out = tmp_path / "out"
    common = ["harness", str(demo / "sft"), "--tasks-dir", str(tasks_dir), "--out", str(out)]
    common += ["--dtype", "float32"]
    assert command_line.main([*common, "--tasks", "sums,winogrande"]) == 0
    shown = capsys.readouterr().out
    files = sorted(out.rglob("*.json"))
    found = [json.loads(file.read_text()) for file in files]
    assert [list(result["results"]) for result in found] == [["sums"], ["winogrande"]]
    assert [result["n-shot"] for result in found] == [{"sums": 0}, {"winogrande": 5}]
    assert found[0]["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(right))

    assert command_line.main(["score", "lm_eval", str(out)]) == 0
    again = capsys.readouterr().out
    assert again in shown and "arc_challenge was not measured" in again


@needs_harness
def test_a_task_without_its_data_is_named_before_any_is_run(demo, tasks_dir, tmp_path, capsys):
    given = ["harness", str(demo / "sft"), "--tasks-dir", str(tasks_dir), "--out", str(tmp_path)]
    assert command_line.main([*given, "--tasks", "sums,absent"]) == 2
    assert "absent: its data set cannot be loaded" in capsys.readouterr().err
    assert not list(tmp_path.rglob("results*"))


def test_task_names():
    openllm = "arc_challenge hellaswag mmlu truthfulqa_mc2 winogrande gsm8k drop"
    assert task_names("openllm", []) == openllm.split()
    assert task_names("a, b", ["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="no task 'hellasweg' .did you mean 'hellaswag'"):
        task_names("hellasweg", ["hellaswag", "drop"])


def test_measured_tasks_are_not_measured_over(tmp_path):
    output = tmp_path / "runs__a__final"
    check_not_measured(output, ["drop"])
    output.mkdir()
    (output / "results_1.json").write_text('{"results": {"drop": {"f1,none": 0.1}}}')
    check_not_measured(output, ["gsm8k"])
    with pytest.raises(UserError, match="drop: .*results_1.json holds its results"):
        check_not_measured(output, ["gsm8k", "drop"])


@pytest.mark.parametrize(
    "option", [("--limit", "0"), ("--batch-size", "many"), ("--batch-size", "0")]
)
def test_numbers_are_checked_at_once(option, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["harness", "no-such-model", *option])
    assert f"argument {option[0]}: " in capsys.readouterr().err


def test_without_the_harness_it_is_named(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    assert command_line.main(["harness", "no-such-model"]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err
