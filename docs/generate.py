"""Writes docs/configuration.md from notus/config.py: `python docs/generate.py`.

A key's meaning is the comment at its field there: the lines above it, and the end of its own line.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from notus.config import CONFLICTS, INERT, Config, describe  # noqa: E402

HEAD = """# Configuration

Generated from `notus/config.py` by `python docs/generate.py`. A configuration is a JSON file of
these sections; `section.key=value` on the command line wins over it. An unknown, missing, mistyped
or inert key is an error that names the key, where it was given, and the nearest valid one.
"""


def comments(cls: type) -> dict[str, str]:
    """What the source says of each field of a dataclass."""
    source, first = inspect.getsourcelines(cls)
    tree = ast.parse("".join(source))
    lines = [line.rstrip("\n") for line in source]
    found = {}
    for node in tree.body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().removeprefix("#").strip())
        _, _, own = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
        found[node.target.id] = " ".join([*above, own.strip()]).strip()
    return found


def sections(cls: type, key: str) -> Iterator[tuple[str, type]]:
    """Every dataclass below the configuration, with the dotted key that holds it."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part, suffix in members(hint):
            dotted = f"{key}.{name}" if key else name
            yield dotted + suffix, part
            yield from sections(part, dotted + suffix)


def members(hint: Any) -> Iterator[tuple[type, str]]:
    """The dataclasses that an annotation may hold; `.0` where they are in a list."""
    if is_dataclass(hint):
        yield hint, ""
    for argument in get_args(hint):
        for part, suffix in members(argument):
            yield part, (".0" if getattr(hint, "__origin__", None) is tuple else "") + suffix


def rows(cls: type) -> Iterator[str]:
    """A table row for each key of a section that is not a section itself."""
    hints, meaning = get_type_hints(cls, include_extras=True), comments(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]) or field.default_factory is not MISSING:
            continue
        default = "required" if field.default is MISSING else json.dumps(field.default)
        expected = describe(hints[field.name]).replace("|", "\\|")
        yield f"| `{field.name}` | {default} | {expected} | {meaning[field.name]} |"


def named(words: str) -> str:
    """A message with the names of keys where it shows their values."""
    return re.sub(r'"?\{0\.([\w.]+)\}"?', r"`\1`", words)


def configuration() -> str:
    """The whole page."""
    parts = [HEAD]
    places: dict[type, list[str]] = {Config: []}
    for key, cls in sections(Config, ""):
        places.setdefault(cls, []).append(f"`{key}`")
    for cls, keys in places.items():
        table = list(rows(cls))
        title = f"## {', '.join(keys) or 'At the top'}"
        text = inspect.getdoc(cls) or ""
        text = "" if text.startswith(f"{cls.__name__}(") else f"\n{text}\n"
        head = "\n| key | default | expected | meaning |\n|---|---|---|---|\n"
        if table:
            parts.append(f"{title}\n{text}{head}" + "\n".join(table) + "\n")
    parts.append("## Keys without effect\n\nGiving one of these is an error:\n")
    parts.append("\n".join(f"- `{key}`, if {named(words)}" for key, _, words in INERT) + "\n")
    parts.append("## Settings that contradict each other\n\nChecked before anything is read:\n")
    parts.append("\n".join(f"- `{key}`: {named(words)}" for key, _, words in CONFLICTS) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(configuration())
