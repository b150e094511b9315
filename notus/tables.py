"""Tables as text: aligned columns for a terminal, Markdown for a page."""

from collections.abc import Iterable, Sequence

from notus.console import width

Cell = str | float | int | None


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[Cell]], digits: int = 2, keys: int = 1
) -> str:
    """Aligned columns: text to the left, numbers to the right, None as a dash.

    Floats are shown with `digits` decimals; a column is right-aligned if no cell of it is text.
    Columns that a terminal is too narrow for are a further table below, behind the first `keys`
    columns again.
    """
    rows = list(rows)
    shown = [[_text(cell, digits) for cell in row] for row in rows]
    columns = []
    for texts, right in zip(zip(header, *shown, strict=True), _numeric(header, rows), strict=True):
        most = max(map(len, texts))
        columns.append([text.rjust(most) if right else text.ljust(most) for text in texts])
    first, *others = _folded(columns, keys)
    tables = [first, *(columns[:keys] + part for part in others)]
    lines = (["  ".join(row).rstrip() for row in zip(*table, strict=True)] for table in tables)
    return "\n\n".join(map("\n".join, lines))


def _folded(columns: Sequence[list[str]], keys: int) -> list[list[list[str]]]:
    """The columns in parts, each of which fits the terminal behind the first `keys` of them."""
    parts, most = [[*columns[:keys]]], width()
    used = reserved = sum(len(column[0]) + 2 for column in columns[:keys])
    for column in columns[keys:]:
        if reserved < used and used + len(column[0]) > most:
            parts.append([])
            used = reserved
        parts[-1].append(column)
        used += len(column[0]) + 2
    return parts


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Cell]], digits: int = 4) -> str:
    """A Markdown table, aligned like `text_table`; integers have thousands separators.

    A "|" in a cell is escaped and line breaks become spaces, so that the cell remains one.
    """
    rows = list(rows)
    lines = [f"| {' | '.join(header)} |"]
    lines.append(f"|{'|'.join('--:' if right else '---' for right in _numeric(header, rows))}|")
    for row in rows:
        texts = (_text(cell, digits, separator=",") for cell in row)
        cells = (" ".join(text.splitlines()).replace("|", "\\|") for text in texts)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _numeric(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Whether each column is free of text."""
    return [not any(isinstance(row[i], str) for row in rows) for i in range(len(header))]


def _text(cell: Cell, digits: int, separator: str = "") -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return f"{cell:{separator}}" if isinstance(cell, int) else cell
