"""Prompts, marks, and the text shown at the end of a run."""

import json

import pytest
import torch
import transformers

from notus.data.tokenization import load_tokenizer
from notus.errors import UserError
from notus.report.samples import (
    Prompt,
    before_and_after,
    check_prompts,
    held_out_rows,
    read_prompts,
    share_right,
    side_by_side,
    write_responses,
)


def test_prompts_are_text_or_messages(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Why?"}]
    file.write_text(json.dumps({"prompt": messages, "answer": "So"}) + '\n{"prompt": "Once"}\n')
    prompts = read_prompts(str(file))
    assert prompts == [Prompt(messages, "So"), Prompt("Once", None)]
    assert [prompt.text for prompt in prompts] == ["Why?", "Once"]


@pytest.mark.parametrize("row", [{"prompt": 3}, {"prompt": ""}, {}, {"prompt": "a", "answer": 1}])
def test_a_wrong_prompt_is_named(row, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match="prompts.jsonl:1: (prompt|answer) is"):
        read_prompts(str(file))


def test_share_right_counts_prompts_that_have_an_answer():
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", None)]
    assert share_right(prompts, [" 1\n", "2 or 3", "?"]) == 0.5
    assert share_right(prompts[2:], ["?"]) is None


def test_side_by_side_shows_what_differs():
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", None)]
    text = side_by_side(prompts, ["1", "2", "x\ny"], ["1", "3", "z"], 5)
    assert text.splitlines() == [
        "2 of 3 prompts are answered differently; the first:",
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
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 10}]))
    rows = held_out_rows(file)
    assert [row[1:] for row in rows] == [(0.0, 9.0)] * 5
    assert before_and_after(rows).splitlines()[1].split() == ["eval_loss", "0.0000", "9.0000"]
    file.write_text('{"step": 1}\n')
    assert held_out_rows(file) == []


def test_greedy_responses_are_those_of_one_prompt_at_a_time(demo):
    check_prompts(str(demo / "prompts.jsonl"), demo / "sft")
    prompts = read_prompts(str(demo / "prompts.jsonl"))[:5]
    responses = write_responses(
        demo / "sft",
        prompts,
        max_new_tokens=6,
        temperature=0,
        seed=0,
        system_prompt=None,
        device=torch.device("cpu"),
    )
    tokenizer = load_tokenizer(demo / "sft")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft")
    for prompt, response in zip(prompts, responses, strict=True):
        text = tokenizer.apply_chat_template(
            prompt.prompt, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert response == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
