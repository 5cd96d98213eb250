"""SIGKILL at random moments and at every named point: nothing committed is asked again, and the
store comes out equal.

Six kills and more in an ordinary test run (`PREFAB_KILLS` says otherwise), a hundred more in `make
kill-test`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefab.factory.ledger import db
from prefab.factory.store import store
from prefab.pipelines.store.fill import fill, rebuild
from tests.support.fork_server import ForkServer
from tests.support.kill_driver import IN_FLIGHT, PROMPTS
from tests.support.miniworld import MiniEngine, run

DRIVER = str(Path(__file__).parents[2] / "support" / "kill_driver.py")
KILLS = int(os.environ.get("PREFAB_KILLS", "6"))
TIMES = {
    "runs": ("started_at", "last_start"),
    "calls": ("answered_at",),
}  # what two runs of one command may differ in


@contextmanager
def server():
    process = subprocess.Popen([sys.executable, DRIVER, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def counts(port: int) -> dict[str, int]:
    """Questions by key, once all connections of an ended process are closed: until then what it
    had sent may not be counted yet."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts") as response:
            found = json.load(response)
        if found["others"] == 0:
            return found["counts"]
    raise AssertionError(f"{found['others']} connections are still open")


def committed(folder: Path) -> set[str]:
    """The keys that have an answer on disk."""
    if not (folder / db.FILE).exists():
        return set()
    con = db.create(folder / db.FILE)
    keys = {row[0].hex() for row in con.execute("SELECT key FROM calls")}
    con.close()
    return keys


def launch(
    forks: ForkServer, folder: Path, port: int, kill_at: str = "", after_s: float | None = None
) -> bool:
    """The same command each time; says whether it was killed. Anything but a kill or success fails
    the test."""
    environment = {**os.environ, "PREFAB_KILL_AT": kill_at}
    process = forks.start([DRIVER, "run", folder, port], env=environment)
    if after_s is not None:
        time.sleep(after_s)
        process.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def deaths(rng: random.Random, usual_s: float) -> list[dict]:
    """The ways to die of one store: every named point, at a moment when the run is sure to pass it,
    and by chance. What dies by chance does not end before: it would have filled the store."""
    points = [
        f"before_commit:{rng.randint(1, 5)}",
        f"after_commit:{rng.randint(1, 5)}",
        "",
        "",
        f"mid_fill:{rng.randint(1, 2)}",
        "end:1",
        "",
        "end:2",
    ]
    filled = points.index("end:1")
    return [
        {"kill_at": point}
        if point
        else {
            "after_s": rng.uniform(0.3, 0.9) * usual_s,
            "kill_at": "mid_fill:1" if i < filled else "",
        }
        for i, point in enumerate(points)
    ]


def rows(folder: Path) -> dict[str, list]:
    """Every table as a sorted list, without times."""
    with store.opened(folder) as con:
        columns = {
            table: f"* EXCLUDE ({', '.join(TIMES[table])})" if table in TIMES else "*"
            for table in store.TABLES
        }
        return {
            table: sorted(con.execute(f"SELECT {what} FROM {table}").fetchall(), key=repr)
            for table, what in columns.items()
        }


def one_life(forks: ForkServer, folder: Path, port: int, way: dict) -> bool:
    """Launch, die or finish, and hold the promise of the ledger; says whether it was killed."""
    before, asked = committed(folder), counts(port)
    killed = launch(forks, folder, port, **way)
    now = counts(port)
    assert all(now[key] == asked[key] for key in before), "a committed answer was asked again"
    assert len(now.keys() - committed(folder)) <= 2 * IN_FLIGHT
    assert (
        sum(now.values()) - sum(asked.values()) - len(now.keys() - asked.keys()) <= 2 * IN_FLIGHT
    ), "asked twice"
    return killed


@pytest.mark.parametrize("kills", [KILLS, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_ask_nothing_committed_again_and_leave_the_same_store(tmp_path, kills, forks):
    asyncio.run(run(tmp_path / "whole", PROMPTS, MiniEngine()))
    fill(tmp_path / "whole")
    whole, rng, died, usual_s = rows(tmp_path / "whole"), random.Random(0), Counter(), 1.0
    while died.total() < kills:
        folder = tmp_path / f"killed {died.total()}"
        with server() as port:
            for way in deaths(rng, usual_s):
                if one_life(forks, folder, port, way):
                    died["at random" if "after_s" in way else way["kill_at"].split(":")[0]] += 1
            began = time.monotonic()
            assert not one_life(forks, folder, port, {})
            usual_s = time.monotonic() - began
        assert rows(folder) == whole
        rebuild(folder)
        assert rows(folder) == whole
    print(f"{died.total()} kills: {dict(died)}")
    assert died.keys() == {"before_commit", "after_commit", "mid_fill", "end", "at random"}


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_a_commit_is_where_the_named_point_says(tmp_path, point, forks):
    with server() as port:
        assert launch(forks, tmp_path, port, kill_at=f"{point}:1")
        assert bool(committed(tmp_path)) == (point == "after_commit")
