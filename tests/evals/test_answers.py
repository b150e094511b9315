"""The files that AlpacaEval and FastChat read, what is in them, and interrupted runs."""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from lines import read_lines, write_lines

import eval as command
from notus.data.tokenizer import load_tokenizer
from notus.evals import answers
from notus.evals.answers import batches, default_name
from notus.evals.benchmarks import temperature_of
from notus.generate.prompts import Prompt

NEW = 8
QUESTIONS = [
    {"question_id": 90, "category": "writing", "turns": ["Which is larger, 15 or 28?", "Again."]},
    {
        "question_id": 81,
        "category": "math",
        "turns": ["What is the first letter of table?", "Why?"],
    },
    {"question_id": 130, "category": "stem", "turns": ["x" * 70, "And?"]},
]
INSTRUCTIONS = [
    {"dataset": "koala", "instruction": f"What is {i} + {'1' * i}?", "output": "theirs"}
    for i in range(1, 6)
]


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def instructions(tmp_path):
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps(INSTRUCTIONS))
    return file


def generate(model, prompts, out, *more):
    sizes = ["--max-new-tokens", str(NEW), "--top-k", "7", "--dtype", "float32"]
    given = ["generate", str(model), "--prompts", str(prompts), "--out", str(out)]
    return command.main([*given, *sizes, *more])


def test_both_turns_are_those_of_fastchat_s_loop(other, questions, tmp_path):
    """Against the loop of gen_model_answer: one question at a time, the seed set once for it."""
    out = tmp_path / "model_answer" / "notus.jsonl"
    out.parent.mkdir()
    assert generate(other, questions, out, "--batch-size", "2") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    tokenizer = load_tokenizer(other)
    rows = read_lines(out)
    assert [row["question_id"] for row in rows] == [81, 90, 130]
    temperatures = {81: 0.0, 90: 0.7, 130: 0.1}
    for row in rows:
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "notus" and type(row["tstamp"]) is float
        asked = next(q for q in QUESTIONS if q["question_id"] == row["question_id"])
        torch.manual_seed(0)
        messages, turns = [], []
        for turn in asked["turns"]:
            messages.append({"role": "user", "content": turn})
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            sampling = {"do_sample": False}
            if temperature := temperatures[row["question_id"]]:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 7}
            output = model.generate(ids, max_new_tokens=NEW, **sampling)[0, ids.shape[1] :]
            turns.append(tokenizer.decode(output, skip_special_tokens=True).strip())
            messages.append({"role": "assistant", "content": turns[-1]})
        assert row["choices"] == [{"index": 0, "turns": turns}]


def test_alpaca_eval_s_file(other, instructions, tmp_path):
    out = tmp_path / "model_outputs.json"
    assert generate(other, instructions, out, "--name", "notus-7b-v1", "--seed", "3") == 0
    rows = json.loads(out.read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in INSTRUCTIONS]
    for row in rows:
        assert row.keys() == {"dataset", "instruction", "output", "generator"}
        assert row["generator"] == "notus-7b-v1" and row["output"] != "theirs"
    recorded = json.loads((tmp_path / "model_outputs.json.settings.json").read_text())
    assert recorded["seeds"] == [3, 4, 5, 6, 7]
    assert sorted(path.name for path in tmp_path.glob("model_outputs*")) == [
        "model_outputs.json",
        "model_outputs.json.settings.json",
    ]


def test_own_prompts_keep_their_rows_and_a_run_is_its_final_model(demo, tmp_path):
    shutil.copytree(demo / "sft", tmp_path / "my-run/final")
    (tmp_path / "my-run/metrics.jsonl").touch()
    file, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    file.write_text('{"prompt": "Once", "id": 7}\n')
    assert generate(tmp_path / "my-run", file, out, "--device", "cpu") == 0
    (row,) = read_lines(out)
    assert row | {"response": "?"} == {
        "prompt": "Once",
        "id": 7,
        "response": "?",
        "generator": "my-run",
    }


def test_an_interrupted_run_answers_only_the_other_prompts(
    other, instructions, tmp_path, monkeypatch
):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    more = ("--batch-size", "2", "--name", "n")
    assert generate(other, instructions, whole, *more) == 0
    asked = []
    real = answers.answer

    def interrupted(prompts, *arguments):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([prompt.row["instruction"] for prompt in prompts])
        return real(prompts, *arguments)

    monkeypatch.setattr(answers, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(other, instructions, out, *more)
    assert not out.exists()
    assert len(list((tmp_path / "out.json.partial").glob("batch-*.json"))) == 2

    def counted(prompts, *arguments):
        asked.append([prompt.row["instruction"] for prompt in prompts])
        return real(prompts, *arguments)

    monkeypatch.setattr(answers, "answer", counted)
    assert generate(other, instructions, out, *more) == 0
    assert sorted(sum(asked, [])) == sorted(row["instruction"] for row in INSTRUCTIONS)
    assert out.read_text() == whole.read_text()
    assert not (tmp_path / "out.json.partial").exists()


def test_other_settings_do_not_continue_a_run(
    other, demo, instructions, tmp_path, capsys, monkeypatch
):
    out, kept = tmp_path / "out.json", tmp_path / "out.json.partial/settings.json"
    settings = ("--name", "n")

    def killed(path, text, durable):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers, "write_whole", killed)
        generate(other, instructions, out, *settings)
    before = kept.read_bytes()
    for model, more, key in (
        (other, ("--seed", "1"), "seed"),
        (other, ("--temperature", "0"), "temperature"),
        (other, ("--system-prompt", ""), "system_prompt"),
        (demo / "sft", (), "model_sha256"),
    ):
        assert generate(model, instructions, out, *settings, *more) == 2
        assert f"out.json.partial: was started with {key}" in capsys.readouterr().err
    kept.write_text("{")
    assert generate(other, instructions, out, *settings) == 2
    assert "settings.json: not valid JSON" in capsys.readouterr().err
    kept.write_bytes(before)
    assert generate(other, instructions, out, *settings) == 0


