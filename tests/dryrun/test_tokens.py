import json
import re

import numpy as np
import pytest

import train
from notus.data.formats import Pair
from notus.data.preferences import find_leaks
from notus.data.tokenization import AS_TEXT, Tokenized, TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer
from notus.dryrun.tokens import (
    COLOURS,
    DataSet,
    Lengths,
    _set_section,
    common_shares,
    lengths_of,
    nearest_rank,
    pair_pieces,
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


@pytest.mark.parametrize(
    ("percent", "rank"), [(1, 10), (50, 20), (51, 30), (75, 30), (76, 40), (90, 40), (100, 40)]
)
def test_nearest_rank(percent, rank):
    assert nearest_rank(np.array([40, 10, 30, 20]), percent) == rank


def test_lengths():
    found = lengths_of(
        cut(
            whole=[(10, 5, 7), (20, 4, 1), (6, 9, 9), (30, 2, 3)],
            kept=[(10, 5, 7), (12, 4, 1), (6, 8, 6), (12, 2, 2)],
        )
    )
    assert found == {
        "prompt": Lengths(total=66, percentiles=(10, 30, 30), longest=30, cut=2, lost=8 + 18),
        "chosen": Lengths(total=20, percentiles=(4, 9, 9), longest=9, cut=1, lost=1),
        "rejected": Lengths(total=20, percentiles=(3, 9, 9), longest=9, cut=2, lost=3 + 1),
        "sequence": Lengths(total=89, percentiles=(17, 33, 33), longest=33, cut=3, lost=31),
    }


def test_common_shares():
    pairs = tokens_of(
        ([1], [5, 6, 7, 2], [5, 6, 7, 2]),  # identical
        ([1], [5, 6, 7, 2], [5, 6, 8, 2]),  # one of four differs
        ([1], [5, 2], [5, 5, 5, 2]),  # a token is never counted from both ends
        ([1], [5, 6, 7, 8, 2], [2]),
        ([1], [5, 6], [7, 8]),
    )
    assert common_shares(pairs).tolist() == [1, 3 / 4, 2 / 4, 1 / 5, 0]


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


def joined(pieces):
    return "".join(piece.text for piece in pieces)


def test_pieces_spell_the_rendered_text(tokenizer):
    row = chat("What is  2 plus 2?", "It is 4, isn't </s> it?", "  5")
    shown = pair_pieces(tokenize(tokenizer, row), 0, tokenizer, "clean")
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        rendered = tokenizer.apply_chat_template([*row.prompt, *answer], tokenize=False)
        pieces = [*shown["prompt"], *shown[name]]
        plain = joined(pieces).replace("⟦", "").replace("⟧", "")
        assert plain == rendered[: len(plain)] and not rendered[len(plain) :].strip()
        specials = [piece.text for piece in pieces if piece.kind == "special"]
        assert specials.count("⟦</s>⟧") == rendered.count("</s>") - (name == "chosen")
    assert "It is 4, isn't </s> it?" in joined(shown["chosen"])


def test_pieces_of_plain_text(tokenizer):
    shown = pair_pieces(tokenize(tokenizer, text("2 and", " 2", " 3.")), 0, tokenizer, "clean")
    assert joined(shown["prompt"]).endswith("2 and")
    assert joined(shown["chosen"]) == " 2⟦</s>⟧"
    assert joined(shown["rejected"]) == " 3.⟦</s>⟧"


def test_hidden_tokens_are_marked(tokenizer):
    found = tokenize(tokenizer, chat("Hi", "4", "5"), style="trl-0.7.4")
    shown = pair_pieces(found, 0, tokenizer, "trl-0.7.4")
    assert joined(shown["chosen"]).startswith("4⟦</s>, hidden⟧")
    assert joined(shown["chosen"]).endswith("⟦</s>⟧")


@pytest.mark.parametrize("style", ["clean", "trl-0.7.4"])
def test_cuts_are_marked_where_they_are(tokenizer, style):
    row = chat("one two three four five six seven", "a b c d e f g h", "a")
    whole = tokenize(tokenizer, row, style=style)
    lengths = whole.pairs.lengths[0]
    limits = {"max_prompt_length": int(lengths[0]) - 3, "max_length": int(lengths[0]) + 2}
    found = tokenize(tokenizer, row, style=style, **limits)
    shown = pair_pieces(found, 0, tokenizer, style)
    lost = lengths - found.pairs.lengths[0]
    assert lost[0] == 3 and lost[1] > 0
    kinds = [piece.kind for piece in shown["prompt"]]
    assert kinds.index("cut") == int(kinds[0] == "special")
    assert f"[{lost[0]:,} tokens cut]" in joined(shown["prompt"])
    assert joined(shown["chosen"]).endswith(f"[{lost[1]:,} tokens cut]")
    assert shown["rejected"][-1].kind == ("cut" if lost[2] else "special")


def test_long_texts_lose_their_middle_and_colours_are_wanted(tokenizer):
    rows = [chat("Hi", "ab" * 500, "no")]
    data = DataSet(rows, tokenize(tokenizer, *rows, max_length=5000), {})
    plain = pair_text(data, 0, tokenizer, "clean", colours=False)
    coloured = pair_text(data, 0, tokenizer, "clean", colours=True)
    assert "ab" * 125 + " […500 characters…] " + "ab" * 125 + "⟦</s>⟧" in plain
    assert "\033" not in plain
    assert re.sub(r"\033\[\d*m", "", coloured) == plain
    assert f"{COLOURS['rejected']}no" in coloured


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
        "train": DataSet(rows, tokenize(tokenizer, *rows), {"empty chosen response": 2}),
        "eval": DataSet(held_out, tokenize(tokenizer, *held_out), {}),
    }
    lines = lines_of(token_report(sets, tokenizer, style="clean", colours=False))
    assert lines[0] == "2 of 3 training pairs; special tokens: ⟦…⟧"
    for line in (
        "train: 3 pairs",
        "2 dropped: empty chosen response",
        "1 dropped: identical responses after truncation, first t:4",
        "1 with special-token text in content, read as special tokens, first t:3",
        "0 with identical responses",
        "1 with the prompt of an earlier one",
        "1 of 3 rated pairs with equal ratings",
        "eval: 1 pairs",
        "leakage: 1 of 3 training prompts are, or nearly are, held-out prompts (1 of 1)",
        "t:3 is like e:1",
    ):
        assert line in lines, line
    whole = sets["train"].tokenized.whole_lengths
    middle, longest = sorted(whole[:, 0])[1], whole[:, 0].max()
    row = f"prompt {middle} {longest} {longest} {longest} 0 (0.0%) 0 (0.0%)"
    assert row in lines


