import json

import pytest
from sources import (
    BAD,
    CURATED,
    DIALOGUES,
    GOOD,
    MEAN_RATING,
    QUESTION,
    SINGLE_TURN,
    Source,
    assistant,
    completion,
    load,
    load_one,
    text_rows,
    user,
    write,
)

from notus.curation.curate import Curation
from notus.curation.rated_rows import RATED
from notus.data.formats import FORMATS, ONLY_ANSWERS, Pair, find_format
from notus.data.pair_formats import common_prompt_length
from notus.data.preferences import load_preferences
from notus.errors import UserError


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
    row["conversations"] = [{"from": "system", "value": "Be brief. "}, *row["conversations"]]
    assert load_one(tmp_path, row).prompt[0] == {"role": "system", "content": "Be brief. "}
    row["system"] = "Be long."
    with pytest.raises(UserError, match='differs from the conversation.s own.*"ignore"'):
        load_one(tmp_path, row)
    assert load_one(tmp_path, row, ignore=("system",)).prompt[0]["content"] == "Be brief. "
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
    with pytest.raises(UserError, match="found rows of one response each .*curation is for pairs"):
        load(tmp_path, *rows, curation=Curation())


def test_scores_may_lie_in_metadata(tmp_path):
    row = {**SINGLE_TURN["implicit"], "metadata": {"score_chosen": 7, "score_rejected": 7.0}}
    pair = load_one(tmp_path, row)
    assert (pair.chosen_score, pair.rejected_score) == (7, 7)


@pytest.mark.parametrize(
    ("names", "cells", "form", "scores"),
    [
        ("prompt,chosen,rejected,score_chosen,score_rejected", "Q,+,-,5,1.5", "turns", (5.0, 1.5)),
        ("prompt,chosen,rejected,score_chosen,score_rejected", "Q,+,-,,", "turns", (None, None)),
        ("prompt,response_1,response_2,preference_strength", "Q,-,+,2", None, (2.0, 0.0)),
        (
            "prompt,response_0,response_1,safer_response_id",
            "Q,-,+,1",
            "saferlhf-safer",
            (None,) * 2,
        ),
    ],
)
def test_numbers_in_a_spreadsheet_are_texts(tmp_path, names, cells, form, scores):
    (tmp_path / "a.csv").write_text(f"{names}\n{cells}\n")
    (pair,) = load_preferences([Source(str(tmp_path / "a.csv"), format=form)], seed=0).train
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("+", "-")
    assert (pair.chosen_score, pair.rejected_score) == scores


