"""Learn how the readings of a run's comparisons become a probability, from comparisons whose better
answer is known.

A run does this at its end by itself (`calibrate_ended`); `prefab calibrate` chooses another source.
What was learned is recorded in the ledger as an evaluation named `calibration`; the store then
derives `p_chosen` of every comparison of the run with it, and keeps the share of the votes as
`vote_share`. So filling and rebuilding give the same rows.

Only comparisons that the panel decides count, at most `MOST` of them, drawn by the digest of their
names: what is learned depends neither on the order of the answers nor on the run's size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefab.factory import decision
from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.store.store import Read
from prefab.judges.stats.preference_calibration import (
    Calibration,
    Method,
    combine_all,
    fit_calibration,
)
from prefab.pipelines.store.calibrations import (
    CALIBRATION,
    RETEST,
    Learned,
    Source,
    record_of,
)
from prefab.pipelines.store.fill import fill, read_filled
from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.selection import Selection, select
from prefab.pipelines.store.verdicts import escalated

METHODS: tuple[Method, ...] = ("auto", "temperature", "isotonic")
KINDS: tuple[Source, ...] = ("human", "oracle", "retest")  # auto: the first that suffices
SOURCES = ("auto", *KINDS, "none")
MOST = 5_000  # comparisons; the errors of one temperature are below 2% from 5,000 outcomes on

Readings = dict[tuple[str, str], float | None]  # P(a) by (judge, principle)

# The prompts on which each source knows something.
_WHERE = {
    "human": "p.prompt IN (SELECT prompt FROM human_labels)",
    "oracle": "p.prompt IN (SELECT prompt FROM prompts WHERE split = 'val')",
    "retest": "true",
}
_LABELS = "SELECT count(*) AS n FROM human_labels"
# A comparison's readings: one a judge and principle, unscored when any of its verdicts is. `again`
# is a second answer: the other order where both were asked, else the repeats after the first.
_READINGS = """
WITH met AS (
  SELECT p.prompt, p.a, p.b, p.escalation FROM preferences p
  WHERE p.run = $run AND p.outcome IN ('a', 'b') AND {where}
  ORDER BY md5(concat_ws(' ', p.prompt, p.a, p.b)) LIMIT {most}),
said AS (
  SELECT v.prompt, v.a, v.b, m.escalation, v.principle, v.judge, avg(v.p_a) AS p_a,
    count(*) = count(v.p_a) AS scored, count(DISTINCT v."order") > 1 AS twice,
    avg(v.p_a) FILTER (WHERE v."order" = 'ab') AS ab,
    avg(v.p_a) FILTER (WHERE v."order" = 'ba') AS ba,
    avg(v.p_a) FILTER (WHERE v.repeat = 0) AS first,
    avg(v.p_a) FILTER (WHERE v.repeat > 0) AS later
  FROM verdicts v JOIN met m USING (prompt, a, b) WHERE v.run = $run GROUP BY ALL)
SELECT s.prompt, s.a, s.b, s.escalation, s.principle, s.judge, q."group",
  CASE WHEN scored THEN p_a END AS p_a,
  CASE WHEN scored THEN CASE WHEN twice THEN ab WHEN later IS NOT NULL THEN first END END AS first,
  CASE WHEN scored THEN CASE WHEN twice THEN ba ELSE later END END AS again
