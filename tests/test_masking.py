import json

import pytest

import train
from notus.masking import mask_text, mask_word, masked, masked_keys
from runs import base_config

HF = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HF, "***"),
        (f"Log in with {HF}, then answer.", "Log in with ***, then answer."),
        ("sk-proj-abc123DEF456_ghi789", "***"),
        ("ghp_" + "a1" * 18, "***"),
        ("https://me:pass@host/x.jsonl", "https://***@host/x.jsonl"),
        ("https://host/x?api_key=abc&page=1", "https://host/x?api_key=***&page=1"),
        # What only looks a little like one.
        ("hf_models/zephyr", None),
        ("data/task-oriented-dialogues-2024-cleaned", None),
        ("https://host:8080/a@b", None),
        ("s3://bucket/key.jsonl", None),
        ("The key: a token of respect.", None),
    ],
)
def test_secrets_in_text(text, expected):
    expected = text if expected is None else expected
    assert mask_text(text) == expected
    assert mask_text(expected) == expected


def test_secrets_by_their_key():
    settings = {
        "max_length": 4,
        "tokens_per_microbatch": 5,
        "max_new_tokens": "6",
        "key_length": "7",
        "monkey": "8",
        "password": "x",
        "API-Key": "x",
        "list": [{"hub_token": "x", "path": HF}, None, True],
        "client.secret": "",
    }
    hidden = {"password": "***", "API-Key": "***", "list": [{"hub_token": "***", "path": "***"}]}
    hidden["list"] += [None, True]
    assert masked(settings) == settings | hidden == masked(masked(settings))
    found = ["password", "API-Key", "list.0.hub_token", "list.0.path"]
    assert list(masked_keys(settings)) == found


def test_secrets_in_a_command():
    assert mask_word("loss.token=x") == "loss.token=***"
    assert mask_word(f"data.system_prompt=Use {HF}.") == "data.system_prompt=Use ***."
    assert mask_word("data.max_length=64") == "data.max_length=64"


def test_no_file_of_a_run_holds_a_secret(demo, tmp_path, monkeypatch, capfd, no_curves):
    """Neither the settings, the history, the checkpoints nor the card; and the run resumes."""
    monkeypatch.chdir(tmp_path)
    prompt = f"data.system_prompt=Log in with {HF}."
    config = base_config(demo) | {"train": {"max_steps": 1, "pairs_per_step": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["train.py", "config.json", prompt, "output_dir=out"])
    for end in ("wrote out/final", "nothing left to do"):
        assert train.main(["config.json", prompt, "output_dir=out"]) == 0
        printed = capfd.readouterr()
        assert end in printed.out
        warning = "data.system_prompt: looks like a secret, and is recorded as ***"
        assert printed.err.count(warning) == 1 and HF not in printed.err
    for path in filter(lambda path: path.is_file(), (tmp_path / "out").rglob("*")):
        assert HF.encode() not in path.read_bytes(), path
    for name in ("config.json", "history.jsonl", "final/README.md"):
        assert "Log in with ***." in (tmp_path / "out" / name).read_text(), name
    (state,) = (tmp_path / "out").glob("checkpoints/*/state.json")
    assert "Log in with ***." in state.read_text()
