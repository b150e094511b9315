"""Files, folders, saved datasets and the hub -> rows, each with its origin."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from notus.errors import UserError

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def read_rows(path: str, split: str | None = None) -> Iterator[PlacedRow]:
    """(where, row) of a file, a folder of files, a dataset saved to disk or one on the hub.

    A split of None means "train" where there are splits. In a folder, the files whose names contain
    the split are read; if there are none, the folder has no splits.

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
    return chain.from_iterable(map(_read_file, named or files))


def _read_file(file: Path) -> Iterator[PlacedRow]:
    if file.name.endswith(".parquet"):
        return _placed(file, _read_parquet(file))
    if file.name.endswith(JSON_SUFFIXES):
        return _placed(file, _read_json(file))
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


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of an array or of lines, by their number in the array or the line's number."""
    opened = gzip.open if file.suffix == ".gz" else open
    line = 0
    try:
        # The "-sig" drops the byte order mark that editors on Windows put first.
        with opened(file, "rt", encoding="utf-8-sig") as text:
            is_array = text.read(4096).lstrip().startswith("[")
            text.seek(0)
            if is_array:
                yield from enumerate(json.load(text), start=1)
                return
            for line, content in enumerate(text, start=1):
                if content.strip():
                    yield line, json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{line or error.lineno}: not JSON: {error.msg} at column {error.colno}; "
            "expected one object per line, or one array of objects in the file"
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


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
    name = split or "train"
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise UserError(f'{folder}: no split "{name}"; the dataset has {", ".join(saved)}')
        folder, saved = folder / name, saved[name]
    elif name not in ("train", saved.split and str(saved.split)):
        raise UserError(f'{folder}: no split "{split}"; the saved dataset has no splits')
    return _placed(folder, enumerate(saved, start=1))


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
    return _placed(f"{path}/{split}", enumerate(dataset, start=1))


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
