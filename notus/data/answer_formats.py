"""Rows with one response each: for supervised fine-tuning, and labelled ones that pair up."""

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from notus.curation.decontamination import Dropped
from notus.curation.rows import PlacedRow, Row, as_number, read_text, reject_column
from notus.data.messages import (
    ASSISTANT,
    MESSAGE_KEYS,
    SHAREGPT_KEYS,
    Message,
    answered,
    read_messages,
)
from notus.data.pairs import Outcome, Pair

CONVERSATIONS = {"messages": MESSAGE_KEYS, "conversations": SHAREGPT_KEYS}  # columns with all turns
NO_COUNTERPART = Dropped("no response with the other label", is_row=True)
NO_ANSWER = Dropped("no message of the assistant", is_row=True)
LABELLED_FALSE = Dropped("labelled false")


def convert_conversation(column: str, row: Row, where: str) -> Outcome:
    """A conversation: each of the assistant's messages, after all that came before it."""
    messages = read_messages(row, column, where, CONVERSATIONS[column])
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    return [Pair(messages[:i], [messages[i]], [], where) for i in answers] or NO_ANSWER


def convert_completion(row: Row, where: str) -> Outcome:
    """TRL's prompt and completion, as text or as messages."""
    if isinstance(row.get("prompt"), list):
        prompt, response = (read_messages(row, name, where) for name in ("prompt", "completion"))
        answered(response, "completion", where)
    else:
        prompt, response = (read_text(row, name, where) for name in ("prompt", "completion"))
    return [Pair(prompt, response, type(response)(), where)]


def convert_unpaired(row: Row, where: str) -> Outcome:
    """Labelled responses, without the bad ones."""
    return convert_labelled(row, where) if _is_good(row, where) else LABELLED_FALSE


def convert_labelled(row: Row, where: str) -> Outcome:
    """TRL's prompt and completion, or ms-swift's messages, of which the last is the response."""
    if "completion" in row or "messages" not in row:
        return convert_completion(row, where)
    *prompt, response = answered(read_messages(row, "messages", where), "messages", where)
    return [Pair(prompt, [response], [], where)]


def _is_good(row: Row, where: str) -> bool:
    label = as_number(row.get("label"))
    if not isinstance(label, bool):
        reject_column(row, "label", where, "true or false")
    return label


def pair_up(rows: Iterable[tuple[PlacedRow, Pair]]) -> Iterator[Pair | Dropped]:
    """Labelled responses, each with its row, as pairs of a good and a bad one to the same prompt.

    The first good response goes with the first bad one, and so on. The pairs come in the order of
    their good responses; after them, a `NO_COUNTERPART` for each response that is left over.
    """
    good: list[tuple[str, Pair]] = []
    bad: dict[str, deque[str | list[Message]]] = defaultdict(deque)
    for (where, row), pair in rows:
        asked = json.dumps([pair.prompt, pair.tools, pair.template_options])
        if _is_good(row, where):
            good.append((asked, pair))
        else:
            bad[asked].append(pair.chosen)
    left_over = len(good) + sum(map(len, bad.values()))
    for asked, pair in good:
        if bad[asked]:
            yield replace(pair, rejected=bad[asked].popleft())
            left_over -= 2
    yield from [NO_COUNTERPART] * left_over
