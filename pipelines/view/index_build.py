"""Making the index of one run's preferences, in a process of its own: `python -m
prefab.pipelines.view.index_build STORE RUN FOLDER`.

The store is open for the queries that read it and closed before the words of the texts are counted,
which takes most of the time. A run that has grown gets a further segment: only its new rows are
read and counted. What each file holds is said in `index.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefab.factory.store import store
from prefab.pipelines.view.filters import OUTCOMES, PEOPLE, SORTS, WORD
from prefab.pipelines.view.index import (
    CURRENT,
    DENSE,
    FORMAT,
    HISTOGRAMS,
    STEPS,
    Array,
    Segment,
    file_state,
)

if TYPE_CHECKING:
    import duckdb

MEMORY_MB = 400
CHUNK = 2_000_000  # members of sets that are in memory together
MOST_SEGMENTS = 8  # more are made anew as one

_ROWS = """
CREATE TABLE rows AS SELECT row_number() OVER (ORDER BY p.rowid) - 1 AS "row", p.rowid AS place,
  hash(p.preference, p.prompt, p.a, p.b) AS id, p.preference, p.prompt, p.a, p.b, p.outcome, p.p_chosen, p.p_a, p.spread,
  p.identical FROM s.preferences p WHERE p.run = $run"""
_ANSWERS = """
CREATE TABLE answers AS SELECT row_number() OVER () - 1 AS doc, prompt, "index", text FROM s.samples
WHERE run = $run AND prompt IN (SELECT prompt FROM rows)"""
_QUESTIONS = """
CREATE TABLE questions AS SELECT row_number() OVER () - 1 + (SELECT count(*) FROM answers) AS doc, prompt, text, tags,
  coalesce(nullif("group", ''), prompt) AS "group" FROM s.prompts WHERE prompt IN (SELECT prompt FROM rows)"""
_READ = """
CREATE TABLE read AS SELECT "row", principle, judge, repeat, bool_or(winner = 'a') AND bool_or(winner = 'b') AS differ,
  list(DISTINCT reason) FILTER (reason IS NOT NULL) AS reasons, sum(v.p_a - 0.5) AS above, count(v.p_a) AS n
FROM s.verdicts v JOIN rows USING (prompt, a, b) WHERE v.run = $run GROUP BY ALL"""
_COLUMNS = f"""
SELECT id, hash(r.prompt, r.a, r.b, x.text, y.text) AS key, (list_position({list(OUTCOMES)}, outcome) - 1)::UTINYINT AS outcome,
  identical, p_chosen, p_a, spread,
  (CASE outcome WHEN 'b' THEN length(y.text) - length(x.text) ELSE length(x.text) - length(y.text) END)::FLOAT AS length,
  coalesce(x.doc, -1)::INTEGER AS a, coalesce(y.doc, -1)::INTEGER AS b, coalesce(q.doc, -1)::INTEGER AS question,
  hash(q."group") AS cluster
