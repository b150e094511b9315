"""Columns other than a format's own: used, renamed, left out on request, or refused."""

import json

import pytest
from sources import MEAN_RATING, SINGLE_TURN, Source, assistant, load, load_one, user, write

from notus.data.preferences import load_preferences
from notus.errors import UserError

TEXTS = {"chosen": "So.", "rejected": "No."}
TURNS = {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("row", "options"),
    [
        (TURNS, {}),
        ({"prompt": "Why?", **TEXTS}, {"format": "turns"}),
        ({"question": "Why?", **TEXTS}, {}),
        (SINGLE_TURN["hh"], {}),
        (SINGLE_TURN["argilla"], {}),
        (SINGLE_TURN["ultrafeedback"], {"curation": MEAN_RATING}),
    ],
)
def test_a_system_column_is_the_first_turn_of_every_conversation(tmp_path, column, row, options):
    prompt = load_one(tmp_path, {**row, column: "Be brief."}, **options).prompt
    assert prompt[0] == SYSTEM and len(prompt) == 2
    for empty in ("", " ", None):
        assert load_one(tmp_path, {**row, column: empty}, **options).prompt == prompt[1:]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("system", "Be brief."),
        ("tools", [{"name": "weather"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_plain_text_has_no_place_for_what_a_template_writes(tmp_path, column, value):
    """The trap of a renamed question: the row loads, and the system turn is gone."""
    row = {"prompt": "Why?", **TEXTS, column: value}
    with pytest.raises(UserError, match=f'rows.jsonl:1: "{column}" has no place in plain text'):
        load(tmp_path, row)
    found = load(tmp_path, row, row, ignore=(column,))
    assert [pair.prompt for pair in found.train] == ["Why?"] * 2
    assert any(line.endswith(f'"{column}" of 2 rows is ignored') for line in found.remarks)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "Why?", **TEXTS, "context": "The sky."}, "context"),
        ({"prompt": "Why?", **TEXTS, "question": "How?"}, "question"),
        ({**TURNS, "reasoning_content": "Because."}, "reasoning_content"),
        ({**TURNS, "images": ["a.png"]}, "images"),
        ({**TURNS, "messages": [user("other")]}, "messages"),
        ({"instruction": "Why?", **TEXTS, "history": [["a", "b"]]}, "history"),
    ],
)
def test_a_column_that_may_matter_is_never_dropped_silently(tmp_path, row, column):
    with pytest.raises(UserError, match=f'rows.jsonl:1: "{column}" is not read by the format'):
        load(tmp_path, row)
    assert len(load(tmp_path, {**row, column: type(row[column])()}).train) == 1
    assert len(load(tmp_path, row, ignore=(column,)).train) == 1


def test_repeated_texts_and_metadata_are_free_and_named(tmp_path):
    dialogue = [user("Why?"), assistant("So.")]
    row = {
        **{"prompt": "Why?", "chosen": dialogue, "rejected": [user("Why?"), assistant("No.")]},
        **{"messages": dialogue, "question": " Why?", "instruction": None, "tools": "[]"},
        **{"prompt_id": "x1", "score_chosen": 2, "score_rejected": 1, "source": "flan"},
    }
    found = load(tmp_path, row, {**row, "extra": 1})
    assert found.train[0].prompt == [user("Why?")]
    path = tmp_path / "rows.jsonl"
    assert found.remarks == [
        f'{path}: 2 rows of the format "preference"; columns without use: messages, question, '
        "instruction, prompt_id, extra",
    ]


def test_keys_of_messages_can_be_ignored(tmp_path):
    row = {**TURNS, "chosen": [{**assistant("So."), "weight": 1}]}
    assert load_one(tmp_path, row).chosen == row["chosen"]
    found = load(tmp_path, row, TURNS, ignore=("weight",))
    assert found.train[0].chosen == TURNS["chosen"]
    assert any(line.endswith('"weight" of 1 rows is ignored') for line in found.remarks)