FROM said s LEFT JOIN prompts q ON q.prompt = s.prompt ORDER BY ALL"""


@dataclass(slots=True)
class _Comparison:
    """The readings of a comparison, of the judges whose word counts. `first` and `again`: of those
    that were asked twice, the two answers.
    """

    group: str
    readings: Readings = field(default_factory=dict)
    first: Readings = field(default_factory=dict)
    again: Readings = field(default_factory=dict)


Compared = dict[tuple[str, int, int], _Comparison]


def calibrate(
    store: str | Path, run: str = "", source: str = "auto", method: str = "auto"
) -> Learned:
    """Learn a run's calibration, record it, and derive its preferences with it. Later runs of the
    same configuration keep to this source and method.

    Args:
        store: The folder of the store.
        run: NAME or NAME@VERSION; empty: the latest.
        source: What tells which answer is better: people (`human`), the embedded world's
            `oracle` on the validation split, or the judges themselves asked a second time
            (`retest`: this measures repeatability, not truth). `auto` is the first of these that
            suffices; with `none`, `p_chosen` is the share of the vote.
        method: temperature, isotonic, or auto: the better one on prompts it was not fitted on.

    Raises:
        ConfigError: Unknown source or method; a run whose readings cannot be combined, or whose
            panel's judges are the people who would be the source.
    """
    for what, given, known in (("source", source, SOURCES), ("method", method, METHODS)):
        if given not in known:
            raise ConfigError(f"--{what} {given}: {did_you_mean(given, known)}")
    selection = select(Path(store), run)
    if source != "none" and (why := _why_not(selection, source)):
        raise ConfigError(f"{selection.name}: {why}")
    learned = _learn(selection, source, method)
    asyncio.run(_record(selection, learned, source, method))
    fill(selection.folder)
    return learned


async def calibrate_ended(folder: Path, run: str) -> Learned:
    """What a run's `p_chosen` is at its end: learned anew where verdicts or labels came since the
    last time, by the source that was chosen last. Nothing is asked, and what was learned is
    recorded where it differs from what the ledger has.
    """
    found = read_filled(folder, partial(_look, folder, run))
    if isinstance(found, Learned):
        return found
    selection, learned, source, method = found
    await _record(selection, learned, source, method)
    fill(folder)
    return learned


def _look(folder: Path, run: str, read: Read) -> Learned | tuple[Selection, Learned, str, str]:
    """What a run's `p_chosen` is; with the selection, the source and the method where that is to be
    recorded.
    """
    selection = select(folder, run, read=read)
    last = record_of(folder, selection.run["run"], read)
    if last is not None and last["seen"] == _seen(selection):
        return Learned.from_data(last)
    source, method = (last["chosen"] if last else None) or ("auto", "auto")
    if why := _why_not(selection, source):
        return _nothing(selection, why)
    learned = _learn(selection, source, method)
    if not learned.fitted:
        return Learned.from_data(last) if last else learned
    return replace(selection, read=None), learned, source, method


def _why_not(selection: Selection, source: str) -> str:
    """Why the run's readings cannot be calibrated by this source; empty where they can."""
    config = selection.config
    if (config["panel"].get("selection") or _constitution(selection)) == "lexicographic":
        return (
            "the first principle that decides is its only word (selection: lexicographic), so there "
            "are no readings to combine"
        )
    if source == "human" and _people_judge(selection):
        return "people are judges of its panel, so their labels are already part of the vote"
    return ""


def _people_judge(selection: Selection) -> bool:
    return any(judge.get("kind") == "human" for judge in selection.config["panel"]["judges"])


def _nothing(selection: Selection, why: str) -> Learned:
    return Learned(selection.name, "", "nobody", Calibration("none", 0.0, reason=why))


def _learn(selection: Selection, source: str, method: str) -> Learned:
    """By the source, or for auto by the first that suffices."""
    if source == "none":
        return _nothing(selection, "calibration is off (`prefab calibrate --source none`)")
    there = {
        "human": not _people_judge(selection),
        "oracle": (selection.config.get("prompts") or {}).get("source") == "microworld",
        "retest": True,
    }
    kinds = [kind for kind in KINDS if source == kind or (source == "auto" and there[kind])]
    reasons = []
    for kind in kinds:
        learned = _learn_from(selection, kind, method)
        if learned.fitted or source == kind:
            return learned
        reasons.append(f"{learned.source}: {learned.calibration.reason}")
    return _nothing(selection, "; ".join(reasons))


def _learn_from(selection: Selection, kind: Source, method: str) -> Learned:
    compared = _comparisons(selection, kind)
    of = _weights(selection)
    rule = decision.Rule(log_odds=selection.config["panel"].get("combine") == "log_odds")
    columns = sorted({place for one in compared.values() for place in one.readings})
    retest = kind == "retest"
    read = [one.first if retest else one.readings for one in compared.values()]
    weights = [[of(*place) if place in one else 0.0 for place in columns] for one in read]
    if retest:
        outcomes, told = _second_answers(compared, columns, weights), RETEST
    else:
        outcomes, told = _known(selection, compared, kind)
    found = fit_calibration(
        [[readings.get(place) for place in columns] for readings in read],
        outcomes,
        [one.group for one in compared.values()],
        method,  # type: ignore[arg-type]  # checked by `calibrate`
        weights,
        [_share(readings, of, rule) for readings in read],
        sharpen=not retest,
    )
    return Learned(selection.name, kind, told, found)


