"""Rows that are read, though perhaps not as meant: warnings of `--dry-run` and `eval.py`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from notus.curation.rows import read_rows
from notus.data.formats import Pair
from notus.data.preferences import Source


def oddities(sources: Sequence[Source], pairs: Sequence[Pair], has_template: bool) -> Iterator[str]:
    """A line for each: text despite a chat template, text among messages, changing columns.

    pairs: as they were read from the sources. has_template: whether the tokenizer has one.
    """
    kinds: dict[str, dict[type, list[Pair]]] = {}
    for pair in pairs:
        file = pair.where.rpartition(":")[0]
        kinds.setdefault(file, {}).setdefault(type(pair.prompt), []).append(pair)
    for file, found in kinds.items():
        text, messages = found.get(str, []), found.get(list, [])
        if text and messages:
            yield (
                f"{file} mixes {len(text):,} rows of text, first {text[0].where}, and "
                f"{len(messages):,} of messages, first {messages[0].where}: only messages go "
                "through the chat template"
            )
        elif text and has_template:
            yield (
                f"{file}: {len(text):,} rows are text, first {text[0].where}, and the tokenizer "
                'has a chat template, which text does not go through; give the source "format": '
                '"turns" if they are turns of a chat'
            )
    for source in sources:
        yield from _changing_columns(source)


def _changing_columns(source: Source) -> Iterator[str]:
    """The first row of a local source whose columns are not those of its first row."""
    if not Path(source.path).expanduser().exists():
        return  # a data set on the hub has the same columns in every row
    rows = read_rows(source.path, source.split, source.longest_line)
    where, first = next(rows)
    for place, row in rows:
        if row.keys() != first.keys():
            added = ", ".join(sorted(row.keys() - first.keys())) or "nothing"
            gone = ", ".join(sorted(first.keys() - row.keys())) or "nothing"
            yield f"{place} has other columns than {where}: added {added}, missing {gone}"
            return
