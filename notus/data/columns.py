"""The columns of a row besides its format's own: renamed, left out on request, added, or refused.

Nothing that may change a prompt or a response is dropped silently. `complete` puts the system
turn, the tools and the options of the chat template into the pair, whatever its format, and refuses
a row that holds more. Columns of metadata (ids, names of models, scores) are free.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from notus.curation.decontamination import Dropped
from notus.curation.rows import Row, read_text
from notus.data.answer_formats import CONVERSATIONS
from notus.data.formats import FORMATS
from notus.data.messages import holds, read_template_options, read_tools, with_system
from notus.data.pair_formats import QUESTIONS
from notus.data.pairs import LABELS, PARTS, SCORE_COLUMNS, Outcome, Pair
from notus.errors import UserError

SYSTEM_COLUMNS = ("system", "system_prompt")
ADDED = (*SYSTEM_COLUMNS, "tools", "chat_template_kwargs")
# Columns that may change a prompt or a response. A row in which one of them holds something that
# its format does not read, and that does not repeat what it reads, is refused.
MEANINGFUL = {
    *ADDED,
    *QUESTIONS,
    *PARTS,
    *CONVERSATIONS,
    *("completion", "completions", "responses", "rejected_response", "rejected_messages"),
    *("context", "history", "documents", "functions", "function_call", "tool_calls"),
    *("system_message", "reasoning_content", "thinking"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
# Columns that are read without being the text of a pair.
KNOWN = {*LABELS, *(column for columns in SCORE_COLUMNS for column in columns), "metadata"}


def check_names(columns: Mapping[str, str], path: str) -> None:
    """Raise UserError for a name on the left of a source's `columns` that no format knows."""
    known = {*KNOWN, *ADDED, *(name for entry in FORMATS.values() for name in entry.reads)}
    for name in columns.keys() - known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f'the nearest is "{nearest[0]}"' if nearest else f"known are {', '.join(known)}"
        raise UserError(f"{path}: columns.{name}: no format knows this name; {hint}")


def rename(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """The row with the columns that the formats know, `columns` from these to the row's own names.

    "a.b" is the field b of the object a, and "a.0" the first item of the list a. An object's other
    fields become columns "a.c". Raises UserError for a name that the row does not have, and for a
    known name that the row has too.
    """
    found = {}
    for known, path in columns.items():
        found[known] = _value_at(row, path, f'{where}: "columns" maps "{known}" to "{path}"')
    rest = dict(row)
    for path in columns.values():
        _take_out(rest, path)
    twice = found.keys() & rest.keys()
    if twice:
        raise UserError(
            f'{where}: "columns" names a "{min(twice)}", but the row has a column of that name too'
            f'; expected "ignore": ["{min(twice)}"] in the source, or one of the two'
        )
    return rest | found


def _value_at(row: Row, path: str, problem: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{problem}, which the row does not have; found the columns {', '.join(row)}"
            ) from None
    return value


def _take_out(rest: Row, path: str) -> None:
    """Remove what is at `path`; what else the objects on the way hold becomes columns."""
    prefix, names = "", path.split(".")
    if path in rest:
        del rest[path]
        return
    for i, name in enumerate(names[:-1]):
        prefix = f"{prefix}.{name}" if prefix else name
        value = rest.pop(prefix, None)
        if isinstance(value, dict):
            rest |= {f"{prefix}.{inner}": one for inner, one in value.items()}
        elif value is not None and i == len(names) - 2:
            return  # a list, of which other columns may name other items
    rest.pop(f"{prefix}.{names[-1]}" if prefix else names[-1], None)


def without_columns(row: Row, ignore: Sequence[str], counts: Counter[str]) -> Row:
    """The row without the columns named in `ignore`.

    counts: is increased for each name that held something.
    """
    counts.update(name for name in ignore if holds(row.get(name)))
    return {name: value for name, value in row.items() if name not in ignore}


def without_keys(row: Row, ignore: Sequence[str], counts: Counter[str]) -> Row:
    """The row, its messages without the keys named in `ignore`; `counts` as above."""
    found = set()

    def without(message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        found.update(name for name in ignore if holds(message.get(name)))
        return {name: value for name, value in message.items() if name not in ignore}

    kept = {
        column: [without(one) for one in value] if isinstance(value, list) else without(value)
        for column, value in row.items()
    }
    counts.update(found)
    return kept


def complete_all(outcome: Outcome, name: str, row: Row, where: str) -> Outcome:
    """`complete` for every pair of a row."""
    if isinstance(outcome, Dropped):
        return outcome
    return [complete(pair, name, row, where) for pair in outcome]


def complete(pair: Pair, name: str, row: Row, where: str) -> Pair:
    """The pair of a row in the format `name`, with the row's system turn, tools and options.

    Raises UserError if the row has a column of `MEANINGFUL` that would be lost.
    """
    is_text, reads = isinstance(pair.prompt, str), FORMATS[name].reads
    for column in row:
        last = column.rpartition(".")[2]
        if last not in MEANINGFUL or column in reads or not holds(row[column]):
            continue
        if column not in ADDED:
            _check_repeated(column, pair, name, row, where)
        elif is_text and str(row[column]).strip():
            raise UserError(
                f'{where}: "{column}" has no place in plain text; give the source "format": '
                f'"turns" (or another of conversations), or "ignore": ["{column}"]'
            )
    if is_text:
        return pair
    prompt = pair.prompt
    for column in SYSTEM_COLUMNS:
        if row.get(column) is not None and read_text(row, column, where).strip():
            prompt = with_system(prompt, row[column], where)
    tools, options = read_tools(row, where), read_template_options(row, where)
    return replace(pair, prompt=prompt, tools=tools, template_options=options)


def _check_repeated(column: str, pair: Pair, name: str, row: Row, where: str) -> None:
    """Raise UserError unless a column is a text of the pair, or equal to a column that is read."""
    value = row[column]
    if isinstance(value, str):
        texts = [
            text
            for part in (pair.prompt, pair.chosen, pair.rejected)
            for text in ([part] if isinstance(part, str) else [one["content"] for one in part])
        ]
        repeats = value.strip() in map(str.strip, texts)
    else:
        repeats = value in [row.get(used) for used in FORMATS[name].reads]
    if not repeats:
        raise UserError(
            f'{where}: "{column}" is not read by the format "{name}" and may belong to the prompt '
            f'or a response; expected "ignore": ["{column}"] in the source, or "columns" that '
            "say what it is"
        )


def unused(names: Sequence[str], name: str) -> list[str]:
    """The columns among `names` that a row of the format `name` is read without."""
    reads = FORMATS[name].reads | KNOWN | {*ADDED}
    return [column for column in names if column not in reads]
