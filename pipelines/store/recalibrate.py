"""Preferences of a run whose calibration alone changed: their probabilities are derived from their
verdicts in the store, without reading an answer. The rows are those that `derive` makes of all uses
and answers.

A preference whose verdicts do not give its id is left to `derive`, and so is one whose probability
they do not give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from prefab.factory.store import store
from prefab.pipelines.store import derive
from prefab.pipelines.store.calibrations import Learned
from prefab.pipelines.store.derive import Row
from prefab.pipelines.store.verdicts import Rules, judges_of, weighed

if TYPE_CHECKING:
    import duckdb

RECALIBRATE = "calibrate"  # of a prompt in `work` whose answers did not change
FIRST_BATCH = 64  # prompts; later batches have about VERDICTS verdicts
VERDICTS = 65_536  # 30 MB; each batch scans the tables
_VERDICTS = """SELECT p.preference, p.prompt, p.a, p.b, p.outcome, p.p_a, p.escalation,
  v.verdict, v.principle, v.judge, v.p_a
FROM preferences p JOIN verdicts v USING (run, prompt, a, b)
WHERE p.run = ? AND p.prompt IN (SELECT unnest(?))
ORDER BY p.prompt, p.a, p.b, v.principle, v.judge, v.repeat, v."order\""""
_OF_PREFERENCE = itemgetter(0, 1, 2, 3, 4, 5, 6)
_NEW = "former VARCHAR, preference VARCHAR, outcome VARCHAR, p_a DOUBLE, calibrated VARCHAR"
_UPDATE = """UPDATE preferences p SET preference = n.preference, outcome = n.outcome, p_a = n.p_a,
  p_chosen = greatest(n.p_a, 1 - n.p_a), calibrated = n.calibrated,
  chosen = CASE n.outcome WHEN 'a' THEN p.a WHEN 'b' THEN p.b END,
  rejected = CASE n.outcome WHEN 'a' THEN p.b WHEN 'b' THEN p.a END
FROM recalibrated n WHERE p.run = ? AND p.preference = n.former"""


def recalibrate(
    con: duckdb.DuckDBPyConnection,
    names: Callable[[Iterable[int]], Mapping[int, str]],
    rules: Rules,
    before: Learned | None,
) -> int:
    """Bring the preferences of a run's prompts in `work` to its new calibration, a batch a
    transaction. Prompts of which that cannot be said from their verdicts are put to be derived.

    Args:
        con: The store, open for writing.
        names: The ids of prompts by the ledger's integers, at least of those that are given.
        rules: Of the run, with the new calibration.
        before: The calibration with which its preferences were derived.

    Returns: The number of preferences that were changed.
    """
    if rules.learned is None or rules.fit:  # strengths are fitted to the probabilities
        con.execute(
            "UPDATE work SET state = 'todo' WHERE state = ? AND run = ?", [RECALIBRATE, rules.run]
        )
        return 0
    was = derive.decided_by(rules, before if before and before.fitted else None)
    change = _Change(rules, rules.learned, was, derive.decided_by(rules, rules.learned))
    con.execute(f"CREATE OR REPLACE TEMP TABLE recalibrated ({_NEW})")
    changed, size = 0, FIRST_BATCH
    while prompts := con.execute(
        "SELECT prompt FROM work WHERE state = ? AND run = ? ORDER BY prompt LIMIT ?",
        [RECALIBRATE, rules.run, size],
    ).fetchall():
        numbers = [number for (number,) in prompts]
        called = names(numbers)
        found = con.execute(_VERDICTS, [rules.run, [called[n] for n in numbers]]).fetchall()
        rows, unknown = [], set()
        for preference, verdicts in groupby(found, key=_OF_PREFERENCE):
            row = _recalibrated(preference, verdicts, change)
            if row is None:
                unknown.add(preference[1])
            else:
                rows.append(row)
        with store.transaction(con):
            con.execute("DELETE FROM recalibrated")
            store.insert(con, "recalibrated", rows)
            con.execute(_UPDATE, [rules.run])
            _settle(con, rules.run, numbers, [n for n in numbers if called[n] in unknown])
        changed += len(rows)
        size = max(1, VERDICTS * len(numbers) // max(1, len(found)))
    return changed


def _settle(
    con: duckdb.DuckDBPyConnection, run: int, numbers: Sequence[int], unknown: Sequence[int]
) -> None:
    """Take prompts out of `work`, but for those that are to be derived."""
    of_run = "WHERE state = ? AND run = ? AND prompt IN (SELECT unnest(?))"
    con.execute(f"UPDATE work SET state = 'todo' {of_run}", [RECALIBRATE, run, unknown])
    con.execute(f"DELETE FROM work {of_run}", [RECALIBRATE, run, numbers])


@dataclass(frozen=True, slots=True)
class _Change:
    """From one calibration of a run to another; `was` and `now` as they stand in ids."""

    rules: Rules
    learned: Learned
    was: tuple[str, ...]
    now: tuple[str, ...]


def _recalibrated(preference: Row, verdicts: Iterable[Row], change: _Change) -> Row | None:
    """A row of `recalibrated`; None where the verdicts do not tell it.

    Args:
        preference: As `_VERDICTS` selects it.
        verdicts: The same with each of its verdicts, in the order of their places.
        change: Of the calibration.
    """
    former, prompt, a, b, outcome, shown, escalation = preference
    judges = judges_of("" if escalation == "settled" else escalation, change.rules) or ()
    readings: dict[tuple[str, str], list[float | None]] = {}
    stands_on = []
    for *_, verdict, principle, judge, p_a in verdicts:
        if judge in judges:
            stands_on.append(verdict)
            readings.setdefault((principle, judge), []).append(p_a)
    if former != derive.preference_id(prompt, a, b, stands_on, change.was):
        return None
    name = derive.preference_id(prompt, a, b, stands_on, change.now)
    if shown is None:
        return former, name, outcome, None, None
    weights = weighed(readings, change.rules)
    means = [_mean(readings[place]) for place in weights]
    p = change.learned.calibration.probability(means, list(weights.values()))
    if p is None:
        return None
    if outcome != "tie":
        outcome = "a" if p > 0.5 else "b"
    return former, name, outcome, p, change.learned.kind


def _mean(p_a: Sequence[float | None]) -> float | None:
    """Of one reading's verdicts; None where one is unscored, as `decision.combine_orders`."""
    known = [p for p in p_a if p is not None]
    return sum(known) / len(known) if len(known) == len(p_a) else None
