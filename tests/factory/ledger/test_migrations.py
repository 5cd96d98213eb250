"""Ledgers of every schema there has been: they open, keep their rows, and ask nothing again."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from prefab.factory.errors import StoreError
from prefab.factory.ledger import db, migrations
from prefab.factory.ledger.checksums import CHECKED, row_crc
from prefab.factory.ledger.db import connect
from prefab.pipelines.store.fill import query
from tests.support.miniworld import MiniEngine, run

LEDGERS = Path(__file__).parents[2] / "golden" / "ledgers"
PROMPTS = 2  # in each of them


def store(folder: Path, name: str) -> Path:
    """A folder with a ledger of an older schema."""
    folder.mkdir(exist_ok=True)
    shutil.copy(LEDGERS / f"{name}.sqlite", folder / db.FILE)
    return folder


def rows(file: Path) -> dict[str, list]:
    """Every table's rows, without the columns that a migration adds."""
    con = sqlite3.connect(file)
    tables = [r[0] for r in con.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    added = {"crc", "replica", "attempt", "rubric", "kind"}  # without these
    found = {}
    for table in tables:
        columns = [r[1] for r in con.execute(f"PRAGMA table_info({table})") if r[1] not in added]
        found[table] = con.execute(
            f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1"
        ).fetchall()
    con.close()
    return found


def test_the_checksum_of_a_row_is_the_same_in_every_version_of_python():
    row = (1, "a", b"\x00\xff", None, 0.1, -3, 2**40, "\u00e9\ud800")
    assert row_crc(row) == row_crc(list(row)) == 3796403104


def assert_checksums(file: Path) -> None:
    """Each row of each table has the checksum of its values."""
    con = sqlite3.connect(file)
    for table in CHECKED:
        for row in con.execute(f"SELECT * FROM {table}"):
            assert row_crc(row[:-1]) == row[-1], (table, row)
    con.close()


@pytest.mark.parametrize("name", sorted(p.stem for p in LEDGERS.glob("*.sqlite")))
def test_an_older_ledger_keeps_its_rows_and_asks_nothing_again(tmp_path, name):
    before = rows(LEDGERS / f"{name}.sqlite")
    folder = store(tmp_path / "store", name)
    engine = MiniEngine()
    asyncio.run(run(folder, PROMPTS, engine))
    assert engine.asked == []
    after = rows(folder / db.FILE)
    assert [
        t for t in before if t not in ("starts", "meta", "migrations") and before[t] != after[t]
    ] == []
    con = connect(folder / db.FILE, readonly=True)
    assert con.execute("PRAGMA user_version").fetchone() == (migrations.SCHEMA,)
    schema = int(name.split("-")[1])
    applied = [r[0] for r in con.execute("SELECT schema FROM migrations ORDER BY 1")]
    assert applied[-1] == migrations.SCHEMA and set(
        range(schema + 1, migrations.SCHEMA + 1)
    ) <= set(applied)
    con.close()
    assert_checksums(folder / db.FILE)
    assert rows(folder / f"ledger.schema-{schema}.sqlite") == before
    assert query(folder, "SELECT count(*) FROM calls").item() == len(before["calls"])
    assert sorted(p.name for p in folder.glob("*migrating*")) == []


def test_an_older_ledger_gives_the_preferences_that_it_gave_then(tmp_path):
    """The rows, ids included, that the version of schema 1 derived from this ledger."""
    folder = store(tmp_path / "store", "schema-1")
    columns = "preference, prompt, a, b, outcome, p_chosen, n_scored"
    found = query(folder, f"SELECT {columns} FROM preferences ORDER BY prompt, a, b").rows()
    expected = json.loads((LEDGERS / "schema-1.preferences.json").read_text())
    for now, then in zip(found, expected, strict=True):
        assert list(now) == [pytest.approx(x) if isinstance(x, float) else x for x in then]


def test_a_reader_migrates_too_and_says_so_once(tmp_path, capsys):
    folder = store(tmp_path / "store", "schema-1-first")
    for _ in range(2):
        connect(folder / db.FILE, readonly=True).close()
    told = capsys.readouterr().err
    assert told.count("brought from schema 1 to") == 1 and "ledger.schema-1.sqlite" in told


def test_a_new_ledger_has_the_newest_schema(tmp_path, capsys):
    con = db.create(tmp_path / db.FILE)
    assert con.execute("PRAGMA user_version").fetchone() == (migrations.SCHEMA,)
    con.close()
    old = store(tmp_path / "store", "schema-1-first") / db.FILE
    connect(old).close()
    shape = "SELECT name, type FROM sqlite_schema WHERE type IN ('table', 'index') ORDER BY 1"
    columns = "SELECT m.name, c.name, c.type FROM sqlite_schema m, pragma_table_info(m.name) c"
    for sql in (shape, f"{columns} ORDER BY 1, 2"):
        new, migrated = (
            sqlite3.connect(f).execute(sql).fetchall() for f in (tmp_path / db.FILE, old)
        )
        assert new == migrated


def test_a_newer_ledger_is_refused_and_untouched(tmp_path):
    file = store(tmp_path / "store", "schema-1") / db.FILE
    con = sqlite3.connect(file)
    con.execute(f"PRAGMA user_version={migrations.SCHEMA + 1}")
    con.close()
    before = file.read_bytes()
    for readonly in (True, False):
        with pytest.raises(StoreError, match=f"schema {migrations.SCHEMA + 1}"):
            connect(file, readonly)
    assert file.read_bytes() == before


def test_a_ledger_in_use_is_not_migrated(tmp_path, monkeypatch):
    monkeypatch.setattr(migrations, "WAIT_MS", 50)
    file = store(tmp_path / "store", "schema-1") / db.FILE
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("SELECT count(*) FROM calls").fetchone()
    before = rows(file)
    with pytest.raises(StoreError, match="another program has it open"):
        connect(file)
    other.close()
    assert rows(file) == before and not list(file.parent.glob("*schema-1*"))
    connect(file).close()
    assert rows(file)["calls"] == before["calls"]


def test_a_copy_that_lost_a_row_does_not_take_the_ledgers_place(tmp_path, monkeypatch):
    file = store(tmp_path / "store", "schema-1") / db.FILE
    loses = migrations.Migration(2, "loses", lambda con: con.execute("DELETE FROM calls"))
    monkeypatch.setattr(migrations, "MIGRATIONS", (loses,))
    before = rows(file)
    with pytest.raises(StoreError, match="not whole"):
        connect(file)
    assert rows(file) == before and [p.name for p in file.parent.iterdir()] == [db.FILE]


KILLED = """
import os, signal, sys
from pathlib import Path
from prefab.factory.ledger import migrations
real = getattr(os, sys.argv[2])
setattr(os, sys.argv[2], lambda *a: os.kill(os.getpid(), signal.SIGKILL))
migrations.migrate(Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize("point", ["link", "replace", "fsync"])
def test_a_kill_at_any_point_leaves_a_whole_ledger(tmp_path, point):
    file = store(tmp_path / "store", "schema-1") / db.FILE
    before = rows(file)
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), point], check=False)
    assert done.returncode == -9
    connect(file).close()
    assert rows(file)["calls"] == before["calls"] and rows(file)["uses"] == before["uses"]


def test_two_programs_at_once_migrate_once(tmp_path):
    file = store(tmp_path / "store", "schema-1") / db.FILE
    before = rows(file)
    code = "import sys; from pathlib import Path; from prefab.factory.ledger.db import connect; "
    code += "connect(Path(sys.argv[1])).close()"
    both = [subprocess.Popen([sys.executable, "-c", code, str(file)]) for _ in range(3)]
    ends = [process.wait() for process in both]
    assert 0 in ends and rows(file)["calls"] == before["calls"]