def test_thumbs_in_a_spreadsheet_are_texts(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\nQ,+,True\nQ,-,false\n")
    (pair,) = load_preferences([Source(str(tmp_path / "a.csv"))], seed=0).train
    assert (pair.chosen, pair.rejected) == ("+", "-")


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
        ({"chosen": "b", "rejected": "c", "score_chosen": "good", "score_rejected": 1}, "a number"),
        (
            {"chosen": "b", "rejected": "c", "score_chosen": 10**400, "score_rejected": 1},
            '"score_chosen" is a number; expected one below 1e308',
        ),
        ({"chosen": ["b"], "rejected": ["c"]}, r'"chosen\[0\]" is text; expected a message'),
        ({"chosen": [user("b")], "rejected": []}, "of the user; expected one of the assistant"),
        ({"chosen": [assistant("b")], "rejected": []}, '"rejected" ends with no message'),
        (
            {"chosen": [{"role": "critic", "content": "b"}], "rejected": [assistant("c")]},
            'the role "critic"; known are system, user',
        ),
        (
            {"chosen": [{"role": "user", "content": ["b"]}], "rejected": [assistant("c")]},
            '"content" holds a part that is text .number 1.; expected text, or parts {"type"',
        ),
        ({"prompt": [user(QUESTION)], **DIALOGUES}, "expected only the answer"),
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


def test_an_unknown_format_shows_the_nearest_ones(tmp_path):
    with pytest.raises(UserError) as raised:
        load(tmp_path, {"prompt": "a", "chosen_text": "b", "reject": "c"})
    said = str(raised.value).replace(str(tmp_path), "")
    assert said.splitlines() == [
        "/rows.jsonl:1: not a known preference format; found the columns prompt, chosen_text, "
        "reject",
        '  near is "turns" without chosen, rejected; a row of it:',
        '  {"prompt": "Why?", "chosen": "So.", "rejected": "No."}',
        '  near is "preference" without chosen, rejected; a row of it:',
        f"  {FORMATS['preference'].example}",
        "  if the columns have other names, say so in the source (dots lead into objects):",
        '  "format": "turns", "columns": {"prompt": "...", "chosen": "...", "rejected": "..."}',
        "  docs/your-data.md goes through an example; docs/data.md has every format",
    ]


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [
        ("prompt,answer_a,answer_b,winner", "turns"),
        ("Question,Good answer,Bad answer", "turns"),
        ("id,question,answer1,answer2,label", "turns"),
        ("instruction,chosen_answer,rejected_answer", "turns"),
        ("prompt,response_a,response_b,preference", "turns"),
        ("prompt,model_a,model_b,conversation_a,conversation_b,winner", "turns"),
        ("prompt,chosen,bad", "turns"),
        ("user,good,bad", "turns"),
        # one column of several is missing
        ("question,chosen,bad", "question"),
        ("prompt,response_1,response_2,preference", "helpsteer2-preference"),
        ("prompt,response,score", "helpsteer2"),
        ("instruction,generations,scores", "distilabel"),
        ("prompt,responses,scores", "rated"),
        # fewer texts than a pair has
        ("prompt,reply", "completion"),
        ("conversation", "conversations"),
    ],
)
def test_columns_of_ones_own_are_nearest_to_a_pair_of_texts(columns, nearest):
    row = {
        name: ["x"] if name in ("responses", "generations") else "x" for name in columns.split(",")
    }
    with pytest.raises(UserError, match=f'near is "{nearest}" without') as raised:
        find_format(None, row, "here:1")
    named = [line for line in str(raised.value).splitlines() if line.startswith("  near is")]
    assert f'near is "{nearest}"' in named[0]
    assert all(f'"{name}": "..."' in str(raised.value) for name in FORMATS[nearest].columns)


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_is_a_row_of_its_format(tmp_path, name):
    """It is recognised, and converts: one of two responses alone makes no pair."""
    row = json.loads(FORMATS[name].example)
    if FORMATS[name].recognises:
        assert find_format(None, row, "here:1") == name
    rated = RATED.get(name)
    curation = Curation(rule=rated.rules[0]) if rated else None
    path = write(tmp_path / "rows.jsonl", [row])
    source = Source(path, format=name, curation=curation)
    single = name in ("unpaired", "helpsteer2", "halos-scored")
    if single:
        with pytest.raises(UserError, match="no pair is left; dropped: [12]"):
            load_preferences([source], seed=0)
        return
    (pair,) = load_preferences([source], seed=0, responses_only=name in ONLY_ANSWERS).train
    texts = [part if isinstance(part, str) else part[-1]["content"] for part in pair_parts(pair)]
    expected = ["Why?", "So.", "" if name in ONLY_ANSWERS else "No."]
    assert [text.strip() for text in texts if text] == [text for text in expected if text]


def pair_parts(pair):
    return [part for part in (pair.prompt, pair.chosen, pair.rejected) if part]


def test_format_forces_one(tmp_path):
    texts = SINGLE_TURN["hh"]
    assert load_one(tmp_path, texts, format="preference").prompt.startswith("\n\nHuman: Why")
    with pytest.raises(UserError, match='"chosen" starts with .*expected "\\\\n\\\\nHuman:"'):
        load(tmp_path, {"chosen": "a", "rejected": "b"}, format="hh")
    with pytest.raises(UserError, match='format "turn"; the nearest is "turns"; known are ultra'):
        load(tmp_path, texts, format="turn")
    with pytest.raises(UserError, match='no preference format "dpo"; known are ultrafeedback, '):
        load(tmp_path, texts, format="dpo")


def test_curation_is_needed_for_raw_ratings_and_refused_elsewhere(tmp_path):
    with pytest.raises(UserError, match='"curation": {"rule": "mean-rating"}'):
        load(tmp_path, SINGLE_TURN["ultrafeedback"])
    with pytest.raises(UserError, match='"curation" does nothing with a rule .*"argilla"'):
        load(tmp_path, SINGLE_TURN["argilla"], curation=MEAN_RATING)
    broken = {"instruction": "a", "completions": [completion("b", "9")]}
    with pytest.raises(UserError, match="rows.jsonl:1: rating of honesty is '9'"):
        load(tmp_path, broken, curation=MEAN_RATING)


def test_text_columns_become_turns_when_the_source_says_so():
    row = {
        "prompt": "Why?",
        "chosen": "So.",
        "rejected": "No.",
        "score_chosen": 2.0,
        "score_rejected": 1.0,
    }
    assert FORMATS["turns"].convert(row, "here:1") == [
        Pair([user("Why?")], [assistant("So.")], [assistant("No.")], "here:1", 2.0, 1.0)
    ]
    assert find_format(None, row, "here:1") == "preference"
    assert find_format("turns", row, "here:1") == "turns"


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
