"""One source's rows -> pairs: by its format's converter, or by its curation."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from notus.curation.curate import Curation, Screen, check_ready, check_rule, curate_row
from notus.curation.decontamination import Dropped
from notus.curation.rated_rows import RATED
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
    """What was seen of a source's rows while they were read, for the log.

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
            found[0] += f"; columns without use: {', '.join(left)}"
        for name, rows in self.ignored.items():
            found.append(f'{self.path}: "{name}" of {rows:,} rows is ignored')
        return found


def read_pairs(
    source: Source, seed: int, responses_only: bool = False, reading: Reading | None = None
) -> Iterator[Pair | Dropped]:
    """A source's rows in file order, each as its pairs or as the reason why it gives none.

    responses_only: pairs have no rejected response, and each answer of a conversation is a pair.
    reading: is filled.
    """
    reading = reading or Reading(source.path)
    check_names(source.columns or {}, source.path)
    rows = _prepared(source, reading)
    where, row = first = next(rows)
    rule = source.curation.rule if source.curation else None
    name = reading.format = find_format(source.format, row, where, rated=rule is not None)
    _check_use(source, name, where, responses_only)
    rows = chain([first], rows)
    if name in RATED and RATED[name].gather:
        rows = RATED[name].gather(rows)
    if name == "unpaired" and not responses_only:
        outcomes = pair_up(_labelled(rows))
    else:
        outcomes = _outcomes(source, name, rows, seed, responses_only)
    for outcome in outcomes:
        if responses_only and isinstance(outcome, Pair):
            outcome = replace(outcome, rejected=type(outcome.rejected)())
        yield outcome


def _prepared(source: Source, reading: Reading) -> Iterator[PlacedRow]:
    """The rows, with the names that the formats know and without what is ignored."""
    for where, row in read_rows(source.path, source.split, source.longest_line):
        ignore = source.ignore or ()
        row = without_columns(row, ignore, reading.ignored) if ignore else row
        row = rename(row, source.columns, where) if source.columns else row
        row = without_keys(row, ignore, reading.ignored) if ignore else row
        reading.rows += 1
        reading.columns |= dict.fromkeys(row)
        yield where, row


def _labelled(rows: Iterator[PlacedRow]) -> Iterator[tuple[PlacedRow, Pair]]:
    for where, row in rows:
        (pair,) = convert_labelled(row, where)
        pair = replace(complete(pair, "unpaired", row, where), labels=labels_of(row))
        yield (where, row), pair


def _outcomes(
    source: Source, name: str, rows: Iterator[PlacedRow], seed: int, responses_only: bool
) -> Iterator[Pair | Dropped]:
    """Each row's pairs, and the reasons for those that it does not give."""
    convert, curation = FORMATS[name].convert, source.curation
    screen = None if curation is None else Screen(curation)
    for where, row in rows:
        if convert is None:
            outcomes = list(_curated(name, row, where, curation, screen, seed))
            if responses_only:  # pairs of a row have the same chosen response
                pairs = [one for one in outcomes if isinstance(one, Pair)]
                outcomes = [one for one in outcomes if one not in pairs[1:]]
        else:
            outcome = convert(row, where)
            if screen and not isinstance(outcome, Dropped):
                prompt = outcome[0].prompt
                left_out = screen.refuse(prompt, row, where) or screen.repeated(prompt, where)
                outcome = left_out or outcome
            outcomes = [outcome] if isinstance(outcome, Dropped) else outcome
        for outcome in outcomes:
            if isinstance(outcome, Pair):
                pair = complete(outcome, name, row, where)
                yield replace(pair, labels=labels_of(row))
            else:
                yield outcome


def _curated(
    name: str, row: Row, where: str, curation: Curation, screen: Screen, seed: int
) -> Iterator[Pair | Dropped]:
    """The pairs that the curation's rule makes of a row of rated responses."""
    rated = RATED[name].read(row, where)
    for outcome in curate_row(rated, row, where, curation, screen, seed):
        if isinstance(outcome, Dropped):
            yield outcome
            continue
        chosen, rejected = outcome.chosen["response"], outcome.rejected["response"]
        scores = (outcome.chosen_score, outcome.rejected_score)
        yield question_pair(rated.prompt, chosen, rejected, where, scores)


def _check_use(source: Source, name: str, where: str, responses_only: bool) -> None:
    """Raise UserError when the format `name` does not fit the curation or the objective."""
    rule = source.curation.rule if source.curation else None
    if name in ONLY_ANSWERS and not responses_only:
        raise UserError(
            f'{where}: found answers without rejected ones (the format "{name}"); expected pairs, '
            'or "train": {"objective": "sft"}'
        )
    if FORMATS[name].convert is None:
        check_rule(source.path, name, rule)
    elif source.curation:
        check_ready(source.path, name, rule)
