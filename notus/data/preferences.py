"""Every accepted dataset format -> canonical preference pairs.

Read top to bottom: each row of a source is converted by its format's function or by its curation,
the sources are mixed by weight, held-out rows are set aside, and pairs that cannot be trained on
are dropped with a named reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from notus.curation.curate import HELD_OUT_PROMPT, Curation, Screen, curate_row
from notus.curation.decontamination import Dropped, SeenPrompts, asked, whole_text
from notus.curation.ratings import RATED_FORMATS, RatedRow
from notus.curation.rows import Row, read_rows, read_text, reject_column
from notus.errors import UserError
from notus.strict import Positive, Text

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    Either all three are text, or all three are messages ({"role", "content"}; roles system, user,
    assistant): the conversation up to the answer, and the message or messages that follow it.
    `where` is the pair's origin, for messages to the user: "file.jsonl:12", the 1-based line, or
    the 1-based row number where there are no lines. Scores are the format's own ratings, if any.
    An implied prompt is what two whole texts have in common, so it may end inside a word. Labels
    say what the row says of itself (`LABELS`). For supervised fine-tuning `rejected` is empty.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    implied: bool = field(default=False, compare=False)
    labels: dict[str, str] = field(default_factory=dict, compare=False)


class Preferences(NamedTuple):
    """Pairs in training order, pairs set aside, and how many rows were dropped for which reason."""

    train: list[Pair]
    holdout: list[Pair]
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of preferences."""

    path: Text  # a .json, .jsonl or .parquet file, a saved dataset, a folder of these, or a hub id
    split: Text | None = None  # null: "train", where the dataset has splits
    weight: Positive = 1.0  # times its rows enter an epoch: 2 = twice, 0.5 = a random half
    format: Text | None = None  # a name from notus/data/preferences.py; null: seen from the rows
    curation: Curation | None = None  # null: the rows are pairs, and all of them enter


# ------------------------------------------------------------------- the parts of a row, checked

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
MESSAGE_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")
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
    """The messages in `row[column]`, whose roles and contents are under `keys`.

    Raises UserError that names `where`, the column and the message's index.
    """
    messages = row.get(column)
    if not isinstance(messages, list):
        reject_column(row, column, where, "a list of messages")
    numbered = {f"{column}[{index}]": message for index, message in enumerate(messages)}
    return [_message(numbered, name, where, keys) for name in numbered]


