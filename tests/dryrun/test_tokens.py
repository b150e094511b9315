import json
import re

import numpy as np
import pytest

import train
from notus.data.dataset import Dataset
from notus.data.formats import Pair
from notus.data.preferences import find_leaks
from notus.data.tokenization import AS_TEXT, Tokenized, TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer
from notus.dryrun.tokens import (
    length_table,
    pair_text,
    repeated_prompts,
    telling_pairs,
    token_report,
)


def tokens_of(*pairs):
    """Pairs of (prompt, chosen, rejected) token ids."""
    flat = [token for pair in pairs for part in pair for token in part]
    lengths = [[len(part) for part in pair] for pair in pairs]
    return TokenizedPairs(
        np.array(flat, np.int32), np.zeros(len(flat), bool), np.array(lengths, np.int64)
    )


def cut(whole, kept):
    """A Tokenized of pairs of these lengths, before and after truncation."""
    pairs = tokens_of(*[[[7] * length for length in lengths] for lengths in kept])
    count = len(kept)
    return Tokenized(pairs, np.arange(count), count, np.array(whole, np.int64), {}, {})


def text(prompt, chosen="a", rejected="b", where="rows:1", scores=(None, None)):
    return Pair(prompt, chosen, rejected, where, *scores)


def chat(question, chosen, rejected, where="rows:1"):
    def turn(role, content):
        return [{"role": role, "content": content}]

    return Pair(
        turn("user", question), turn("assistant", chosen), turn("assistant", rejected), where
    )


@pytest.fixture(scope="module")
def tokenizer(demo):
    return load_tokenizer(demo / "sft")


def tokenize(tokenizer, *rows, **options):
    settings = {"style": "clean", "truncation": "pair", "max_length": 999, "system_prompt": None}
    return tokenize_pairs(rows, tokenizer, **settings | {"max_prompt_length": 500} | options)


# Counting, against numbers worked out by hand


def test_lengths():
    """Percentiles by nearest rank: of four values the second, and the fourth."""
    tokenized = cut(
        whole=[(10, 5, 7), (20, 4, 1), (6, 9, 9), (30, 2, 3)],
        kept=[(10, 5, 7), (12, 4, 1), (6, 8, 6), (12, 2, 2)],
    )
    heads = ["tokens before truncation", "50%", "90%", "99%", "longest", "pairs cut", "tokens lost"]
    assert [
        re.split("  +", line.strip()) for line in length_table(tokenized, "pairs").splitlines()
    ] == [
        heads,
        ["prompt", "10", "30", "30", "30", "2 (50.0%)", "26 (39.4%)"],
        ["chosen", "4", "9", "9", "9", "1 (25.0%)", "1 (5.0%)"],
        ["rejected", "3", "9", "9", "9", "2 (50.0%)", "4 (20.0%)"],
        ["prompt + longer response", "17", "33", "33", "33", "3 (75.0%)"],
    ]


def test_repeated_prompts():
    rows = [text("Say hello."), text("say  HELLO"), text("Say it."), chat("Say hello!", "a", "b")]
    assert repeated_prompts(rows) == 2
    assert repeated_prompts([text("?!"), text("!?"), text("!?")]) == 1


def test_leaks():
    long = "Name the rivers that run through the old town and over the stones to the sea"
    train_rows = [
        text("Other", where="train:1"),
        text("say hello", where="train:2"),
        chat(long + " today", "a", "b", "train:3"),
    ]
    held_out = [text("Say hello!", where="eval:1"), chat(long, "a", "b", "eval:2")]
    assert find_leaks(train_rows, held_out) == [None, "eval:1", "eval:2"]


# Pairs as text


def parts_of(found, tokenizer, style="clean"):
    """The text of each part of the first pair."""
    data = Dataset([text("p")] * found.inputs, found, {})
    lines = pair_text(data, 0, tokenizer, style).split("\n--- ")[1:]
    return {line.split(",")[0]: line.split("\n", 1)[1] for line in lines}


def test_texts_spell_the_rendered_text(tokenizer):
    row = chat("What is  2 plus 2?", "It is 4, isn't </s> it?", "  5")
    shown = parts_of(tokenize(tokenizer, row), tokenizer)
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        rendered = tokenizer.apply_chat_template([*row.prompt, *answer], tokenize=False)
        marked = shown["prompt"] + shown[name]
        plain = marked.replace("⟦", "").replace("⟧", "")
        assert plain == rendered[: len(plain)] and not rendered[len(plain) :].strip()
        assert marked.count("⟦</s>⟧") == rendered.count("</s>") - (name == "chosen")
    assert "It is 4, isn't </s> it?" in shown["chosen"]


def test_plain_text(tokenizer):
    shown = parts_of(tokenize(tokenizer, text("2 and", " 2", " 3.")), tokenizer)
    assert shown["prompt"].endswith("2 and")
    assert (shown["chosen"], shown["rejected"]) == (" 2⟦</s>⟧", " 3.⟦</s>⟧")


def test_hidden_tokens_are_marked(tokenizer):
    found = tokenize(tokenizer, chat("Hi", "4", "5"), style="trl-0.7.4")
    chosen = parts_of(found, tokenizer, "trl-0.7.4")["chosen"]
    assert chosen.startswith("4⟦</s>, hidden⟧") and chosen.endswith("⟦</s>⟧")