FROM rows r LEFT JOIN answers x ON x.prompt = r.prompt AND x."index" = r.a
LEFT JOIN answers y ON y.prompt = r.prompt AND y."index" = r.b LEFT JOIN questions q ON q.prompt = r.prompt
ORDER BY "row" """
# Each set of preferences that a filter names: its kind, up to three names, and its members.
_FACETS = """
CREATE TABLE facets AS
SELECT 'asked' AS kind, principle AS one, judge AS two, '' AS three, "row" FROM read
UNION SELECT 'differ', principle, judge, '', "row" FROM read WHERE differ
UNION SELECT 'reason', principle, judge, unnest(reasons), "row" FROM read
UNION SELECT 'tag', unnest(tags), '', '', "row" FROM rows JOIN questions USING (prompt)
UNION SELECT 'apart', x.judge, y.judge, '', "row" FROM judged x JOIN judged y USING ("row")
  WHERE x.judge < y.judge AND x.mean * y.mean < -1e-9"""
_JUDGED = """
CREATE TABLE judged AS SELECT "row", judge, sum(above) / sum(n) AS mean FROM read GROUP BY ALL HAVING sum(n) > 0"""
_NAMES = """
CREATE TABLE names AS SELECT row_number() OVER (ORDER BY kind, one, two, three) - 1 AS number, kind, one, two, three, n
FROM (SELECT kind, one, two, three, count(*) AS n FROM facets GROUP BY ALL)"""
_MEMBERS = """
CREATE TABLE members AS SELECT number, "row"::INTEGER AS member FROM facets JOIN names USING (kind, one, two, three)"""
_WORDS = f"""
CREATE TABLE found AS SELECT doc, unnest(list_distinct(regexp_extract_all(lower(text), '{WORD}'))) AS word
FROM (SELECT doc, text FROM answers UNION ALL SELECT doc, text FROM questions)"""
_VOCABULARY = """
CREATE TABLE vocabulary AS SELECT row_number() OVER (ORDER BY word) - 1 AS number, word, count(*) AS n
FROM found GROUP BY word"""
_POSTINGS = """
CREATE TABLE postings AS SELECT number::INTEGER AS number, doc::INTEGER AS doc FROM found JOIN vocabulary USING (word)"""


def main(folder: Path, run: int, out: Path) -> None:
    """Bring the index of a run up to the store."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another server may be making it
        for path in out.glob("build-*"):  # of processes that were killed
            shutil.rmtree(path, ignore_errors=True)
        if _current(out).get("state") == file_state(folder):
            return
        with tempfile.TemporaryDirectory(prefix="build-", dir=out) as temporary:
            con = _connect(folder, Path(temporary))
            try:
                _update(con, folder, run, out, Path(temporary))
            finally:
                con.close()


