"""A store whose DuckDB file is damaged or unfinished is made anew from the ledger, and says so; a
file of another program is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys

import duckdb
import pytest

from prefab.factory.errors import StoreError
from prefab.factory.store import store
from prefab.pipelines.store.fill import fill, query, rebuild
from tests.support.miniworld import MiniEngine, run
from tests.support.store_rows import dump, same


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A filled store, its rows, and the bytes of its DuckDB file."""
    folder = tmp_path_factory.mktemp("whole")
    asyncio.run(run(folder, 12, MiniEngine()))
    fill(folder)
    return folder, dump(folder), (folder / store.FILE).read_bytes()


@pytest.fixture
def place(made):
    """The folder and its rows; the DuckDB file is as it was filled."""
    folder, rows, data = made
    for path in folder.glob(f"{store.FILE}*"):
        path.unlink()
    (folder / store.FILE).write_bytes(data)
    yield folder, rows


def damaged(folder):
    return sorted(path.name for path in folder.glob("*.damaged-*"))


@pytest.mark.slow_but("0", "4096", "12287")
@pytest.mark.parametrize("size", [0, 100, 4096, 8192, 12_287])
def test_a_file_that_was_never_finished_is_made_anew_and_said_once(place, capsys, size):
    folder, rows = place
    with open(folder / store.FILE, "r+b") as file:
        file.truncate(size)
    assert "not finished" in fill(folder).rebuilt
    assert same(dump(folder), rows) and not damaged(folder)
    fill(folder)
    assert capsys.readouterr().err.count("made anew from the ledger") == 1


def test_zeros_where_the_header_was_are_an_unfinished_file(place):
    folder, rows = place
    (folder / store.FILE).write_bytes(bytes(20_000))
    assert fill(folder).rebuilt and same(dump(folder), rows)


@pytest.mark.slow_but("0.9")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_flipped_bit_anywhere_shows_the_true_rows(place, capsys, share):
    """In whatever order: damage may be found by the filling, or first by a query."""
    folder, rows = place
    data = bytearray((folder / store.FILE).read_bytes())
    at = store.HEADERS + 500 + int(share * (len(data) - store.HEADERS - 1000))
    data[at] ^= 4
    (folder / store.FILE).write_bytes(data)
    for table in store.TABLES:
        query(folder, f"SELECT * FROM {table}")
    assert same(dump(folder), rows)
    told = capsys.readouterr().err
    assert told.count("made anew") == len(damaged(folder)) <= 1
    assert all(name in told for name in damaged(folder))


def test_a_cut_file_is_kept_under_another_name(place, capsys):
    folder, rows = place
    whole = (folder / store.FILE).stat().st_size
    with open(folder / store.FILE, "r+b") as file:
        file.truncate(whole // 2)
    assert "damaged" in fill(folder).rebuilt and same(dump(folder), rows)
    assert damaged(folder) == [f"{store.FILE}.damaged-1"]
    assert f"{store.FILE}.damaged-1" in capsys.readouterr().err


def test_a_damaged_write_ahead_log_is_set_aside_with_its_file(tmp_path):
    """As a power cut leaves it: the process dies in the middle of a filling."""
    asyncio.run(run(tmp_path, 40, MiniEngine()))
    code = (
        "import sys; from prefab.pipelines.store import fill; fill.FIRST_BATCH = 2; "
        "fill.USES_PAGE = 64; fill.fill(sys.argv[1])"
    )
    environment = {**os.environ, "PREFAB_KILL_AT": "mid_fill:4"}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    log = tmp_path / store.WAL
    data = bytearray(log.read_bytes())
    assert len(data) > 12_000
    data[6000:6100] = bytes(100)
    log.write_bytes(data)
    fill(tmp_path)
    filled = dump(tmp_path)
    rebuild(tmp_path)
    assert same(dump(tmp_path), filled) and len(filled["samples"]) >= 120


def test_a_file_of_another_program_is_neither_opened_nor_replaced(place):
    folder, rows = place
    (folder / store.FILE).unlink()
    other = sqlite3.connect(folder / store.FILE)
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    theirs = (folder / store.FILE).read_bytes()
    for work in (fill, rebuild, lambda folder: store.read_frame(folder, "SELECT 1")):
        with pytest.raises(StoreError, match="a SQLite database. Move it"):
            work(folder)
    assert (folder / store.FILE).read_bytes() == theirs
    (folder / store.FILE).write_bytes(b"PAR1" * 5000)
    with pytest.raises(StoreError, match="of another program"):
        fill(folder)
    (folder / store.FILE).unlink()
    fill(folder)
    assert same(dump(folder), rows)


def test_a_file_of_a_newer_duckdb_is_told_and_rebuild_makes_it_anew(place, monkeypatch):
    folder, rows = place
    connect = duckdb.connect

    def newer(*args, **kwargs):
        raise duckdb.IOException(
            "IO Error: Trying to read a database file with version number 999, but we can only read "
            "versions between 64 and 67."
        )

    monkeypatch.setattr(duckdb, "connect", newer)
    (folder / store.MARKS).unlink()
    with pytest.raises(store.NewerError, match="newer version of DuckDB"):
        fill(folder)
    monkeypatch.setattr(store, "delete", lambda folder: monkeypatch.undo())
    rebuild(folder)
    assert duckdb.connect is connect and same(dump(folder), rows)