# --------------------------------------------------------------------------------- "columns"

OPENAI = {
    "input": {"messages": [user("Why?")], "tools": [{"name": "w"}], "parallel": True},
    "preferred_output": [assistant("So.")],
    "non_preferred_output": [assistant("No.")],
}
NAMES = {
    "prompt": "input.messages",
    "tools": "input.tools",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
}


def test_columns_map_any_set_by_hand(tmp_path):
    pair = load_one(tmp_path, OPENAI, columns=NAMES)
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(TURNS.values())
    assert pair.tools == [{"name": "w"}]
    swapped = load_one(
        tmp_path, {"prompt": "Why?", **TEXTS}, columns={"chosen": "rejected", "rejected": "chosen"}
    )
    assert (swapped.chosen, swapped.rejected) == ("No.", "So.")
    ranked = {"q": "Why?", "answers": [{"text": "So."}, {"text": "No."}]}
    names = {"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.1.text"}
    pair = load_one(tmp_path, ranked, columns=names, format="turns")
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(TURNS.values())


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({**NAMES, "prompt": "input.turns"}, {}, 'maps "prompt" to "input.turns", which'),
        ({k: v for k, v in NAMES.items() if k != "tools"}, {}, '"input.tools" is not read by'),
        ({**NAMES, "promt": "input"}, {}, 'columns.promt: .* nearest is "prompt"'),
    ],
)  # fmt: skip
def test_what_columns_leave_over_is_not_lost(tmp_path, columns, options, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, OPENAI, columns=columns, **options)


def test_a_mapped_name_that_the_row_has_too(tmp_path):
    row = {"prompt": "x", "question": "Why?", **TEXTS}
    with pytest.raises(UserError, match='"columns" names a "prompt", but the row has'):
        load(tmp_path, row, columns={"prompt": "question"})
    found = load_one(tmp_path, row, columns={"prompt": "question"}, ignore=("prompt",))
    assert found.prompt == "Why?"


def test_a_spreadsheet_is_a_source(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('Question,Good,Bad\n"Why, so?","So\nit is.",No.\n', encoding="utf-8-sig")
    names = {"prompt": "Question", "chosen": "Good", "rejected": "Bad"}
    (pair,) = load_preferences([Source(str(path), format="turns", columns=names)], seed=0).train
    assert (pair.prompt, pair.chosen) == ([user("Why, so?")], [assistant("So\nit is.")])
    assert pair.where == f"{path}:2"


def test_parts_of_text_are_joined_and_others_refused(tmp_path):
    def row(*parts):
        return {**TURNS, "prompt": [{"role": "user", "content": list(parts)}]}

    texts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert load_one(tmp_path, row(*texts)).prompt == TURNS["prompt"]
    path = write(tmp_path / "a.jsonl", [TURNS, row(texts[0], {"type": "image_url", "url": "x"})])
    with pytest.raises(UserError, match=r'a.jsonl:2, prompt\[0\]: .* of the type "image_url" \(nu'):
        load_preferences([Source(path)], seed=0)


@pytest.mark.parametrize("tools", [5, ["a"], "{", {"name": "w"}, json.dumps([1])])
def test_tools_that_are_none(tmp_path, tools):
    with pytest.raises(UserError, match='rows.jsonl:1: "tools" is .*; expected a list'):
        load(tmp_path, {**TURNS, "tools": tools})


def test_a_field_next_to_a_renamed_one_can_be_ignored(tmp_path):
    row = {"about": {"ask": "Why?", "context": "The sky."}, **TEXTS}
    with pytest.raises(UserError, match='expected "ignore": ..about.context'):
        load(tmp_path, row, columns={"prompt": "about.ask"})
    found = load(tmp_path, row, columns={"prompt": "about.ask"}, ignore=("about.context",))
    assert [pair.prompt for pair in found.train] == ["Why?"]
    assert any(line.endswith('"about.context" of 1 rows is ignored') for line in found.remarks)
