"""Files and folders that appear complete or not at all, whenever the process is killed."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from notus.errors import UserError

Plain = dict[str, Any]  # a JSON object

PARTIAL = ".partial-"  # the prefix of what is being written; a killed process may leave one


def partial_path(path: Path) -> Path:
    """The name that `path` has while it is being written, in the same folder."""
    return path.with_name(f"{PARTIAL}{path.name}")


def remove_partial(folder: Path) -> None:
    """Remove what killed processes were writing in a folder; nobody else may be writing there.

    Raises UserError when the file system refuses.
    """
    with writing(folder):
        for left in folder.glob(f"{PARTIAL}*"):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(
    path: Path,
    content: str | Callable[[Path], object],
    *,
    durable: bool = False,
    shared: bool = False,
) -> None:
    """Write a file under a partial name and rename it, so that readers never see half of it.

    content: text (written as UTF-8), or a function that writes the file at the path given to it.
    durable: fsync the file before the rename and its folder after it, so that the file survives a
    power loss too. shared: other processes may write the same path at the same time; the last to
    finish wins. An earlier file of the name is replaced. Raises OSError, leaving nothing, when
    the file system refuses.
    """
    partial = partial_path(path)
    if shared:
        partial = partial.with_name(f"{partial.name}-{secrets.token_hex(4)}")
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


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder, to NAME.damaged or NAME.damaged-2, ...; the new path."""
    names = (f"{path.name}.damaged{'' if n == 1 else f'-{n}'}" for n in count(1))
    aside = next(p for p in map(path.with_name, names) if not os.path.lexists(p))
    os.rename(path, aside)
    return aside


def write_json(path: Path, value: Any, *, durable: bool = False, shared: bool = False) -> None:
    """`write_whole` of a value as indented JSON."""
    write_whole(path, json.dumps(value, indent=2) + "\n", durable=durable, shared=shared)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `path` when the block ends well.

    Its name until then is not shared with another process that makes `path` at the same time: the
    first to finish wins. A killed process leaves its partial folder. Raises UserError if `path`
    exists, or the file system refuses.
    """
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        if os.path.lexists(path):
            raise UserError(f"{path}: exists already; expected the name of a new folder")
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there once it has its name


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


def read_object(path: Path) -> Plain:
    """The JSON object in a file. Raises UserError that names the file if it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, too many digits, nested too deeply
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
