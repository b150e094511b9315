"""Results as a table to read and as a JSON file to keep, which never replaces another."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.errors import UserError

Cell = str | float | int | None


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 2) -> str:
    """Aligned columns: text to the left, numbers to the right, None as a dash.

    Floats are shown with `digits` decimals; a column is right-aligned if no cell of it is text.
    """
    texts = [[_text(cell, digits) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    numeric = [
        not any(isinstance(cell, str) for cell in column) for column in zip(*rows, strict=True)
    ]
    lines = []
    for row in (header, *texts):
        cells = zip(row, widths, numeric, strict=True)
        lines.append("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in cells))
    return "\n".join(line.rstrip() for line in lines)


def _text(cell: Cell, digits: int) -> str:
    if cell is None:
        return "-"
    return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json FILE, to be served by `check_new` before the work and `write_json` after it."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")


def check_new(file: Path | None) -> None:
    """Raise UserError if a file that is to be written is there already, or has no folder."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"{file}: exists already and is not overwritten; expected a new file")
    if not file.parent.is_dir():
        raise UserError(f"{file}: the folder {file.parent} does not exist")


def write_json(file: Path | None, content: Mapping[str, Any]) -> None:
    """Write a new JSON file, whole or not at all; nothing if `file` is None.

    Raises UserError if the file exists by now, or cannot be written.
    """
    if file is None:
        return
    check_new(file)
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises UserError if the file cannot be read, is not JSON (cut off, say) or holds no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: found {type(content).__name__}, expected a JSON object")
    return content