def _check_ends_with_answer(messages: list[Message], column: str, where: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        found = f"a message of the {messages[-1]['role']}" if messages else "no message"
        raise UserError(f'{where}: "{column}" ends with {found}; expected one of the assistant')


def _scores(row: Row, where: str) -> tuple[float | None, float | None]:
    """The ratings of chosen and rejected, where the row or its `metadata` has both columns."""
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for columns in SCORE_COLUMNS:
            if all(column in place for column in columns):
                return _score(place, columns[0], where), _score(place, columns[1], where)
    return None, None


def _score(row: Row, column: str, where: str) -> float | None:
    score = row[column]
    if score is not None and not isinstance(score, (int, float)):
        reject_column(row, column, where, "a number")
    return None if score is None else float(score)


def _labels(row: Row) -> dict[str, str]:
    return {name: row[name] for name in LABELS if isinstance(row.get(name), str)}


# ---------------------------------------------------------- conversion: a row -> Pair, or a reason

EMPTY_CHOSEN = "empty chosen response"
EMPTY_REJECTED = "empty rejected response"
IDENTICAL = "identical responses"
EMPTY_PROMPT = "empty prompt"
PROMPTS_DIFFER = "prompts differ"
HELD_OUT_COPY = "copy of a held-out row"
NO_COUNTERPART = "no response with the other label"
LABELLED_BAD = "labelled false"
NO_ANSWER = "no message of the assistant"


def convert_preference(row: Row, where: str) -> Pair | str:
    """TRL's preference formats: text or messages, with a prompt or with one implied.

    Whole dialogues in chosen and rejected imply their common leading messages as the prompt, also
    beside a `prompt` that merely repeats it as text (HuggingFaceH4/ultrafeedback_binarized,
    argilla/ultrafeedback-binarized-preferences-cleaned).
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        missing = "chosen" if row.get("chosen") is None else "rejected"
        reject_column(row, missing, where, "text or a list of messages")
    convert = _convert_texts if isinstance(row["chosen"], str) else _convert_messages
    return convert(row, where)


def _convert_texts(row: Row, where: str) -> Pair:
    chosen, rejected = read_text(row, "chosen", where), read_text(row, "rejected", where)
    if "prompt" in row:
        prompt = read_text(row, "prompt", where)
    else:
        length = common_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    implied = "prompt" not in row
    return Pair(prompt, chosen, rejected, where, *_scores(row, where), implied=implied)


def common_prompt_length(chosen: str, rejected: str) -> int:
    """How many leading characters two texts share as their prompt, by TRL's `extract_prompt`.

    A space at the prompt's end goes to the responses, and each response keeps a character even
    if one text begins with the whole of the other.
    """
    shortest = min(len(chosen), len(rejected))
    for index in range(shortest):
        if chosen[index] != rejected[index]:
            return index - 1 if chosen[:index].endswith(" ") else index
    return max(shortest - 1, 0)


def _convert_messages(row: Row, where: str) -> Pair | str:
    chosen, rejected = read_messages(row, "chosen", where), read_messages(row, "rejected", where)
    _check_ends_with_answer(chosen, "chosen", where)
    _check_ends_with_answer(rejected, "rejected", where)
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row, "prompt", where)
        for column, response in (("chosen", chosen), ("rejected", rejected)):
            if response[0]["role"] != "assistant":
                raise UserError(
                    f'{where}: "{column}" starts with a message of the {response[0]["role"]}; '
                    'expected the answer alone, since "prompt" holds the conversation'
                )
    else:
        repeated = read_text(row, "prompt", where) if "prompt" in row else ""
        if repeated and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            prompt = [{"role": "user", "content": repeated}]
        else:
            length = _common_messages(chosen, rejected)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
            if not chosen[0]["role"] == rejected[0]["role"] == "assistant":
                return PROMPTS_DIFFER
    return Pair(prompt, chosen, rejected, where, *_scores(row, where))


def _common_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """How many leading messages are equal; the last one of either is always a response."""
    shortest = min(len(chosen), len(rejected)) - 1
    equal = (chosen[index] == rejected[index] for index in range(shortest))
    return next((index for index, same in enumerate(equal) if not same), shortest)


def convert_turns(row: Row, where: str) -> Pair:
    """Text columns that are turns of a chat: the prompt the user's, the responses the model's."""
    texts = (read_text(row, column, where) for column in ("prompt", "chosen", "rejected"))
    return _single_turn_pair(*texts, where, _scores(row, where))


def convert_argilla(row: Row, where: str) -> Pair:
    """argilla/ultrafeedback-binarized-preferences: an instruction and two answers to it."""
    return _single_turn_pair(
        read_text(row, "instruction", where),
        read_text(row, "chosen_response", where),
        read_text(row, "rejected_response", where),
        where,
        _scores(row, where),
    )


def convert_hh(row: Row, where: str) -> Pair | str:
    """Anthropic's hh-rlhf: two dialogues as text whose last turns are the responses."""
    chosen, rejected = _hh_turns(row, "chosen", where), _hh_turns(row, "rejected", where)
    if chosen[:-1] != rejected[:-1]:
        return PROMPTS_DIFFER
    return Pair(chosen[:-1], chosen[-1:], rejected[-1:], where, *_scores(row, where))


def _hh_turns(row: Row, column: str, where: str) -> list[Message]:
    before, *parts = re.split(r"\n\n(Human|Assistant):", read_text(row, column, where))
    if before.strip() or not parts:
        raise UserError(
            f'{where}: "{column}" starts with {row[column][:40]!r}; expected "\\n\\nHuman:"'
        )
    turns = [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    _check_ends_with_answer(turns, column, where)
    return turns


def convert_sharegpt(row: Row, where: str) -> Pair:
    """LLaMA-Factory's ShareGPT preferences: a conversation and two messages that may follow it."""
    prompt = read_messages(row, "conversations", where, SHAREGPT_KEYS)
    system = "" if row.get("system") is None else read_text(row, "system", where)
    if system.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    chosen = [_message(row, "chosen", where, SHAREGPT_KEYS)]
    rejected = [_message(row, "rejected", where, SHAREGPT_KEYS)]
    _check_ends_with_answer(chosen, "chosen", where)
    _check_ends_with_answer(rejected, "rejected", where)
    return Pair(prompt, chosen, rejected, where, *_scores(row, where))


def convert_rated(
    read: Callable[[Row, str], RatedRow],
    row: Row,
    where: str,
    *,
    curation: Curation,
    screen: Screen,
    seed: int,
) -> Pair | Dropped:
    """A prompt with rated responses: the pair that the curation makes of it."""
    rated = read(row, where)
    choice = curate_row(rated, row, where, curation, screen, seed)
    if isinstance(choice, Dropped):
        return choice
    responses = (choice.chosen["response"], choice.rejected["response"])
    scores = (choice.chosen_score, choice.rejected_score)
    return _single_turn_pair(rated.prompt, *responses, where, scores)


def convert_screened(
    convert: Callable[[Row, str], Pair | str], row: Row, where: str, *, screen: Screen
) -> Pair | str | Dropped:
    """A row that `convert` reads as a pair, unless the screen leaves it out."""
    pair = convert(row, where)
    if isinstance(pair, str):
        return pair
    whole = whole_text(pair.prompt)
    refused = screen.refuse(asked(pair.prompt), whole, row, where)
    return refused or screen.repeated(whole, where) or pair


def convert_conversation(
    column: str, keys: tuple[str, str], row: Row, where: str
) -> list[Pair] | str:
    """A conversation alone: each of the assistant's messages, after all that came before it."""
    messages = read_messages(row, column, where, keys)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [Pair(messages[:i], [messages[i]], [], where) for i in answers] or NO_ANSWER


def convert_completion(row: Row, where: str) -> Pair:
    """TRL's prompt and completion, as text or as messages."""
    prompt, response = _prompt_and_completion(row, where)
    return Pair(prompt, response, type(response)(), where)


def _prompt_and_completion(row: Row, where: str) -> tuple[str | list[Message], str | list[Message]]:
    if not isinstance(row.get("prompt"), list):
        return read_text(row, "prompt", where), read_text(row, "completion", where)
    prompt, response = (read_messages(row, name, where) for name in ("prompt", "completion"))
    _check_ends_with_answer(response, "completion", where)
    return prompt, response


class Judged(NamedTuple):
    """One response to a prompt, and whether it is a good one; labels: as a `Pair`'s."""

    prompt: str | list[Message]
    response: str | list[Message]
    is_good: bool
    where: str
    labels: dict[str, str]


def convert_unpaired(row: Row, where: str) -> Judged:
    """TRL's unpaired preferences: a prompt, one completion, and a label, true or false."""
    if not isinstance(row.get("label"), bool):
        reject_column(row, "label", where, "true or false")
    return Judged(*_prompt_and_completion(row, where), row["label"], where, _labels(row))


def pair_up(responses: Sequence[Judged]) -> list[Pair | str]:
    """Each good response with a bad one to the same prompt, the first with the first, and so on.

    The pairs stand in the order of their good responses, and behind them, a reason for each
    response that is left over.
    """
    bad: dict[str, list[Judged]] = {}
    for one in responses:
        if not one.is_good:
            bad.setdefault(json.dumps(one.prompt), []).append(one)
    waiting = {key: iter(found) for key, found in bad.items()}
    rows: list[Pair | str] = []
    for one in responses:
        other = next(waiting.get(json.dumps(one.prompt), iter(())), None) if one.is_good else None
        if other is not None:
            prompt, good, _, where, labels = one
            rows.append(Pair(prompt, good, other.response, where, labels=labels))
    return rows + [NO_COUNTERPART] * (len(responses) - 2 * len(rows))


def _single_turn_pair(
    prompt: str,
    chosen: str,
    rejected: str,
    where: str,
    scores: tuple[float | None, float | None],
) -> Pair:
    """A question and two answers as messages: the datasets in question are chats of one turn."""
    return Pair(
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
        where,
        *scores,
    )


# ------------------------------------------------------------------------------------- formats


class Format(NamedTuple):
    """How rows of a format are told apart, converted, and described in messages."""

    columns: str
    recognises: Callable[[Row], bool]
    convert: Callable[..., Pair | str | Dropped | Judged]
    needs_curation: bool = False
    has_rejected: bool = True


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(column in row for column in columns)


def _rated(name: str) -> Format:
    columns, read = RATED_FORMATS[name]
    convert = partial(convert_rated, read)
    return Format(", ".join(columns), _has(*columns), convert, needs_curation=True)


def _is_hh(row: Row) -> bool:
    return "prompt" not in row and all(
        isinstance(row.get(column), str) and row[column].startswith("\n\nHuman:")
        for column in ("chosen", "rejected")
    )


def _is_preference(row: Row) -> bool:
    # Two bare answers to a question in another column would share no prompt but by accident.
    question = {"question", "instruction", "query", "input"} & set(row)
    return "chosen" in row and "rejected" in row and ("prompt" in row or not question)


# The first format that recognises a source's first row is taken, so the special ones come first.
FORMATS: dict[str, Format] = {
    "ultrafeedback": _rated("ultrafeedback"),
    "rated": _rated("rated"),
    "argilla": Format(
        "instruction, chosen_response, rejected_response",
        _has("instruction", "chosen_response", "rejected_response"),
        convert_argilla,
    ),
    "sharegpt": Format(
        "conversations, chosen, rejected",
        _has("conversations", "chosen", "rejected"),
        convert_sharegpt,
    ),
    "hh": Format('chosen, rejected as "\\n\\nHuman:" dialogues', _is_hh, convert_hh),
    "preference": Format(
        "chosen, rejected and optionally prompt", _is_preference, convert_preference
    ),
    "unpaired": Format(
        "prompt, completion, label", _has("prompt", "completion", "label"), convert_unpaired
    ),
    "completion": Format(
        "prompt, completion",
        _has("prompt", "completion"),
        convert_completion,
        has_rejected=False,
    ),
    "messages": Format(
        "messages",
        _has("messages"),
        partial(convert_conversation, "messages", MESSAGE_KEYS),
        has_rejected=False,
    ),
    "conversations": Format(
        "conversations",
        _has("conversations"),
        partial(convert_conversation, "conversations", SHAREGPT_KEYS),
        has_rejected=False,
    ),
    # The columns of plain text, so it is never guessed: the source has to name it.
    "turns": Format(
        "prompt, chosen, rejected as text to be put in a chat template",
        lambda row: False,
        convert_turns,
    ),
}


def find_format(name: str | None, row: Row, where: str) -> str:
    """The name of a row's format in `FORMATS`: the one asked for, or the first to recognise it."""
    known = "; ".join(f"{name} ({entry.columns})" for name, entry in FORMATS.items())
    if name is not None and name not in FORMATS:
        raise UserError(f'{where}: no preference format "{name}"; known are {known}')
    recognised = (name for name, entry in FORMATS.items() if entry.recognises(row))
    found = name or next(recognised, None)
    if found is None:
        raise UserError(
            f"{where}: not a known preference format; found the columns {', '.join(row)}; "
            f"known are {known}"
        )
    return found


def read_pairs(
    source: Source, seed: int, responses_only: bool = False
) -> tuple[list[Pair | str], Counter[str]]:
    """A source's rows in file order, each a pair or why it is none, and what curation left out.

    What curation leaves out was never a pair and so is not a row: the published curated sets
    were split into train and test without it. With `responses_only` the pairs have no rejected
    response, and rows may be conversations, each of whose answers is then a pair.
    """
    rows: list[Pair | str] = []
    judged: list[Judged] = []
    left_out: Counter[str] = Counter()
    convert = None
    for where, row in read_rows(source.path, source.split):
        convert = convert or _converter(source, row, where, seed, responses_only)
        found = convert(row, where)
        for pair in found if isinstance(found, list) else [found]:
            if isinstance(pair, Dropped):
                left_out[pair.reason] += 1
            elif isinstance(pair, str):
                rows.append(pair)
            elif isinstance(pair, Pair):
                rows.append(replace(pair, labels=_labels(row)))
            elif not responses_only:
                judged.append(pair)
            elif pair.is_good:
                prompt, response, _, where, labels = pair
                rows.append(Pair(prompt, response, response, where, labels=labels))
            else:
                left_out[LABELLED_BAD] += 1
    rows += pair_up(judged)
    if responses_only:
        rows = [row if isinstance(row, str) else _without_rejected(row) for row in rows]
    return rows, left_out


def _without_rejected(pair: Pair) -> Pair:
    return replace(pair, rejected=type(pair.rejected)())


def _converter(
    source: Source, row: Row, where: str, seed: int, responses_only: bool
) -> Callable[[Row, str], Pair | list[Pair] | str | Dropped | Judged]:
    name = find_format(source.format, row, where)
    entry, curation = FORMATS[name], source.curation
    if not entry.has_rejected and not responses_only:
        raise UserError(
            f'{where}: found answers without rejected ones (the format "{name}"); expected pairs, '
            'or "train": {"objective": "sft"}'
        )
    if entry.needs_curation and (curation is None or curation.rule is None):
        raise UserError(
            f"{source.path}: the rows hold ratings and no pairs yet; "
            'give the source "curation": {"rule": "mean-rating"}'
        )
    if curation is None:
        return entry.convert
    if entry.needs_curation:
        return partial(entry.convert, curation=curation, screen=Screen(curation), seed=seed)
    if name == "unpaired" or not entry.has_rejected:
        raise UserError(
            f'{source.path}: "curation" is not for rows of one response each (the format '
            f'"{name}"); remove it'
        )
    if curation.rule is not None:
        raise UserError(
            f'{source.path}: "curation" does nothing with a rule for rows in the format "{name}", '
            "which are pairs already; remove it"
        )
    return partial(convert_screened, entry.convert, screen=Screen(curation))


# -------------------------------------------------------------------------------------- mixing


def weighted_rows(count: int, weight: float, seed: int, source_index: int) -> np.ndarray:
    """Indices (int64) of the rows that enter an epoch: all of them `weight` times.

    The whole part of the weight repeats the source in file order; the rest is a random part of
    it, drawn by (seed, source_index), in file order too.
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


def reason_to_drop(pair: Pair, responses_only: bool = False) -> str | None:
    """Why nothing can be learned from a pair, or its chosen response alone; None if it can."""
    if _is_blank(pair.chosen):
        return EMPTY_CHOSEN
    if not responses_only and _is_blank(pair.rejected):
        return EMPTY_REJECTED
    if pair.chosen == pair.rejected:
        return IDENTICAL
    return EMPTY_PROMPT if _is_blank(pair.prompt) else None


def _is_blank(text: str | list[Message]) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any(message["content"].strip() for message in text)


def _usable(rows: Iterable[Pair | str], dropped: Counter[str], responses_only: bool) -> list[Pair]:
    """The pairs worth training on; the others are counted in `dropped` by reason."""
    pairs = []
    for row in rows:
        reason = row if isinstance(row, str) else reason_to_drop(row, responses_only)
        if reason is None:
            pairs.append(row)
        else:
            dropped[reason] += 1
    return pairs


def find_leaks(pairs: Iterable[Pair], held_out: Iterable[Pair]) -> list[str | None]:
    """Of each pair, where a held-out one with (nearly) its prompt is from, if there is one.

    Nearly is what it is for `SeenPrompts`.
    """
    seen = SeenPrompts(near=True)
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

    A source's rows enter `weight` times, in the order of the sources. The held-out rows are drawn
    by `holdout_seed` (None: `seed`) from all entered rows before any is dropped, so that dropping
    does not change the draw; a copy of a held-out row (weight above 1) is dropped from training.
    With `drop_leaks` so is every row whose prompt is, or nearly is, that of a held-out row or of
    one of the `evaluation` pairs. Rows are counted in `dropped` as often as they enter, those
    that curation leaves out once. With `responses_only` (supervised fine-tuning) the chosen
    responses alone are read, and each answer of a conversation is a row of its own.

    Raises:
        UserError: a source cannot be read or converted, `holdout` takes every row, or no pair is
            left.
    """
    rows: list[Pair | str] = []
    dropped: Counter[str] = Counter()
    entered = []
    for index, source in enumerate(sources):
        source_rows, left_out = read_pairs(source, seed, responses_only)
        entered.append(len(rows) + weighted_rows(len(source_rows), source.weight, seed, index))
        rows += source_rows
        dropped += left_out
    order = np.concatenate(entered)
    if holdout and holdout >= len(order):
        raise UserError(
            f"data.eval.holdout is {holdout}, but the sources hold only {len(order)} rows; "
            "expected fewer than there are"
        )

    split_seed = seed if holdout_seed is None else holdout_seed
    train, held_out = (order[part] for part in split_holdout(len(order), holdout, split_seed))
    is_copy = np.isin(train, held_out)
    dropped += Counter({HELD_OUT_COPY: int(is_copy.sum())})
    train_pairs = _usable((rows[index] for index in train[~is_copy]), dropped, responses_only)
    holdout_pairs = _usable((rows[index] for index in held_out), dropped, responses_only)
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
