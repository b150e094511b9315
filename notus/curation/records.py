"""The records that a curation writes: of pairs, by the columns of Argilla's set, and of drops."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow

from notus.curation.decontamination import Dropped, Prompt, whole_text
from notus.curation.rated_rows import RatedRow
from notus.curation.ratings import Choice
from notus.curation.rows import Row, optional_text
from notus.data.columns import complete
from notus.data.messages import ASSISTANT, USER
from notus.data.pairs import PARTS, Pair, question_pair
from notus.errors import UserError

# The columns of argilla/ultrafeedback-binarized-preferences, Notus's training data.
TEXTS = ("source", "instruction", "chosen_response", "rejected_response")
SCORES = ("chosen_avg_rating", "rejected_avg_rating")
SCORED = ("score_chosen", "score_rejected", "chosen_model")  # next to messages
SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in TEXTS]
    + [(name, pyarrow.float64()) for name in SCORES]
    + [("chosen_model", pyarrow.string())]
)


def record_of_pair(name: str, rated: RatedRow, choice: Choice, row: Row, where: str) -> Row:
    """The record of a pair that a rule chose; its prompt is messages where it has several turns.

    name: of the row's format. Raises UserError for tools, and as `complete` does.
    """
    model = optional_text(choice.chosen, "model", where)
    texts = (choice.chosen["response"], choice.rejected["response"])
    scores = (choice.chosen_score, choice.rejected_score)
    pair = complete(question_pair(rated.prompt, *texts, where, scores), name, row, where)
    if pair.tools or pair.template_options:
        raise UserError(
            f"{where}: the row has tools or options of the chat template, which the command does "
            'not write; give the set "curation" as a source of a training configuration instead'
        )
    is_question = isinstance(rated.prompt, str) and len(pair.prompt) == 1
    prompt = rated.prompt if is_question else pair.prompt
    values = (rated.source, prompt, *texts, *scores, model)
    return dict(zip(SCHEMA.names, values, strict=True))


def record_of_dropped(
    prompt: Prompt | None, source: str | None, dropped: Dropped, where: str
) -> Row:
    """The record of a row that gives no pair, with the benchmark prompt that it holds, if any."""
    hit = {} if dropped.hit is None else dropped.hit._asdict()
    record = {"row": where, "source": source, "instruction": prompt}
    return record | {"reason": dropped.reason} | {f"benchmark_{k}": v for k, v in hit.items()}


def record_of_ready(pair: Pair, source: str | None) -> Row:
    """The record of a row that is a pair already, as text; for counts and the report."""
    texts = [whole_text(part) for part in (pair.prompt, pair.chosen, pair.rejected)]
    values = (source, *texts, pair.chosen_score, pair.rejected_score, None)
    return dict(zip(SCHEMA.names, values, strict=True))


def row_of_pair(pair: Pair, source: str | None) -> Row:
    """A complete pair as a row in TRL's formats."""
    row = {part: getattr(pair, part) for part in PARTS}
    if pair.implied:  # the prompt is the common beginning of both texts
        row = {part: pair.prompt + row[part] for part in PARTS[1:]}
    row |= {"score_chosen": pair.chosen_score, "score_rejected": pair.rejected_score}
    row |= {"source": source, "tools": pair.tools, "chat_template_kwargs": pair.template_options}
    return {name: value for name, value in row.items() if value not in (None, [], {})}


def write_lines(path: Path, records: Iterable[Row]) -> None:
    """Write JSONL. Values that JSON does not have (dates of Parquet) become text."""
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    # Half a surrogate pair may be in a column that no format reads; UTF-8 has none.
    text = re.sub("[\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], "".join(lines))
    path.write_text(text, encoding="utf-8")


def table_of(pairs: Sequence[Row], path: str) -> pyarrow.Table:
    """The records as a table: in Argilla's columns, or as messages if a prompt is messages."""
    if all(isinstance(pair["instruction"], str) for pair in pairs):
        return pyarrow.Table.from_pylist(pairs, SCHEMA)
    columns = defaultdict(list)
    for pair in pairs:
        values = iter(pair.values())
        columns["source"].append(next(values))
        for column, role in (("prompt", USER), ("chosen", ASSISTANT), ("rejected", ASSISTANT)):
            part = next(values)
            is_text = isinstance(part, str)
            columns[column].append([{"role": role, "content": part}] if is_text else part)
        for column, value in zip(SCORED, values, strict=True):
            columns[column].append(value)
    if any(len(message) > 2 for prompt in columns["prompt"] for message in prompt):
        raise UserError(
            f"{path}: messages hold more than a role and a content, which the command does not "
            'write; give the set "curation" as a source of a training configuration instead'
        )
    return pyarrow.table(dict(columns))