def _constitution(selection: Selection) -> str:
    sql = "SELECT selection FROM constitutions WHERE constitution = $constitution"
    rows = selection.query(sql)
    return str(rows["selection"][0]) if rows.height else "all"


def _comparisons(selection: Selection, kind: Source) -> Compared:
    """The readings that count in each comparison on which this source may know something."""
    if kind == "human" and not selection.query(_LABELS)["n"][0]:
        return {}
    escalate = selection.config["panel"].get("escalate") or {}
    strong, joined = set(escalate.get("to", ())), escalate.get("decides") == "all"
    found: Compared = {}
    sql = _READINGS.format(where=_WHERE[kind], most=MOST)
    for row in selection.query(sql).iter_rows(named=True):
        if strong:
            asked = escalated({"settled": ""}.get(row["escalation"], row["escalation"] or ""))
            counts = row["judge"] not in strong if not asked else joined or row["judge"] in strong
            if not counts:
                continue
        place = (row["prompt"], row["a"], row["b"])
        one = found.setdefault(place, _Comparison(row["group"] or row["prompt"]))
        reading = row["judge"], row["principle"]
        one.readings[reading] = row["p_a"]
        if row["again"] is not None:
            one.first[reading], one.again[reading] = row["first"], row["again"]
    return found


def _known(
    selection: Selection, compared: Compared, kind: Source
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
    schema = {"prompt": pl.String, "a": pl.Int32, "b": pl.Int32, "principle": pl.String}
    gold, told = find_gold(selection, pl.DataFrame(rows, schema=schema, orient="row"), kind)
    known = [None if value != value else float(value) for value in gold]
    return known, f"{told}, on the validation split" if kind == "oracle" else told


def _second_answers(
    compared: Compared, columns: Sequence[tuple[str, str]], weights: Sequence[Sequence[float]]
) -> list[float | None]:
    """What the second answers of each comparison say together: 1 for a, 0 for b, 0.5 for neither;
    None where there are none.
    """
    rows = [[one.again.get(place) for place in columns] for one in compared.values()]
    _, combined = combine_all(rows, weights)
    return [None if x is None else 0.5 if x == 0 else float(x > 0) for x in combined]


def _share(
    readings: Readings, of: Callable[[str, str], float], rule: decision.Rule
) -> float | None:
    """P(a) as the panel's rule has it without a calibration."""
    said = [
        decision.Reading(p, weight=of(judge, principle), principle=principle, judge=judge)
        for (judge, principle), p in readings.items()
    ]
    return decision.decide(said, rule).p_a


def _weights(selection: Selection) -> Callable[[str, str], float]:
    """The weight of a judge's reading under a principle."""
    sql = "SELECT principle, weight FROM principles WHERE constitution = $constitution"
    of: dict[str, float] = dict(selection.query(sql).iter_rows())
    by = {judge["name"]: judge.get("weight", 1.0) for judge in selection.config["panel"]["judges"]}
    return lambda judge, principle: of.get(principle, 1.0) * by.get(judge, 1.0)


def _seen(selection: Selection) -> str:
    """What a calibration is learned from, as a digest: the run's verdicts, and the labels."""
    sql = """SELECT count(*) AS n, bit_xor(hash(verdict)) AS together,
        (SELECT count(*) FROM human_labels) AS labels FROM verdicts WHERE run = $run"""
    return " ".join(map(str, selection.query(sql).row(0)))


async def _record(selection: Selection, learned: Learned, source: str, method: str) -> None:
    """Record what was learned in the ledger."""
    value: Mapping[str, Any] = {
        "name": CALIBRATION,
        "subject": selection.name,
        "run": selection.run["run"],
        "kind": learned.kind if learned.fitted else "",
        "source": learned.source,
        "calibration": learned.calibration.data(),
        "chosen": [source, method],
        "seen": _seen(selection),
        "at": time.time(),  # the same calibration may be learned again after another one
    }
    ledger = Ledger.open(selection.folder)
    try:
        ledger.add_eval(dict(value))
    finally:
        await ledger.close()
