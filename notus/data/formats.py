"""Dataset formats: a row of any of them -> preference pairs, or the reason why it gives none."""

import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import commonprefix
from types import NoneType
from typing import NamedTuple

from notus.curation.decontamination import Dropped
from notus.curation.ratings import RATED_COLUMNS
from notus.curation.rows import PlacedRow, Row, optional_text, read_text, reject_column
from notus.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    Either all three are text, or all three are messages ({"role", "content"}; roles system, user,
    assistant): the conversation up to the answer, and the message or messages that follow it.
    For supervised fine-tuning `rejected` is empty.

    where: the pair's origin, for messages to the user: "file.jsonl:12", the 1-based line, or the
    1-based row number where there are no lines. Scores: the dataset's own ratings, if any.
    implied: the prompt is the common beginning of two complete texts, so it may end inside a word.
    labels: the row's `LABELS`.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    implied: bool = field(default=False, compare=False)
    labels: dict[str, str] = field(default_factory=dict, compare=False)


PARTS = ("prompt", "chosen", "rejected")
Outcome = list[Pair] | Dropped  # of one row
Scores = tuple[float | None, float | None]  # of chosen and rejected


# ------------------------------------------------------------------- the parts of a row, checked

USER, ASSISTANT = "user", "assistant"
ROLES = {"system": "system", "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT}
MESSAGE_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")
CONVERSATIONS = {"messages": MESSAGE_KEYS, "conversations": SHAREGPT_KEYS}  # columns with all turns
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LABELS = ("source", "subset")  # columns of text that evaluation reports by


def _message(row: Row, column: str, where: str, keys: tuple[str, str]) -> Message:
    """The message in `row[column]`, whose role and content are under `keys`."""
    message = row.get(column)
    if not isinstance(message, dict):
        reject_column(row, column, where, f"a message with {keys[0]} and {keys[1]}")
    role = read_text(message, keys[0], f"{where}, {column}")
    if role not in ROLES:
        raise UserError(f'{where}: "{column}" has the role "{role}"; known are {", ".join(ROLES)}')
    return {"role": ROLES[role], "content": read_text(message, keys[1], f"{where}, {column}")}


def read_messages(
    row: Row, column: str, where: str, keys: tuple[str, str] = MESSAGE_KEYS
) -> list[Message]:
    """The messages in `row[column]`; raises UserError that names `where`, column and index."""
    messages = row.get(column)
    if not isinstance(messages, list):
        reject_column(row, column, where, "a list of messages")
    numbered = {f"{column}[{index}]": message for index, message in enumerate(messages)}
    return [_message(numbered, name, where, keys) for name in numbered]


def _answered(messages: list[Message], column: str, where: str) -> list[Message]:
    """The messages of `column`; raises UserError unless the last one is of the assistant."""
    if not messages or messages[-1]["role"] != ASSISTANT:
        found = f"a message of the {messages[-1]['role']}" if messages else "no message"
        raise UserError(f'{where}: "{column}" ends with {found}; expected one of the assistant')
    return messages


def _scores(row: Row, where: str) -> Scores:
    """The ratings of chosen and rejected, if the row or its `metadata` has both columns."""
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for columns in SCORE_COLUMNS:
            if all(column in place for column in columns):
                for column in columns:
                    if not isinstance(place[column], int | float | NoneType):
                        reject_column(place, column, where, "a number")
                return tuple(None if place[c] is None else float(place[c]) for c in columns)
    return None, None


def labels_of(row: Row) -> dict[str, str]:
    """The row's `LABELS` that are text."""
    return {name: row[name] for name in LABELS if isinstance(row.get(name), str)}


def single_turn_pair(prompt: str, chosen: str, rejected: str, where: str, scores: Scores) -> Pair:
    """A question and two answers as messages."""
    question, *answers = (
        [{"role": role, "content": content}]
        for role, content in ((USER, prompt), (ASSISTANT, chosen), (ASSISTANT, rejected))
    )
    return Pair(question, *answers, where, *scores)


# ----------------------------------------------------------------------------- formats of pairs

PROMPTS_DIFFER = Dropped("prompts differ", is_row=True)
NO_COUNTERPART = Dropped("no response with the other label", is_row=True)
NO_ANSWER = Dropped("no message of the assistant", is_row=True)
LABELLED_FALSE = Dropped("labelled false")


def convert_preference(row: Row, where: str) -> Outcome:
    """TRL's preference formats: text or messages, with a prompt or with one implied.

    Complete dialogues in chosen and rejected imply their common leading messages as the prompt,
    even if a `prompt` repeats it as text (HuggingFaceH4/ultrafeedback_binarized,
    argilla/ultrafeedback-binarized-preferences-cleaned).
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        missing = "chosen" if row.get("chosen") is None else "rejected"
        reject_column(row, missing, where, "text or a list of messages")
    if not isinstance(row["chosen"], str):
        return _convert_messages(row, where)
    chosen, rejected = read_text(row, "chosen", where), read_text(row, "rejected", where)
    implied = "prompt" not in row
    if implied:
        length = common_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        prompt = read_text(row, "prompt", where)
    return [Pair(prompt, chosen, rejected, where, *_scores(row, where), implied=implied)]


def common_prompt_length(chosen: str, rejected: str) -> int:
    """How many leading characters two texts share as their prompt, by TRL's `extract_prompt`.

    A space at the prompt's end goes to the responses, and each response keeps a character even
    if one text begins with all of the other.
    """
    length, shortest = len(commonprefix([chosen, rejected])), min(len(chosen), len(rejected))
    if length == shortest:
        return max(shortest - 1, 0)
    return length - 1 if chosen[:length].endswith(" ") else length


def _convert_messages(row: Row, where: str) -> Outcome:
    chosen, rejected = (
        _answered(read_messages(row, column, where), column, where)
        for column in ("chosen", "rejected")
    )
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row, "prompt", where)
        for column, response in (("chosen", chosen), ("rejected", rejected)):
            if response[0]["role"] != ASSISTANT:
                raise UserError(
                    f'{where}: "{column}" starts with a message of the {response[0]["role"]}; '
                    'expected only the answer, since "prompt" holds the conversation'
                )
    else:
        repeated = read_text(row, "prompt", where) if "prompt" in row else ""
        if repeated and chosen[0]["role"] == rejected[0]["role"] == ASSISTANT:
            prompt = [{"role": USER, "content": repeated}]
        else:
            # The last message of either is a response, even if they are equal.
            same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
            length = (*same, False).index(False)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
            if not chosen[0]["role"] == rejected[0]["role"] == ASSISTANT:
                return PROMPTS_DIFFER
    return [Pair(prompt, chosen, rejected, where, *_scores(row, where))]


def convert_turns(columns: tuple[str, str, str], row: Row, where: str) -> Outcome:
    """Text columns that are turns of a chat: a question of the user and two answers to it."""
    texts = (read_text(row, column, where) for column in columns)
    return [single_turn_pair(*texts, where, _scores(row, where))]


def convert_hh(row: Row, where: str) -> Outcome:
    """Anthropic's hh-rlhf: two dialogues as text whose last turns are the responses."""
    chosen, rejected = _hh_turns(row, "chosen", where), _hh_turns(row, "rejected", where)
    if chosen[:-1] != rejected[:-1]:
        return PROMPTS_DIFFER
    return [Pair(chosen[:-1], chosen[-1:], rejected[-1:], where, *_scores(row, where))]


def _hh_turns(row: Row, column: str, where: str) -> list[Message]:
    before, *parts = re.split(r"\n\n(Human|Assistant):", read_text(row, column, where))
    if before.strip() or not parts:
        raise UserError(
            f'{where}: "{column}" starts with {row[column][:40]!r}; expected "\\n\\nHuman:"'
        )
    turns = [
        {"role": USER if name == "Human" else ASSISTANT, "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _answered(turns, column, where)


def convert_sharegpt(row: Row, where: str) -> Outcome:
    """LLaMA-Factory's ShareGPT preferences: a conversation and two messages that may follow it."""
    prompt = read_messages(row, "conversations", where, SHAREGPT_KEYS)
    system = optional_text(row, "system", where) or ""
    if system.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    responses = (
        _answered([_message(row, column, where, SHAREGPT_KEYS)], column, where)
        for column in ("chosen", "rejected")
    )
    return [Pair(prompt, *responses, where, *_scores(row, where))]


# ---------------------------------------------------------------------- formats of one response


def convert_conversation(column: str, row: Row, where: str) -> Outcome:
    """A conversation: each of the assistant's messages, after all that came before it."""
    messages = read_messages(row, column, where, CONVERSATIONS[column])
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    return [Pair(messages[:i], [messages[i]], [], where) for i in answers] or NO_ANSWER


def convert_completion(row: Row, where: str) -> Outcome:
    """TRL's prompt and completion, as text or as messages."""
    if isinstance(row.get("prompt"), list):
        prompt, response = (read_messages(row, name, where) for name in ("prompt", "completion"))
        _answered(response, "completion", where)
    else:
        prompt, response = (read_text(row, name, where) for name in ("prompt", "completion"))
    return [Pair(prompt, response, type(response)(), where)]


def convert_unpaired(row: Row, where: str) -> Outcome:
    """TRL's unpaired preferences (prompt, completion and a label), without the bad responses."""
    return convert_completion(row, where) if _is_good(row, where) else LABELLED_FALSE


def _is_good(row: Row, where: str) -> bool:
    if not isinstance(row.get("label"), bool):
        reject_column(row, "label", where, "true or false")
    return row["label"]


def pair_up(rows: Iterable[PlacedRow]) -> Iterator[Pair | Dropped]:
    """TRL's unpaired preferences as pairs: each good response with a bad one to the same prompt.

    The first good response goes with the first bad one, and so on. The pairs come in the order of
    their good responses; after them, a `NO_COUNTERPART` for each response that is left over.
    """
    good: list[tuple[str, Pair]] = []
    bad: dict[str, deque[str | list[Message]]] = defaultdict(deque)
    for where, row in rows:
        is_good = _is_good(row, where)
        (pair,) = convert_completion(row, where)
        prompt = json.dumps(pair.prompt)
        if is_good:
            good.append((prompt, replace(pair, labels=labels_of(row))))
        else:
            bad[prompt].append(pair.chosen)
    left_over = len(good) + sum(map(len, bad.values()))
    for prompt, pair in good:
        if bad[prompt]:
            yield replace(pair, rejected=bad[prompt].popleft())
            left_over -= 2
    yield from [NO_COUNTERPART] * left_over


# ------------------------------------------------------------------------------------- formats


class Format(NamedTuple):
    """How rows of a format are described in messages, told apart, and converted.

    convert: None for rated responses, which only a curation turns into pairs.
    """

    columns: str
    recognises: Callable[[Row], bool]
    convert: Callable[[Row, str], Outcome] | None


def _format(convert: Callable[[Row, str], Outcome] | None, *columns: str) -> Format:
    """A format that is recognised by its columns."""
    return Format(", ".join(columns), lambda row: all(name in row for name in columns), convert)


def _is_hh(row: Row) -> bool:
    return "prompt" not in row and all(
        isinstance(row.get(column), str) and row[column].startswith("\n\nHuman:")
        for column in ("chosen", "rejected")
    )


def _is_preference(row: Row) -> bool:
    # Two bare answers to a question in another column would share a prompt only by accident.
    question = {"question", "instruction", "query", "input"} & set(row)
    return "chosen" in row and "rejected" in row and ("prompt" in row or not question)


ARGILLA = ("instruction", "chosen_response", "rejected_response")
# The first format that recognises a source's first row is taken, so the special ones come first.
FORMATS: dict[str, Format] = {
    **{name: _format(None, *columns) for name, columns in RATED_COLUMNS.items()},
    "argilla": _format(partial(convert_turns, ARGILLA), *ARGILLA),
    "sharegpt": _format(convert_sharegpt, "conversations", "chosen", "rejected"),
    "hh": Format('chosen, rejected as "\\n\\nHuman:" dialogues', _is_hh, convert_hh),
    "preference": Format(
        "chosen, rejected and optionally prompt", _is_preference, convert_preference
    ),
    "unpaired": _format(convert_unpaired, "prompt", "completion", "label"),
    "completion": _format(convert_completion, "prompt", "completion"),
    **{column: _format(partial(convert_conversation, column), column) for column in CONVERSATIONS},
    # The same columns as plain text's, so it is never guessed: the source has to name it.
    "turns": Format(
        "prompt, chosen, rejected as text to be put in a chat template",
        lambda row: False,
        partial(convert_turns, ("prompt", "chosen", "rejected")),
    ),
}
ONLY_ANSWERS = ("completion", "messages", "conversations")  # formats for supervised fine-tuning


def find_format(name: str | None, row: Row, where: str) -> str:
    """The name of a row's format in `FORMATS`: the one asked for, or the first to recognise it."""
    recognised = (name for name, entry in FORMATS.items() if entry.recognises(row))
    found = name or next(recognised, None)
    if found in FORMATS:
        return found
    columns = f"not a known preference format; found the columns {', '.join(row)}"
    problem = f'no preference format "{name}"' if name else columns
    known = "; ".join(f"{name} ({entry.columns})" for name, entry in FORMATS.items())
    raise UserError(f"{where}: {problem}; known are {known}")
