"""The option --json FILE: a command's numbers in a new file."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notus.errors import UserError
from notus.files import write_json


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json FILE, for `check_new` before the work and `keep_json` after it."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")


def check_new(file: Path | None) -> None:
    """Raise UserError if a file to be written exists already, or its folder does not."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"{file}: exists already and is not overwritten; expected a new file")
    if not file.parent.is_dir():
        raise UserError(f"{file}: the folder {file.parent} does not exist")


def keep_json(file: Path | None, content: Mapping[str, Any]) -> None:
    """Write the numbers of a command, unless `file` is None. Raises UserError."""
    if file is None:
        return
    check_new(file)
    try:
        write_json(file, content)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None
