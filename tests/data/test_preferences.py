import datasets
import pytest
from sources import (
    BAD,
    DIALOGUES,
    GOOD,
    MEAN_RATING,
    QUESTION,
    SINGLE_TURN,
    Source,
    assistant,
    completion,
    load,
    prompts,
    text_rows,
    user,
    write,
)

from notus.curation.curate import Curation
from notus.data.preferences import load_preferences, split_holdout
from notus.errors import UserError

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
    with pytest.raises(UserError, match="no pair is left; dropped: 2 identical"):
        load(tmp_path, *[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2)


# ------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("weight", [1e8, 1e18, 1e308])
def test_a_weight_that_no_memory_could_hold(tmp_path, weight):
    message = r"rows.jsonl: 2 rows with the weight 1e\+.*; expected at most 100,000,000 rows"
    with pytest.raises(UserError, match=message):
        load(tmp_path, *text_rows(2), weight=weight)


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
    curation = Curation(decontaminate=(bench,), drop_sources=("y",), duplicates="near")
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
        load(tmp_path, SINGLE_TURN["ultrafeedback"], curation=Curation())


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


# ------------------------------------------------------------------------ supervised fine-tuning


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


def test_a_conversation_is_held_out_whole(tmp_path):
    def turns(n):
        pair = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
        return {"messages": pair + [{**m, "content": m["content"] + "!"} for m in pair]}

    path = write(tmp_path / "talks.jsonl", [turns(n) for n in range(20)])
    found = load_preferences([Source(path)], seed=0, holdout=5, responses_only=True)
    held_out = {pair.where for pair in found.holdout}
    assert len(found.holdout) == 5 and not held_out & {pair.where for pair in found.train}
    assert len(found.train) + found.dropped["copy of a held-out row"] == 35
