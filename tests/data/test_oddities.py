import json

import pytest

from notus.data.oddities import oddities
from notus.data.preferences import Source, load_preferences
from notus.errors import UserError

TEXT = {"prompt": "Where is Rome?", "chosen": "In Italy.", "rejected": "In Spain."}
CHAT = {
    "prompt": [{"role": "user", "content": "Where is Oslo?"}],
    "chosen": [{"role": "assistant", "content": "In Norway."}],
    "rejected": [{"role": "assistant", "content": "In Peru."}],
}


def warnings(folder, rows, has_template=True):
    """Those on a file of these rows."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = [Source(path=str(file))]
    pairs = load_preferences(sources, seed=0).train
    return [line.replace(f"{folder}/", "") for line in oddities(sources, pairs, has_template)]


def test_text_despite_a_chat_template(tmp_path):
    (line,) = warnings(tmp_path, [TEXT, TEXT])
    assert line.startswith("pairs.jsonl: 2 rows are text, first pairs.jsonl:1, and the tokenizer")
    assert line.endswith('give the source "format": "turns" if they are turns of a chat')
    assert warnings(tmp_path, [TEXT, TEXT], has_template=False) == []


def test_messages_are_what_they_seem(tmp_path):
    assert warnings(tmp_path, [CHAT, CHAT]) == []


@pytest.mark.parametrize("has_template", [True, False])
def test_text_among_messages(tmp_path, has_template):
    (line,) = warnings(tmp_path, [CHAT, CHAT, TEXT], has_template)
    assert line.startswith(
        "pairs.jsonl mixes 1 rows of text, first pairs.jsonl:3, and 2 of messages, first "
        "pairs.jsonl:1: "
    )


def test_columns_that_change(tmp_path):
    renamed = {
        ("source_id" if key == "id" else key): value for key, value in (CHAT | {"id": 1}).items()
    }
    (line,) = warnings(tmp_path, [CHAT | {"id": 0}, CHAT | {"id": 1}, renamed, CHAT])
    assert line == (
        "pairs.jsonl:3 has other columns than pairs.jsonl:1: added source_id, missing id"
    )


def test_a_line_as_long_as_the_source_allows(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{json.dumps(TEXT)}\n")
    source = Source(path=str(file), longest_line=len(json.dumps(TEXT)) - 1)
    with pytest.raises(UserError, match="longest_line"):
        list(oddities([source], [], has_template=False))
