import gzip
import json
from dataclasses import dataclass

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from notus.curation.curate import Settings
from notus.data.preferences import (
    FORMATS,
    Pair,
    common_prompt_length,
    find_format,
    load_preferences,
    split_holdout,
)
from notus.errors import UserError


@dataclass(frozen=True)
class Source:
    path: str
    split: str | None = None
    weight: float = 1.0
    format: str | None = None
    curation: Settings | None = None


MEAN_RATING = Settings(rule="mean-rating")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, *rows, **options):
    source = Source(write(tmp_path / "rows.jsonl", rows), **options)
    return load_preferences([source], seed=42)


def load_one(tmp_path, row, **options):
    (pair,) = load(tmp_path, row, **options).train
    return pair


def text_rows(count, name=""):
    return [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


def prompts(pairs):
    return [pair.prompt for pair in pairs]


# ----------------------------------------------------------------------------------- formats

QUESTION, GOOD, BAD = "Why is the sky blue?", "It scatters.", "It is painted."
DIALOGUES = {
    "chosen": [user(QUESTION), assistant(GOOD)],
    "rejected": [user(QUESTION), assistant(BAD)],
}


def completion(response, rating):
    return {"response": response, "annotations": {"honesty": {"Rating": rating}}}


SINGLE_TURN = {
    "explicit": {
        "prompt": [user(QUESTION)],
        "chosen": [assistant(GOOD)],
        "rejected": [assistant(BAD)],
    },
    "implicit": DIALOGUES,
    "h4": {"prompt": QUESTION, **DIALOGUES, "messages": [], "score_chosen": 5, "score_rejected": 2},
    "argilla-cleaned": {"prompt": QUESTION, **DIALOGUES, "chosen-rating": 5, "rejected-rating": 2},
    "dpo-mix": {**DIALOGUES, "chosen_rating": 5, "rejected_rating": 2},
    "answers-only": {
        "prompt": QUESTION,
        "chosen": [assistant(GOOD)],
        "rejected": [assistant(BAD)],
    },
    "argilla": {
        "instruction": QUESTION,
        "chosen_response": GOOD,
        "rejected_response": BAD,
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 2.0,
    },
    "hh": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "ultrafeedback": {
        "instruction": QUESTION,
        "completions": [completion(BAD, "2"), completion(GOOD, "5")],
    },
    "rated": {"prompt": QUESTION, "responses": [BAD, GOOD], "ratings": [2, 5]},
}
CURATED = {"ultrafeedback": MEAN_RATING, "rated": Settings(rule="rating")}


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_every_conversational_format_converts_to_the_same_pair(tmp_path, name):
    pair = load_one(tmp_path, SINGLE_TURN[name], curation=CURATED.get(name))
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        [user(QUESTION)],
        [assistant(GOOD)],
        [assistant(BAD)],
    )
    has_scores = name not in ("explicit", "implicit", "answers-only", "hh", "sharegpt")
    scores = (5.0, 2.0) if has_scores else (None, None)
    assert (pair.chosen_score, pair.rejected_score) == scores
    assert pair.where == f"{tmp_path / 'rows.jsonl'}:1"


def test_multi_turn_formats_agree(tmp_path):
    prompt = [user("a"), assistant("b"), user("c")]
    chosen, rejected = assistant("d"), assistant("e")
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    turns = [("human", "a"), ("gpt", "b"), ("human", "c")]
    rows = [
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"chosen": dialogue + "d", "rejected": dialogue + "e"},
        {
            "conversations": [{"from": role, "value": text} for role, text in turns],
            "chosen": {"from": "gpt", "value": "d"},
            "rejected": {"from": "gpt", "value": "e"},
        },
    ]
    pairs = [load_one(tmp_path, row) for row in rows]
    assert pairs == [Pair(prompt, [chosen], [rejected], pairs[0].where)] * 4


