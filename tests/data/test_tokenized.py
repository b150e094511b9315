"""The cache of tokens; the heart, `tokenize_pairs`, is checked in test_tokenization.py."""

from dataclasses import replace

import datasets
import numpy as np
import pytest

from notus.data import tokenized
from notus.data.preferences import Pair
from notus.data.tokenization import load_tokenizer, tokenize_pairs
from notus.data.tokenized import read_tokens, tokenize_once, tokens_file, write_tokens
from notus.errors import UserError

SETTINGS = {
    "style": "clean",
    "truncation": "pair",
    "max_length": 40,
    "max_prompt_length": 20,
    "system_prompt": None,
}
PAIRS = [
    Pair(
        [{"role": "user", "content": "What is it? " * (1 + i % 7)}],
        [{"role": "assistant", "content": f"It is {i}."}],
        [{"role": "assistant", "content": f"It is {i + i % 4}."}],
        f"rows.jsonl:{i + 1}",
    )
    for i in range(41)
]
PAIRS[17] = replace(PAIRS[17], prompt="Plain", chosen=" text", rejected=" here</s>!")


@pytest.fixture(scope="module")
def tokenizer(demo):
    return load_tokenizer(demo / "sft")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, shares of few pairs, and nothing in the terminal."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenized, "PAIRS_PER_SHARE", 6)
    return tmp_path / "cache" / "notus-tokens"


def once(tokenizer, pairs=PAIRS, processes=1, file=None):
    file = file or tokens_file(pairs, tokenizer, SETTINGS)
    return tokenize_once(file, pairs, tokenizer, SETTINGS, processes=processes, progress=False)


def facts(result):
    """Everything in a Tokenized, comparable."""
    arrays = (*vars(result.pairs).values(), result.kept, result.whole_lengths)
    return [(array.dtype, array.tolist()) for array in arrays if isinstance(array, np.ndarray)] + [
        result.inputs,
        result.counts,
        result.examples,
    ]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_same(tokenizer, cache, processes):
    direct = tokenize_pairs(PAIRS, tokenizer, **SETTINGS)
    found = once(tokenizer, processes=processes)
    assert found.pairs.fingerprint() == direct.pairs.fingerprint()
    assert facts(found) == facts(direct)
    assert {"cut: prompt", "dropped: identical responses after truncation"} <= found.counts.keys()
    assert found.examples["dropped: identical responses after truncation"] == 0
    assert any(name.startswith("with special-token text") for name in found.counts)
    assert [file.name for file in cache.iterdir()] == [tokens_file(PAIRS, tokenizer, SETTINGS).name]


def test_a_second_start_reads_the_file(tokenizer, monkeypatch):
    first = once(tokenizer)
    monkeypatch.delattr(tokenized, "_tokenize_shares")
    second = once(tokenizer)
    assert facts(second) == facts(first)
    for array in (second.pairs.tokens, second.pairs.hidden, second.pairs.lengths, second.kept):
        assert not array.flags.owndata and not array.flags.writeable  # views of the mapped file


def test_the_name_depends_on_all_that_the_tokens_do(demo, tokenizer, monkeypatch):
    other = load_tokenizer(demo / "sft")
    other.chat_template += " "
    bigger = load_tokenizer(demo / "sft")
    bigger.add_tokens(["What is it"])
    changed = [*PAIRS[:-1], replace(PAIRS[-1], rejected=PAIRS[0].chosen)]
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in PAIRS]
    names = {
        tokens_file(PAIRS, tokenizer, SETTINGS),
        tokens_file(PAIRS, other, SETTINGS),
        tokens_file(PAIRS, bigger, SETTINGS),
        tokens_file(changed, tokenizer, SETTINGS),
        tokens_file(swapped, tokenizer, SETTINGS),
        tokens_file([replace(PAIRS[0], implied=True), *PAIRS[1:]], tokenizer, SETTINGS),
        tokens_file(PAIRS[:-1], tokenizer, SETTINGS),
        tokens_file(PAIRS[::-1], tokenizer, SETTINGS),
        *(tokens_file(PAIRS, tokenizer, SETTINGS | {key: "x"}) for key in SETTINGS),
    }
    assert len(names) == 8 + len(SETTINGS)
    monkeypatch.setattr(tokenized.inspect, "getsource", lambda module: "edited")
    names.add(tokens_file(PAIRS, tokenizer, SETTINGS))
    assert len(names) == 9 + len(SETTINGS)


def test_the_name_does_not_depend_on_the_place(demo, tokenizer):
    moved = [replace(pair, where="elsewhere") for pair in PAIRS]
    again = load_tokenizer(demo / "sft")
    assert tokens_file(moved, again, SETTINGS) == tokens_file(PAIRS, tokenizer, SETTINGS)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_again(tokenizer, damage):
    file = tokens_file(PAIRS, tokenizer, SETTINGS)
    first = once(tokenizer)
    whole = bytearray(file.read_bytes())
    place = bytes(whole).index(np.ascontiguousarray(first.pairs.tokens).tobytes())
    whole[place + 8] ^= 1
    kept = {"cut": whole[: len(whole) // 2], "flipped": whole, "empty": b""}[damage]
    file.unlink()
    file.write_bytes(kept)
    assert read_tokens(file) is None
    assert facts(once(tokenizer)) == facts(first)
    assert read_tokens(file) is not None


def test_no_pair_left(tokenizer, tmp_path):
    direct = tokenize_pairs(PAIRS[:1], tokenizer, **SETTINGS)
    assert len(direct.pairs) == 0
    write_tokens(tmp_path / "none.arrow", direct)
    assert facts(read_tokens(tmp_path / "none.arrow")) == facts(direct)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_pair_is_named_and_nothing_stays(tokenizer, cache, processes):
    rows = [*PAIRS, Pair("Ad", "d 9 and 4.", "4", "rows.jsonl:99")]
    with pytest.raises(UserError, match="rows.jsonl:99: the prompt is not a token prefix"):
        once(tokenizer, rows, processes)
    assert list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the tokens cannot be kept there .* HF_DATASETS_CACHE"):
        once(tokenizer, file=tmp_path / "file" / "tokens.arrow")
