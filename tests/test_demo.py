import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus import demo
from notus.config import load_config
from notus.errors import UserError
from notus.generate.samples import is_right

SMALL = {"rows": 48, "sft_passes": 1, "hidden_size": 16, "vocabulary": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    demo.write_demo(path, **SMALL)
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_rating(completion: dict) -> float:
    ratings = [int(a["Rating"]) for a in completion["annotations"].values()]
    return sum(ratings) / len(ratings)


def test_rows_have_the_raw_ultrafeedback_schema(folder: Path) -> None:
    rows = read_jsonl(folder / "preferences.jsonl")
    assert len(rows) == 48
    for row in rows:
        assert set(row) == {
            "source",
            "instruction",
            "models",
            "completions",
            "correct_answers",
            "incorrect_answers",
        }
        assert row["models"] == [c["model"] for c in row["completions"]]
        assert len({c["response"] for c in row["completions"]}) == 4
        for completion in row["completions"]:
            assert set(completion["annotations"]) == {
                "instruction_following",
                "honesty",
                "truthfulness",
                "helpfulness",
            }
            assert completion["fine-grained_score"] == mean_rating(completion)
            assert isinstance(completion["overall_score"], float)
            for annotation in completion["annotations"].values():
                assert annotation["Rating"] in {"1", "2", "3", "4", "5"}
                assert isinstance(annotation["Rationale"], str)


def test_the_best_rated_completion_is_the_only_right_one() -> None:
    data = demo.make_data()
    for prompt, row in zip(data["prompts.jsonl"], data["heldout.jsonl"], strict=True):
        assert prompt["prompt"] == [{"role": "user", "content": row["instruction"]}]
        ranked = sorted(row["completions"], key=mean_rating)
        right = [is_right(c["response"], prompt["answer"]) for c in ranked]
        assert right == [False, False, False, True]
        assert mean_rating(ranked[-2]) < mean_rating(ranked[-1])


def test_the_demo_has_no_partial_step() -> None:
    data = demo.make_data(sft_passes=20)
    for name, rows in (("demo", "preferences.jsonl"), ("demo-sft", "sft.jsonl")):
        config = load_config(demo.ROOT / f"configs/{name}.json")
        assert len(data[rows]) % config.train.pairs_per_step == 0


def test_some_bad_completions_have_a_planted_score_of_ten() -> None:
    rows = demo.make_data()["preferences.jsonl"]
    tens = [c for row in rows for c in row["completions"] if c["overall_score"] == 10]
    assert 0.05 < len(tens) / len(rows) < 0.12
    assert all(mean_rating(completion) <= 2 for completion in tens)


def test_answers_agree_with_the_questions() -> None:
    questions = {q.instruction: q for q in demo.all_questions(random.Random(demo.SEED))}
    assert questions["What is 7 plus 8?"].answer == "15"
    assert questions["Which letter comes after g?"].answer == "h"
    assert questions["What are the letters of cat?"].answer == "c-a-t"
    assert all(q.wrong and q.answer not in q.wrong for q in questions.values())


def test_data_is_deterministic_and_held_out() -> None:
    data = demo.make_data(rows=100, sft_passes=3)
    assert data == demo.make_data(rows=100, sft_passes=3)
    trained = {row["instruction"] for row in data["preferences.jsonl"]}
    assert len(trained) == 100 and len(data["sft.jsonl"]) == 300
    trained |= {row["messages"][0]["content"] for row in data["sft.jsonl"]}
    assert len(trained) == 100
    assert trained.isdisjoint(row["instruction"] for row in data["heldout.jsonl"])


def test_policy_examples_are_right_first_and_then_mixed() -> None:
    answers = {q.instruction: q.answer for q in demo.all_questions(random.Random(demo.SEED))}
    sft = demo.make_data(rows=500, sft_passes=20)["sft.jsonl"]
    turns = [[message["content"] for message in row["messages"]] for row in sft]
    right = [is_right(text, answers[instruction]) for instruction, text in turns]
    assert len(right) == 10_000 and all(right[:7500])
    # the binomial's standard deviation over 2,500 draws is 0.01
    assert sum(right[7500:]) / 2500 == pytest.approx(demo.SFT_SHARES["right"], abs=0.03)


@pytest.mark.parametrize(
    ("generated", "right"), [("15", True), (" 15\n", True), ("15.", False), ("115", False)]
)
def test_is_right_wants_the_answer_and_nothing_else(generated: str, right: bool) -> None:
    assert is_right(generated, "15") is right


def test_chat_template_renders_like_zephyr(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n"
    opened = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert opened == "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"


def test_tokenizer_restores_every_text() -> None:
    rows = demo.make_data(rows=200)["preferences.jsonl"]
    texts = [row["instruction"] for row in rows]
    tokenizer = demo.train_tokenizer(texts, 500)
    unseen = ["Zoë  has 1234 pets.", " two\nlines ", "日本", *demo.RAMBLING]
    for text in texts + unseen:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 500
    assert tokenizer.tokenize("Spell<|user|>15") == ["Spell", "<|user|>", "1", "5"]


def test_tokenizer_as_loaded_by_transformers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    text = "<|user|>\nWhat is 7 plus 8?</s>\n<|assistant|>\n15</s>\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert pieces[0] == "<|user|>" and pieces[-2] == "</s>"
    assert pieces[-4:-2] == ["1", "5"]
    assert tokenizer.decode(encoded["input_ids"]) == text


def test_policy_loads_in_transformers_and_was_trained(folder: Path) -> None:
    initial, model = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto")
        for name in ("init", "sft")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    assert model.config.model_type == "mistral"
    assert model.config.vocab_size == len(tokenizer)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == demo.FILES
    assert (initial.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    # two steps at rates up to 1.5e-3, which bfloat16 does not show on norms: they are near 1
    for name, value in model.named_parameters():
        if "norm" not in name:
            moved = (value - initial.get_parameter(name)).abs()
            assert 0 < moved.mean() < 4e-3, name


def test_the_policy_is_trained_as_the_configuration_says(folder: Path) -> None:
    config = load_config(demo.ROOT / "configs/demo-sft.json")
    assert config.train.objective == "sft" and not config.data.shuffle
    paths = (config.model.policy, config.data.train[0].path, config.data.eval[0].path)
    assert paths == ("demo/init", "demo/sft.jsonl", "demo/heldout.jsonl")
    assert len(read_jsonl(folder / "sft.jsonl")) == 48


def test_default_policy_has_about_a_million_parameters() -> None:
    texts = [row["instruction"] for row in demo.make_data()["preferences.jsonl"]]
    tokenizer = demo.train_tokenizer(texts, 600)
    model = demo.random_policy(tokenizer, hidden_size=128)
    assert 0.8e6 < model.num_parameters() < 1.2e6


def test_without_steps_the_policy_is_the_initial_model(tmp_path: Path) -> None:
    demo.write_demo(tmp_path, **SMALL | {"sft_passes": 0})
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")} == demo.FILES
    for name in demo.MODEL_FILES:
        assert (tmp_path / "sft" / name).read_bytes() == (tmp_path / "init" / name).read_bytes()


def test_a_training_that_fails_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (folder / name).read_bytes() for name in demo.FILES}
    (tmp_path / "train.py").write_text("import sys; sys.exit(2)")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    for place in (folder, tmp_path / "demo"):
        with pytest.raises(UserError, match="ended with 2"):
            demo.write_demo(place, **SMALL)
    assert not (tmp_path / "demo").exists()  # rather none than one that looks trained
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.*")}
    assert before == {name: path.read_bytes() for name, path in found.items()}


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and tokenizers have exceptions of their own for a full disk."""

    def full(model: object, folder: Path) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(demo.MistralForCausalLM, "save_pretrained", full)
    monkeypatch.setattr(demo, "make_data", lambda *given, make=demo.make_data: make(30, 0))
    for name, message in (
        ("file/demo", "file/demo: cannot be written (Not a directory)"),
        ("link", "link is a file; the demo is written into a folder"),
        ("new", "/init: No space left on device (os error 28))"),
    ):
        assert demo.main(["--out", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_demo_is_written_over_with_the_same_bytes(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in demo.FILES}
    demo.write_demo(folder, **SMALL)
    assert before == {name: (folder / name).read_bytes() for name in demo.FILES}


def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt"):
        demo.write_demo(tmp_path, **SMALL)
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        demo.write_demo(tmp_path / "thesis.txt", **SMALL)