def _current(out: Path) -> dict[str, Any]:
    """The index that there is: its state, segments and overlay; empty: none of this format."""
    try:
        current: dict[str, Any] = json.loads((out / CURRENT).read_text())
        return current if current["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError):
        return {}


def _connect(folder: Path, temporary: Path) -> duckdb.DuckDBPyConnection:
    import duckdb

    store.check_header(folder / store.FILE)
    settings: dict[str, Any] = {
        "memory_limit": f"{MEMORY_MB}MB",
        "threads": 1,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "temp_directory": str(temporary / "spill"),
    }
    con = duckdb.connect(str(temporary / "build.duckdb"), config=settings)
    con.execute("SET enable_progress_bar = false")
    con.execute(
        f"ATTACH '{str(folder / store.FILE).replace(chr(39), chr(39) * 2)}' AS s (READ_ONLY)"
    )
    con.execute("SET search_path = 'build.main,s.main'")
    return con


def _update(
    con: duckdb.DuckDBPyConnection, folder: Path, run: int, out: Path, temporary: Path
) -> None:
    state, at = file_state(folder), {"run": run}
    con.execute(_ROWS, at)
    known = _segments(out)
    now = con.execute('SELECT place, id FROM rows ORDER BY "row"').fetchnumpy()
    old = np.concatenate([s.column("id") for s in known]) if known else np.empty(0, np.uint64)
    places, new = matched(old, now["id"], now["place"])
    if (
        len(known) >= MOST_SEGMENTS
        or 2 * len(new) > len(now["id"])
        or 10 * (places < 0).sum() > len(old)
    ):
        known, places, new = [], np.empty(0, np.int64), now["place"]
    _only(con, new)
    overlay = _overlay(con, at)
    if len(new):
        con.execute(_ANSWERS, at)
        con.execute(_QUESTIONS)
        con.execute(_READ, at)
    con.execute("SET search_path = 'build.main'")
    con.execute("DETACH s")
    names = [segment.folder.name for segment in known]
    if len(new):
        number = 1 + max((int(path.name[8:]) for path in out.glob("segment-*")), default=0)
        made = temporary / f"segment-{number}"
        _segment(con, made)
        os.replace(made, out / made.name)
        names.append(made.name)
    all_places = np.concatenate([places, new])
    _overlaid(overlay, all_places, temporary / "overlay")
    _orders([Segment(out / name) for name in names], all_places, temporary / "overlay")
    name = f"overlay-{1 + max((int(path.name[8:]) for path in out.glob('overlay-*')), default=0)}"
    os.replace(temporary / "overlay", out / name)
    current = {"format": FORMAT, "state": state, "segments": names, "overlay": name}
    (temporary / CURRENT).write_text(json.dumps(current))
    os.replace(temporary / CURRENT, out / CURRENT)
    for path in out.glob("[so][ev]*-*"):
        if path.name not in (*names, name):
            shutil.rmtree(path, ignore_errors=True)


def _segments(out: Path) -> list[Segment]:
    return [Segment(out / name) for name in _current(out).get("segments", ())]


def matched(old: Array, now: Array, places: Array) -> tuple[Array, Array]:
    """Where the rows of `old` ids lie now (-1: nowhere), and the places of ids that are new."""
    order = np.argsort(now)
    at = np.searchsorted(now[order], old)
    at[at == len(now)] = 0
    found = now[order[at]] == old if len(now) else np.zeros(len(old), bool)
    fresh = np.ones(len(now), bool)
    fresh[order[at[found]]] = False
    return np.where(found, places[order[at]] if len(now) else -1, -1), places[fresh]


def _only(con: duckdb.DuckDBPyConnection, places: Array) -> None:
    """Leave the rows of these places, numbered from 0. `everything` keeps the preferences' ids."""
    con.execute("CREATE VIEW everything AS SELECT place, preference, prompt, a, b FROM rows")
    if len(places) == con.execute("SELECT count(*) FROM rows").fetchall()[0][0]:
        return
    import pyarrow

    con.register("kept", pyarrow.table({"place": places}))
    con.execute("DROP VIEW everything; ALTER TABLE rows RENAME TO everything")
    con.execute(
        'CREATE TABLE rows AS SELECT * REPLACE (row_number() OVER (ORDER BY place) - 1 AS "row") '
        "FROM everything WHERE place IN (SELECT place FROM kept)"
    )
    con.unregister("kept")


def _overlay(con: duckdb.DuckDBPyConnection, at: dict[str, int]) -> dict[str, Any]:
    """What changes without a preference's id: marks of an audit, and what people say."""
    marks = con.execute(
        "SELECT DISTINCT rule, place FROM s.marks m JOIN everything USING (preference) WHERE run = $run ORDER BY ALL",
        at,
    ).fetchnumpy()
    people = con.execute(
        f"SELECT place, said::TINYINT AS said FROM {PEOPLE} JOIN everything USING (prompt, a, b)",
        at,
    ).fetchnumpy()
    return {"marks": marks, "people": people}


def _overlaid(overlay: dict[str, Any], places: Array, out: Path) -> None:
    out.mkdir()
    order = np.argsort(places)

    def rows(at: Array) -> Array:
        return order[np.searchsorted(places[order], at)]

    said = np.full(len(places), -2, np.int8)
    said[rows(overlay["people"]["place"])] = overlay["people"]["said"]
    np.save(out / "people.npy", said)
    marks = overlay["marks"]
    rules = sorted(set(marks["rule"]))
    sets = SetWriter(out, "marks", len(places))
    for rule in rules:
        sets.add(np.sort(rows(marks["place"][marks["rule"] == rule])))
    sets.close()
    (out / "marks.json").write_text(json.dumps(rules))
    np.save(out / "places.npy", places)
    np.save(out / "there.npy", places >= 0)


def _orders(segments: Sequence[Segment], places: Array, out: Path) -> None:
    """Write the numbers of the rows that are in the store, in each order of the grid."""

    def column(name: str) -> Array:
        return np.concatenate([s.column(name) for s in segments] or [np.empty(0)])

    stored = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]
    for sort in SORTS:
        order = stored
        if sort != "stored":
            key = _sort_key(sort, column)[stored]
            order = stored[np.argsort(key, kind="stable")]
        np.save(out / f"order-{sort}.npy", order.astype(np.int32))


def _sort_key(sort: str, column: Callable[[str], Array]) -> Array:
    """What the rows are sorted by, ascending; rows without a value come last."""
    if sort == "unsure":
        values = np.abs(column("p_a") - 0.5)
        values = np.where(np.isnan(values), 2.0, values) + 10 * column("identical")
    else:
        values = column({"sure": "p_a"}.get(sort, sort)).astype(np.float64)
        values = -np.abs(values - 0.5 if sort == "sure" else values)
    return np.where(np.isnan(values), np.inf, values)


