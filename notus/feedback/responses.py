"""Sampled responses in, rated rows out: the files that every judge reads and writes."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notus.curation.rated_rows import as_text
from notus.curation.rows import Row, kind_of, read_rows, read_text, reject_column
from notus.data.messages import ASSISTANT, MESSAGE_KEYS, TOOL_ROLES, USER, Message, read_messages
from notus.errors import UserError
from notus.evals.options import NewPath
from notus.files import new_folder, write_json

RATED, MANIFEST = "train.jsonl", "manifest.json"  # the first is read as the split "train"


class Sampled(NamedTuple):
    """A row of sampled responses: what they answer, two of them or more, the unchanged row.

    prompt: a question of the user as text, or the messages of a conversation that ends with one.
    """

    prompt: str | list[Message]
    responses: list[str]
    row: Row
    where: str

    @property
    def distinct(self) -> list[str]:
        """The responses without repetitions: equal ones are judged once, and rated the same."""
        return list(dict.fromkeys(self.responses))

    def answered(self, response: str) -> list[Message]:
        """The conversation that ends with the response."""
        single = [{"role": USER, "content": self.prompt}]
        turns = single if isinstance(self.prompt, str) else self.prompt
        return [*turns, {"role": ASSISTANT, "content": response}]


def judge_parser(name: str, about: str) -> argparse.ArgumentParser:
    """The command line of the module `name` with what every judge takes: responses and --out."""
    parser = argparse.ArgumentParser(prog=f"python -m notus.feedback.{name}", description=about)
    parser.add_argument("responses", help="the rows of eval.py generate --samples")
    parser.add_argument(
        "--out", required=True, type=Path, action=NewPath, help="the folder to make"
    )
    return parser


def read_responses(path: str) -> list[Sampled]:
    """The rows of `eval.py generate --samples`, or any rows with "prompt" and "responses".

    Raises UserError that names the row if the prompt is neither text nor messages of text, the last
    one the user's, or there are not at least two responses, all of them text.
    """
    found = []
    for where, row in read_rows(path):
        prompt, responses = _read_prompt(row, where), row.get("responses")
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


def _read_prompt(row: Row, where: str) -> str | list[Message]:
    if not isinstance(row.get("prompt"), list):
        return read_text(row, "prompt", where)
    messages = read_messages(row, "prompt", where)
    for number, message in enumerate(messages):
        if message["role"] in TOOL_ROLES or message.keys() != set(MESSAGE_KEYS):
            raise UserError(f'{where}: "prompt[{number}]" holds more than text; expected only text')
    if not messages or messages[-1]["role"] != USER:
        found = f"a message of the {messages[-1]['role']}" if messages else "no message"
        raise UserError(f'{where}: "prompt" ends with {found}; expected one of the user')
    return as_text(messages)


def write_rated(
    out: Path, rows: Iterable[Row], settings: Mapping[str, Any], others: Mapping[str, str] = {}
) -> None:
    """Make the folder `out`: RATED, and MANIFEST with `settings` and the hashes of all files.

    others: the contents of further files by name. As a training source the folder is its RATED.
    It appears only when it is complete. Raises UserError if it exists or cannot be written.
    """
    text = "".join(map(_line_of, rows))
    with new_folder(out) as folder:
        hashes = {}
        for name, content in {RATED: text, **others}.items():
            (folder / name).write_text(content, encoding="utf-8")
            hashes[name] = hashlib.sha256(content.encode()).hexdigest()
        write_json(folder / MANIFEST, {**settings, "files_sha256": hashes})


def _line_of(row: Row) -> str:
    """A row as a line of JSON; half a surrogate pair, which UTF-8 has not, remains escaped."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def hash_of_rows(sampled: Sequence[Sampled]) -> str:
    """A hash of the rows' content, whatever the kind of file that they were read from."""
    digest = hashlib.sha256()
    for one in sampled:
        digest.update(json.dumps(one.row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
