"""Tables as lines of text: fitted to a width for people, and as Markdown or CSV.

A table that is too wide has its headers and texts wrapped between words. One that is still too
wide is cut into several below each other, which repeat the first column; with very many columns
each row is written as a list of names and values.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prefab.factory.numbers import cell, is_estimate
from prefab.factory.printable import printable

GAP = "  "  # between columns
LONGEST_WORD = 24  # longer words of a text may be broken
MOST_PARTS = 3  # a table that would be cut into more is written as lists
_NUMERIC = re.compile(r"[▲▼] ?|[<+-]?[\d.,∞]+(e-?\d+)?%?( [±+-][\d.,]+){0,2}( [▲▼])?|-?")

Cells = list[list[str]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table, or a part of a wide one, as lines."""

    header: list[str]
    body: list[str]


def fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    width: int | None,
    rule: bool = True,
    intervals: bool = False,
) -> list[TextTable]:
    """A table as lines of text.

    Args:
        columns: The headers.
        rows: The rows; each value is written by `cell`.
        width: Characters of a line; None: as many as it needs, and one line a row.
        rule: Whether a line is drawn below the headers.
        intervals: Whether estimates show the bounds of their intervals.

    Returns:
        The parts of the table, one where it fits.
    """
    heads = [printable(column) for column in columns]
    texts = [[cell(value, intervals) for value in row] for row in rows]
    if width is None:
        texts = [[text.replace("\n", "\\n") for text in row] for row in texts]
    right = [_numeric([row[i] for row in texts]) for i in range(len(heads))]
    parts = list(_parts(heads, texts, right, width))
    if len(parts) > MOST_PARTS and width is not None:
        return [TextTable([], _records(heads, texts, width))]
    return [
        _lines(
            _pick(heads, part), [_pick(row, part) for row in texts], _pick(right, part), width, rule
        )
        for part in parts
    ]


def _pick(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[i] for i in places]


def _numeric(texts: Sequence[str]) -> bool:
    """Whether a column is aligned right."""
    return any(texts) and all(_NUMERIC.fullmatch(text) for text in texts if text)


def _parts(
    heads: list[str], texts: Cells, right: Sequence[bool], width: int | None
) -> Iterator[list[int]]:
    """The columns of each part, so that each part fits."""
    least = [_least(heads[i], [row[i] for row in texts], right[i]) for i in range(len(heads))]
    if width is None or not heads:
        yield list(range(len(heads)))
        return
    part = [0]
    for i in range(1, len(heads)):
        if len(part) > 1 and sum(least[k] + len(GAP) for k in part) + least[i] > width:
            yield part
            part = [0]
        part.append(i)
    yield part


def _least(head: str, texts: Sequence[str], right: bool) -> int:
    """The width below which a column would have its words broken."""
    from rich.cells import cell_len

    longest = max(map(cell_len, head.split()), default=0)
    if right:
        return max([longest, *map(cell_len, texts)])
    words = (cell_len(word) for text in texts for word in text.split())
    return max([longest, *(min(n, LONGEST_WORD) for n in words)])


def _lines(
    heads: list[str], texts: Cells, right: Sequence[bool], width: int | None, rule: bool
) -> TextTable:
    """A part as lines."""
    columns = range(len(heads))
    natural = [_natural([heads[i], *(row[i] for row in texts)]) for i in columns]
    least = [_least(heads[i], [row[i] for row in texts], right[i]) for i in columns]
    widths = (
        natural if width is None else _widths(natural, least, width - len(GAP) * (len(heads) - 1))
    )
    header = list(_row(heads, widths, right)) if any(heads) else []
    body = [line for row in texts for line in _row(row, widths, right)]
    if header and rule:
        body.insert(0, "─" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    return TextTable(header, body)


def _natural(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _widths(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """A width for each column: its natural one where all fit, else more than the least where its
    texts are longest.
    """
    if sum(natural) <= room:
        return list(natural)
    widths = [min(n, m) for n, m in zip(natural, least, strict=True)]
    while sum(widths) > room and max(widths) > 1:  # even the least is too much: break words
        widths[widths.index(max(widths))] -= 1
    for _ in range(room - sum(widths)):
        at = max(range(len(widths)), key=lambda i: natural[i] / max(1, widths[i]))
        if natural[at] <= widths[at]:
            break
        widths[at] += 1
    return widths


def _row(texts: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    """The lines of one row."""
    wrapped = [wrap(text, width) for text, width in zip(texts, widths, strict=True)]
    for k in range(max(map(len, wrapped), default=0)):
        parts = (
            pad(lines[k] if k < len(lines) else "", width, to_right)
            for lines, width, to_right in zip(wrapped, widths, right, strict=True)
        )
        yield GAP.join(parts).rstrip()


def pad(text: str, width: int, right: bool = False) -> str:
    """The text, filled with spaces to a width in terminal cells."""
    from rich.cells import cell_len

    spaces = " " * max(0, width - cell_len(text))
    return spaces + text if right else text + spaces


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` terminal cells, broken between words; a longer word is
    broken too.
    """
    from rich.cells import cell_len, chop_cells

    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cell_len(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *whole, line = chop_cells(word, max(1, width)) or [""]
            lines += whole
        lines.append(line)
    return lines


def _records(heads: Sequence[str], texts: Cells, width: int) -> list[str]:
    """Each row as a list of names and values."""
    name = max(map(_natural, ([head] for head in heads)), default=0)
    lines = []
    for number, row in enumerate(texts, 1):
        lines.append(f"row {number:,}")
        sizes = [name, max(20, width - name - 2 * len(GAP))]
        for head, text in zip(heads, row, strict=True):
            lines += [GAP + line for line in _row([head, text], sizes, [False, False])]
    return lines


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as CSV: numbers with all their digits, an estimate as three columns."""
    wide = [any(is_estimate(row[i]) for row in rows) for i in range(len(columns))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    bounds = ("", " low", " high")
    writer.writerow(
        printable(name + bound)
        for name, is_wide in zip(columns, wide, strict=True)
        for bound in (bounds if is_wide else bounds[:1])
    )
    for row in rows:
        writer.writerow(
            _plain(part)
            for value, is_wide in zip(row, wide, strict=True)
            for part in (_bounds(value) if is_wide else (value,))
        )
    return file.getvalue()


def _bounds(value: Any) -> tuple[Any, Any, Any]:
    return (value.value, value.low, value.high) if is_estimate(value) else (value, None, None)


def _plain(value: Any) -> str:
    return "" if value is None else printable(str(value))


def as_markdown(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], intervals: bool = False
) -> str:
    """The table as Markdown (GitHub's)."""
    texts = [[_markdown(cell(value, intervals)) for value in row] for row in rows]
    right = [_numeric([row[i] for row in texts]) for i in range(len(columns))]
    lines = [
        [_markdown(printable(column)) for column in columns],
        ["---:" if to_right else "---" for to_right in right],
        *texts,
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(text: str) -> str:
    """Text that means nothing else within a table."""
    text = re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)
    return text.replace("\n", " ")
