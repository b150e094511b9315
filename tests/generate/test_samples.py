"""Answers of the models, their marks and the page that shows them."""

import json

import pytest
import sample_ranks
import torch
import transformers
from lines import read_lines
from torch.utils.tensorboard import SummaryWriter

import eval as command
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.errors import UserError
from notus.generate import samples
from notus.generate.answering import respond_all
from notus.generate.prompts import Prompt, read_prompt_set
from notus.generate.samples import record_samples, samples_markdown, share_right, write_samples
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights
from ranks import call

CPU = torch.device("cpu")
NEW = 6


@pytest.fixture(autouse=True, scope="module")
def group():
    """A process group of one rank."""
    distributed.start("cpu")
    yield
    distributed.stop()


def read_prompts(path):
    return read_prompt_set(str(path)).prompts


def test_prompts_are_text_or_messages(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Why?"}]
    file.write_text(json.dumps({"prompt": messages, "answer": "So"}) + '\n{"prompt": "Once"}\n')
    prompts = read_prompts(file)
    assert [prompt[:2] for prompt in prompts] == [(messages, "So"), ("Once", None)]
    assert [prompt.text for prompt in prompts] == ["Why?", "Once"]


@pytest.mark.parametrize("row", [{"prompt": 3}, {"prompt": ""}, {"prompt": "a", "answer": 1}])
def test_a_wrong_prompt_is_named(row, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match="prompts.jsonl:1: (prompt|answer): found"):
        read_prompts(file)


def test_share_right_counts_prompts_that_have_an_answer():
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", None)]
    assert share_right(prompts, [" 1\n", "2 or 3", "?"]) == 0.5
    assert share_right(prompts[2:], ["?"]) is None


def model_of(folder):
    model = MistralForCausalLM(read_shape(folder))
    load_weights(model, folder)
    return model


def alone(folder, prompts, **sampling):
    """transformers' responses to one prompt at a time, the seed set again for each."""
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
    return [*read_prompts(demo / "prompts.jsonl")[:4], Prompt("Once " * 30), Prompt("A")]


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
    saved = {"top_k": 0, "batch_size": 4, "dtype": "float32"}
    found = respond_all(other, asked, **settings, **saved)
    assert found == [[text.strip()] for text in expected]


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
    prompts = read_prompt_set(str(demo / "prompts.jsonl")).prompts
    for count in (5, 1):
        expected = alone(other, prompts[:count], do_sample=True, temperature=0.9)
        for rank in range(2):
            assert json.loads((tmp_path / f"{count}-{rank}.json").read_text()) == expected
    # The command, its prompts shared by both ranks.
    rows = read_lines(tmp_path / "out.jsonl")
    one = tmp_path / "one.jsonl"
    given = ["generate", str(other), "--prompts", str(demo / "prompts.jsonl"), "--out", str(one)]
    assert command.main([*given, "--max-new-tokens", "4", "--name", "out"]) == 0
    assert rows == read_lines(one)


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