def test_sharegpt_system_column_comes_first_unless_the_conversation_has_its_own(tmp_path):
    row = {**SINGLE_TURN["sharegpt"], "system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    assert load_one(tmp_path, row).prompt == [system, user(QUESTION)]
    row["conversations"] = [{"from": "system", "value": "Be long."}, *row["conversations"]]
    assert load_one(tmp_path, row).prompt[0] == {"role": "system", "content": "Be long."}
    assert load_one(tmp_path, {**SINGLE_TURN["sharegpt"], "system": None}).prompt == [
        user(QUESTION)
    ]


def test_responses_with_labels_pair_up_by_their_prompt(tmp_path):
    def row(prompt, completion, label):
        return {"prompt": prompt, "completion": completion, "label": label}

    rows = [
        row("a", "bad", False),
        row("b", "alone", True),
        row("a", "good", True),
        row("c", "C", True),
        row("a", "worse", False),
        row("c", "c", False),
        row("a", "better", True),
        row("a", "third", False),
    ]
    loaded = load(tmp_path, *rows)
    parts = [(one.prompt, one.chosen, one.rejected, one.where[-2:]) for one in loaded.train]
    assert parts == [
        ("a", "good", "bad", ":3"),
        ("c", "C", "c", ":4"),
        ("a", "better", "worse", ":7"),
    ]
    assert loaded.dropped == {"no response with the other label": 2}
    explicit = SINGLE_TURN["explicit"]
    turns = [row(explicit["prompt"], explicit[name], name == "chosen") for name in DIALOGUES]
    (pair,) = load(tmp_path, *turns).train
    assert pair == load_one(tmp_path, explicit)
    for broken, message in (
        (row("a", "b", 1), '"label" is a number; expected true or false'),
        (row("a", None, True), '"completion" is null; expected text'),
        (row(None, "b", True), '"prompt" is null; expected text'),
        (row([user("a")], [user("b")], True), '"completion" ends with a message of the user'),
    ):
        with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
            load(tmp_path, broken)
    with pytest.raises(UserError, match='"curation" is not for rows of one response each'):
        load(tmp_path, *rows, curation=Settings(rule=None))


def test_scores_may_lie_in_metadata(tmp_path):
    row = {**SINGLE_TURN["implicit"], "metadata": {"score_chosen": 7, "score_rejected": 7.0}}
    pair = load_one(tmp_path, row)
    assert (pair.chosen_score, pair.rejected_score) == (7, 7)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("Same start", "Same start and more", "Same star"),
        (" a", " b", ""),
        ("a", "b", ""),
        ("", "b", ""),
    ],
)
def test_text_without_a_prompt_shares_its_longest_prefix(chosen, rejected, prompt):
    assert common_prompt_length(chosen, rejected) == len(prompt)


def test_text_stays_text(tmp_path):
    explicit = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    implicit = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    pairs = load(tmp_path, explicit).train + load(tmp_path, implicit).train
    assert pairs == [Pair("The sky is", " blue.", " green.", pairs[0].where)] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, '"rejected" is null; expected text'),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, '"chosen" is a number'),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, '"prompt" is null; expected text'),
        ({"prompt": "a", "chosen": "b", "rejected": []}, '"rejected" is a list; expected text'),
        ({"chosen": "b", "rejected": "c", "score_chosen": "9", "score_rejected": 1}, "a number"),
        ({"chosen": ["b"], "rejected": ["c"]}, r'"chosen\[0\]" is text; expected a message'),
        ({"chosen": [user("b")], "rejected": []}, "of the user; expected one of the assistant"),
        ({"chosen": [assistant("b")], "rejected": []}, '"rejected" ends with no message'),
        (
            {"chosen": [{"role": "tool", "content": "b"}], "rejected": [assistant("c")]},
            'the role "tool"; known are system, user',
        ),
        (
            {"chosen": [{"role": "user", "content": ["b"]}], "rejected": [assistant("c")]},
            '"content" is a list; expected text',
        ),
        ({"prompt": [user(QUESTION)], **DIALOGUES}, "expected the answer alone"),
        ({**SINGLE_TURN["sharegpt"], "chosen": "b"}, "expected a message with from and value"),
        (
            {**SINGLE_TURN["sharegpt"], "chosen": {"from": "human", "value": "b"}},
            "expected one of the assistant",
        ),
        ({**SINGLE_TURN["argilla"], "instruction": 1}, '"instruction" is a number'),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "ends with a message of the user"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, '"chosen" is not valid Unicode'),
    ],
)
def test_a_malformed_row_names_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"rows.jsonl:1.*{message}"):
        load(tmp_path, row)