@pytest.mark.parametrize(
    ("prompts", "out", "more", "words"),
    [
        ("questions", "out.json", (), "kind mt_bench, expected a .jsonl file"),
        ("questions", "questions.jsonl", (), "questions.jsonl: exists already and is not over"),
        ("questions", "a.jsonl", ("--name", "b"), "--name b: FastChat takes .* a; expected"),
        ("questions", "a.jsonl", ("--backend", "vllm"), "vllm is not installed"),
        ("questions", "a.jsonl", ("--tensor-parallel", "2"), "--tensor-parallel: does nothing"),
        (
            "questions",
            "a.jsonl",
            ("--prompt-format", "published", "--system-prompt", "x"),
            "--system-prompt: the published format has an empty system turn",
        ),
        ("nothing.jsonl", "a.jsonl", (), "nothing.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_message(
    prompts, out, more, words, demo, questions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    before = questions.read_bytes()
    prompts = questions if prompts == "questions" else tmp_path / prompts
    assert generate(demo / "sft", prompts, tmp_path / out, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error), error
    assert questions.read_bytes() == before


def test_batches_are_of_similar_lengths():
    assert batches([3, 9, 9, 1, 5], 2) == [[1, 2], [4, 0], [3]]


def test_temperatures_and_names():
    for category, temperature in (("roleplay", 0.7), ("humanities", 0.1), ("coding", 0.0)):
        prompt = Prompt([], row={"category": category})
        assert temperature_of(prompt, "mt_bench", None) == temperature
        assert temperature_of(prompt, "mt_bench", 1.0) == 1.0
    assert temperature_of(Prompt("a"), "alpaca_eval", None) == 0.7
    assert default_name("argilla/notus-7b-v1") == "notus-7b-v1"
    assert default_name("runs/mine/final") == "mine"


def test_fastchat_reads_the_answers(demo, questions, tmp_path):
    fastchat = pytest.importorskip("fastchat.llm_judge.common")
    folder = tmp_path / "model_answer"
    folder.mkdir()
    assert generate(demo / "sft", questions, folder / "notus.jsonl") == 0
    asked = fastchat.load_questions(str(questions), None, None)
    answers = fastchat.load_model_answers(str(folder))
    assert fastchat.get_model_list(str(folder)) == ["notus"]
    fastchat.check_data(asked, answers, {}, ["notus"], {})
    assert len(answers["notus"][81]["choices"][0]["turns"]) == 2


def test_alpaca_eval_reads_the_outputs(demo, instructions, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils")
    out = tmp_path / "model_outputs.json"
    assert generate(demo / "sft", instructions, out) == 0
    frame = utils.load_or_convert_to_dataframe(out)
    assert list(frame["instruction"]) == [row["instruction"] for row in INSTRUCTIONS]
    assert utils.get_generator_name(None, frame) == "sft"
    assert frame["output"].map(type).eq(str).all()


# ------------------------------------------------------------------------------ several samples


def test_samples_are_draws_of_generate_each_with_its_recorded_seed(other, demo, tmp_path):
    """Of a preference file with a repeated prompt: each sample against transformers' own draw."""
    lines = (demo / "preferences.jsonl").read_text().splitlines()[:3]
    file, out = tmp_path / "preferences.jsonl", tmp_path / "responses.jsonl"
    file.write_text("\n".join([*lines, lines[0]]))
    more = ("--samples", "3", "--temperature", "0.9", "--top-p", "0.95", "--seed", "5")
    assert generate(other, file, out, *more, "--batch-size", "4") == 0
    rows = read_lines(out)
    assert [row["prompt"] for row in rows] == [json.loads(line)["instruction"] for line in lines]
    assert rows[0].keys() == {"source", "prompt", "responses", "seeds", "generator"}
    assert {row["source"] for row in rows} == {"notus_demo"}
    assert len({seed for row in rows for seed in row["seeds"]}) == 9
    model = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    tokenizer = load_tokenizer(other)
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 7, "top_p": 0.95}
    for row in rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for seed, response in zip(row["seeds"], row["responses"], strict=True):
            torch.manual_seed(seed)
            output = model.generate(ids, max_new_tokens=NEW, **sampling)[0, ids.shape[1] :]
            assert response == tokenizer.decode(output, skip_special_tokens=True).strip()


def test_a_prompt_s_samples_do_not_depend_on_the_other_prompts(other, tmp_path):
    """Nor on their order, on the batch or on how many samples are drawn; other columns stay."""
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "id": i} for i in range(4)]
    files = {"all": (rows, "3", "32"), "few": (rows[:0:-2], "2", "3")}
    found = {}
    for name, (some, samples, size) in files.items():
        file, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-out.jsonl"
        write_lines(file, some)
        assert generate(other, file, out, "--samples", samples, "--batch-size", size) == 0
        found[name] = {row["id"]: row for row in read_lines(out)}
    for number, row in found["few"].items():
        whole = found["all"][number]
        assert row["responses"] == whole["responses"][:2] and row["seeds"] == whole["seeds"][:2]
        assert row["answer"] == str(2 * number)


def test_samples_that_would_all_be_the_same_are_refused(other, instructions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert generate(other, instructions, out, "--samples", "2", "--temperature", "0") == 2
    assert "--temperature 0: all 2 samples would be the same" in capsys.readouterr().err
