"""Files and folders that appear complete or not at all, whenever the process is killed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from notus.errors import UserError

PARTIAL = ".partial-"  # the prefix of what is being written; a killed process may leave one


def partial_path(path: Path) -> Path:
    """The name that `path` has while it is being written, in the same folder."""
    return path.with_name(f"{PARTIAL}{path.name}")


def write_whole(
    path: Path, content: str | Callable[[Path], object], *, durable: bool = False
) -> None:
    """Write a file under a partial name and rename it, so that readers never see half of it.

    content: text (written as UTF-8), or a function that writes the file at the path given to it.
    durable: fsync the file before the rename and its folder after it, so that the file survives a
    power loss too. An earlier file of the name is replaced. Raises OSError, leaving nothing, when
    the file system refuses.
    """
    partial = partial_path(path)
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_text(content, encoding="utf-8")
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """`write_whole` of a value as indented JSON."""
    write_whole(path, json.dumps(value, indent=2) + "\n", durable=durable)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `path`, which must be free, when the block ends well.

    What a killed process left under the partial name is removed first. Raises OSError.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError, which names `path` and the file in it, when the file system refuses."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename  # of a copy, where it goes
        inside = place and Path(place).parent != path.parent
        reason = f"{place}: {error.strerror}" if inside else error.strerror
        raise UserError(f"{path}: cannot be written ({reason})") from None


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError that names the file if it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