def test_a_later_row_without_rejected_names_its_line(tmp_path):
    with pytest.raises(UserError, match='rows.jsonl:3: "rejected" is missing; expected text'):
        load(tmp_path, *text_rows(2), {"prompt": "a", "chosen": "b"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "answer": "b"},
        {"question": "a", "chosen": "b", "rejected": "c"},
    ],
)
def test_an_unknown_format_lists_the_columns_seen_and_the_formats_known(tmp_path, row):
    columns = ", ".join(row)
    with pytest.raises(UserError, match=f"columns {columns}; known are .*hh .*preference"):
        load(tmp_path, row)


def test_format_forces_one(tmp_path):
    texts = SINGLE_TURN["hh"]
    assert load_one(tmp_path, texts, format="preference").prompt.startswith("\n\nHuman: Why")
    with pytest.raises(UserError, match='"chosen" starts with .*expected "\\\\n\\\\nHuman:"'):
        load(tmp_path, {"chosen": "a", "rejected": "b"}, format="hh")
    with pytest.raises(UserError, match='no preference format "dpo"; known are ultrafeedback'):
        load(tmp_path, texts, format="dpo")


def test_curation_is_needed_for_raw_ratings_and_refused_elsewhere(tmp_path):
    with pytest.raises(UserError, match='"curation": {"rule": "mean-rating"}'):
        load(tmp_path, SINGLE_TURN["ultrafeedback"])
    with pytest.raises(UserError, match='"curation" does nothing with a rule .*"argilla"'):
        load(tmp_path, SINGLE_TURN["argilla"], curation=MEAN_RATING)
    broken = {"instruction": "a", "completions": [completion("b", "9")]}
    with pytest.raises(UserError, match="rows.jsonl:1: rating of honesty is '9'"):
        load(tmp_path, broken, curation=MEAN_RATING)


# ----------------------------------------------------------------------------------- dropping


