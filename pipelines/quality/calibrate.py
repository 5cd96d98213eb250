"""`prefab calibrate`: learn how the readings of a run's comparisons become a probability, from
comparisons whose better answer is known.

What was learned is recorded in the ledger as an evaluation named `calibration`; the store then
derives `p_chosen` of every comparison of the run with it, and keeps the share of the votes as
`vote_share`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec.yamlio import did_you_mean
from prefab.judges.stats.preference_calibration import Method, fit_calibration
from prefab.pipelines.quality.ground_truth import find_gold
from prefab.pipelines.quality.selection import Selection, select
from prefab.pipelines.store.calibrations import CALIBRATION, Learned
from prefab.pipelines.store.fill import fill
from prefab.pipelines.store.verdicts import escalated

METHODS: tuple[Method, ...] = ("auto", "temperature", "isotonic")
SOURCES = ("auto", "human", "oracle", "retest")

# A comparison's readings: one a judge and principle, unscored when any of its verdicts is.
_READINGS = """
SELECT v.prompt, v.a, v.b, v.principle, v.judge, p.escalation, q."group", q.split,
  CASE WHEN count(*) = count(v.p_a) THEN avg(v.p_a) END AS p_a,
  CASE WHEN count(*) = count(v.p_a) THEN avg(v.p_a) FILTER (WHERE v.repeat = 0) END AS first,
  avg(v.p_a) FILTER (WHERE v.repeat > 0) AS again
FROM verdicts v JOIN preferences p USING (run, prompt, a, b) LEFT JOIN prompts q ON q.prompt = v.prompt
WHERE v.run = $run GROUP BY ALL ORDER BY ALL"""


@dataclass(slots=True)
class _Comparison:
    """The readings of a comparison by (judge, principle), of the judges whose word counts."""

    group: str
    split: str | None
    readings: dict[tuple[str, str], float | None]
    first: dict[tuple[str, str], float | None]
    again: list[float]


def calibrate(
    store: str | Path, run: str = "", source: str = "auto", method: str = "auto"
) -> Learned:
    """Learn a run's calibration, record it, and derive its preferences with it.

    Args:
        store: The folder of the store.
        run: NAME or NAME@VERSION; empty: the latest.
        source: Whose word tells which answer is better: people (`human`), the embedded world's
            `oracle` on the validation split, the judges themselves asked again (`retest`: this
            measures repeatability, not truth), or the first of these that there is (`auto`).
        method: temperature, isotonic, or auto: the better one on prompts it was not fitted on.

    Raises:
        ConfigError: Unknown source or method; a run whose rule is lexicographic.
    """
    for what, given, known in (("source", source, SOURCES), ("method", method, METHODS)):
        if given not in known:
            raise ConfigError(f"--{what} {given}: {did_you_mean(given, known)}")
    store = Path(store)
    selection = select(store, run)
    config = selection.config
    constitution = _constitution(selection)
    lexicographic = (config["panel"].get("selection") or constitution) == "lexicographic"
    if lexicographic:
        raise ConfigError(
            f"{selection.name}: the first principle that decides is its only word (selection: "
            "lexicographic), so there are no readings to combine"
        )
    compared = _comparisons(selection)
    outcomes, told = _outcomes(selection, compared, source)
    columns = sorted({place for one in compared.values() for place in one.readings})
    of = _weights(selection)
    retest = told == RETEST
    found = fit_calibration(
        [[_of(one, retest).get(place) for place in columns] for one in compared.values()],
        outcomes,
        [one.group for one in compared.values()],
        method,  # type: ignore[arg-type]  # checked above
        [
            [of(*place) if place in one.readings else 0.0 for place in columns]
            for one in compared.values()
        ],
    )
    value = {
        "name": CALIBRATION,
        "subject": selection.name,
        "run": selection.run["run"],
        "source": told,
        "calibration": found.data(),
        "at": time.time(),  # the same calibration may be learned again after another one
    }
    asyncio.run(_add(store, value))
    fill(store)
    return Learned(selection.name, told, found)


RETEST = "the judges' own second answers"


def _of(one: _Comparison, retest: bool) -> Mapping[tuple[str, str], float | None]:
    return one.first if retest else one.readings


def _constitution(selection: Selection) -> str:
    sql = "SELECT selection FROM constitutions WHERE constitution = $constitution"
    rows = selection.query(sql)
    return str(rows["selection"][0]) if rows.height else "all"


def _comparisons(selection: Selection) -> dict[tuple[str, int, int], _Comparison]:
    """The readings that count in each comparison of the run."""
    escalate = selection.config["panel"].get("escalate") or {}
    strong, joined = set(escalate.get("to", ())), escalate.get("decides") == "all"
    found: dict[tuple[str, int, int], _Comparison] = {}
    for row in selection.query(_READINGS).iter_rows(named=True):
        if strong:
            asked = escalated({"settled": ""}.get(row["escalation"], row["escalation"] or ""))
            counts = row["judge"] not in strong if not asked else joined or row["judge"] in strong
            if not counts:
                continue
        place = (row["prompt"], row["a"], row["b"])
        empty = _Comparison(row["group"] or row["prompt"], row["split"], {}, {}, [])
        one = found.setdefault(place, empty)
        one.readings[row["judge"], row["principle"]] = row["p_a"]
        one.first[row["judge"], row["principle"]] = row["first"]
        one.again += [row["again"]] if row["again"] is not None else []
    return found


def _outcomes(
    selection: Selection, compared: Mapping[tuple[str, int, int], _Comparison], source: str
) -> tuple[list[float | None], str]:
    """For each comparison which answer is better (1: a, 0: b, 0.5: neither, None: unknown), and who
    says so.
    """
    import polars as pl

    rows = []
    for (prompt, a, b), one in compared.items():
        principles = {principle for _, principle in one.readings}
        alone = principles.pop() if len(principles) == 1 else ""
        rows.append((prompt, a, b, alone))
    items = pl.DataFrame(rows, schema=["prompt", "a", "b", "principle"], orient="row")
    if source != "retest":
        gold, told = find_gold(selection, items, source)
        by_oracle = told.startswith("the embedded")
        known = [
            None if value != value or (by_oracle and one.split != "val") else float(value)
            for value, one in zip(gold, compared.values(), strict=True)
        ]
        if told or source != "auto":
            return known, f"{told}, on the validation split" if by_oracle else told
    again = [_side(one.again) for one in compared.values()]
    return again, RETEST if any(value is not None for value in again) else "nobody"


def _side(again: list[float]) -> float | None:
    """What the second answers say: 1 for a, 0 for b, 0.5 for neither."""
    if not again:
        return None
    p = sum(again) / len(again)
    return 0.5 if p == 0.5 else float(p > 0.5)


def _weights(selection: Selection) -> Any:
    """The weight of a judge's reading under a principle."""
    sql = "SELECT principle, weight FROM principles WHERE constitution = $constitution"
    of = dict(selection.query(sql).iter_rows())
    by = {judge["name"]: judge.get("weight", 1.0) for judge in selection.config["panel"]["judges"]}
    return lambda judge, principle: of.get(principle, 1.0) * by.get(judge, 1.0)


async def _add(folder: Path, value: dict[str, Any]) -> None:
    ledger = Ledger.open(folder)
    try:
        ledger.add_eval(value)
    finally:
        await ledger.close()
