"""Every accepted dataset format -> canonical preference pairs.

Read top to bottom: files and datasets give rows, each row is converted by its format's function,
the sources are mixed by weight, held-out rows are set aside, and pairs that cannot be trained on
are dropped with a named reason.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TextIO

import numpy as np
import pyarrow
import pyarrow.parquet

from notus.data.curation import choose_pair
from notus.errors import UserError

Message = dict[str, str]
Row = dict[str, Any]
PlacedRow = tuple[str, Row]


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    Either all three are text, or all three are messages ({"role", "content"}; roles system, user,
    assistant): the conversation up to the answer, and the message or messages that follow it.
    `where` is the pair's origin, for messages to the user: "file.jsonl:12", the 1-based line, or
    the 1-based row number where there are no lines. Scores are the format's own ratings, if any.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    chosen_score: float | None = None
    rejected_score: float | None = None


class Preferences(NamedTuple):
    """Pairs in training order, pairs set aside, and how many rows were dropped for which reason."""

    train: list[Pair]
    holdout: list[Pair]
    dropped: dict[str, int]


class Curation(Protocol):
    """How raw ratings become pairs."""

    rule: str


class Source(Protocol):
    """One dataset of a mixture, as the configuration describes it."""

    path: str
    split: str | None
    weight: float
    format: str | None
    curation: Curation | None


# ------------------------------------------------------------------------------------- reading

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def read_rows(path: str, split: str | None = None) -> Iterator[PlacedRow]:
    """(where, row) of a file, a folder of files, a dataset saved to disk or one on the hub.

    A split of null stands for "train" wherever there are splits. In a folder of files, those
    whose name contains the split are read; a folder without a file so named has no splits.

    Raises:
        UserError: nothing is found, or what is found cannot be read as rows.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _read_files([local], split)
    if not local.is_dir():
        return _read_hub(path, split or "train")
    if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
        return _read_saved_dataset(local, split)
    files = sorted(file for file in local.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return _read_files(files, split)


def _read_files(files: Sequence[Path], split: str | None) -> Iterator[PlacedRow]:
    named = [file for file in files if (split or "train") in file.name]
    if not named and split not in (None, "train"):
        names = ", ".join(file.name for file in files)
        raise UserError(f'{files[0].parent}: no file name contains the split "{split}": {names}')
    for file in named or files:
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[PlacedRow]:
    if file.name.endswith(".parquet"):
        rows = _read_parquet(file)
    elif file.name.endswith(JSON_SUFFIXES):
        rows = _read_json(file)
    else:
        raise UserError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}")
    empty = True
    for number, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: the row is {_kind(row)}; expected an object")
        yield f"{file}:{number}", row
    if empty:
        raise UserError(f"{file}: the file holds no rows")


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open_text(file) as text:
            is_array = text.read(4096).lstrip().startswith("[")
            text.seek(0)
            yield from _json_array(file, text) if is_array else _json_lines(file, text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _open_text(file: Path) -> TextIO:
    opener = gzip.open if file.suffix == ".gz" else open
    # The "-sig" drops the byte order mark that editors on Windows put first.
    return opener(file, "rt", encoding="utf-8-sig")


def _json_lines(file: Path, text: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}:{number}: not JSON: {error.msg} at column {error.colno}; "
                "expected one object per line, or one array of objects in the file"
            ) from None


def _json_array(file: Path, text: TextIO) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.load(text), start=1)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            batches = parquet.iter_batches(batch_size=1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {error}") from None


def _read_saved_dataset(folder: Path, split: str | None) -> Iterator[PlacedRow]:
    import datasets  # takes seconds to import and plain files do not need it

    try:
        saved = datasets.load_from_disk(str(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a saved dataset: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise UserError(
                f'{folder}: no split "{split or "train"}"; the dataset has {", ".join(saved)}'
            )
        folder, saved = folder / (split or "train"), saved[split or "train"]
    elif split not in (None, "train", saved.split and str(saved.split)):
        raise UserError(f'{folder}: no split "{split}"; the saved dataset has no splits')
    return _dataset_rows(str(folder), saved)


def _read_hub(path: str, split: str) -> Iterator[PlacedRow]:
    if path.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such file or folder")

    import datasets  # takes seconds to import and plain files do not need it
    from huggingface_hub.errors import HFValidationError

    try:
        dataset = datasets.load_dataset(path, split=split)
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{path}: neither a local file or folder nor a dataset reachable on the hub: {error}"
        ) from None
    # An unknown split, several configurations; a loading script; files that cannot be parsed.
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f'{path}, split "{split}": {error}') from None
    return _dataset_rows(f"{path}/{split}", dataset)


def _dataset_rows(name: str, dataset: Iterable[Row]) -> Iterator[PlacedRow]:
    number = 0
    for number, row in enumerate(dataset, start=1):
        yield f"{name}:{number}", row
    if number == 0:
        raise UserError(f"{name}: the dataset holds no rows")


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
KINDS = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "a number")