def test_what_cannot_be_trained_on_is_dropped_by_reason(tmp_path):
    def row(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    loaded = load(
        tmp_path,
        row("a", "b", "c"),
        row("a", "b", "b"),
        row("a", " \n", "c"),
        row("a", "b", ""),
        row(" ", "b", "c"),
        {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
    )
    assert prompts(loaded.train) == ["a"]
    assert loaded.dropped == {
        "identical responses": 2,
        "empty chosen response": 1,
        "empty rejected response": 1,
        "empty prompt": 1,
        "prompts differ": 1,
    }


def test_hh_rows_whose_prompts_differ_are_dropped(tmp_path):
    other = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: e",
    }
    assert load(tmp_path, SINGLE_TURN["hh"], other).dropped == {"prompts differ": 1}


def test_curation_names_what_it_left_out(tmp_path):
    tied = {"instruction": "a", "completions": [completion("b", 3), completion("c", 3)]}
    lonely = {"instruction": "a", "completions": [completion("b", 3)]}
    empty = {"instruction": "a", "completions": None}
    rows = [SINGLE_TURN["ultrafeedback"], tied, lonely, empty]
    loaded = load(tmp_path, *rows, curation=MEAN_RATING)
    assert len(loaded.train) == 1
    assert loaded.dropped == {"tied ratings": 1, "fewer than two rated completions": 2}


def test_rows_that_curation_left_out_are_not_held_out(tmp_path):
    tied = {"instruction": "a", "completions": [completion("b", 3), completion("c", 3)]}
    rows = [tied, tied, SINGLE_TURN["ultrafeedback"], SINGLE_TURN["ultrafeedback"]]
    source = Source(write(tmp_path / "a.jsonl", rows), curation=MEAN_RATING)
    loaded = load_preferences([source], seed=0, holdout=1)
    assert (len(loaded.train), len(loaded.holdout)) == (1, 1)
    with pytest.raises(UserError, match="holdout is 2, but the sources hold only 2 rows"):
        load_preferences([source], seed=0, holdout=2)


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    with pytest.raises(UserError, match="no pair is left to train on; dropped: 2 identical"):
        load(tmp_path, *[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2)


# ------------------------------------------------------------------------------------- mixing


def test_weights_repeat_rows_and_take_a_seeded_part(tmp_path):
    def load_weighted(seed):
        return load_preferences(
            [
                Source(write(tmp_path / "a.jsonl", text_rows(10, "a")), weight=2),
                Source(write(tmp_path / "b.jsonl", text_rows(10, "b")), weight=0.5),
                Source(write(tmp_path / "c.jsonl", text_rows(10, "c")), weight=1.5),
                Source(write(tmp_path / "d.jsonl", text_rows(10, "d")), weight=0.5),
            ],
            seed=seed,
        )

    got = prompts(load_weighted(1).train)
    names = {letter: [f"{letter}{index}" for index in range(10)] for letter in "abc"}
    assert got[:20] == names["a"] * 2
    b, c, d = got[20:25], got[35:40], got[40:]
    assert got[25:35] == names["c"]
    assert all(part == sorted(set(part)) and len(part) == 5 for part in (b, c, d))
    assert [name[1] for name in b] != [name[1] for name in d]  # the source's place is in the key
    assert got == prompts(load_weighted(1).train)
    assert got != prompts(load_weighted(2).train)


# The first is the published split of Notus's 63,619 rows: 61,619 to train on, 2,000 held out.
@pytest.mark.parametrize(
    ("count", "holdout", "seed"), [(63619, 2000, 42), (50, 7, 42), (333, 100, 1), (2, 1, 0)]
)
def test_holdout_is_the_split_that_datasets_makes(count, holdout, seed):
    shuffled = datasets.Dataset.from_dict({"index": range(count)}).shuffle(seed)
    expected = shuffled.train_test_split(test_size=holdout, seed=seed, shuffle=True)
    train, held_out = split_holdout(count, holdout, seed)
    assert (len(train), len(held_out)) == (count - holdout, holdout)
    assert train.tolist() == list(expected["train"]["index"])
    assert held_out.tolist() == list(expected["test"]["index"])


def test_the_split_may_have_a_seed_of_its_own(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", text_rows(20)))

    def held_out(**seeds):
        return prompts(load_preferences([source], holdout=5, **seeds).holdout)

    assert held_out(seed=1, holdout_seed=42) == held_out(seed=42) != held_out(seed=1)
    assert held_out(seed=1, holdout_seed=0) == held_out(seed=0)


LONG = "tell me in a few plain words why the sky over the sea looks blue at noon and red at dusk"


def test_training_rows_that_repeat_an_evaluation_prompt_can_be_dropped(tmp_path):
    def row(prompt):
        return {"prompt": prompt, "chosen": "good", "rejected": "bad"}

    names = [LONG, LONG.upper() + "?", LONG.replace("few", "hundred") + " today", "something else"]
    train = Source(write(tmp_path / "train.jsonl", [row(name) for name in names]))
    other = Source(write(tmp_path / "eval.jsonl", [row(f"{LONG}."), row("Something!")]))
    evaluation = load_preferences([other], seed=0).train
    kept = load_preferences([train], seed=0, evaluation=evaluation)
    assert prompts(kept.train) == names and kept.dropped == {}
    apart = load_preferences([train], seed=0, evaluation=evaluation, drop_leaks=True)
    # One word in twenty changed breaks five of the sixteen shingles: that is no near duplicate.
    assert prompts(apart.train) == names[2:]
    assert apart.dropped == {"prompt of a held-out row": 2}

    rows = [row(f"prompt {index // 2}") for index in range(40)]
    twice = Source(write(tmp_path / "twice.jsonl", rows))
    split = load_preferences([twice], seed=0, holdout=10, drop_leaks=True)
    assert not set(prompts(split.train)) & set(prompts(split.holdout))
    assert len(split.holdout) == 10
    assert len(split.train) + split.dropped["prompt of a held-out row"] == 30


def test_pairs_can_be_decontaminated_without_a_rule(tmp_path):
    bench = write(tmp_path / "bench.jsonl", [{"question": "c "}, {"question": QUESTION}])
    conversation = [user("a"), assistant("b"), user("c")]
    rows = [
        {
            "source": "x",
            "chosen": [*conversation, assistant(GOOD)],
            "rejected": [*conversation, assistant(BAD)],
        },
        {"source": "x", **DIALOGUES},
        {
            "source": "y",
            "prompt": [user("c d")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
        },
        {
            "source": "z",
            "prompt": [user("c d")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
        },
        {
            "source": "z",
            "prompt": [user("C, d!")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
        },
        {
            "source": "z",
            "prompt": [user("f")],
            "chosen": [assistant("d")],
            "rejected": [assistant("d")],
        },
    ]
    curation = Settings(rule=None, decontaminate=(bench,), drop_sources=("y",), duplicates="near")
    loaded = load(tmp_path, *rows, curation=curation)
    assert [pair.where[-2:] for pair in loaded.train] == [":4"]
    assert loaded.dropped == {
        f"normalised prompt of {bench}": 1,
        f"exact prompt of {bench}": 1,
        'source "y"': 1,
        "near-duplicate prompt": 1,
        "identical responses": 1,
    }
    with pytest.raises(UserError, match='rows.jsonl:1: "source" is missing; expected text'):
        load(tmp_path, DIALOGUES, curation=curation)
    with pytest.raises(UserError, match='the rows hold ratings .*"curation": {"rule"'):
        load(tmp_path, SINGLE_TURN["ultrafeedback"], curation=Settings(rule=None))


def test_rows_are_held_out_before_any_is_dropped(tmp_path):
    rows = text_rows(20)
    path = write(tmp_path / "a.jsonl", rows)
    before = load_preferences([Source(path)], seed=3, holdout=5)
    assert len(before.train) == 15 and len(before.holdout) == 5
    dropped_train, dropped_holdout = before.train[4].prompt, before.holdout[2].prompt
    for prompt in (dropped_train, dropped_holdout):
        rows[int(prompt)]["rejected"] = "good"
    write(tmp_path / "a.jsonl", rows)
    after = load_preferences([Source(path)], seed=3, holdout=5)
    assert prompts(after.train) == [p for p in prompts(before.train) if p != dropped_train]
    assert prompts(after.holdout) == [p for p in prompts(before.holdout) if p != dropped_holdout]
    assert after.dropped == {"identical responses": 2}


def test_a_repeated_row_is_never_in_both_parts(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", text_rows(20)), weight=3)
    loaded = load_preferences([source], seed=3, holdout=10)
    assert len(loaded.holdout) == 10
    assert not set(prompts(loaded.train)) & set(prompts(loaded.holdout))
    assert len(loaded.train) + loaded.dropped["copy of a held-out row"] == 50


def test_a_holdout_of_every_row_is_an_error(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", text_rows(5)))
    with pytest.raises(UserError, match="holdout is 5, but the sources hold only 5 rows"):
        load_preferences([source], seed=0, holdout=5)


# ------------------------------------------------------------------------------------- reading


def load_path(path, **options):
    return load_preferences([Source(str(path), **options)], seed=0).train


def test_every_file_type_gives_the_same_pairs(tmp_path):
    rows = [SINGLE_TURN["implicit"], SINGLE_TURN["implicit"]]
    lines = "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "array.json").write_text("\n" + json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    for name in ("lines.json", "array.json", "lines.jsonl.gz", "array.json.gz", "table.parquet"):
        pairs = load_path(tmp_path / name)
        assert [pair.where for pair in pairs] == [f"{tmp_path / name}:{n}" for n in (1, 2)]
        assert pairs[1].prompt == [user(QUESTION)] and pairs[1].rejected == [assistant(BAD)]


def test_saved_datasets(tmp_path):
    train, test = (datasets.Dataset.from_list(text_rows(2, name)) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert prompts(load_path(tmp_path / "one")) == ["train0", "train1"]
    assert prompts(load_path(tmp_path / "both")) == ["train0", "train1"]
    (first, _) = load_path(tmp_path / "both", split="test")
    assert (first.prompt, first.where) == ("test0", f"{tmp_path / 'both' / 'test'}:1")
    with pytest.raises(UserError, match='no split "dev"; the dataset has train, test'):
        load_path(tmp_path / "both", split="dev")
    with pytest.raises(UserError, match='no split "dev"'):
        load_path(tmp_path / "one", split="dev")


def test_a_folder_is_read_in_name_order_and_by_split(tmp_path):
    write(tmp_path / "b.jsonl", text_rows(1, "b"))
    write(tmp_path / "a.jsonl", text_rows(1, "a"))
    assert prompts(load_path(tmp_path)) == ["a0", "b0"]
    write(tmp_path / "test-0.jsonl", text_rows(1, "test"))
    assert prompts(load_path(tmp_path, split="test")) == ["test0"]
    write(tmp_path / "train-0.jsonl", text_rows(1, "train"))
    assert prompts(load_path(tmp_path)) == ["train0"]
    with pytest.raises(UserError, match='no file name contains the split "dev": a.jsonl, b.jsonl'):
        load_path(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"chosen": "a", "rejected": "b"}\n{oops\n', "b.jsonl:2: not JSON"),
        ("c.json", b'[\n{"chosen": "a"},\n{oops\n]', "c.json:3: not JSON"),
        ("d.jsonl", b"", "the file holds no rows"),
        ("e.json", b"[]", "the file holds no rows"),
        ("f.jsonl", b'"text"\n', "f.jsonl:1: the row is text; expected an object"),
        ("g.jsonl.gz", b"not gzip", "g.jsonl.gz: cannot be read"),
        ("h.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], "h.jsonl.gz: cannot be read"),
        ("i.jsonl", b'{"prompt": "\xff"}', "i.jsonl: cannot be read: 'utf-8' codec"),
        ("j.parquet", b"PAR", "cannot be read as Parquet"),
        ("k.csv", b"a,b", "expected a file that ends in .json"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_path(tmp_path / name)


def test_what_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="absent.jsonl: no such file or folder"):
        load_path("absent.jsonl")
    with pytest.raises(UserError, match="no such file or folder"):
        load_path(tmp_path / "absent")
    with pytest.raises(UserError, match="the folder holds no .json"):
        load_path(tmp_path)
    for name in ("nobody/absent", "not a name"):
        with pytest.raises(UserError, match=f"{name}: neither a local .* reachable on the hub"):
            load_path(name)


def test_text_columns_become_turns_when_the_source_says_so():
    row = {
        "prompt": "Why?",
        "chosen": "So.",
        "rejected": "No.",
        "score_chosen": 2.0,
        "score_rejected": 1.0,
    }
    assert FORMATS["turns"].convert(row, "here:1") == Pair(
        [{"role": "user", "content": "Why?"}],
        [{"role": "assistant", "content": "So."}],
        [{"role": "assistant", "content": "No."}],
        "here:1",
        2.0,
        1.0,
    )
    assert find_format(None, row, "here:1") == "preference"
    assert find_format("turns", row, "here:1") == "turns"


def test_supervised_fine_tuning_reads_chosen_responses_alone(tmp_path):
    rows = [
        {"prompt": "2+2?", "chosen": " 4", "rejected": " 4"},  # equal: no matter
        {"prompt": "3+3?", "chosen": " 6", "rejected": ""},
        {"prompt": "4+4?", "chosen": " ", "rejected": " 8"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = load_preferences([Source(path)], seed=0, responses_only=True)
    assert [(p.prompt, p.chosen, p.rejected) for p in found.train] == [
        ("2+2?", " 4", ""),
        ("3+3?", " 6", ""),
    ]
    assert found.dropped == {"empty chosen response": 1}


def test_each_answer_of_a_conversation_is_learnt(tmp_path):
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [{"from": names[t["role"]], "value": t["content"]} for t in turns]
    shapes = {
        "messages": [{"messages": turns}, {"messages": turns[:2]}],
        "conversations": [{"conversations": other}, {"conversations": other[:2]}],
    }
    for name, rows in shapes.items():
        path = write(tmp_path / f"{name}.jsonl", rows)
        found = load_preferences([Source(path)], seed=0, responses_only=True)
        assert [(p.prompt, p.chosen, p.rejected) for p in found.train] == [
            (turns[:2], turns[2:3], []),
            (turns[:4], turns[4:], []),
        ]
        assert found.dropped == {"no message of the assistant": 1}
    path = write(
        tmp_path / "completion.jsonl",
        [
            {"prompt": turns[:2], "completion": turns[2:3]},
            {"prompt": turns[:4], "completion": turns[4:]},
        ],
    )
    same = load_preferences([Source(path)], seed=0, responses_only=True)
    assert [vars(p) | {"where": ""} for p in same.train] == [
        vars(p) | {"where": ""} for p in found.train
    ]


def test_a_conversation_is_held_out_whole(tmp_path):
    def turns(n):
        pair = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
        return {"messages": pair + [{**m, "content": m["content"] + "!"} for m in pair]}

    path = write(tmp_path / "talks.jsonl", [turns(n) for n in range(20)])
    found = load_preferences([Source(path)], seed=0, holdout=5, responses_only=True)
    held_out = {pair.where for pair in found.holdout}
    assert len(found.holdout) == 5 and not held_out & {pair.where for pair in found.train}
    assert len(found.train) + found.dropped["copy of a held-out row"] == 35


def test_answers_alone_are_no_preferences(tmp_path):
    path = write(tmp_path / "talks.jsonl", [{"messages": []}])
    expected = r'talks.jsonl:1: found answers without .*"messages".*"sft"'
    with pytest.raises(UserError, match=expected):
        load_preferences([Source(path)], seed=0)


def test_a_later_row_without_a_prompt_names_its_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}, {"completion": "c"}])
    with pytest.raises(UserError, match='rows.jsonl:2: "prompt" is missing; expected text'):
        load_preferences([Source(path)], seed=0, responses_only=True)


def test_rows_may_say_where_they_come_from(tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "math", "source": 3}
    path = write(tmp_path / "pairs.jsonl", [row])
    found = load_preferences([Source(path)], seed=0)
    assert found.train[0].labels == {"subset": "math"}
    rows = [
        {"prompt": "p", "completion": text, "label": text == "good", "subset": "math"}
        for text in ("good", "bad")
    ]
    path = write(tmp_path / "judged.jsonl", rows)
    for alone in (False, True):
        (found,) = load_preferences([Source(path)], seed=0, responses_only=alone).train
        assert (found.chosen, found.labels) == ("good", {"subset": "math"})
