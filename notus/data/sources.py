"""One source's rows -> pairs: by its format's converter, or by its curation."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from notus.curation.curate import (
    Curation,
    Screen,
    check_ready,
    check_rule,
    curate_row,
    screen_ready,
)
from notus.curation.decontamination import Dropped, Prompt
from notus.curation.rated_rows import RATED, RatedRow
from notus.curation.ratings import Choice
from notus.curation.rows import LONGEST_LINE, PlacedRow, Row, read_rows
from notus.data.answer_formats import convert_labelled, pair_up
from notus.data.columns import (
    check_names,
    complete,
    rename,
    unused,
    without_columns,
    without_keys,
)
from notus.data.formats import FORMATS, ONLY_ANSWERS, find_format
from notus.data.pairs import Pair, labels_of, question_pair
from notus.errors import UserError
from notus.strict import Count, Positive, Text


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of preferences."""

    # a .json, .jsonl, .csv or .parquet file, a saved dataset, a folder of these, or a hub id
    path: Text
    split: Text | None = None  # null: "train", where the dataset has splits
    weight: Positive = 1.0  # times its rows enter an epoch: 2 = twice, 0.5 = a random half
    longest_line: Count = LONGEST_LINE  # characters of a line of JSON; a longer one is refused
    format: Text | None = None  # a name from docs/data.md; null: seen from the rows
    # the names that the formats know -> the columns that the rows have, as {"prompt": "question"};
    # "a.b" is the field b of the object a; null: the columns have names that a format knows
    columns: dict[str, str] | None = None
    # columns, or keys of messages, that may change a prompt or a response and are left out anyway
    ignore: tuple[Text, ...] | None = None
    curation: Curation | None = None  # null: the rows are pairs, and all of them enter


@dataclass
class Reading:
    """Counts and columns of a source's rows, gathered while they are read, for the log.

    columns: of any row, in order. ignored: how many rows held what the source ignores, by name.
    """

    path: str
    format: str = ""
    rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """A line on what was read and which columns had no use, and one for each ignored name."""
        found = [f'{self.path}: {self.rows:,} rows of the format "{self.format}"']
        if left := unused([*self.columns], self.format):
            found[0] += f"; columns without use: {', '.join(name or '(no name)' for name in left)}"
        for name, rows in self.ignored.items():
            found.append(f'{self.path}: "{name}" of {rows:,} rows is ignored')
        return found


class Found(NamedTuple):
    """A row of a source: what it holds, and what becomes of it.

    rated: its responses, if it is a row of rated ones. outcomes: its pairs, with marks applied,
    each with the reason why it is left out or None; a reason without a pair where the row gives
    none. Of unpaired rows only the outcomes are known, without `row`.
    """

    where: str
    row: Row
    rated: RatedRow | None
    outcomes: list[tuple[Pair | None, Dropped | None]]


def read_pairs(
    source: Source, seed: int, responses_only: bool = False, reading: Reading | None = None
) -> Iterator[Pair | Dropped]:
    """A source's rows in file order, each as its pairs or as the reason why it gives none.

    responses_only: pairs have no rejected response, and each answer of a conversation is a pair.
    reading: is filled.
    """
    for found in read_found(source, seed, responses_only=responses_only, reading=reading):
        for pair, dropped in found.outcomes:
            if dropped:
                yield dropped
            else:
                yield replace(pair, rejected=type(pair.rejected)()) if responses_only else pair


def read_found(
    source: Source,
    seed: int,
    held_out: Sequence[str] = (),
    responses_only: bool = False,
    reading: Reading | None = None,
) -> Iterator[Found]:
    """A source's rows in file order; held_out: as for `Screen`, of a source with a curation."""
    reading = reading or Reading(source.path)
    rows = prepared(source, reading)
    where, row = first = next(rows)
    rule = source.curation.rule if source.curation else None
    name = reading.format = find_format(source.format, row, where, rated=rule is not None)
    _check_use(source, name, where, responses_only)
    rows = chain([first], rows)
    if name in RATED and RATED[name].gather:
        rows = RATED[name].gather(rows)
    if name == "unpaired" and not responses_only:
        for pair in pair_up(_labelled(rows)):
            if isinstance(pair, Dropped):
                yield Found("", {}, None, [(None, pair)])
            else:
                yield Found(pair.where, {}, None, [(pair, None)])
        return
    screen = Screen(source.curation, held_out) if source.curation else None
    for where, row in rows:
        if name in RATED:
            rated = RATED[name].read(row, where)
            choices = curate_row(rated, row, where, source.curation, screen, seed)
            outcomes = [_pair_of(choice, rated.prompt, where) for choice in choices]
            if responses_only:  # pairs of a row have the same chosen response
                kept = next((one for one in outcomes if one[0]), None)
                outcomes = [one for one in outcomes if one is kept or not one[0]]
        else:
            rated, converted = None, FORMATS[name].convert(row, where)
            if isinstance(converted, Dropped):
                outcomes = [(None, converted)]
            elif screen:
                outcomes = [screen_ready(converted[0], name, row, screen)]
            else:
                outcomes = [(pair, None) for pair in converted]
        finished = [
            (pair and replace(complete(pair, name, row, where), labels=labels_of(row)), reason)
            for pair, reason in outcomes
        ]
        yield Found(where, row, rated, finished)
    if screen:
        screen.marks.require_all_found()


def prepared(source: Source, reading: Reading) -> Iterator[PlacedRow]:
    """The rows, with the names that the formats know and without what is ignored.

    reading: is filled. Raises UserError as `check_names`, `read_rows` and `rename` do.
    """
    check_names(source.columns or {}, source.path)
    for where, row in read_rows(source.path, source.split, source.longest_line):
        ignore = source.ignore or ()
        row = without_columns(row, ignore, reading.ignored) if ignore else row
        if source.columns:  # whose objects may hold what is ignored
            row = rename(row, source.columns, where)
            inside = [name for name in ignore if name not in source.columns]
            row = without_columns(row, inside, reading.ignored)
        row = without_keys(row, ignore, reading.ignored) if ignore else row
        reading.rows += 1
        reading.columns |= dict.fromkeys(row)
        yield where, row


def _labelled(rows: Iterator[PlacedRow]) -> Iterator[tuple[PlacedRow, Pair]]:
    for where, row in rows:
        (pair,) = convert_labelled(row, where)
        pair = replace(complete(pair, "unpaired", row, where), labels=labels_of(row))
        yield (where, row), pair


def _pair_of(
    choice: Choice | Dropped, prompt: Prompt, where: str
) -> tuple[Pair | None, Dropped | None]:
    """The pair of a row of rated responses, or the reason why there is none."""
    if isinstance(choice, Dropped):
        return None, choice
    texts = choice.chosen["response"], choice.rejected["response"]
    scores = choice.chosen_score, choice.rejected_score
    return question_pair(prompt, *texts, where, scores), None


def _check_use(source: Source, name: str, where: str, responses_only: bool) -> None:
    """Raise UserError when the format `name` does not fit the curation or the objective."""
    rule = source.curation.rule if source.curation else None
    if name in ONLY_ANSWERS and not responses_only:
        raise UserError(
            f'{where}: found answers without rejected ones (the format "{name}"); expected pairs '
            '(only supervised fine-tuning, "train": {"objective": "sft"}, is without)'
        )
    if FORMATS[name].convert is None:
        check_rule(source.path, name, rule)
    elif source.curation:
        check_ready(source.path, name, source.curation)