def _steps(values: Array, low: float, high: float) -> Array:
    """The bar of a histogram that each row is in; STEPS: in none."""
    at = np.clip(np.floor((values - low) / ((high - low) / STEPS)), 0, STEPS - 1)
    return np.where(np.isnan(values), STEPS, at).astype(np.uint8)


def _segment(con: duckdb.DuckDBPyConnection, out: Path) -> None:
    """The files of a segment."""
    out.mkdir()
    columns = con.execute(_COLUMNS).fetchnumpy()
    size = len(columns["id"])
    for name, values in columns.items():
        if isinstance(values, np.ma.MaskedArray):
            values = values.filled(np.nan)
        columns[name] = values
        np.save(out / f"{name}.npy", values)
    for name, (column, low, high, _) in HISTOGRAMS.items():
        np.save(out / f"step-{name}.npy", _steps(columns[column], low, high))
    del columns
    con.execute(_JUDGED)
    con.execute(_FACETS)
    con.execute(_NAMES)
    names = con.execute("SELECT kind, one, two, three, n FROM names ORDER BY number").fetchall()
    (out / "facets.json").write_text(json.dumps([name[:4] for name in names]))
    con.execute(_MEMBERS)
    _sets(con, "members", "member", [name[4] for name in names], SetWriter(out, "facets", size))
    for sql in (_WORDS, _VOCABULARY, _POSTINGS):
        con.execute(sql)
    con.execute("DROP TABLE found")
    words = con.execute("SELECT word, n FROM vocabulary ORDER BY number").fetchnumpy()
    (out / "words.txt").write_text("\n" + "".join(f"{word}\n" for word in words["word"]), "utf-8")
    counts = words.pop("n")
    del words
    documents = con.execute(
        "SELECT (SELECT count(*) FROM answers) + (SELECT count(*) FROM questions)"
    ).fetchall()[0][0]
    np.save(out / "documents.npy", documents)
    _sets(con, "postings", "doc", counts, SetWriter(out, "words", documents))


def _sets(
    con: duckdb.DuckDBPyConnection, table: str, column: str, counts: Sequence[int], sets: SetWriter
) -> None:
    """Write the sets of a table (`number`, and a member in `column`), a part of them at a time."""
    for low, high in _parts(counts):
        sql = f"SELECT {column} AS m FROM {table} WHERE number >= $low AND number < $high ORDER BY number, {column}"
        members = con.execute(sql, {"low": low, "high": high}).fetchnumpy()["m"]
        start = 0
        for n in counts[low:high]:
            sets.add(members[start : start + n])
            start += n
    sets.close()


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of sets that have about CHUNK members together."""
    low = total = 0
    for i, n in enumerate(counts):
        if total and total + n > CHUNK:
            yield low, i
            low, total = i, 0
        total += n
    if low < len(counts):
        yield low, len(counts)


class SetWriter:
    """Writes sets of whole numbers below `size`: large ones as bits, others as their members."""

    def __init__(self, out: Path, name: str, size: int) -> None:
        self.size, self.path = size, out / name
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.files = [open(f"{self.path}.{end}", "wb") for end in ("bits", "members")]  # noqa: SIM115
        self.written = [0, 0]

    def add(self, members: npt.NDArray[np.integer[Any]]) -> None:
        """The next set, in ascending order."""
        n = len(members)
        kind = 0 if n * DENSE > self.size else 1
        self.starts.append(self.written[kind])
        self.counts.append(n)
        data: Array
        if kind:
            data = members.astype(np.int32)
        else:
            whole = np.zeros(self.size, bool)
            whole[members] = True
            data = np.packbits(whole)
        self.files[kind].write(data.tobytes())
        self.written[kind] += len(data)

    def close(self) -> None:
        """Write where each set begins."""
        for file in self.files:
            file.close()
        np.save(f"{self.path}.starts.npy", np.array(self.starts, np.int64))
        np.save(f"{self.path}.counts.npy", np.array(self.counts, np.int64))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
