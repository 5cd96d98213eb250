"""What SQLite's errors become, and the points at which the kill test ends a process."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from prefab.factory.errors import StoreError
from prefab.factory.ledger import db


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("database or disk is full", "the disk is full"),
        ("database is locked", "another program has held the ledger for 60 s"),
        ("database disk image is malformed", "damaged"),
        ("file is not a database", "damaged"),
        ("unable to open database file", "cannot be opened for writing"),
        ("attempt to write a readonly database", "cannot be opened for writing"),
        ("no such table: calls", "^x.sqlite: no such table: calls. "),
    ],
)
def test_what_an_error_of_sqlite_becomes(text: str, story: str) -> None:
    with pytest.raises(StoreError, match=story), db.translate_errors(Path("x.sqlite")):
        raise sqlite3.OperationalError(text)


@pytest.mark.parametrize(
    ("wanted", "ends"), [("", []), ("here", [1, 2, 3]), ("here:2", [2]), ("elsewhere", [])]
)
def test_a_process_ends_at_its_point(
    monkeypatch: pytest.MonkeyPatch, wanted: str, ends: list[int]
) -> None:
    monkeypatch.setenv("PREFAB_KILL_AT", wanted)
    monkeypatch.setattr(db, "_passed", type(db._passed)())
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    found = []
    for call in (1, 2, 3):
        db.kill_point("here")
        if killed:
            assert killed.pop() == (os.getpid(), signal.SIGKILL)
            found.append(call)
    assert found == ends
