"""Marks that a person set on rows, as the page of `python -m notus.look` saves them.

A file of marks holds an object on each line:

    {"prompt": "1f0c...", "responses": ["a3e1...", "07bd..."], "mark": "swap",
     "note": "the critique says so", "where": "ratings.jsonl:12"}

prompt, responses: `fingerprint`s. A mark belongs to every row that has this prompt and these
responses, so it survives another order of the rows, another format, and another rule that picks
the pair. "drop" leaves the row out. "swap" makes a pair of the second response as the chosen one
and the first as the rejected one, whatever the rule picks. "keep" says that somebody looked.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from notus.curation.decontamination import Prompt
from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.strict import Invalid, Text, parse

MARKED = "marked to be dropped"


def fingerprint(part: Prompt) -> str:
    """16 hexadecimal digits that identify a prompt or a response.

    A text and the same text as a single message have the same fingerprint.
    """
    if not isinstance(part, str):
        single = len(part) == 1 and part[0].keys() == {"role", "content"}
        part = part[0]["content"] if single else json.dumps(part, sort_keys=True)
    # Half a surrogate pair may be in a response that no rule picks.
    return hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One line of a file of marks; see the module. `where` is only for the reader of the file."""

    prompt: Text
    responses: tuple[Text, ...]
    mark: Literal["keep", "drop", "swap"] | None = None
    note: str = ""
    where: str = ""


class Marks:
    """The marks of a file, and the rows to which they were found to belong."""

    def __init__(self, path: str | None) -> None:
        """Raises UserError if the file cannot be read, or a mark is malformed or repeated."""
        self._marks: dict[str, dict[frozenset[str], tuple[str, Mark]]] = defaultdict(dict)
        self._unseen: dict[str, Mark] = {}  # by its place in the file
        self.found: list[tuple[str, Mark]] = []  # (where the row is, its mark)
        for where, row in read_rows(path) if path else ():
            try:
                mark = parse(row, Mark)
            except Invalid as error:
                raise UserError(f"{where}: {error}") from None
            key = frozenset(mark.responses)
            if mark.mark == "swap" and not len(mark.responses) == len(key) == 2:
                raise UserError(f"{where}: responses: expected two that differ, to swap them")
            if key in self._marks[mark.prompt]:
                first = self._marks[mark.prompt][key][0]
                raise UserError(f"{where}: a mark for the row that {first} marks; expected one")
            self._marks[mark.prompt][key] = where, mark
            self._unseen[where] = mark

    def __bool__(self) -> bool:
        return bool(self._marks)

    def find(self, prompt: Prompt, responses: Sequence[Prompt], where: str) -> Mark | None:
        """The mark of a row. Raises UserError if it has several, which differ."""
        if not (marks := self._marks.get(fingerprint(prompt)) if self else None):
            return None
        held = set(map(fingerprint, responses))
        fitting = [placed for key, placed in marks.items() if key <= held]
        asked = [mark.responses if mark.mark == "swap" else mark.mark for _, mark in fitting]
        if len(set(asked)) > 1:
            places = " and ".join(place for place, _ in fitting)
            raise UserError(f"{where}: {places} mark this row differently; expected one mark")
        for place, _ in fitting:
            self._unseen.pop(place, None)
        if not fitting:
            return None
        self.found.append((where, fitting[0][1]))
        return fitting[0][1]

    def require_all_found(self) -> None:
        """Raise UserError if a mark belongs to none of the rows that were looked up."""
        for place, mark in self._unseen.items():
            others = len(self._unseen) - 1
            more = f" (and {others:,} more marks without a row)" if others else ""
            raise UserError(
                f"{place}: no row has this prompt and these responses{more}; the row was "
                f"{mark.where or 'not named'} when it was marked; expected marks for this data"
            )
