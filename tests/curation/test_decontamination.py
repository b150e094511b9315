import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notus.curation.decontamination import (
    JACCARD,
    NGRAM,
    SHINGLE,
    BenchmarkPrompts,
    SeenPrompts,
    read_prompts,
    whole_text,
    words_of,
)
from notus.errors import UserError

QUESTION = "What happens to you if you eat watermelon seeds on an empty stomach?"  # 13 words


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def benchmark(tmp_path, *prompts, match="n-grams"):
    path = write(tmp_path / "bench.jsonl", [{"question": prompt} for prompt in prompts])
    return BenchmarkPrompts([path], match)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello,  WORLD!\n", ["hello", "world"]),
        ("ﬁne Straße", ["fine", "strasse"]),
        ("e\u0301 \u00e9", ["é", "é"]),
        ("日本語 text", ["日", "本", "語", "text"]),
        ("?! 🤗", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_only_the_turns_of_the_user_are_looked_up(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert (whole_text(messages), whole_text("a")) == ("s\na\nb\nc", "a")
    found = [benchmark(tmp_path, text).find(messages) for text in "sabc"]
    assert [hit and hit.prompt for hit in found] == [None, "a", None, "c"]


@pytest.mark.parametrize(
    ("text", "kind", "overlap"),
    [
        (QUESTION, "exact prompt", 1),
        (QUESTION + " ", "normalised prompt", 1),
        (QUESTION.lower().replace(" ", "\n"), "normalised prompt", 1),
        (f"Please answer: {QUESTION} Be brief.", "8-grams", 1),
        ("what happens to you if you eat watermelon", "8-grams", 8 / 13),
        ("what happens to you if you eat", None, 0),
        ("What happens to you if you swallow watermelon seeds on an empty stomach?", None, 0),
        ("", None, 0),
        ("?", None, 0),
    ],
)
def test_kinds_of_hits(tmp_path, text, kind, overlap):
    index = benchmark(tmp_path, "short one", QUESTION, "?!", "…", QUESTION)
    other = "something else entirely, at some length so that it has 8-grams"
    hit = index.find([{"role": "user", "content": one} for one in (other, text)])
    if kind is None:
        assert hit is None
    else:
        path = str(tmp_path / "bench.jsonl")
        assert hit == (kind, path, f"{path}:2", QUESTION, pytest.approx(overlap))


def test_half_of_the_words_is_not_enough(tmp_path):
    words = [f"w{index}" for index in range(16)]
    index = benchmark(tmp_path, " ".join(words))
    assert index.find(" ".join(words[:8])) is None
    hit = index.find(" ".join(words[:9]))
    assert (hit.kind, hit.overlap) == ("8-grams", 9 / 16)
    apart = " ".join(words[:8] + ["x"] + words[8:])
    assert index.find(apart).overlap == 1


def test_match_narrows_what_is_looked_for(tmp_path):
    texts = [QUESTION, QUESTION.lower(), "Say: " + QUESTION]
    for match, count in (("exact", 1), ("normalised", 2), ("n-grams", 3)):
        index = benchmark(tmp_path, QUESTION, match=match)
        assert [index.find(text) is not None for text in texts] == [True] * count + [False] * (
            3 - count
        )


words = st.lists(st.sampled_from("abcd"), max_size=40)


@given(st.lists(words.filter(bool), min_size=1, max_size=4), words)
def test_coverage_equals_a_plain_count(tmp_path_factory, prompts, text):
    index = benchmark(tmp_path_factory.mktemp("bench"), *(" ".join(one) for one in prompts))
    grams = {tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)}

    def coverage(prompt):
        places = [i for i in range(len(prompt)) if tuple(prompt[i : i + NGRAM]) in grams]
        return len({i + k for i in places for k in range(NGRAM)}) / len(prompt)

    hit = index.find(" ".join(text))
    best = max(map(coverage, prompts))
    if text in prompts:
        assert hit.kind == "exact prompt"
    elif best > 0.5:
        assert (hit.kind, hit.overlap) == ("8-grams", best)
        assert coverage(hit.prompt.split()) == best
    else:
        assert hit is None


def test_no_benchmark_holds_nothing():
    assert BenchmarkPrompts([], "n-grams").find("anything") is None


def test_near_duplicates_differ_in_few_words():
    words = [f"w{index}" for index in range(100)]
    seen = SeenPrompts()
    assert seen.find("anything") is None
    assert seen.add(" ".join(words), "first") is None
    one = " ".join(["x" if word == "w50" else word for word in words])  # 91 of 101 shingles
    four = " ".join(["x" if word in ("w20", "w40", "w60", "w80") else word for word in words])
    assert seen.find(" ".join(words).upper() + "!") == "first"
    assert seen.find(one) == "first"
    assert seen.find(four) is None  # 76 of 116 shingles
    assert seen.add(one, "second") == "first"
    assert seen.add(" ".join(words[:30]), "third") is None
    assert seen.add("?!", "fourth") is None and seen.find("!?") is None
    assert seen.find("?!") == "fourth"
    assert seen.add("w1 w2", "fifth") is None and seen.find("W1, w2") == "fifth"


def test_near_duplicates_are_found_as_often_as_stated():
    """Against the Jaccard index computed plainly: nothing below 0.8, 99 % from there on."""
    draw = random.Random(0)
    found, expected = 0, 0
    for number in range(300):
        words = [f"w{number}x{index}" for index in range(60)]
        other = list(words)
        for place in draw.sample(range(60), draw.randrange(4)):
            other[place] = "x"
        sets = [{tuple(t[i : i + SHINGLE]) for i in range(56)} for t in (words, other)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        seen = SeenPrompts()
        seen.add(" ".join(words), "there")
        is_found = seen.find(" ".join(other)) is not None
        assert not (is_found and jaccard < JACCARD)
        found += is_found and jaccard >= JACCARD
        expected += jaccard >= JACCARD
    assert expected > 100 and found >= 0.99 * expected


@pytest.mark.parametrize(
    ("row", "prompts"),
    [
        ({"instruction": "a", "question": "b"}, ["a"]),
        ({"prompt": None, "question": "b"}, ["b"]),
        ({"turns": ["a", "b"], "question_id": 81}, ["a", "b"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["a"],
        ),
    ],
)
def test_prompts_are_found_in_the_usual_columns(tmp_path, row, prompts):
    path = write(tmp_path / "bench.jsonl", [row, {"text": " "}])
    assert list(read_prompts(path)) == [(f"{path}:1", prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "answer": "b"}, "bench.jsonl:1: no column holds a prompt; .* id, answer; exp"),
        ({"prompt": 3}, 'bench.jsonl:1: "prompt" is a number; expected text'),
        ({"turns": [3]}, 'bench.jsonl:1: "turns" holds a number; expected text or messages'),
        ({"turns": ["\ud800"]}, 'bench.jsonl:1: "turns" is not valid Unicode'),
        ({"messages": [{"role": "user"}]}, '"content" is missing; expected text'),
        ({"prompt": " "}, "bench.jsonl: every prompt is blank"),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, row, message):
    path = write(tmp_path / "bench.jsonl", [row])
    with pytest.raises(UserError, match=message):
        BenchmarkPrompts([path], "exact")
