"""The table of dataset formats: how rows of each are recognised, converted and described.

A format is a converter (pair_formats.py, answer_formats.py, or a reader of rated_rows.py) and a
line in `FORMATS`. docs/data.md shows a row of each.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from notus.curation.rated_rows import RATED
from notus.curation.rows import Row
from notus.data.answer_formats import (
    convert_completion,
    convert_conversation,
    convert_unpaired,
)
from notus.data.messages import Message, holds, read_messages
from notus.data.pair_formats import (
    QUESTIONS,
    convert_halos,
    convert_hh,
    convert_preference,
    convert_question,
    convert_saferlhf,
    convert_sharegpt,
    convert_strength,
    convert_swift,
    convert_turns,
)
from notus.data.pairs import PARTS, Outcome, Pair
from notus.errors import UserError

# The last four are the types and the reader that users of formats need with them.
__all__ = ["FORMATS", "ONLY_ANSWERS", "find_format", "PARTS", "Message", "Pair", "read_messages"]


class Format(NamedTuple):
    """A format's line in `FORMATS`.

    columns: those that a row of it has. example: a row, for messages and for docs/data.md. convert:
    None for rated responses, which only a curation turns into pairs. recognises: whether a row is
    of this format; None: never guessed, the source names it. reads: every column that may be read.
    """

    columns: tuple[str, ...]
    example: str
    convert: Callable[[Row, str], Outcome] | None
    recognises: Callable[[Row], bool] | None
    reads: frozenset[str]


def _format(
    convert: Callable[[Row, str], Outcome] | None,
    *columns: str,
    recognises: Callable[[Row], bool] | None = None,
    named: bool = False,
    reads: Iterable[str] = (),
    **example: Any,
) -> Format:
    """A format that is recognised by its columns; `named`: that its source has to name."""
    by_columns = None if named else lambda row: all(name in row for name in columns)
    shown = json.dumps(example, ensure_ascii=False)
    return Format(
        columns, shown, convert, recognises or by_columns, frozenset((*columns, *example, *reads))
    )


def _is_hh(row: Row) -> bool:
    return "prompt" not in row and all(
        isinstance(row.get(column), str) and row[column].startswith("\n\nHuman:")
        for column in ("chosen", "rejected")
    )


def _is_question(row: Row) -> bool:
    # Two bare answers to a question in another column would share a prompt only by accident.
    asks = any(row.get(name) is not None for name in QUESTIONS)
    return asks and "chosen" in row and "rejected" in row and not holds(row.get("prompt"))


def _is_unpaired(row: Row) -> bool:
    return "label" in row and ({"prompt", "completion"} <= row.keys() or "messages" in row)


def _ask(text: str = "Why?") -> list[Message]:
    return [{"role": "user", "content": text}]


def _say(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _from(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


# What `gather` makes, and a ready pair that a rule's choice replaces.
RATED_READS = ("responses", "ratings", "chosen", "rejected")
RATED_EXAMPLES: dict[str, dict[str, Any]] = {
    "ultrafeedback": {
        "instruction": "Why?",
        "completions": [
            {"response": text, "annotations": {"honesty": {"Rating": rating}}}
            for text, rating in (("So.", "5"), ("No.", "2"))
        ],
    },
    "rated": {"prompt": "Why?", "responses": ["So.", "No."], "ratings": [5, 2]},
    "simpo": {
        "prompt": "Why?",
        "all_generated_responses": ["So.", "No."],
        "all_rm_scores": [0.9, 0.1],
    },
    "distilabel": {"instruction": "Why?", "generations": ["So.", "No."], "ratings": [5, 2]},
    "nectar": {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": [{"answer": "So.", "rank": 1}, {"answer": "No.", "rank": 2}],
    },
    "helpsteer2": {"prompt": "Why?", "response": "So.", "helpfulness": 4},
    "halos-scored": {"prompt": _ask(), "output": _say("So."), "reward": 0.9},
}
STRENGTH = {
    "helpsteer2-preference": ("prompt", "response_1", "response_2", "preference_strength"),
    "helpsteer3": ("context", "response1", "response2", "overall_preference"),
}
SAFER = ("prompt", "response_0", "response_1")
ARGILLA = ("instruction", "chosen_response", "rejected_response")
REJECTED = {"rejected_response", "rejected_messages"}
TEXTS = {"chosen": "So.", "rejected": "No."}

# The first format that recognises a source's first row is taken, so the special ones come first.
FORMATS: dict[str, Format] = {
    **{
        name: _format(None, *RATED[name].columns, reads=RATED_READS, **example)
        for name, example in RATED_EXAMPLES.items()
    },
    "argilla": _format(
        partial(convert_turns, ARGILLA),
        *ARGILLA,
        **dict(zip(ARGILLA, ("Why?", "So.", "No."), strict=True)),
    ),
    "sharegpt": _format(
        convert_sharegpt,
        *("conversations", "chosen", "rejected"),
        conversations=[_from("human", "Why?")],
        chosen=_from("gpt", "So."),
        rejected=_from("gpt", "No."),
    ),
    "hh": _format(
        convert_hh,
        *("chosen", "rejected"),
        recognises=_is_hh,
        **{name: f"\n\nHuman: Why?\n\nAssistant: {text}" for name, text in TEXTS.items()},
    ),
    "question": _format(
        convert_question,
        *("question", "chosen", "rejected"),
        recognises=_is_question,
        reads=QUESTIONS,
        **{"system": "Be brief.", "question": "Why?", **TEXTS},
    ),
    "preference": _format(
        convert_preference,
        *("chosen", "rejected"),
        reads=("prompt",),
        **{"prompt": _ask(), "chosen": _say("So."), "rejected": _say("No.")},
    ),
    **{
        name: _format(
            partial(convert_strength, columns),
            *columns,
            **dict(
                zip(columns, (_ask() if "3" in name else "Why?", "So.", "No.", -2), strict=True)
            ),
        )
        for name, columns in STRENGTH.items()
    },
    "halos": _format(
        convert_halos,
        *("prompt", "output_A", "output_B", "label"),
        **{"prompt": _ask(), "output_A": _say("So."), "output_B": _say("No."), "label": 1},
    ),
    "swift": _format(
        convert_swift,
        *("messages", "rejected_response"),
        recognises=lambda row: "messages" in row and bool(REJECTED & row.keys()),
        reads=REJECTED,
        messages=_ask() + _say("So."),
        rejected_response="No.",
    ),
    "unpaired": _format(
        convert_unpaired,
        *("prompt", "completion", "label"),
        recognises=_is_unpaired,
        reads=("messages",),
        **{"prompt": "Why?", "completion": " So.", "label": True},
    ),
    "completion": _format(
        convert_completion, "prompt", "completion", prompt="Why?", completion=" So."
    ),
    "messages": _format(
        partial(convert_conversation, "messages"), "messages", messages=_ask() + _say("So.")
    ),
    "conversations": _format(
        partial(convert_conversation, "conversations"),
        "conversations",
        conversations=[_from("human", "Why?"), _from("gpt", "So.")],
    ),
    # The same columns as plain text's, so it is never guessed.
    "turns": _format(
        partial(convert_turns, PARTS), *PARTS, named=True, **{"prompt": "Why?", **TEXTS}
    ),
    # Two labels, of which the source has to choose one.
    **{
        f"saferlhf-{label}": _format(
            partial(convert_saferlhf, f"{label}_response_id"),
            *(*SAFER, f"{label}_response_id"),
            named=True,
            **dict(zip(SAFER, ("Why?", "So.", "No."), strict=True)),
            **{f"{label}_response_id": 0},
        )
        for label in ("better", "safer")
    },
}
ONLY_ANSWERS = ("completion", "messages", "conversations")  # formats for supervised fine-tuning


def find_format(name: str | None, row: Row, where: str, rated: bool = False) -> str:
    """The name of a row's format in `FORMATS`: the one asked for, or the first to recognise it.

    rated: whether ratings are preferred where a row holds both ratings and a ready pair. Raises
    UserError with the nearest formats if there is none.
    """
    if name is not None and name not in FORMATS:
        nearest = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f'; the nearest is "{nearest[0]}"' if nearest else ""
        raise UserError(
            f'{where}: no preference format "{name}"{hint}; known are {", ".join(FORMATS)}'
        )
    if name is not None:
        return name
    is_pair = holds(row.get("chosen")) and holds(row.get("rejected"))
    for known, entry in FORMATS.items():
        skipped = is_pair and not rated and entry.convert is None
        if entry.recognises and entry.recognises(row) and not skipped:
            return known
    raise UserError(*_unknown(row, where))


def _unknown(row: Row, where: str) -> list[str]:
    """The lines about a row of no known format: the nearest ones, and what is missing."""
    to_name = [n for n, f in FORMATS.items() if not f.recognises and set(f.columns) <= row.keys()]
    if to_name:
        names = " or ".join(f'"format": "{name}"' for name in to_name)
        return [f"{where}: the columns fit {len(to_name)} formats; give the source {names}"]

    def likeness(entry: Format) -> float:
        """The share of a format's columns that the row has, or nearly; the larger of equal ones."""
        has = [
            1.0 if column in row else 0.5 * bool(difflib.get_close_matches(column, row, 1, 0.65))
            for column in entry.columns
        ]
        return sum(has) / len(has) + 0.1 * sum(has)

    texts = sum(isinstance(value, str) for value in row.values())

    def distance(name: str) -> tuple[float, ...]:
        """Nearest is what lacks one column of several; then for three texts or more their pair."""
        columns = FORMATS[name].columns
        found = sum(column in row for column in columns)
        lacks_one = 2 <= found == len(columns) - 1
        is_pair = name == "turns" and texts >= len(PARTS)
        others = -likeness(FORMATS[name]), not FORMATS[name].convert, name != "turns"
        return not lacks_one, not is_pair, *others

    # Of formats with the same columns the last, and of equally near ones a ready pair, "turns".
    known = {entry.columns: name for name, entry in FORMATS.items()}.values()
    nearest = sorted(known, key=distance)[:2]
    lines = [f"{where}: not a known preference format; found the columns {', '.join(row)}"]
    for name in nearest:
        entry = FORMATS[name]
        missing = ", ".join(column for column in entry.columns if column not in row)
        lines += [f'near is "{name}" without {missing}; a row of it:', entry.example]
    named = "" if FORMATS[nearest[0]].recognises else f'"format": "{nearest[0]}", '
    columns = json.dumps(dict.fromkeys(FORMATS[nearest[0]].columns, "..."))
    lines += [
        "if the columns have other names, say so in the source (dots lead into objects):",
        f'{named}"columns": {columns}',
        "docs/your-data.md goes through an example; docs/data.md has every format",
    ]
    return lines
