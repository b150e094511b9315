"""Files, folders, saved datasets and the hub -> rows, each with its origin."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from notus.curation.text_files import (
    LONGEST_LINE,
    Row,
    read_csv_rows,
    read_json_rows,
    reading,
)
from notus.errors import UserError

PlacedRow = tuple[str, Row]

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CSV_SUFFIXES = (".csv", ".csv.gz")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet")


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
        return _placed(file, read_json_rows(file, longest_line))
    if file.name.endswith(CSV_SUFFIXES):
        return _placed(file, read_csv_rows(file))
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


def as_number(value: Any) -> Any:
    """The number or truth value that a text spells, as the cells of a CSV file do; else `value`."""
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        with suppress(ValueError):
            return float(value)
    return value


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
