"""Files of text, JSON and CSV, -> numbered rows; a .gz file is unpacked on the way."""

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from notus.errors import UserError

Row = dict[str, Any]

LONGEST_LINE = 64 * 2**20
# A .gz file of text grows 3 to 20 times; one of nothing but spaces 1000 times. The growth is looked
# at from so many bytes on.
MOST_GROWTH, LOOKED_AT = 200, 2**24


@contextmanager
def reading(place: Path | str, kind: str = "") -> Iterator[None]:
    """Raise UserError, which names the place, for whatever a library meets in a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: cannot be read{kind}: {error}") from None


class _Inflated(gzip.GzipFile):
    """The contents of a .gz file. Raises UserError when they are MOST_GROWTH times its size."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._most = max(LOOKED_AT, MOST_GROWTH * file.stat().st_size)

    def read1(self, size: int = -1) -> bytes:
        if self.tell() > self._most:
            raise UserError(
                f"{self.name}: grows to more than {MOST_GROWTH} times its size; expected rows of "
                "text; if it holds them, unpack it first"
            )
        return super().read1(size)


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIOWrapper]:
    """The text of a file. Raises UserError for whatever goes wrong while it is read."""
    is_packed = file.suffix == ".gz"
    with reading(file), _Inflated(file) if is_packed else file.open("rb") as opened:
        try:
            # The "-sig" drops the byte order mark that editors on Windows put first.
            yield TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: cannot be read: {error}; expected UTF-8 (a spreadsheet: save as CSV "
                "UTF-8; other files of Windows: iconv -f cp1252 -t utf-8)"
            ) from None


def read_json_rows(file: Path, longest_line: int) -> Iterator[tuple[int, Any]]:
    """The rows of an array or of lines, by their number in the array or the line's number."""
    with _opened(file) as text:
        is_array = text.read(4096).lstrip().startswith("[")
        text.seek(0)
        if is_array:
            content = "".join(iter(partial(text.read, 2**20), ""))
            yield from enumerate(_parse(file, None, content), start=1)
            return
        lines = iter(partial(text.readline, longest_line + 1), "")
        for line, content in enumerate(lines, start=1):
            if len(content.rstrip("\n")) > longest_line:
                raise UserError(
                    f"{file}:{line}: found a line of more than {longest_line:,} characters, "
                    "expected fewer (longest_line of a source in data.train)"
                )
            if content.strip():
                yield line, _parse(file, line, content)


def _parse(file: Path, line: int | None, text: str) -> Any:
    """The JSON of a line, or of a file without lines of its own."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends = line and error.pos >= len(text.rstrip())
        problem = (
            "its object does not end on this line"
            if ends
            else f"{error.msg} at column {error.colno}"
        )
        raise UserError(
            f"{file}:{line or error.lineno}: not JSON: {problem}; expected one object per line, or "
            "one array of objects in the file",
            *[f"one object over several lines: python -m json.tool --no-indent {file} rows.jsonl"]
            * bool(ends),
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits; 1,000 lists
        raise UserError(f"{file}:{line or 1}: cannot be read: {error}") from None


def read_csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows below a line of column names, by the line that they begin on; every cell is text.

    Cells are separated by commas, or where the names have no comma by tabs or semicolons. Spaces
    around names do not count.
    """
    csv.field_size_limit(2**31 - 1)  # of a cell; the default is 128 KiB
    with _opened(file, newline="") as text:
        first = text.readline()
        text.seek(0)
        separator = next((sign for sign in ",\t;" if sign in first), ",")
        rows = _csv_cells(file, csv.reader(text, delimiter=separator, strict=True))
        line, cells = next(rows, (1, []))
        names = [name.strip() for name in cells]
        if twice := {name for name in names if name and names.count(name) > 1}:
            raise UserError(
                f'{file}:{line}: two columns have the name "{min(twice)}"; expected one'
            )
        for line, cells in rows:
            if len(cells) != len(names):
                raise UserError(
                    f"{file}:{line}: the row has {len(cells)} cells, and the first line "
                    f"{len(names)} column names ({', '.join(names)}); expected as many (a cell "
                    "that holds a comma or a line break needs quotes around it)"
                )
            yield line, dict(zip(names, cells, strict=True))


def _csv_cells(file: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv.reader that are not empty, by the line that they begin on."""
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}:{line}: the row that begins here is not CSV: {error}; expected a cell that "
            "begins with a quote to end with one, and to double the quotes in it"
        ) from None
