"""The preference pair, and what every format reads in the same way: scores and labels."""

from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from notus.curation.decontamination import Dropped
from notus.curation.rows import Row, as_number, reject_column
from notus.data.messages import ASSISTANT, USER, Message


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    Either all three are text, or all three are messages (messages.py): the conversation up to the
    answer, and the message or messages that follow it. For supervised fine-tuning `rejected` is
    empty.

    where: the pair's origin, for messages to the user: "file.jsonl:12", the 1-based line, or the
    1-based row number where there are no lines. Scores: the dataset's own ratings, if any.
    implied: the prompt is the common beginning of two complete texts, so it may end inside a word.
    labels: the row's `LABELS`. tools, template_options: passed to the chat template.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    implied: bool = field(default=False, compare=False)
    labels: dict[str, str] = field(default_factory=dict, compare=False)
    tools: list[dict[str, Any]] = field(default_factory=list)
    template_options: dict[str, Any] = field(default_factory=dict)


PARTS = ("prompt", "chosen", "rejected")
Outcome = list[Pair] | Dropped  # of one row
Scores = tuple[float | None, float | None]  # of chosen and rejected

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LABELS = ("source", "subset")  # columns of text that evaluation reports by


def scores_of(row: Row, where: str) -> Scores:
    """The ratings of chosen and rejected, if the row or its `metadata` has both columns."""
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for columns in SCORE_COLUMNS:
            if all(column in place for column in columns):
                return tuple(_score(place, column, where) for column in columns)
    return None, None


def _score(place: Row, column: str, where: str) -> float | None:
    found = as_number(place[column] if place[column] != "" else None)
    if not isinstance(found, int | float | NoneType):
        reject_column(place, column, where, "a number")
    if found is None or found != found:  # NaN is pandas' missing number
        return None
    if not abs(found) < 1e308:
        reject_column(place, column, where, "one below 1e308")
    return float(found)


def labels_of(row: Row) -> dict[str, str]:
    """The row's `LABELS` that are text."""
    return {name: row[name] for name in LABELS if isinstance(row.get(name), str)}


def question_pair(
    prompt: str | list[Message],
    chosen: str | list[Message],
    rejected: str | list[Message],
    where: str,
    scores: Scores,
) -> Pair:
    """A question and two answers as messages; a text becomes the one message of its part."""
    question, *answers = (
        [{"role": role, "content": part}] if isinstance(part, str) else part
        for role, part in ((USER, prompt), (ASSISTANT, chosen), (ASSISTANT, rejected))
    )
    return Pair(question, *answers, where, *scores)
