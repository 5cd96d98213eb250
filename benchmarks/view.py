"""`prefab view` over a made-up store of 1,000,000 preferences: time until the first page, time of
each kind of query, and memory of the server.

    python -m benchmarks.view
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import psutil

from benchmarks.common import write
from prefab.factory.ledger import db
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.store import store
from prefab.pipelines.store import fill

LONGEST_S = 1800  # of what is made in the background
PAIRS = ((0, 1), (0, 2), (1, 2), (2, 3))
CONFIG = {
    "recipe": "rlaif",
    "seed": 0,
    "panel": {
        "orders": "both",
        "judges": [{"name": "large", "kind": "pairwise"}, {"name": "small", "kind": "pairwise"}],
    },
}
TEXT = (
    "the answer is short and names a reason for what it says you can go to the shop on Monday "
    "please write to me if more help is wanted because nobody knows how much water plants need"
)
WORDS = TEXT.split()
# Answers of 60 words. A quarter of the answers hold a word that no other holds.
ROWS = """
CREATE TEMP TABLE w AS SELECT [{words}] AS w;
INSERT INTO prompts SELECT 'prompt-' || i, 'Question ' || i || ' about ' || w[1 + i % {n}] || ' and '
    || w[1 + (i * 7) % {n}], to_json([['user', 'Question ' || i]]), ['t' || i % 5], 'g' || i // 4,
    ['train', 'val', 'test'][1 + (i % 20 > 17)::INT + (i % 20 > 18)::INT], NULL
    FROM range({prompts}) t(i), w;
INSERT INTO samples (sample, run, prompt, "index", parent, round, principle, text, finish, reason, call)
    SELECT md5('s' || i), 1, 'prompt-' || i // 4, i % 4, -1, 0, '',
    array_to_string(list_transform(range(20 + (hash(i) % 80)::INT),
    lambda x: w[1 + (hash(i * 131 + x) % {n})::INT]), ' ') || CASE WHEN i % 4 = 0 THEN ' rare' || i ELSE '' END, 'stop', NULL,
    md5('c' || i) FROM range({samples}) t(i), w;
CREATE TEMP TABLE d AS SELECT i, 'prompt-' || i // 4 AS prompt, [0, 0, 1, 2][1 + i % 4] AS a,
    [1, 2, 2, 3][1 + i % 4] AS b, ['kind', 'brief', 'honest', 'clear', 'safe'][1 + (hash(i) % 5)::INT] AS principle
    FROM range({preferences}) t(i);
INSERT INTO verdicts SELECT md5('v' || i || j || o), 1, prompt, a, b, principle, j, o, 0, p,
    CASE WHEN p > 0.52 THEN 'a' WHEN p < 0.48 THEN 'b' ELSE 'tie' END, NULL, 0.97, 0.02, 'exact',
    md5('k' || i || j || o) FROM (SELECT *, (hash(i) % 1000 + hash(i || j || o) % 400) / 1400.0 AS p
    FROM d, (VALUES ('large'), ('small')) js(j), (VALUES ('ab'), ('ba')) os(o));
INSERT INTO preferences SELECT md5('p' || d.i), 1, d.prompt, d.a, d.b,
    CASE WHEN p > 0.52 THEN 'a' WHEN p < 0.48 THEN 'b' ELSE 'tie' END,
    CASE WHEN p > 0.52 THEN d.a WHEN p < 0.48 THEN d.b END,
    CASE WHEN p > 0.52 THEN d.b WHEN p < 0.48 THEN d.a END, p, greatest(p, 1 - p), s, 2, 2, 'exact',
    false, NULL, greatest(p, 1 - p), NULL
    FROM d JOIN (SELECT prompt, a, b, avg(p_a) AS p, stddev_pop(p_a) AS s FROM verdicts GROUP BY ALL) v
    ON d.prompt = v.prompt AND d.a = v.a AND d.b = v.b ORDER BY d.i;
