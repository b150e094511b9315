import json

import pytest
from hypothesis import given, settings
from odd_text import (
    BOS,
    ZEPHYR,
    by_sentencepiece,
    odd_texts,
    quick,
    sentencepiece_of,
    write_tokenizer,
)

from notus.data.tokenizer import load_tokenizer, sentencepiece_backend
from notus.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def zephyr(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def spm(folder):
    return sentencepiece_of(folder)


@settings(quick, max_examples=300)
@given(text=odd_texts)
def test_backend_equals_sentencepiece(zephyr, spm, text):
    assert zephyr(text, add_special_tokens=False)["input_ids"] == by_sentencepiece(spm, text)


@pytest.mark.parametrize(
    "text, pieces",
    [  # Mistral's tokenizer gives the same shapes: a lone ▁ where a text or segment begins
        ("</s>\n", ["</s>", "▁", "<0x0A>"]),
        ("\n", ["▁", "<0x0A>"]),
        ("a\nb", ["▁a", "<0x0A>", "b"]),
        ("🤗", ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"]),
        ("", []),
    ],
)
def test_backend_pieces(zephyr, text, pieces):
    ids = zephyr(text, add_special_tokens=False)["input_ids"]
    assert zephyr.convert_ids_to_tokens(ids) == pieces


def test_backend_puts_bos_before_plain_text(folder, spm):
    backend = sentencepiece_backend(folder / "tokenizer.model")
    assert backend.encode("Hello there").ids == [BOS, *spm.encode("Hello there")]


def test_tokenizer_json_is_taken_unchanged(zephyr, tmp_path):
    zephyr.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    loaded = load_tokenizer(tmp_path)
    assert (
        loaded("  two  spaces\n    four")["input_ids"]
        == zephyr("  two  spaces\n    four")["input_ids"]
    )
    assert loaded.chat_template == ZEPHYR


@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, None, "no tokenizer.json or tokenizer.model"),
        ("tokenizer.model", b"rubbish", "tokenizer.model: not a sentencepiece model"),
        ("tokenizer.json", b'{"model": ', "the tokenizer cannot be read"),
    ],
)
def test_unreadable_tokenizer(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": "\xff"}'),
        ("tokenizer_config.json", b'{"eos_token": 5}'),
        ("tokenizer_config.json", b'{"bos_token": ["<s>"]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 5}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("tokenizer_config.json", b'{"a": ' + b"1" * 5000 + b"}"),
        ("special_tokens_map.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_beside_the_tokenizer(folder, tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(
        (folder / "tokenizer_config.json").read_bytes()
    )
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [{}, {"eos_token": ""}, {"eos_token": None}])
def test_tokenizer_without_eos(folder, tmp_path, names):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokenizer_config.json: no eos_token"):
        load_tokenizer(tmp_path)


# Clean: rendered as one text, encoded once


def test_a_tokenizer_larger_than_the_model(folder):
    assert len(load_tokenizer(folder, 420)) == 420
    with pytest.raises(UserError, match="the tokenizer has 420 tokens, .* vocab_size is 419"):
        load_tokenizer(folder, 419)
