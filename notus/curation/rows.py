"""Files, folders, saved datasets and the hub -> rows, each with its origin."""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from notus.errors import UserError

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".parquet")


LONGEST_LINE = 64 * 2**20
# A .gz file of text grows 3 to 20 times; one of nothing but spaces 1000 times. The growth is looked
# at from so many bytes on.
MOST_GROWTH, LOOKED_AT = 200, 2**24


def read_rows(
    path: str, split: str | None = None, longest_line: int = LONGEST_LINE
) -> Iterator[PlacedRow]:
    """(where, row) of a file, a folder of files, a dataset saved to disk or one on the hub.

    A split of None means "train" where there are splits. In a folder, the files whose names contain
    the split are read; if there are none, the folder has no splits. longest_line: the characters
    that a line of JSON may have.

    Raises:
        UserError: nothing is found, or what is found cannot be read as rows.
    """
    with reading(path):  # no such home, a name that is too long, no permission
        local = Path(path).expanduser()
        is_file = local.is_file()
        names = [file.name for file in local.iterdir()] if local.is_dir() else None
    if is_file:
        return _read_files([local], split, longest_line)
    if names is None:
        return _read_hub(path, split or "train")
    if "dataset_dict.json" in names or "state.json" in names:
        return _read_saved_dataset(local, split)
    files = [local / name for name in sorted(names) if name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return _read_files(files, split, longest_line)


@contextmanager
def reading(place: Path | str, kind: str = "") -> Iterator[None]:
    """Raise UserError, which names the place, for whatever a library meets in a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: cannot be read{kind}: {error}") from None


def _read_files(files: Sequence[Path], split: str | None, longest_line: int) -> Iterator[PlacedRow]:
    named = [file for file in files if (split or "train") in file.name]
    if not named and split not in (None, "train"):
        names = ", ".join(file.name for file in files)
        raise UserError(f'{files[0].parent}: no file name contains the split "{split}": {names}')
    return chain.from_iterable(_read_file(file, longest_line) for file in named or files)


def _read_file(file: Path, longest_line: int) -> Iterator[PlacedRow]:
    if file.name.endswith(".parquet"):
        return _placed(file, _read_parquet(file))
    if file.name.endswith(JSON_SUFFIXES):
        return _placed(file, _read_json(file, longest_line))
    if file.name.endswith(".csv"):
        return _placed(file, _read_csv(file))
    raise UserError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}")


def _placed(name: Path | str, rows: Iterable[tuple[int, Any]]) -> Iterator[PlacedRow]:
    """(where, row) of numbered rows; raises UserError for one that is no object, and for none."""
    number = 0
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: the row is {kind_of(row)}; expected an object")
        yield f"{name}:{number}", row
    if number == 0:
        raise UserError(f"{name}: holds no rows")


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


def _read_json(file: Path, longest_line: int) -> Iterator[tuple[int, Any]]:
    """The rows of an array or of lines, by their number in the array or the line's number."""
    open_bytes = _Inflated if file.suffix == ".gz" else partial(open, mode="rb")
    # The "-sig" drops the byte order mark that editors on Windows put first.
    with (
        reading(file),
        open_bytes(file) as opened,
        TextIOWrapper(opened, encoding="utf-8-sig") as text,
    ):
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
        raise UserError(
            f"{file}:{line or error.lineno}: not JSON: {error.msg} at column {error.colno}; "
            "expected one object per line, or one array of objects in the file"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits; 1,000 lists
        raise UserError(f"{file}:{line or 1}: cannot be read: {error}") from None


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows below a line of column names, by the line that they end on; every cell is text."""
    csv.field_size_limit(2**31 - 1)  # of a cell; the default is 128 KiB
    with reading(file, " as CSV"), open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{file}:{reader.line_num}: the row has more or fewer cells than the first "
                    f"line has column names ({', '.join(reader.fieldnames)})"
                )
            yield reader.line_num, row


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    with reading(file, " as Parquet"), pyarrow.parquet.ParquetFile(file) as parquet:
        batches = parquet.iter_batches(batch_size=1000)
        yield from enumerate(_from_arrow(row for b in batches for row in b.to_pylist()), start=1)


def _from_arrow(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows without the null fields of objects inside columns.

    Arrow gives all objects of a column the same fields: a message without a tool call gets a null
    one, and a call every other tool's arguments.
    """

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: pruned(one) for name, one in value.items() if one is not None}
        return [pruned(one) for one in value] if isinstance(value, list) else value

    for row in rows:
        yield {name: pruned(value) for name, value in row.items()}


def _read_saved_dataset(folder: Path, split: str | None) -> Iterator[PlacedRow]:
    import datasets  # takes seconds to import and plain files do not need it

    with reading(folder, " as a saved dataset"):
        saved = datasets.load_from_disk(str(folder))
        name = split or "train"
        if isinstance(saved, datasets.DatasetDict):
            if name not in saved:
                raise UserError(f'{folder}: no split "{name}"; the dataset has {", ".join(saved)}')
            folder, saved = folder / name, saved[name]
        elif name not in ("train", saved.split and str(saved.split)):
            raise UserError(f'{folder}: no split "{split}"; the saved dataset has no splits')
        yield from _placed(folder, enumerate(_from_arrow(saved), start=1))


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
    return _placed(f"{path}/{split}", enumerate(_from_arrow(dataset), start=1))


KINDS = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}


def kind_of(value: Any) -> str:
    """The kind of a row's value, in words for a message."""
    return KINDS.get(type(value), "a number")


def reject_column(row: Row, column: str, where: str, expected: str) -> NoReturn:
    """Raise the UserError for a column that is missing or holds something else."""
    found = f"is {kind_of(row[column])}" if column in row else "is missing"
    raise UserError(f'{where}: "{column}" {found}; expected {expected}')


def read_text(row: Row, column: str, where: str) -> str:
    """The text in `row[column]`; raises a UserError that names `where` if there is none."""
    text = row.get(column)
    if not isinstance(text, str):
        reject_column(row, column, where, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON's \\u can spell
        raise UserError(f'{where}: "{column}" is not valid Unicode: {error}') from None
    return text


def optional_text(row: Row, column: str, where: str) -> str | None:
    """`read_text`, or None if the column is missing or null."""
    return None if row.get(column) is None else read_text(row, column, where)
