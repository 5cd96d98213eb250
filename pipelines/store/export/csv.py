"""The format `csv`: texts in tables for people who read them in a spreadsheet.

A cell that begins with = + - @ or a tab gets an apostrophe before it: a spreadsheet would take it
for a formula and run it (OWASP, CSV Injection).
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import ONE_TURN, Layout, LayoutFormat, Make, Row
from prefab.pipelines.store.export.text import ANSWERS, texts

RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t", "\r", "\n")


def _guarded(make: Make) -> Make:
    def row(of: Row) -> Row | None:
        made = make(of)
        return made and {name: _cell(value) for name, value in made.items()}

    return row


def _cell(value: object) -> object:
    run = isinstance(value, str) and value.startswith(RUN_BY_SPREADSHEETS)
    return f"'{value}" if run else value


CSV = LayoutFormat(
    {
        name: Layout(name, _guarded(texts(True, *answers)), ONE_TURN)
        for name, answers in ANSWERS.items()
    },
    suffix="csv",
)
