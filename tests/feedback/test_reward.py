"""Scores of a reward model against transformers' class, one conversation at a time."""

import json
import os
import shutil

import pytest
import torch
import transformers

from notus.data.tokenizer import load_tokenizer
from notus.feedback import reward
from notus.feedback.record import Record, Score
from notus.feedback.reward import main
from ranks import call

ROWS = [
    {
        "prompt": f"Question {n}" + " and more" * n + "?",
        "responses": ["word " * k + str(k) for k in range(n)],
    }
    for n in (2, 3, 5, 8)
]
TURNS = [("system", "Be brief."), ("user", "Who?"), ("assistant", "She."), ("user", "Again?")]
TURNS = [{"role": role, "content": content} for role, content in TURNS]
ROWS.append({"prompt": TURNS, "responses": ["same", "other", "same"], "id": 4})
KINDS = {
    "mistral": (transformers.MistralConfig, transformers.MistralForSequenceClassification),
    "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
}


def make(kind, demo, folder, pad=2, labels=1):
    """A random reward model with the demo's tokenizer, whose template ends a turn with </s>."""
    shutil.copytree(demo / "sft", folder, ignore=shutil.ignore_patterns("*.safetensors", "*ion*"))
    settings, model = KINDS[kind]
    config = settings(
        vocab_size=len(load_tokenizer(demo / "sft")),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=pad,
        num_labels=labels,
        **({"sliding_window": 16} if kind == "mistral" else {}),
    )
    torch.manual_seed(3)
    model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def responses(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def score(responses, model, out="scored"):
    folder = responses.parent / out
    code = main([str(responses), "--model", str(model), "--out", str(folder)])
    if not folder.exists():
        return code, None
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "ratings"} for row in rows] == ROWS
    return code, [row["ratings"] for row in rows]


@pytest.mark.parametrize(("kind", "pad"), [("mistral", 2), ("llama", None), ("llama", 0)])
def test_scores_are_transformers_one_by_one(demo, tmp_path, responses, kind, pad):
    """Ragged prompts, 2 to 8 responses; where </s> is padding, transformers skips it at the end."""
    folder = make(kind, demo, tmp_path / "reward", pad)
    code, ratings = score(responses, folder)
    assert code == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    tokenizer = load_tokenizer(folder)
    seen = []
    for row, own in zip(ROWS, ratings, strict=True):
        for response, rating in zip(row["responses"], own, strict=True):
            single = [{"role": "user", "content": row["prompt"]}]
            messages = row["prompt"] if isinstance(row["prompt"], list) else single
            messages = [*messages, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = theirs(ids).logits.item()
            assert rating == pytest.approx(expected, abs=1e-5)
            seen.append(expected)
    assert len(seen) == 21 and max(seen) - min(seen) > 0.1


def score_on_rank(file, model, out):
    return main([str(file), "--model", str(model), "--out", str(out)])


def test_neither_other_responses_nor_ranks_change_a_bit(demo, tmp_path, responses):
    folder = make("mistral", demo, tmp_path / "reward")
    _, ratings = score(responses, folder)
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(ROWS[3] | {"responses": ROWS[3]["responses"][6:4:-1]}) + "\n")
    assert main([str(few), "--model", str(folder), "--out", str(tmp_path / "few")]) == 0
    (row,) = map(json.loads, (tmp_path / "few/train.jsonl").read_text().splitlines())
    assert row["ratings"] == ratings[3][6:4:-1]
    log = tmp_path / "ranks.log"
    code, told = call(score_on_rank, responses, folder, tmp_path / "ranks", log=log, ranks=2)
    assert code == 0 and told.count("wrote") == 1
    one, two = (tmp_path / name / "train.jsonl" for name in ("scored", "ranks"))
    assert one.read_bytes() == two.read_bytes()


def score_and_die(file, model, out):
    """The command, which ends without any cleaning up when its rank has kept three scores."""
    added = []

    def add(self, answer):
        added.append(answer)
        if len(added) == 4:
            os._exit(9)
        keep(self, answer)

    keep, Record.add = Record.add, add
    return score_on_rank(file, model, out)


def test_a_killed_run_resumes_and_equals_an_undisturbed_one(demo, tmp_path, responses, monkeypatch):
    """Two ranks die after a few scores each, both within a line; one rank does the rest."""
    folder, log = make("mistral", demo, tmp_path / "reward"), tmp_path / "ranks.log"
    score(responses, folder)
    code, _ = call(score_and_die, responses, folder, tmp_path / "killed", log=log, ranks=2)
    assert code == 9 and not (tmp_path / "killed").exists()
    files = sorted((tmp_path / "killed.partial").glob("*answers.jsonl"))
    kept = [line for file in files for line in file.read_text().splitlines()]
    assert [file.name for file in files] == ["1-answers.jsonl", "answers.jsonl"] and len(kept) == 6
    for file in files:
        file.write_text(file.read_text()[:-3])
    computed = []
    monkeypatch.setattr(reward.Scorer, "__call__", counting(reward.Scorer.__call__, computed))
    assert score(responses, folder, "killed")[0] == 0
    assert len(computed) == 20 - 4 and not (tmp_path / "killed.partial").exists()
    for file in (tmp_path / "scored").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def counting(function, calls):
    def counted(self, *given):
        calls.append(given)
        return function(self, *given)

    return counted


def test_another_model_does_not_resume_the_record(demo, tmp_path, responses, capsys):
    folder = make("mistral", demo, tmp_path / "reward")
    record = Record(tmp_path / "scored.partial", {"dtype": "float32"}, Score)
    record.add(Score(0, 0, 1.0))
    record.close()
    assert score(responses, folder) == (2, None)
    error = capsys.readouterr().err
    assert 'scored.partial: was started with judge null, now it is "reward model"' in error


def edit(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def test_models_that_are_refused(demo, tmp_path, responses, capsys):
    two = make("mistral", demo, tmp_path / "two", labels=2)
    code = make("mistral", demo, tmp_path / "code")
    wide = edit(make("llama", demo, tmp_path / "wide"), hidden_act="gelu")
    refused = {
        two: f"{two}: found 2 labels (score.weight), expected a model with one label",
        edit(code, auto_map={"AutoModel": "x.Y"}): "the model brings code of its own (auto_map)",
        demo / "sft": "architecture is MistralForCausalLM, expected MistralForSequenceClass",
        wide: f"{wide}/config.json: hidden_act is 'gelu', expected 'silu'",
    }
    two_pads = edit(make("llama", demo, tmp_path / "pads"), pad_token_id=[1, 2])
    refused[two_pads] = "pads/config.json: pad_token_id: found [1, 2], expected an integer or null"
    for named in ({"a": 1}, [["a"]], 5):
        (tmp_path / f"{len(refused)}").mkdir()
        (tmp_path / f"{len(refused)}/config.json").write_text(json.dumps({"architectures": named}))
        refused[tmp_path / f"{len(refused)}"] = "expected MistralForSequenceClassification or Llama"
    before = set(os.listdir(tmp_path))
    capsys.readouterr()  # transformers' progress of saving
    for folder, message in refused.items():
        assert score(responses, folder) == (2, None)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert set(os.listdir(tmp_path)) == before
