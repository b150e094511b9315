"""Sources -> preference pairs: mixed by weight, held-out rows set aside, unusable pairs dropped.

Each row of a source is converted by its format's function (formats.py) or by its curation, the
sources are mixed, held-out rows are drawn, and unusable pairs are dropped with a named reason.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from notus.curation.curate import HELD_OUT_PROMPT, Curation, Screen, curate_row, reason_to_drop
from notus.curation.decontamination import Dropped, SeenPrompts, whole_text
from notus.curation.marks import MARKED, fingerprint
from notus.curation.ratings import READ_RATED, Choice, RatedRow
from notus.curation.rows import LONGEST_LINE, Row, read_rows
from notus.data.formats import (
    FORMATS,
    ONLY_ANSWERS,
    Pair,
    find_format,
    labels_of,
    pair_up,
    single_turn_pair,
)
from notus.errors import UserError
from notus.strict import Count, Positive, Text


class Preferences(NamedTuple):
    """Pairs in training order, held-out pairs, and how many rows were dropped, by reason."""

    train: list[Pair]
    holdout: list[Pair]
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of preferences."""

    path: Text  # a .json, .jsonl or .parquet file, a saved dataset, a folder of these, or a hub id
    split: Text | None = None  # null: "train", where the dataset has splits
    weight: Positive = 1.0  # times its rows enter an epoch: 2 = twice, 0.5 = a random half
    longest_line: Count = LONGEST_LINE  # characters of a line of JSON; a longer one is refused
    format: Text | None = None  # a name from notus/data/formats.py; null: seen from the rows
    curation: Curation | None = None  # null: the rows are pairs, and all of them enter


# --------------------------------------------------------------------------- one source's rows


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


def read_pairs(source: Source, seed: int, responses_only: bool = False) -> Iterator[Pair | Dropped]:
    """A source's rows in file order, each as its pairs or as the reason why it gives none.

    responses_only: pairs have no rejected response, and each answer of a conversation is a pair.
    """
    for found in read_found(source, seed, responses_only=responses_only):
        for pair, dropped in found.outcomes:
            if dropped:
                yield dropped
            else:
                yield replace(pair, rejected=type(pair.rejected)()) if responses_only else pair


def read_found(
    source: Source, seed: int, held_out: Sequence[str] = (), responses_only: bool = False
) -> Iterator[Found]:
    """A source's rows in file order; held_out: as for `Screen`, of a source with a curation."""
    rows = read_rows(source.path, source.split, source.longest_line)
    where, row = first = next(rows)
    name = find_format(source.format, row, where)
    _check_use(source, name, where, responses_only)
    convert, curation = FORMATS[name].convert, source.curation
    screen = None if curation is None else Screen(curation, held_out)
    rows = chain([first], rows)
    if name == "unpaired" and not responses_only:
        for pair in pair_up(rows):
            if isinstance(pair, Dropped):
                yield Found("", {}, None, [(None, pair)])
            else:
                yield Found(pair.where, {}, None, [(pair, None)])
        return
    for where, row in rows:
        rated = None
        if convert is None:
            rated = READ_RATED[name](row, where)
            choices = curate_row(rated, row, where, curation, screen, seed)
            outcomes = [_pair_of(choice, rated.prompt, where) for choice in choices]
            if responses_only:  # pairs of a row have the same chosen response
                first = next((one for one in outcomes if one[0]), None)
                outcomes = [one for one in outcomes if one is first or not one[0]]
        else:
            converted = convert(row, where)
            if isinstance(converted, Dropped):
                outcomes = [(None, converted)]
            elif screen:
                outcomes = [_screened(converted[0], row, screen)]
            else:
                outcomes = [(pair, None) for pair in converted]
        labels = labels_of(row)
        labelled = [(pair and replace(pair, labels=labels), reason) for pair, reason in outcomes]
        yield Found(where, row, rated, labelled)
    if screen:
        screen.marks.require_all_found()