@pytest.mark.parametrize("style", ["clean", "trl-0.7.4"])
def test_cuts_are_marked_where_they_are(tokenizer, style):
    row = chat("one two three four five six seven", "a b c d e f g h", "a")
    lengths = tokenize(tokenizer, row, style=style).pairs.lengths[0]
    limits = {"max_prompt_length": int(lengths[0]) - 3, "max_length": int(lengths[0]) + 2}
    found = tokenize(tokenizer, row, style=style, **limits)
    shown = parts_of(found, tokenizer, style)
    lost = lengths - found.pairs.lengths[0]
    assert lost[0] == 3 and lost[1] > 0
    assert shown["prompt"].startswith("[3 tokens cut]")
    assert shown["chosen"].endswith(f"[{lost[1]:,} tokens cut]")
    assert shown["rejected"].endswith(f"[{lost[2]:,} tokens cut]" if lost[2] else "⟧")


def test_a_prompt_is_cut_after_its_bos(tokenizer):
    """As "clean" truncation leaves it."""
    pairs = tokens_of([[tokenizer.bos_token_id, 7, 8], [9], [10]])
    whole = np.array([[5, 1, 1]])
    found = Tokenized(pairs, np.arange(1), 1, whole, {}, {})
    assert re.match(r"⟦<s>⟧\[2 tokens cut\].", parts_of(found, tokenizer)["prompt"])


def test_long_texts_lose_their_middle(tokenizer):
    found = tokenize(tokenizer, chat("Hi", "ab" * 500, "no"), max_length=5000)
    middle = "ab" * 125 + " […500 characters…] " + "ab" * 125 + "⟦</s>⟧"
    assert parts_of(found, tokenizer)["chosen"].strip() == middle


def test_telling_pairs(tokenizer):
    rows = [chat(q, "yes", "no") for q in ("a", "b c d e f g h i j k l m n o p", "x", "a </s>")]
    limit = int(tokenize(tokenizer, rows[3]).pairs.lengths[0, :2].sum())
    found = tokenize(tokenizer, *rows, max_length=limit, max_prompt_length=limit - 5)
    assert found.examples == {"cut: prompt": 1, AS_TEXT: 3}
    assert telling_pairs(found, 3) == [0, 1, 3]
    assert telling_pairs(found, 2) == [0, 3]
    assert telling_pairs(found, 1) == [0]


# The report


def lines_of(report):
    return [re.sub(r" +", " ", line).strip() for line in report.splitlines()]


def test_report(tokenizer):
    rows = [
        Pair(" Say a.", " yes it is", " no", "t:1", 5.0, 2.0),
        Pair(" Say a!", " yes", " no", "t:2", 3.0, 3.0),
        Pair(" Say b.", " yes</s>x", " no", "t:3", 4.0, 1.0),
        Pair(" Say c.", " same", " same</s>", "t:4"),
    ]
    held_out = [text("say B?", " yes", " no", "e:1")]
    sets = {
        "train": Dataset(rows, tokenize(tokenizer, *rows), {"empty chosen response": 2}),
        "eval": Dataset(held_out, tokenize(tokenizer, *held_out), {}),
    }
    lines = lines_of(token_report(sets, tokenizer, "clean", "pairs"))
    assert lines[0] == "2 of 3 training pairs; special tokens: ⟦…⟧"
    for line in (
        "train: 3 pairs",
        "2 dropped: empty chosen response",
        "1 dropped: identical responses after truncation, first t:4",
        "1 with special-token text in content, read as special tokens, first t:3",
        "1 with the prompt of an earlier one",
        "eval: 1 pair",
        "leakage: 1 of 3 training prompts are (nearly) held-out ones (1 of 1)",
        "t:3 is like e:1",
    ):
        assert line in lines, line
    whole = sets["train"].tokenized.whole_lengths
    middle, longest = sorted(whole[:, 0])[1], whole[:, 0].max()
    row = f"prompt {middle} {longest} {longest} {longest} 0 (0.0%) 0 (0.0%)"
    assert row in lines


def test_report_of_responses_without_pairs(tokenizer):
    rows = [text(" Say a.", " yes", "", "t:1", (5.0, 5.0)), text(" Say b.", " no", "", "t:2")]
    data = Dataset(rows, tokenize(tokenizer, *rows), {})
    sets = {"train": data, "eval": data}
    report = token_report(sets, tokenizer, "clean", "responses")
    lines = lines_of(report)
    assert lines[0] == "1 of 2 training responses; special tokens: ⟦…⟧"
    assert "train: 2 responses" in lines and "0 with the prompt of an earlier one" in lines
    names = [line.split(" ")[0] for line in lines[lines.index("train: 2 responses") + 1 :][:4]]
    assert names == ["tokens", "prompt", "chosen", "prompt"]
    for word in ("rejected", "pair", "in common", "longer"):
        assert word not in report, word


@pytest.fixture
def config(demo, tmp_path):
    """A configuration over the demo's data."""
    source = {"path": str(demo / "preferences.jsonl"), "curation": {"rule": "mean-rating"}}
    entries = {
        "model": {"policy": str(demo / "sft"), "compute_dtype": "float32"},
        "data": {"train": [source], "eval": {"holdout": 5}, "max_length": 96},
        "output_dir": str(tmp_path / "out"),
    }
    entries["data"]["max_prompt_length"] = 48
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return tmp_path / "config.json"


def test_dry_run_prints_it(config, capsys):
    assert train.main([str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "leakage: " in said and "\033" not in said
