"""Sampled responses in, rated rows out: the files that every judge reads and writes."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notus.console import emit
from notus.curation.rows import Row, kind_of, read_rows, read_text, reject_column
from notus.errors import UserError
from notus.files import new_folder, write_json

RATED, MANIFEST = "train.jsonl", "manifest.json"  # the first is read as the split "train"


class Sampled(NamedTuple):
    """A row of sampled responses: the user's question, two responses or more, the unchanged row."""

    prompt: str
    responses: list[str]
    row: Row
    where: str


def read_responses(path: str) -> list[Sampled]:
    """The rows of `eval.py generate --samples`, or any rows with "prompt" and "responses".

    Raises UserError that names the row if the prompt is not text (one question of the user), or
    there are not at least two responses, all of them text.
    """
    found = []
    for where, row in read_rows(path):
        if isinstance(row.get("prompt"), list):
            raise UserError(
                f'{where}: "prompt" is a conversation of {len(row["prompt"])} messages; expected '
                "text, a single question, because rated rows hold one"
            )
        prompt, responses = read_text(row, "prompt", where), row.get("responses")
        if not isinstance(responses, list):
            reject_column(row, "responses", where, "a list of texts")
        if len(responses) < 2:
            raise UserError(
                f"{where}: {len(responses)} responses; expected at least two to compare "
                "(eval.py generate --samples 2)"
            )
        for response in responses:
            if not isinstance(response, str):
                raise UserError(f'{where}: "responses" holds {kind_of(response)}; expected texts')
            read_text({"responses": response}, "responses", where)
        found.append(Sampled(prompt, responses, row, where))
    return found


def write_rated(
    out: Path, rows: Iterable[Row], settings: Mapping[str, Any], others: Mapping[str, str] = {}
) -> None:
    """Make the folder `out`: RATED, and MANIFEST with `settings` and the hashes of all files.

    others: the contents of further files by name. As a training source the folder is its RATED.
    It appears only when it is complete. Raises UserError if it exists or cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with new_folder(out) as folder:
        hashes = {}
        for name, content in {RATED: text, **others}.items():
            (folder / name).write_text(content, encoding="utf-8")
            hashes[name] = hashlib.sha256(content.encode()).hexdigest()
        write_json(folder / MANIFEST, {**settings, "files_sha256": hashes})


def hash_of_rows(sampled: Sequence[Sampled]) -> str:
    """A hash of the rows' content, whatever the kind of file that they were read from."""
    digest = hashlib.sha256()
    for one in sampled:
        digest.update(json.dumps(one.row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def run_judge(judge: Callable[[], str]) -> int:
    """Print the line that `judge` returns; the exit code, 2 after a user's mistake.

    Under torchrun one process speaks.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        told = judge()
    except UserError as error:
        if speaks:
            emit(f"error: {error}", sys.stderr)
        return 2
    if speaks:
        emit(told)
    return 0