def _pair_of(
    choice: Choice | Dropped, prompt: str, where: str
) -> tuple[Pair | None, Dropped | None]:
    """What becomes of a row of rated responses: a pair, or the reason why not."""
    if isinstance(choice, Dropped):
        return None, choice
    texts = choice.chosen["response"], choice.rejected["response"]
    scores = choice.chosen_score, choice.rejected_score
    return single_turn_pair(prompt, *texts, where, scores), None


def _screened(pair: Pair, row: Row, screen: Screen) -> tuple[Pair, Dropped | None]:
    """A ready pair with its mark applied, and why it is left out."""
    mark = screen.marks.find(pair.prompt, (pair.chosen, pair.rejected), pair.where)
    if mark and mark.mark == "drop":
        return pair, Dropped(MARKED)
    if mark and mark.mark == "swap" and mark.responses[0] == fingerprint(pair.chosen):
        pair = replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_score=pair.rejected_score,
            rejected_score=pair.chosen_score,
        )
    refused = screen.refuse(pair.prompt, row, pair.where)
    return pair, refused or screen.repeated(pair.prompt, pair.where)


def _check_use(source: Source, name: str, where: str, responses_only: bool) -> None:
    """Raise UserError when the format `name` does not fit the curation or the objective."""
    rule = source.curation.rule if source.curation else None
    if name in ONLY_ANSWERS and not responses_only:
        raise UserError(
            f'{where}: found answers without rejected ones (the format "{name}"); expected pairs, '
            'or "train": {"objective": "sft"}'
        )
    if FORMATS[name].convert is None:
        if rule is None:
            raise UserError(
                f"{source.path}: the rows hold ratings and no pairs yet; "
                'give the source "curation": {"rule": "mean-rating"} '
                "(eval.py preferences: --rule mean-rating)"
            )
    elif source.curation and name in ("unpaired", *ONLY_ANSWERS):
        raise UserError(
            f'{source.path}: "curation" is not for rows of one response each (the format '
            f'"{name}"); remove it'
        )
    elif rule is not None:
        raise UserError(
            f'{source.path}: "curation" does nothing with a rule for rows in the format "{name}", '
            "which are pairs already; remove it"
        )


# -------------------------------------------------------------------------------------- mixing


def weighted_rows(count: int, weight: float, seed: int, source_index: int) -> np.ndarray:
    """Indices (int64) of the rows that enter an epoch: each of them `weight` times.

    The integer part of the weight repeats the source in file order; the rest is a random part of
    it, drawn by (seed, source_index), also in file order.
    """
    repeats, fraction = divmod(weight, 1)
    generator = np.random.default_rng((seed, source_index))
    part = np.sort(generator.permutation(count)[: round(fraction * count)])
    return np.concatenate([np.tile(np.arange(count), int(repeats)), part])


