"""The record of a judge's answers, kept line by line so that nothing is ever asked twice."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from notus.errors import UserError
from notus.files import new_folder, read_object, write_json, writing

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"


class Answer(NamedTuple):
    """An answer of the judge, as received.

    row, question, attempt: which one, counted from 0; the questions are the aspects in the rubric's
    order, then the overall score of each response. order: the responses as they were shown. text:
    unchanged, None if there was none. problem: why it cannot be read; None if it can.
    """

    row: int
    question: int
    attempt: int
    name: str
    order: list[int]
    seed: int
    temperature: float
    schema: bool
    text: str | None
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    problem: str | None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.row, self.question, self.attempt


class Record:
    """A folder with the settings of a judge's run and its answers so far.

    A half-written last line, of a process that was killed, is cut off. The folder is made with the
    first answer.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises UserError if the folder is of a run with other settings, or is damaged."""
        self._folder, self._settings, self._lock = folder, settings, threading.Lock()
        self._file = None
        self.answers: dict[tuple[int, int, int], Answer] = {}
        if not folder.is_dir():
            return
        found = read_object(folder / SETTINGS)
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(
                    f"{folder}: was started with {key} {json.dumps(found.get(key))[:60]}, now it "
                    f"is {json.dumps(value)[:60]}; give the same or another --out, or remove the "
                    "folder"
                )
        file = folder / ANSWERS
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(file, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{file}:{number}: is damaged; remove this line") from None
            self.answers[answer.key] = answer

    def add(self, answer: Answer) -> None:
        """Keep an answer; on the disk when this returns. May be called from several threads."""
        with self._lock, writing(self._folder):
            if self._file is None:
                if not self._folder.is_dir():
                    with new_folder(self._folder) as new:
                        write_json(new / SETTINGS, self._settings)
                self._file = (self._folder / ANSWERS).open("a", encoding="utf-8")
            self._file.write(line_of(answer))
            self._file.flush()
            os.fsync(self._file.fileno())
            self.answers[answer.key] = answer

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def text(self) -> str:
        """All answers as JSON lines, in the order of rows, questions and attempts."""
        return "".join(line_of(self.answers[key]) for key in sorted(self.answers))


def line_of(answer: Answer) -> str:
    return json.dumps(answer._asdict(), ensure_ascii=True) + "\n"
