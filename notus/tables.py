"""Tables as text: aligned columns for a terminal, Markdown for a page."""

from collections.abc import Iterable, Sequence

Cell = str | float | int | None


def text_table(header: Sequence[str], rows: Iterable[Sequence[Cell]], digits: int = 2) -> str:
    """Aligned columns: text to the left, numbers to the right, None as a dash.

    Floats are shown with `digits` decimals; a column is right-aligned if no cell of it is text.
    """
    rows = list(rows)
    shown = [[_text(cell, digits) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *shown, strict=True)]
    lines = []
    for row in (header, *shown):
        cells = zip(row, widths, _numeric(header, rows), strict=True)
        lines.append("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in cells))
    return "\n".join(line.rstrip() for line in lines)


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