def test_report_of_responses_alone(tokenizer):
    rows = [text(" Say a.", " yes", "", "t:1", (5.0, 5.0)), text(" Say b.", " no", "", "t:2")]
    data = DataSet(rows, tokenize(tokenizer, *rows), {})
    report = token_report({"train": data, "eval": data}, tokenizer, style="clean", colours=False)
    lines = lines_of(report)
    assert lines[0] == "1 of 2 training responses; special tokens: ⟦…⟧"
    assert "train: 2 responses" in lines and "0 with the prompt of an earlier one" in lines
    names = [line.split(" ")[0] for line in lines[lines.index("train: 2 responses") + 1 :][:4]]
    assert names == ["tokens", "prompt", "chosen", "prompt"]
    for word in ("rejected", "pair", "identical", "longer", "ratings"):
        assert word not in report, word


@pytest.mark.parametrize("longest", [9, 9_000_000])
def test_columns_stand_apart_and_end_together(longest):
    data = DataSet([text("p")], cut(whole=[(longest, 5, 7)], kept=[(2, 5, 7)]), {})
    _, head, *rows = _set_section("train", data)
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", head)][1:]
    for row in rows[:3]:
        cells = list(re.finditer(r"\S+( \S+)*", row))[1:]
        assert [cell.end() for cell in cells] == ends
    assert re.search(rf"1 \(100\.0%\) {{2,}}{longest - 2:,} \(", rows[0])


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
