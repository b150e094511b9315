"""What the models answer, how it is marked, and how it is shown."""

import json

import pytest
import sample_ranks
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter

import eval as command
from notus.data.tokenization import load_tokenizer
from notus.errors import UserError
from notus.generate import samples
from notus.generate.prompts import Prompt, read_prompts
from notus.generate.samples import (
    before_and_after,
    held_out_rows,
    record_samples,
    samples_markdown,
    share_right,
    side_by_side,
    write_responses,
    write_samples,
)
from notus.model.mistral import MistralForCausalLM, read_shape
from notus.model.weights import load_weights
from ranks import call

CPU = torch.device("cpu")
NEW = 6


def test_prompts_are_text_or_messages(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Why?"}]
    file.write_text(json.dumps({"prompt": messages, "answer": "So"}) + '\n{"prompt": "Once"}\n')
    prompts = read_prompts(str(file))
    assert [prompt[:2] for prompt in prompts] == [(messages, "So"), ("Once", None)]
    assert [prompt.text for prompt in prompts] == ["Why?", "Once"]


@pytest.mark.parametrize("row", [{"prompt": 3}, {"prompt": ""}, {"prompt": "a", "answer": 1}])
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


def model_of(folder):
    model = MistralForCausalLM(read_shape(folder))
    load_weights(model, folder)
    return model


def alone(folder, prompts, **sampling):
    """transformers' responses to one prompt at a time, the seed set anew for each."""
    tokenizer = load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    responses = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt.prompt, str):
            ids = tokenizer(prompt.prompt)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(
                prompt.prompt, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        torch.manual_seed(7 + number)
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, top_k=0, **sampling)
        responses.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return responses


@pytest.fixture
def asked(demo):
    return [*read_prompts(str(demo / "prompts.jsonl"))[:4], Prompt("Once " * 30), Prompt("A")]


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("slots", [64, samples.SLOTS])
def test_our_model_and_the_saved_one_answer_as_transformers_does(
    temperature, slots, other, asked, monkeypatch
):
    """The prompts side by side in one row, and in several rows."""
    monkeypatch.setattr(samples, "SLOTS", slots)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    expected = alone(other, asked, **sampling)
    settings = {
        "max_new_tokens": NEW,
        "temperature": temperature,
        "seed": 7,
        "system_prompt": None,
        "device": CPU,
    }
    assert write_samples(model_of(other), load_tokenizer(other), asked, **settings) == expected
    assert write_responses(other, asked, **settings) == expected


def test_an_answer_ends_at_the_end_of_sequence(other, asked):
    """One that every model gives: the row of the head for it is made the largest by far."""
    model, tokenizer = model_of(other), load_tokenizer(other)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    settings = {"temperature": 0, "seed": 0, "system_prompt": None, "device": CPU}
    first = write_samples(model, tokenizer, asked, max_new_tokens=3, **settings)
    assert len(calls) == 3 and all(first)
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    write_samples(model, tokenizer, asked, max_new_tokens=1, **settings)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 1e3 * torch.linalg.lstsq(
            hidden[0], torch.ones(len(asked), 1)
        ).solution.squeeze(1)
    del calls[:]
    assert write_samples(model, tokenizer, asked, max_new_tokens=9, **settings) == [""] * len(asked)
    assert len(calls) == 1


def test_no_prompts_no_responses(other):
    settings = {"temperature": 0, "seed": 0, "system_prompt": None, "device": CPU}
    model, tokenizer = model_of(other), load_tokenizer(other)
    assert write_samples(model, tokenizer, [], max_new_tokens=2, **settings) == []


@pytest.mark.slow
def test_a_sharded_model_answers_as_one(other, demo, tmp_path):
    """Two ranks, FSDP2; one of them has no prompt in the last case."""
    given = other, demo / "prompts.jsonl", tmp_path
    code, told = call(sample_ranks.main, *given, log=tmp_path / "log", ranks=2)
    assert code == 0, told
    prompts = read_prompts(str(demo / "prompts.jsonl"))
    for count in (5, 1):
        expected = alone(other, prompts[:count], do_sample=True, temperature=0.9)
        for rank in range(2):
            assert json.loads((tmp_path / f"{count}-{rank}.json").read_text()) == expected
    # The command, its prompts shared by both ranks.
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    one = tmp_path / "one.jsonl"
    given = ["generate", str(other), "--prompts", str(demo / "prompts.jsonl"), "--out", str(one)]
    assert command.main([*given, "--max-new-tokens", "4", "--name", "out"]) == 0
    assert rows == [json.loads(line) for line in one.read_text().splitlines()]


def test_markdown_shows_texts_as_they_are():
    prompts = [Prompt("a|b"), Prompt([{"role": "user", "content": "c"}], "d", ("e",))]
    columns = {"reference": [["*x*\n<b>"], ["1", "2"]], "policy": [[""], ["3", "$4"]]}
    assert samples_markdown(prompts, columns).splitlines() == [
        r"**1.** a\|b",
        "",
        "| reference | policy |",
        "|---|---|",
        r"| \*x\*<br>&lt;b&gt; |  |",
        "",
        "**2.** c",
        "",
        "The right answer: d",
        "",
        "| reference | policy |",
        "|---|---|",
        "| 1 | 3 |",
        "| *e* | |",
        "| 2 | &#36;4 |",
    ]


def test_a_resumed_run_writes_its_samples_over(tmp_path):
    board = SummaryWriter(str(tmp_path / "tensorboard"))
    for step, text in ((0, "a"), (10, "b"), (20, "## After 5 steps"), (10, "d")):
        record_samples(tmp_path, board, step, [Prompt("q")], ["r"], [text])
    board.close()
    table = "**1.** q\n\n| reference | policy |\n|---|---|\n| r | {} |\n"
    assert (tmp_path / "samples.md").read_text() == (
        f"## After 0 steps\n\n{table.format('a')}\n## After 10 steps\n\n{table.format('d')}"
    )
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"samples/text_summary" in events.read_bytes()


def test_the_command_shows_both_models(other, demo, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    given = ["samples", str(other), "--reference", str(demo / "sft"), "--prompts", str(prompts)]
    assert command.main([*given, "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"| reference: sft | policy: {other.name} |" in shown
    out = tmp_path / "samples.md"
    assert command.main([*given, "--max-new-tokens", "3", "--out", str(out)]) == 0
    assert out.read_text() == shown.removesuffix("\n")
    assert command.main([*given, "--out", str(out)]) == 2
    assert "the file exists" in capsys.readouterr().err


def test_models_of_other_vocabularies_are_refused(demo, tiny_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    smaller = tmp_path / "smaller"
    config = transformers.MistralConfig.from_pretrained(demo / "sft")
    config.vocab_size += 64
    transformers.MistralForCausalLM(config).save_pretrained(smaller)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (smaller / name).write_bytes((demo / "sft" / name).read_bytes())
    given = ["samples", str(demo / "sft"), "--prompts", str(prompts), "--reference"]
    assert command.main([*given, str(smaller)]) == 2
    assert "has a vocabulary of" in capsys.readouterr().err
    assert command.main([*given, str(tiny_folder)]) == 2
    assert "no tokenizer.json or tokenizer.model" in capsys.readouterr().err