def _mistyped(row: Row, column: str, where: str, expected: str) -> NoReturn:
    found = f"is {_kind(row[column])}" if column in row else "is missing"
    raise UserError(f'{where}: "{column}" {found}; expected {expected}')


def _text(row: Row, column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        _mistyped(row, column, where, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON's \\u can spell
        raise UserError(f'{where}: "{column}" is not valid Unicode: {error}') from None
    return text


def _message(row: Row, column: str, where: str, keys: tuple[str, str]) -> Message:
    """The message in `row[column]`, whose role and content are under `keys`."""
    message = row.get(column)
    if not isinstance(message, dict):
        _mistyped(row, column, where, f"a message with {keys[0]} and {keys[1]}")
    role = _text(message, keys[0], f"{where}, {column}")
    if role not in ROLES:
        raise UserError(f'{where}: "{column}" has the role "{role}"; known are {", ".join(ROLES)}')
    return {"role": ROLES[role], "content": _text(message, keys[1], f"{where}, {column}")}


def read_messages(
    row: Row, column: str, where: str, keys: tuple[str, str] = MESSAGE_KEYS
) -> list[Message]:
    """The messages in `row[column]`, whose roles and contents are under `keys`.

    Raises UserError that names `where`, the column and the message's index.
    """
    messages = row.get(column)
    if not isinstance(messages, list):
        _mistyped(row, column, where, "a list of messages")
    numbered = {f"{column}[{index}]": message for index, message in enumerate(messages)}
    return [_message(numbered, name, where, keys) for name in numbered]


def _check_ends_with_answer(messages: list[Message], column: str, where: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        found = f"a message of the {messages[-1]['role']}" if messages else "no message"
        raise UserError(f'{where}: "{column}" ends with {found}; expected one of the assistant')


def _scores(row: Row, where: str) -> tuple[float | None, float | None]:
    """The ratings of chosen and rejected, where the row has both columns."""
    for columns in SCORE_COLUMNS:
        if all(column in row for column in columns):
            return _score(row, columns[0], where), _score(row, columns[1], where)
    return None, None


def _score(row: Row, column: str, where: str) -> float | None:
    score = row[column]
    if score is not None and not isinstance(score, (int, float)):
        _mistyped(row, column, where, "a number")
    return None if score is None else float(score)


# ---------------------------------------------------------- conversion: a row -> Pair, or a reason

EMPTY_CHOSEN = "empty chosen response"
EMPTY_REJECTED = "empty rejected response"
IDENTICAL = "identical responses"
EMPTY_PROMPT = "empty prompt"
PROMPTS_DIFFER = "prompts differ"
HELD_OUT_COPY = "copy of a held-out row"


def convert_preference(row: Row, where: str) -> Pair | str:
    """TRL's preference formats: text or messages, with a prompt or with one implied.

    Whole dialogues in chosen and rejected imply their common leading messages as the prompt, also
    beside a `prompt` that merely repeats it as text (HuggingFaceH4/ultrafeedback_binarized,
    argilla/ultrafeedback-binarized-preferences-cleaned).
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        missing = "chosen" if row.get("chosen") is None else "rejected"
        _mistyped(row, missing, where, "text or a list of messages")
    convert = _convert_texts if isinstance(row["chosen"], str) else _convert_messages
    return convert(row, where)


def _convert_texts(row: Row, where: str) -> Pair:
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    if "prompt" in row:
        prompt = _text(row, "prompt", where)
    else:
        length = common_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    return Pair(prompt, chosen, rejected, where, *_scores(row, where))


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
        repeated = _text(row, "prompt", where) if "prompt" in row else ""
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
    texts = (_text(row, column, where) for column in ("prompt", "chosen", "rejected"))
    return _single_turn_pair(*texts, where, _scores(row, where))


def convert_argilla(row: Row, where: str) -> Pair:
    """argilla/ultrafeedback-binarized-preferences: an instruction and two answers to it."""
    return _single_turn_pair(
        _text(row, "instruction", where),
        _text(row, "chosen_response", where),
        _text(row, "rejected_response", where),
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
    before, *parts = re.split(r"\n\n(Human|Assistant):", _text(row, column, where))
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
    system = "" if row.get("system") is None else _text(row, "system", where)
    if system.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    chosen = [_message(row, "chosen", where, SHAREGPT_KEYS)]
    rejected = [_message(row, "rejected", where, SHAREGPT_KEYS)]
    _check_ends_with_answer(chosen, "chosen", where)
    _check_ends_with_answer(rejected, "rejected", where)
    return Pair(prompt, chosen, rejected, where, *_scores(row, where))


def convert_ultrafeedback(row: Row, where: str, *, rule: str, seed: int) -> Pair | str:
    """Raw openbmb/UltraFeedback: the pair that the curation rule makes of the completions."""
    prompt = _text(row, "instruction", where)
    # null stands for no completions: Parquet files written from JSON hold it for missing lists.
    completions = [] if row.get("completions", ()) is None else row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        _mistyped(row, "completions", where, "a list of objects")
    try:
        choice = choose_pair(row, rule, seed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if isinstance(choice, str):
        return choice
    chosen, rejected, *scores = choice
    responses = (_text(completion, "response", where) for completion in (chosen, rejected))
    return _single_turn_pair(prompt, *responses, where, tuple(scores))


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
    convert: Callable[..., Pair | str]
    needs_curation: bool = False


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(column in row for column in columns)


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
    "ultrafeedback": Format(
        "instruction, completions",
        _has("instruction", "completions"),
        convert_ultrafeedback,
        needs_curation=True,
    ),
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


def read_pairs(source: Source, seed: int) -> tuple[list[Pair | str], Counter[str]]:
    """A source's rows in file order, each a pair or why it is none, and what curation left out.

    What curation leaves out was never a pair and so is not a row: the published curated sets
    were split into train and test without it.
    """
    rows: list[Pair | str] = []
    left_out: Counter[str] = Counter()
    convert = None
    for where, row in read_rows(source.path, source.split):
        convert = convert or _converter(source, row, where, seed)
        pair = convert(row, where)
        if source.curation is not None and isinstance(pair, str):
            left_out[pair] += 1
        else:
            rows.append(pair)
    return rows, left_out


def _converter(source: Source, row: Row, where: str, seed: int) -> Callable[..., Pair | str]:
    name = find_format(source.format, row, where)
    needs_curation = FORMATS[name].needs_curation
    if needs_curation and source.curation is None:
        raise UserError(
            f"{source.path}: the rows hold ratings and no pairs yet; "
            'give the source "curation": {"rule": "mean-rating"}'
        )
    if source.curation is None:
        return FORMATS[name].convert
    if not needs_curation:
        raise UserError(
            f'{source.path}: "curation" does nothing for rows in the format "{name}", '
            "which are pairs already; remove it"
        )
    return partial(FORMATS[name].convert, rule=source.curation.rule, seed=seed)


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


def reason_to_drop(pair: Pair) -> str | None:
    """Why nothing can be learned from a pair; None if something can."""
    if _is_blank(pair.chosen):
        return EMPTY_CHOSEN
    if _is_blank(pair.rejected):
        return EMPTY_REJECTED
    if pair.chosen == pair.rejected:
        return IDENTICAL
    return EMPTY_PROMPT if _is_blank(pair.prompt) else None


def _is_blank(text: str | list[Message]) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any(message["content"].strip() for message in text)


def _usable(rows: Iterable[Pair | str], dropped: Counter[str]) -> list[Pair]:
    """The pairs worth training on; the others are counted in `dropped` by reason."""
    pairs = []
    for row in rows:
        reason = row if isinstance(row, str) else reason_to_drop(row)
        if reason is None:
            pairs.append(row)
        else:
            dropped[reason] += 1
    return pairs


def load_preferences(sources: Sequence[Source], *, seed: int, holdout: int = 0) -> Preferences:
    """Read, convert and mix the sources, set `holdout` rows aside, and drop what is unusable.

    A source's rows enter `weight` times, in the order of the sources. The held-out rows are drawn
    from all entered rows before any is dropped, so that dropping does not change the draw; a copy
    of a held-out row (weight above 1) is dropped from training. Rows are counted in `dropped` as
    often as they enter, those that curation leaves out once.

    Raises:
        UserError: a source cannot be read or converted, `holdout` takes every row, or no pair is
            left.
    """
    rows: list[Pair | str] = []
    dropped: Counter[str] = Counter()
    entered = []
    for index, source in enumerate(sources):
        source_rows, left_out = read_pairs(source, seed)
        entered.append(len(rows) + weighted_rows(len(source_rows), source.weight, seed, index))
        rows += source_rows
        dropped += left_out
    order = np.concatenate(entered)
    if holdout and holdout >= len(order):
        raise UserError(
            f"data.eval.holdout is {holdout}, but the sources hold only {len(order)} rows; "
            "expected fewer than there are"
        )

    train, held_out = (order[part] for part in split_holdout(len(order), holdout, seed))
    is_copy = np.isin(train, held_out)
    dropped += Counter({HELD_OUT_COPY: int(is_copy.sum())})
    train_pairs = _usable((rows[index] for index in train[~is_copy]), dropped)
    holdout_pairs = _usable((rows[index] for index in held_out), dropped)
    if not train_pairs or (holdout and not holdout_pairs):
        name = "held out" if train_pairs else "left to train on"
        paths = ", ".join(source.path for source in sources)
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{paths}: no pair is {name}; dropped: {counts or 'none'}")
    return Preferences(train_pairs, holdout_pairs, dict(dropped))