"""


def make(folder: Path, preferences: int) -> None:
    """A store with this number of preferences, whose ledger holds the run and nothing else."""
    ledger = Ledger.open(folder)
    text = Path("constitutions/microworld.yaml").read_text()
    ledger.begin_run("large", CONFIG, {"constitution": text})
    asyncio.run(ledger.close())
    fill.fill(folder)
    sql = ROWS.format(
        words=", ".join(f"'{word}'" for word in WORDS),
        n=len(WORDS),
        preferences=preferences,
        prompts=preferences // 4,
        samples=preferences,
    )
    with store.opened(folder, 4000) as con:
        con.execute(sql)
        con.execute("CHECKPOINT")
    con = db.connect(folder / db.FILE, readonly=True)
    store.write_marks(folder, {"state": [fill._ledger_state(con), fill._file_state(folder)]})
    con.close()


# A page each; `rare88888` stands in one answer of a million, `plants` in most.
QUERIES = {
    "first page": "preferences",
    "page 100": "preferences?start=5000&part=rows",
    "preferred A": "preferences?outcome=a",
    "p_chosen .6 to .7": "preferences?p_min=0.6&p_max=0.7",
    "spread above .2": "preferences?spread_min=0.2&sort=spread",
    "one principle": "preferences?principle=kind",
    "one judge and principle": "preferences?principle=kind&judge=large",
    "two orders differ": "preferences?orders=differ",
    "tag": "preferences?tag=t3",
    "search: frequent word": "preferences?q=plants",
    "search: rare word": "preferences?q=rare88888",
    "longer by 100": "preferences?length_min=100",
    "row 900,000": "preferences?start=900000&part=rows",
    "one preference": "preference?id={id}",
    "runs": "runs",
    "constitution": "constitution",
}


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Start the server on the store; time until its first page, each page's time, its memory."""
    command = [
        sys.executable,
        "-m",
        "prefab.pipelines.cli.main",
        "view",
        str(folder),
        "--port",
        "0",
    ]
    began = time.monotonic()
    cache = Path(os.environ.get("PREFAB_CACHE") or folder.parent / "cache")
    with subprocess.Popen(
        [*command, "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PREFAB_CACHE": str(cache)},
    ) as server:
        try:
            return _measure(server, began, repeats, cache)
        finally:  # whatever fails: the block waits for its end
            server.terminate()


def _measure(
    server: subprocess.Popen[str], began: float, repeats: int, cache: Path
) -> dict[str, Any]:
    assert server.stdout is not None
    address, _, token = server.stdout.readline().strip().partition("?token=")
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    opener.open(f"{address}runs?token={token}").read()
    found: dict[str, Any] = {"first_page_s": round(time.monotonic() - began, 2)}
    grid = f"{address}preferences?format=json"
    found["first_page_cpu_s"] = round(_cpu(server.pid), 2)
    some = _json(opener, grid)["rows"][7]
    used = _cpu(server.pid)
    if _json(opener, f"{grid}&outcome=a&p_min=0.6")["index"]["state"] == "building":
        found["filter_without_index_cpu_s"] = round(_cpu(server.pid) - used, 2)
    found |= _index(server.pid, lambda: _json(opener, grid)["index"]["state"])
    found["index_disk_mb"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) // 2**20
    pages = {}
    for name, page in QUERIES.items():
        times, cpu = [], []
        for i in range(repeats):
            # another address each time, so that nothing is kept from the time before
            url = page.format(id=some["preference"]) + f"{'&' if '?' in page else '?'}x={i}"
            if page.startswith("preferences"):
                url += f"&spread_max={10 + i}"
            used, start = _cpu(server.pid), time.monotonic()
            opener.open(address + url).read()
            times.append(time.monotonic() - start)
            cpu.append(_cpu(server.pid) - used)
        pages[name] = {
            "median_ms": round(1000 * statistics.median(times)),
            "cpu_ms": round(1000 * statistics.median(cpu)),
        }
    found["agreement_s"] = _seconds(lambda: opener.open(f"{address}agreement").status == 200)
    found["label_s"] = _seconds(lambda: opener.open(f"{address}label").status == 200)
    found["peak_mb"] = _peak_mb(server.pid)
    return {**found, "pages": pages}


def _index(server: int, state: Callable[[], str]) -> dict[str, Any]:
    """The time until the index is there, and processor time and memory of the process that makes
    it, which is the only one that the server has until then.
    """
    used, peak_mb = 0.0, 0

    def done() -> bool:
        nonlocal used, peak_mb
        for child in psutil.Process(server).children():
            with suppress(psutil.Error, OSError, IndexError):  # it may end here
                used = max(used, _cpu(child.pid))
                peak_mb = max(peak_mb, _peak_mb(child.pid))
        return state() not in ("building", "behind")

    seconds = _seconds(done)
    return {"index_s": seconds, "index_cpu_s": round(used, 1), "index_peak_mb": peak_mb}


def _peak_mb(pid: int) -> int:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def _json(opener: urllib.request.OpenerDirector, url: str) -> Any:
    return orjson.loads(opener.open(url).read())


def _seconds(done: Callable[[], bool]) -> float:
    """How long it takes until this is so."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > LONGEST_S:
            raise TimeoutError(f"not done after {LONGEST_S} s")
        time.sleep(0.5)
    return round(time.monotonic() - began, 1)


def _cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preferences", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", type=Path, help="Keep the store here, or use the one there.")
    parser.add_argument("--quick", action="store_true", help="10,000 preferences, once.")
    args = parser.parse_args()
    if args.quick:
        args.preferences, args.repeats = 10_000, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.store or Path(temporary) / "store"
        if not (folder / db.FILE).exists():
            make(folder, args.preferences)
        found = measure(folder, args.repeats)
    print(json.dumps(found, indent=1))
    write("view", args.quick, preferences=args.preferences, **found)


if __name__ == "__main__":
    main()
