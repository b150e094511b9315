"""Rows of rated, scored or ranked responses, in the published schemas, read into one shape."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from notus.curation.rows import PlacedRow, Row, optional_text, read_text, reject_column
from notus.data.messages import (
    USER,
    Message,
    answered,
    helpsteer_turns,
    hh_turns,
    read_messages,
)
from notus.errors import UserError

Completion = dict[str, Any]


class RatedRow(NamedTuple):
    """A prompt with several rated completions; source: the dataset that it is from, if known.

    prompt: text, or messages where it is a conversation of several turns. A completion has its
    `response` as text, and what a rule of ratings.py reads: `annotations`, `overall_score`,
    `rating`.
    """

    prompt: str | list[Message]
    completions: list[Completion]
    source: str | None


def read_ultrafeedback(row: Row, where: str) -> RatedRow:
    """openbmb/UltraFeedback, in any of its revisions."""
    prompt = row.get("instruction")
    if isinstance(prompt, list):  # what a judge was asked about conversations
        prompt = as_text(read_messages(row, "instruction", where))
    else:
        prompt = read_text(row, "instruction", where)
    # null means no completions: Parquet files written from JSON hold it for missing lists.
    completions = [] if row.get("completions", ()) is None else row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        reject_column(row, "completions", where, "a list of objects")
    return RatedRow(prompt, completions, optional_text(row, "source", where))


def read_lists(columns: tuple[str, str, str], row: Row, where: str) -> RatedRow:
    """A prompt, responses (texts or messages) and ratings (a number or null for each of them)."""
    prompt, responses, ratings = columns
    for column in (responses, ratings):
        if not isinstance(row.get(column), list):
            reject_column(row, column, where, "a list")
    if len(row[responses]) != len(row[ratings]):
        counts = f"{len(row[responses])} responses, but {len(row[ratings])} ratings"
        raise UserError(f"{where}: {counts}")
    both = enumerate(zip(row[responses], row[ratings], strict=True))
    completions = [
        {"response": _text_of(response, f"{responses}[{i}]", where), "rating": rating}
        for i, (response, rating) in both
    ]
    return RatedRow(_prompt(row, prompt, where), completions, optional_text(row, "source", where))


def read_nectar(row: Row, where: str) -> RatedRow:
    """berkeley-nest/Nectar: answers by rank, 1 the best. A rating is the negative of the rank."""
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        reject_column(row, "answers", where, "a list of objects")
    ranks = [one.get("rank") for one in answers]
    if any(isinstance(rank, bool) or not isinstance(rank, int | float) for rank in ranks):
        raise UserError(f"{where}: an answer's rank is no number; expected one in each answer")
    *turns, last = hh_turns(row, "prompt", where)
    if last["content"]:  # without the answer's empty turn
        turns.append(last)
    completions = [
        {"response": one.get("answer"), "model": one.get("model"), "rating": -one["rank"]}
        for one in answers
    ]
    return RatedRow(as_text(turns), completions, None)


def _prompt(row: Row, column: str, where: str) -> str | list[Message]:
    if isinstance(row.get(column), list):
        return as_text(read_messages(row, column, where))
    return as_text(helpsteer_turns(row, column, where))


def as_text(prompt: str | list[Message]) -> str | list[Message]:
    """The prompt, as text if it is a single question."""
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].keys() == {"role", "content"}:
        return prompt[0]["content"] if prompt[0]["role"] == USER else prompt
    return prompt


def _text_of(response: Any, column: str, where: str) -> Any:
    """A response's text, if it is given as the message of an assistant."""
    if not isinstance(response, list):
        return response
    messages = answered(read_messages({column: response}, column, where), column, where)
    if len(messages) > 1 or messages[0].keys() != {"role", "content"}:
        raise UserError(f'{where}: "{column}" is more than one text; expected a message of text')
    return messages[0]["content"]


def gather(response: str, rating: str, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
    """Rows of one rated response each as rows of `prompt`, `responses` and `ratings`.

    Responses to the same prompt come together, in the order and at the place of the first.
    """
    found: dict[str, PlacedRow] = {}
    for where, row in rows:
        for column in ("prompt", response, rating):
            if column not in row:
                reject_column(row, column, where, "a prompt and one rated response")
        key = json.dumps([row[name] for name in ("prompt", "system", "tools") if name in row])
        others = {k: v for k, v in row.items() if k not in (response, rating)}
        _, all_of = found.setdefault(key, (where, {**others, "responses": [], "ratings": []}))
        all_of["responses"].append(row[response])
        all_of["ratings"].append(row[rating])
    yield from found.values()


class Rated(NamedTuple):
    """A schema of rated rows.

    columns: those that identify it. read: a row -> a RatedRow. rules: the names in ratings.RULES
    that can read its completions, the usual one first. gather: rows of one response each -> rows
    of all responses to a prompt, which `read` takes; None where they are so already.
    """

    columns: tuple[str, ...]
    read: Callable[[Row, str], RatedRow]
    rules: tuple[str, ...] = ("rating",)
    gather: Callable[[Iterable[PlacedRow]], Iterator[PlacedRow]] | None = None


def _lists(*columns: str) -> Rated:
    return Rated(columns, partial(read_lists, columns))


def _singles(response: str, rating: str) -> Rated:
    read = partial(read_lists, ("prompt", "responses", "ratings"))
    return Rated(("prompt", response, rating), read, gather=partial(gather, response, rating))


RATED = {
    "ultrafeedback": Rated(
        ("instruction", "completions"),
        read_ultrafeedback,
        ("mean-rating", "overall-score", "overall-score-fixed", "rating"),
    ),
    "rated": _lists("prompt", "responses", "ratings"),
    "simpo": _lists("prompt", "all_generated_responses", "all_rm_scores"),
    "distilabel": _lists("instruction", "generations", "ratings"),
    "nectar": Rated(("prompt", "answers"), read_nectar),
    "helpsteer2": _singles("response", "helpfulness"),
    "halos-scored": _singles("output", "reward"),
}