def split_holdout(count: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices into `count` rows, int64, in the order they are to be used.

    Equal to `datasets`' shuffle(seed) followed by train_test_split(test_size=holdout, seed=seed),
    which is how Notus set aside 2,000 of its 63,619 rows; both draw the same permutation. With
    holdout 0 all rows keep their order.
    """
    if holdout == 0:
        return np.arange(count), np.arange(0)
    permutation = np.random.default_rng(seed).permutation(count)
    shuffled_twice = permutation[permutation]
    return shuffled_twice[holdout:], shuffled_twice[:holdout]


MOST_ROWS = 10**8  # of a source in an epoch, all of them held in memory
HELD_OUT_COPY = "copy of a held-out row"


def find_leaks(pairs: Iterable[Pair], held_out: Iterable[Pair]) -> list[str | None]:
    """For each pair, the origin of a held-out pair with (nearly) the same prompt, or None.

    `SeenPrompts` defines "nearly".
    """
    seen = SeenPrompts()
    for pair in held_out:
        seen.add(whole_text(pair.prompt), pair.where)
    return [seen.find(whole_text(pair.prompt)) for pair in pairs]


def load_preferences(
    sources: Sequence[Source],
    *,
    seed: int,
    holdout: int = 0,
    holdout_seed: int | None = None,
    evaluation: Sequence[Pair] = (),
    drop_leaks: bool = False,
    responses_only: bool = False,
) -> Preferences:
    """Read, convert and mix the sources, set `holdout` rows aside, and drop what is unusable.

    A source's rows enter `weight` times, in the order of the sources; those that curation leaves
    out do not, as the published curated sets were split into train and test without them. The
    held-out rows are drawn by `holdout_seed` (None: `seed`) from all entered rows before any is
    dropped, so that dropping does not change the draw. A copy of a held-out row (weight above 1) is
    dropped from training and, with `drop_leaks`, so is every row whose prompt is, or nearly is,
    that of a held-out row or of one of the `evaluation` pairs. `dropped` counts rows as often as
    they enter, and once if curation leaves them out. responses_only (supervised fine-tuning): only
    chosen responses are read, and each answer of a conversation is a row of its own. Raises
    UserError if a source cannot be read or converted, `holdout` takes every row, or no pair is
    left.
    """
    rows: list[Pair | Dropped] = []
    dropped: Counter[str] = Counter()
    entered = []
    for index, source in enumerate(sources):
        first = len(rows)
        for found in read_pairs(source, seed, responses_only):
            if isinstance(found, Pair) or found.is_row:
                rows.append(found)
            else:
                dropped[found.reason] += 1
        if source.weight * (len(rows) - first) > MOST_ROWS:
            raise UserError(
                f"{source.path}: {len(rows) - first:,} rows with the weight {source.weight:g}; "
                f"expected at most {MOST_ROWS:,} rows in an epoch"
            )
        entered.append(first + weighted_rows(len(rows) - first, source.weight, seed, index))
    order = np.concatenate(entered)
    if holdout and holdout >= len(order):
        raise UserError(
            f"data.eval.holdout is {holdout}, but the sources hold only {len(order)} rows; "
            "expected fewer than there are"
        )

    def usable(indices: np.ndarray) -> list[Pair]:
        """The pairs worth training on; the other rows are counted by reason."""
        pairs = []
        for row in (rows[index] for index in indices):
            if isinstance(row, Dropped):
                reason = row.reason
            else:
                rejected = None if responses_only else row.rejected
                reason = reason_to_drop(row.prompt, row.chosen, rejected)
            if reason is None:
                pairs.append(row)
            else:
                dropped[reason] += 1
        return pairs

    split_seed = seed if holdout_seed is None else holdout_seed
    train, held_out = (order[part] for part in split_holdout(len(order), holdout, split_seed))
    is_copy = np.isin(train, held_out)
    dropped += Counter({HELD_OUT_COPY: int(is_copy.sum())})
    train_pairs, holdout_pairs = usable(train[~is_copy]), usable(held_out)
    if responses_only:  # the answers of one conversation stay together
        conversations = {pair.where for pair in holdout_pairs}
        apart = [pair for pair in train_pairs if pair.where not in conversations]
        dropped += Counter({HELD_OUT_COPY: len(train_pairs) - len(apart)})
        train_pairs = apart
    if drop_leaks:
        leaks = find_leaks(train_pairs, [*holdout_pairs, *evaluation])
        train_pairs = [pair for pair, leak in zip(train_pairs, leaks, strict=True) if leak is None]
        dropped += Counter({HELD_OUT_PROMPT: len(leaks) - len(train_pairs)})
    if not train_pairs or (holdout and not holdout_pairs):
        name = "held out" if train_pairs else "left to train on"
        paths = ", ".join(source.path for source in sources)
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{paths}: no pair is {name}; dropped: {counts or 'none'}")
    return Preferences(train_pairs, holdout_pairs, dict(dropped))
