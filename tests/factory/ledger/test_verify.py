"""A changed bit anywhere in the ledger is found, or changes nothing; what is damaged is told, and
what is intact is recovered."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from pathlib import Path

import duckdb
import pytest

from prefab.factory.errors import StoreError
from prefab.factory.ledger import db
from prefab.factory.ledger.verify import back_up_ledger, recover_ledger, verify_ledger
from prefab.factory.store import store
from prefab.pipelines.store.compare import compare
from prefab.pipelines.store.fill import fill, query
from tests.support.miniworld import MiniEngine, run

PROMPTS = 3
TIMES = {"calls": "answered_at", "runs": "started_at, last_start"}
SHOWN = ("runs", "models", "prompts", "principles", "calls", *store.DERIVED)


def shown(folder: Path) -> dict[str, list[str]]:
    """The rows of the store without times."""
    fill(folder)
    with duckdb.connect(str(folder / store.FILE), read_only=True) as con:
        return {table: sorted(map(repr, con.sql(_rows_of(table)).fetchall())) for table in SHOWN}


def _rows_of(table: str) -> str:
    return f"SELECT {f'* EXCLUDE ({TIMES[table]})' if table in TIMES else '*'} FROM {table}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A finished store, and its rows."""
    folder = tmp_path_factory.mktemp("whole")
    for _ in range(2):
        asyncio.run(run(folder, PROMPTS, MiniEngine()))
    return folder, shown(folder)


