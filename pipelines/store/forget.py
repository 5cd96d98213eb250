"""Forgetting answers: which ones, counted or marked in the ledger so that their questions are asked
again, and undone.

An answer that was given while a server was ill is a fact like any other, and would be reused for
ever. A forgotten answer stays in the ledger; it no longer counts, in a run as in the store. Each
forgetting is a row, and so is its undoing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import orjson

from prefab.factory.errors import ConfigError
from prefab.factory.ledger import db, records
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.store.shared import refuse_shards
from prefab.factory.types import UnscoredReason
from prefab.pipelines.store.fill import query

ANY_REASON = "unscored"
EMPTY = "empty"
_REASONS = ("samples", "critiques", "scores", "steps", "rankings", "verdicts")


@dataclass(frozen=True, slots=True)
class AnswerFilter:
    """Which answers: all that meet every condition that is given. `run` is NAME or NAME@VERSION;
    `reason` that of an unscored answer, `unscored` for any, or `empty` for an empty text; `since`
    (included) and `until` are Unix times; `model` an identity, or its name; `replica` a server.
    """

    run: str = ""
    role: str = ""
    reason: str = ""
    since: float | None = None
    until: float | None = None
    model: str = ""
    replica: str = ""

    def given(self) -> dict[str, Any]:
        """The conditions that are given."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


@dataclass(frozen=True, slots=True)
class Forgetting:
    """One forgetting: its id, how many answers it took, why, and whether it is undone."""

    id: int
    answers: int
    reason: str
    filter: dict[str, Any]
    at: float
    undone: bool


def select_answers(folder: Path, wanted: AnswerFilter) -> list[int]:
    """The rows of `calls` that count and that a filter means.

    Raises: ConfigError for a filter without a condition, an unknown reason, or a run, role, model
    or server that is not in the ledger.
    """
    check_reason(wanted.reason)
    refuse_shards(folder)
    if not wanted.given():
        raise ConfigError("no condition is given: name a run, role, reason, time, model or replica")
    with closing(db.connect(folder / db.FILE, readonly=True)) as con:
        where = [f"id NOT IN ({db.FORGOTTEN})"]
        values: list[Any] = []
        for column, names in (("model", wanted.model), ("replica", wanted.replica)):
            if names:
                where.append(f"{column} IN ({_ids(con, column, names)})")
        for sign, time in ((">=", wanted.since), ("<", wanted.until)):
            if time is not None:
                where.append(f"at {sign} ?")
                values.append(time)
        if wanted.run or wanted.role:
            where.append(f"key IN (SELECT key FROM uses WHERE {_uses(con, wanted)})")
        if wanted.reason == EMPTY:
            where.append("trim(text) = '' AND label_logps IS NULL AND finish IN ('stop', 'length')")
        sql = f"SELECT id, key FROM calls WHERE {' AND '.join(where)} ORDER BY id"
        rows = con.execute(sql, values).fetchall()
    if wanted.reason in ("", EMPTY):
        return [row[0] for row in rows]
    keys = _unscored(folder, wanted.reason)
    return [row[0] for row in rows if row[1].hex() in keys]


def check_reason(reason: str) -> None:
    """Raises: ConfigError for a reason for which no answer is unscored."""
    known = (ANY_REASON, EMPTY, *get_args(UnscoredReason))
    if reason and reason not in known:
        raise ConfigError(f"no answer is unscored for {reason!r}; {did_you_mean(reason, known)}")


def _ids(con: Any, column: str, name: str) -> str:
    """The ids of a name of models or servers, as SQL. A model's identity is KIND:NAME."""
    rows = con.execute(
        f"SELECT id, name FROM names WHERE id IN (SELECT DISTINCT {column} FROM calls)"
    ).fetchall()
    found = [i for i, full in rows if name in (full, full.partition(":")[2])]
    if not found:
        known = ", ".join(sorted(full for _, full in rows)) or "none"
        raise ConfigError(f"no answer has the {column} {name!r} (known: {known})")
    return ", ".join(map(str, found))


def _uses(con: Any, wanted: AnswerFilter) -> str:
    """The condition on uses of a run and a role, as SQL."""
    where = []
    if wanted.run:
        name, _, version = wanted.run.partition("@")
        runs = [
            str(r.id)
            for r in records.runs(con)
            if r.name == name and version in ("", str(r.version))
        ]
        if not runs:
            raise ConfigError(f"no run {wanted.run!r} in this store")
        where.append(f"run IN ({', '.join(runs)})")
    if wanted.role:
        row = con.execute("SELECT id FROM names WHERE name = ?", (wanted.role,)).fetchone()
        if row is None:
            raise ConfigError(f"no answer has the role {wanted.role!r}")
        where.append(f"role = {row[0]}")
    return " AND ".join(where)


def _unscored(folder: Path, reason: str) -> set[str]:
    """The keys of answers that are unscored for a reason."""
    sql = " UNION ".join(
        f"SELECT call FROM {table} WHERE call IS NOT NULL AND reason IS NOT NULL "
        "AND ($reason = 'unscored' OR reason = $reason)"
        for table in _REASONS
    )
    return set(query(folder, sql, {"reason": reason})["call"])


def forget(folder: Path, wanted: AnswerFilter, why: str = "") -> Forgetting | None:
    """Mark answers as forgotten; the next run asks their questions again.

    Args:
        folder: The store.
        wanted: Which answers, as an `AnswerFilter` of `prefab.pipelines.store.forget`.
        why: The reason that is recorded; left out: the filter's own.

    Returns:
        What was recorded; None when no answer meets the filter.

    Raises:
        ConfigError: As `select_answers`.
        StoreError: The ledger cannot be written.
    """
    calls = select_answers(folder, wanted)
    if not calls:
        return None
    reason = why or wanted.reason or "asked for"
    made = db.write(
        folder / db.FILE, lambda con: db.forget_calls(con, reason, wanted.given(), calls)
    )
    return next(one for one in forgettings(folder) if one.id == made)


def undo_forgetting(folder: Path, forgetting: int) -> Forgetting:
    """Let the answers of a forgetting count again, before those that were given since.

    Args:
        folder: The store.
        forgetting: Its id, from `forget`.

    Raises:
        ConfigError: There is no such forgetting, or it is undone already.
    """
    found = {one.id: one for one in forgettings(folder)}
    if forgetting not in found or found[forgetting].undone:
        known = ", ".join(str(one.id) for one in found.values() if not one.undone) or "none"
        raise ConfigError(f"there is no forgetting {forgetting} to undo (there are: {known})")
    db.write(folder / db.FILE, lambda con: db.undo_forget(con, forgetting))
    return next(one for one in forgettings(folder) if one.id == forgetting)


def forgettings(folder: Path) -> list[Forgetting]:
    """Every forgetting of a store, oldest first. Raises: StoreError."""
    with closing(db.connect(folder / db.FILE, readonly=True)) as con:
        rows: Sequence[tuple[Any, ...]] = con.execute(
            "SELECT id, (SELECT count(*) FROM forgotten WHERE forget = f.id), reason, filter, at, "
            "EXISTS (SELECT 1 FROM forgets u WHERE u.undoes = f.id) "
            "FROM forgets f WHERE undoes IS NULL ORDER BY id"
        ).fetchall()
    return [
        Forgetting(i, n, reason, orjson.loads(filters), at, bool(undone))
        for i, n, reason, filters, at, undone in rows
    ]
