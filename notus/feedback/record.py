"""The record of a judge's answers, kept line by line so that nothing is asked or computed twice."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

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


class Score(NamedTuple):
    """A reward model's score of a row's distinct response, both counted from 0."""

    row: int
    response: int
    score: float

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.response


Kept = TypeVar("Kept", Answer, Score)


class Record(Generic[Kept]):
    """A folder with the settings of a judge's run and its answers so far.

    Every process adds to a file of its own, and reads all of them. A half-written last line, of a
    process that was killed, is left out. The folder is made with the first answer.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        kind: Callable[..., Kept],
        rank: int = 0,
    ) -> None:
        """Raises UserError if the folder is of a run with other settings, or is damaged."""
        self._folder, self._settings, self._lock = folder, settings, threading.Lock()
        self._place = folder / (f"{rank}-{ANSWERS}" if rank else ANSWERS)
        self._file = None
        self.answers: dict[tuple[int, ...], Kept] = {}
        if not folder.is_dir():
            return
        found = read_object(folder / SETTINGS)
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(
                    f"{folder}: was started with {key} {json.dumps(found.get(key))[:60]}, now it "
                    f"is {json.dumps(value)[:60]}; expected the same settings, or another --out"
                )
        for file in sorted(folder.glob(f"*{ANSWERS}")):
            self._read(file, kind)

    def _read(self, file: Path, kind: Callable[..., Kept]) -> None:
        with writing(file):
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content and file == self._place:
                os.truncate(file, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                answer = kind(**json.loads(line))
                self.answers[answer.key] = answer
            except (ValueError, TypeError, RecursionError):
                raise UserError(f"{file}:{number}: is damaged; remove this line") from None

    def add(self, answer: Kept) -> None:
        """Keep an answer; on the disk when this returns. May be called from several threads."""
        with self._lock, writing(self._folder):
            if self._file is None:
                self._make_folder()
                self._file = self._place.open("a", encoding="utf-8")
            self._file.write(line_of(answer))
            self._file.flush()
            os.fsync(self._file.fileno())
            self.answers[answer.key] = answer

    def _make_folder(self) -> None:
        try:
            with new_folder(self._folder) as new:
                write_json(new / SETTINGS, self._settings)
        except UserError:
            if not self._folder.is_dir():  # it is, if another process was faster
                raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def text(self) -> str:
        """All answers as JSON lines, in the order of their keys."""
        return "".join(line_of(self.answers[key]) for key in sorted(self.answers))


def line_of(answer: Kept) -> str:
    return json.dumps(answer._asdict(), ensure_ascii=True) + "\n"