def flipped(whole: Path, folder: Path, bit: int) -> Path:
    """A copy of the ledger in a new folder with one bit changed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = bytearray((whole / db.FILE).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (folder / db.FILE).write_bytes(data)
    return folder


def places(file: Path, count: int, seed: int) -> list[int]:
    """Bits to change: some in the file's header, some in the header of each fifth page, and others
    at random."""
    chance, size = random.Random(seed), file.stat().st_size
    pages = range(0, size, 4096 * 5)
    return (
        [chance.randrange(100 * 8) for _ in range(count // 8)]
        + [(page + chance.randrange(12)) * 8 + chance.randrange(8) for page in pages][: count // 4]
        + [chance.randrange(size * 8) for _ in range(count - count // 8 - count // 4)]
    )


def outcome(folder: Path, truth: dict[str, list[str]], rerun: bool) -> str:
    """What a rebuild (`rerun`: after the run itself) makes of a damaged ledger."""
    try:
        if rerun:
            asyncio.run(run(folder, PROMPTS, MiniEngine()))
        report = fill(folder)
        now = shown(folder)
    except (StoreError, ExceptionGroup) as error:
        first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        helps = isinstance(first, StoreError) and "prefab store verify" in str(first)
        return "error" if helps else f"unhelpful: {first!r}"
    if now == truth:
        return "same"
    if not rerun and any("prefab store verify" in note for note in report.notes):
        return "said"
    return "changed: " + ", ".join(t for t in truth if now[t] != truth[t])


@pytest.mark.slow_but("True-10")
@pytest.mark.parametrize(
    ("rerun", "count"),
    [
        (False, 10),
        (True, 10),
        pytest.param(False, 90, marks=pytest.mark.slow),
        pytest.param(True, 90, marks=pytest.mark.slow),
    ],
)
def test_a_changed_bit_is_found_or_harmless(whole, tmp_path, rerun, count):
    folder, truth = whole
    found = {}
    for bit in places(folder / db.FILE, count, seed=rerun):
        found[bit] = outcome(flipped(folder, tmp_path / "store", bit), truth, rerun)
    bad = {bit: word for bit, word in found.items() if word not in ("same", "error", "said")}
    assert not bad
    assert {"same", "error"} <= set(found.values())


def test_a_whole_ledger_is_whole(whole):
    folder, _ = whole
    report = verify_ledger(folder / db.FILE)
    assert report.whole and compare(folder) == []
    calls = query(folder, "SELECT count(*) FROM calls").item()
    assert report.tables["calls"].intact == report.tables["requests"].intact == calls


def overwrite(file: Path, sql: str) -> None:
    with sqlite3.connect(file) as con:
        con.execute(sql)
    con.close()


@pytest.mark.parametrize(
    ("table", "damage"),
    [
        ("calls", "UPDATE calls SET text = text || '!' WHERE id = 7"),
        ("uses", "UPDATE uses SET sample = 2 - sample WHERE id = 3"),
        ("names", "UPDATE names SET name = 'name:other' WHERE name = 'name:mini'"),
        ("requests", "UPDATE requests SET request = x'7b7d' WHERE id = 5"),
        ("prompts", "UPDATE prompts SET split = 'test' WHERE id = 1"),
        ("splits", "UPDATE splits SET split = 'test'"),
        ("runs", "UPDATE runs SET version = 2"),
    ],
)
def test_damage_is_counted_and_the_rest_recovered(whole, tmp_path, table, damage):
    folder, truth = whole
    bad, new = tmp_path / "bad", tmp_path / "new"
    shutil.copytree(folder, bad)
    overwrite(bad / db.FILE, damage)
    report = verify_ledger(bad / db.FILE)
    assert not report.whole
    lost = {name: damaged for name, _, damaged, _ in report.rows() if damaged}
    assert lost == {table: lost[table]}
    assert recover_ledger(bad / db.FILE, new / db.FILE).rows() == report.rows()
    assert verify_ledger(new / db.FILE).whole
    engine = MiniEngine()
    asyncio.run(run(new, PROMPTS, engine))
    assert len(engine.asked) == (lost[table] if table == "calls" else 0)
    assert shown(new) == truth


@pytest.mark.parametrize("wiped", ["calls", "uses"])
def test_rows_behind_an_unreadable_page_are_recovered(tmp_path, wiped):
    folder, new = tmp_path / "bad", tmp_path / "new"
    asyncio.run(run(folder, 40, MiniEngine()))
    truth = shown(folder)
    with sqlite3.connect(folder / db.FILE) as con:
        sql = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path"
        pages = [page for (page,) in con.execute(sql, (wiped,))]
    con.close()
    assert len(pages) > 4
    with (folder / db.FILE).open("r+b") as file:
        for page in (pages[1], pages[-1]):
            file.seek((page - 1) * 4096)
            file.write(b"\xff" * 4096)
    report = recover_ledger(folder / db.FILE, new / db.FILE)
    found = report.tables[wiped]
    assert report.integrity and found.unreadable and found.intact > 10 * len(pages)
    assert verify_ledger(new / db.FILE).whole
    engine = MiniEngine()
    asyncio.run(run(new, 40, engine))
    assert bool(engine.asked) == (wiped == "calls") and len(engine.asked) <= found.unreadable
    assert shown(new) == truth


def test_a_store_that_differs_from_its_ledger_is_told(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "store")
    with store.opened(tmp_path / "store") as con:
        con.execute("UPDATE calls SET finish = 'length' WHERE finish = 'stop'")
        con.execute(
            "INSERT INTO calls SELECT 'ab' || substr(call, 3), * EXCLUDE (call) FROM calls LIMIT 1"
        )
    differ, lost = sorted(compare(tmp_path / "store"), key=lambda text: "no answer" in text)
    assert "differ from the ledger" in differ and lost.startswith("1 calls")


def test_a_backup_holds_what_is_still_in_the_wal_and_is_verified(whole, tmp_path):
    live, saved = tmp_path / "live", tmp_path / "saved"

    async def back_up_during_a_run() -> int:
        started = asyncio.create_task(run(live, 20, MiniEngine()))
        while not (live / db.FILE).exists() or not (n := committed(live / db.FILE)):
            await asyncio.sleep(0.005)
        report = back_up_ledger(live / db.FILE, saved / db.FILE)
        await started
        assert report.tables["calls"].intact >= n
        return report.tables["calls"].intact

    n = asyncio.run(back_up_during_a_run())
    assert [p.name for p in saved.iterdir()] == [db.FILE]
    engine, all_of_them = MiniEngine(), MiniEngine()
    asyncio.run(run(saved, 20, engine))
    asyncio.run(run(tmp_path / "fresh", 20, all_of_them))
    assert len(engine.asked) == len(all_of_them.asked) - n
    with pytest.raises(StoreError, match="exists already"):
        back_up_ledger(live / db.FILE, saved / db.FILE)
    shutil.copytree(whole[0], tmp_path / "bad")
    overwrite(tmp_path / "bad" / db.FILE, "UPDATE calls SET text = 'x'")
    with pytest.raises(StoreError, match="damaged, so that no copy is kept"):
        back_up_ledger(tmp_path / "bad" / db.FILE, tmp_path / "copy" / db.FILE)
    assert list((tmp_path / "copy").iterdir()) == []


def committed(file: Path) -> int:
    con = sqlite3.connect(file)
    try:
        return con.execute("SELECT count(*) FROM calls").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        con.close()


def test_a_file_of_another_program_is_refused(tmp_path):
    overwrite(tmp_path / db.FILE, "CREATE TABLE cookies (name)")
    with pytest.raises(StoreError, match="another program"):
        verify_ledger(tmp_path / db.FILE)
    with pytest.raises(StoreError, match="no ledger here"):
        verify_ledger(tmp_path / "none.sqlite")
