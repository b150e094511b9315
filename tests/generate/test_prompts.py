"""Prompt files of three forms, and the text that the published answers were written to."""

import pytest
from lines import write_lines

from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError
from notus.generate import prompts
from notus.generate.prompts import Prompt, check_template, encode_published, read_prompt_set

QUESTION = {"question_id": 81, "category": "math", "turns": ["Why?", "And then?"]}
INSTRUCTION = {"dataset": "koala", "instruction": "Why?", "output": "davinci's", "generator": "d"}


def write(folder, *rows):
    return str(write_lines(folder / "prompts.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "kind", "follow_ups", "answer"),
    [
        (QUESTION, "mt_bench", ("And then?",), None),
        (INSTRUCTION, "alpaca_eval", (), None),
        ({"prompt": [{"role": "user", "content": "Why?"}], "answer": "So"}, "prompts", (), "So"),
    ],
)
def test_a_file_s_kind_follows_from_its_columns(row, kind, follow_ups, answer, tmp_path):
    found = read_prompt_set(write(tmp_path, row))
    conversation = [{"role": "user", "content": "Why?"}]
    assert found.kind == kind
    assert found.prompts == [Prompt(conversation, answer, follow_ups, row)]
    assert found.prompts[0].text == "Why?"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "tools": [{}]}], 'prompts.jsonl:1: "tools" is not read from prompts'),
        ([{"text": "a"}], "prompts.jsonl:1: the columns are text; expected prompt, or"),
        ([QUESTION, QUESTION], "prompts.jsonl:2: question_id 81 is also that of .*prompts.jsonl:1"),
        ([QUESTION | {"question_id": "81"}], 'question_id: found "81", expected an integer'),
        (
            [{"question_id": 1, "turns": ["a"]}],
            "prompts.jsonl:1: category: missing, expected a string",
        ),
        ([QUESTION | {"turns": ["a", ""]}], 'turns.1: found "", expected a non-empty string'),
        ([QUESTION, INSTRUCTION], "prompts.jsonl:2: question_id: missing"),
        ([INSTRUCTION, {"instruction": ""}], 'prompts.jsonl:2: instruction: found "", expected'),
    ],
)
def test_a_wrong_row_is_named(rows, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_prompt_set(write(tmp_path, *rows))


def test_without_a_network_the_message_names_the_file_to_give(monkeypatch):
    def offline(*arguments, **settings):
        raise OSError("no route to the hub")

    monkeypatch.setattr(prompts, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"alpaca_eval.json .* --prompts PATH/alpaca_eval.json"):
        read_prompt_set("alpaca_eval")
    with pytest.raises(UserError, match=r"no route .* --prompts PATH/question.jsonl"):
        read_prompt_set("mt_bench")


def test_a_benchmark_must_be_complete(monkeypatch, tmp_path):
    file = write(tmp_path, QUESTION)
    monkeypatch.setattr(prompts, "hf_hub_download", lambda *arguments, **settings: file)
    with pytest.raises(UserError, match="found 1 prompts of the kind mt_bench, expected .* 80"):
        read_prompt_set("mt_bench")


def test_conversations_want_a_chat_template(demo):
    conversations = read_prompt_set(str(demo / "prompts.jsonl")).prompts
    tokenizer = load_tokenizer(demo / "sft")
    check_template(conversations, "prompts.jsonl", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template; expected"):
        check_template(conversations, "prompts.jsonl", tokenizer)
    check_template([Prompt("text")], "prompts.jsonl", tokenizer)


def conversation(first_answer):
    """Messages, and the text that FastChat makes of them."""
    turns = [("user", "Why?"), ("assistant", first_answer), ("user", "And?")]
    answered = f"{first_answer}</s>\n" if first_answer else ""
    text = (
        "<|system|>\n</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n"
        f"{answered}<|user|>\nAnd?</s>\n<|assistant|>\n"
    )
    return [{"role": role, "content": content} for role, content in turns], text


@pytest.mark.parametrize("first_answer", ["So.", ""])
def test_published_text_has_an_empty_system_turn_and_a_bos(first_answer, demo):
    tokenizer = load_tokenizer(demo / "sft")
    messages, text = conversation(first_answer)
    for final_newline, shown in ((True, text), (False, text[:-1])):
        encoded = encode_published(messages, tokenizer, final_newline)
        assert encoded == [1, *tokenizer(shown, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("first_answer", ["So.", ""])
def test_published_text_is_that_of_fastchat(first_answer):
    theirs = pytest.importorskip("fastchat.conversation").get_conv_template("zephyr")
    messages, text = conversation(first_answer)
    for message in [*messages, {"role": "assistant", "content": None}]:
        theirs.append_message(f"<|{message['role']}|>", message["content"])
    assert theirs.get_prompt() == text
