"""The rows of a store as sorted lists, compared with those of another store or of a rebuild."""

from __future__ import annotations

from pathlib import Path

from prefab.factory.store import store
from prefab.pipelines.store.fill import rebuild


def dump(folder: Path) -> dict[str, list]:
    """Every table's rows as a sorted list, and the prompts that are waited for."""
    with store.opened(folder) as con:
        tables = {
            table: sorted(con.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in store.TABLES
        }
        tables["work"] = sorted(con.execute("SELECT run, prompt, state FROM work").fetchall())
    return tables


def same(one: dict, other: dict) -> bool:
    for table in {*one, *other}:
        assert one[table] == other[table], table
    return True


def checked(folder):
    """The store as it was filled, seen to be what a rebuild shows."""
    filled = dump(folder)
    rebuild(folder)
    assert same(dump(folder), filled)
    return filled
