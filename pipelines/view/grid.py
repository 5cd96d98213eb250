"""The page of all preferences of a run: filters, histograms, and the rows that match.

A large run is answered from its index (`index.py`). A small one, or one whose index is still being
made, is asked of the store.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from prefab.factory.keys import digest
from prefab.pipelines.view.filters import (
    LENGTH,
    OUTCOMES,
    RANGES,
    SORTS,
    Filters,
    Query,
    build,
    read_filters,
)
from prefab.pipelines.view.index import HISTOGRAMS, STEPS, Array, Mask, PageIndex
from prefab.pipelines.view.pages import Page, Parameters, View, as_sql, one
from prefab.pipelines.view.reader import Row

# The histogram of lengths reads every text: above so many preferences, of a share of the prompts.
LENGTHS_OF = 100_000
_ID = "hash(p.preference, p.prompt, p.a, p.b)"
_COLUMNS = (
    "p.preference, p.prompt, p.a, p.b, p.outcome, p.p_chosen, p.p_a, p.spread, p.n_scored, p.n_readings, "
    "p.identical, p.escalation"
)
_TEXTS = """
SELECT prompt, "index", substr(text, 1, 400) AS text FROM samples
WHERE run = $run AND prompt IN (SELECT unnest($prompts))"""
_QUESTIONS = """
SELECT prompt, substr(text, 1, 400) AS text, tags FROM prompts
WHERE prompt IN (SELECT unnest($prompts))"""


class _MovedError(Exception):
    """The store no longer has the rows that its index names."""


def preferences(view: View, parameters: Parameters) -> Page:
    """The grid: filters, histograms, and a page of rows."""
    filters, about, query = filtered(view, parameters)
    start, more = _start(parameters), one(parameters, "part") == "rows"
    rows, whole = _found(view, filters, about, start, view.rows + 1, more)
    rows = with_texts(view, about["run"], rows)
    data: dict[str, Any] = {
        "run": about["named"],
        "filters": filters,
        "start": start,
        "rows": rows[: view.rows],
        "more": len(rows) > view.rows,
        "of": view.rows,
    }
    if view.bundle:
        _add_verdicts(view, about["run"], data["rows"])
    if more:
        return Page("rows.jinja", "Preferences", data)
    data |= whole
    data["choices"] = view.reader.cached(
        f"choices {about['run']}", lambda: _choices(view, about["run"])
    )
    sql = as_sql(ordered(filters, query, start, view.rows), query.values)
    shown = {
        **data,
        "filters": {k: v for k, v in asdict(filters).items() if v not in (None, "", ())},
    }
    return Page("preferences.jinja", "Preferences", data, view.command("sql", sql), sql, json=shown)


def filtered(view: View, parameters: Parameters) -> tuple[Filters, Row, Query]:
    """The filters in an address, the run that they are of, and their SQL."""
    filters = read_filters(parameters)
    about = view.run(filters.run)
    against = view.run(filters.against)["run"] if filters.against else None
    return filters, about, build(filters, about["run"], against)


def _start(parameters: Parameters) -> int:
    text = one(parameters, "start")
    return int(text) if text.isdecimal() and len(text) < 9 else 0


def rows_of(view: View, filters: Filters, about: Row, start: int, n: int) -> list[Row]:
    """`n` rows of the grid from `start` on, in their order, without texts."""
    return _found(view, filters, about, start, n, more=True)[0]


def _found(
    view: View, filters: Filters, about: Row, start: int, n: int, more: bool
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the grid, and what is shown of all that match: counts and histograms; without these
    where only `more` rows are asked for.
    """
    index = view.index(about["run"])
    if index is not None:
        try:
            rows = _rows_at(view, about, index, filters, start, n)
            return rows, {} if more else _indexed(view, filters, about, index)
        except _MovedError:
            pass  # its successor is being made
    with view.reader.together():
        left, narrow = narrowed(view, filters, about)
        query = build(left, about["run"])
        query.conditions += narrow
        rows = _asked(view, left, query, start, n)
        return rows, {} if more else _whole(view, filters, left, narrow, about, query)


# --- from the index ---


def _others(view: View, about: Row, index: PageIndex, filters: Filters) -> Mask:
    """The rows of filters that the index has no sets for."""
    run = about["run"]
    if filters.against:
        other = view.run(filters.against)["run"]
        known = view.index(other, run)
        if known is not None:
            same = index.same_in(known)
            was = known.column("outcome")[same]
            changed: Mask = (same >= 0) & (was != index.column("outcome"))
            if filters.was:
                changed &= was == OUTCOMES.index(filters.was)
            return changed
    else:
        other = None
    if index.state != list(view.reader.state()):
        raise _MovedError
    query = build(replace(filters, sort="stored"), run, other)
    return index.rows_at(
        view.reader.numbers(f"SELECT p.rowid AS place {query.source()}", query.values)
    )


def _rows_at(
    view: View, about: Row, index: PageIndex, filters: Filters, start: int, n: int
) -> list[Row]:
    """Rows of the grid by the index.

    Raises: _MovedError where the store has other rows at their places.
    """
    mask = index.selected(filters, lambda rest: _others(view, about, index, rest))
    rows = index.window(mask, filters.sort, start, n)
    places = index.places[rows]
    found = _by_place(view, places)
    ids = index.column("id")[rows]
    for place, expected in zip(places.tolist(), ids.tolist(), strict=True):
        if place not in found or found[place].pop("id") != expected:
            raise _MovedError
    return [found[place] for place in places.tolist()]


def _by_place(view: View, places: Array) -> dict[int, Row]:
    sql = (
        f"SELECT p.rowid AS place, {_ID} AS id, {_COLUMNS} FROM preferences p "
        "WHERE p.rowid IN (SELECT unnest($places))"
    )
    rows = view.reader.rows(sql, {"places": places.tolist()})
    return {row.pop("place"): row for row in rows}


def _indexed(view: View, filters: Filters, about: Row, index: PageIndex) -> dict[str, Any]:
    """Counts and histograms by the index, each histogram under all filters but its own."""
    matching = index.matching(filters, lambda rest: _others(view, about, index, rest))

    def within(*names: str) -> Mask:
        inside = index.inside(filters, *names)
        return matching if inside is None else matching & inside

    counts = index.counts(within(*RANGES))
    shown = []
    for name, (_, low, high, title) in HISTOGRAMS.items():
        steps = index.histogram(name, within(*(other for other in RANGES if other != name)))
        shown.append(_histogram(filters, name, title, low, high, steps))
    as_of = (
        ""
        if index.state == list(view.reader.state())
        else time.strftime("%H:%M:%S", time.localtime(index.at))
    )
    return {
        "counts": counts,
        "total": sum(counts.values()),
        "histograms": shown,
        "index": {"state": "behind" if as_of else "current", "as_of": as_of},
    }


def _histogram(
    filters: Filters, name: str, title: str, low: float, high: float, counts: list[int]
) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "low": low,
        "high": high,
        "counts": counts,
        "chosen": (getattr(filters, f"{name}_min"), getattr(filters, f"{name}_max")),
    }


# --- from the store ---


def ordered(filters: Filters, query: Query, start: int, n: int) -> str:
    """The SQL of `n` rows of the grid from `start` on."""
    return (
        f"SELECT {_COLUMNS} FROM preferences p WHERE p.rowid IN "
        f"(SELECT p.rowid {query.source()} {_by(filters)} LIMIT {n} OFFSET {start})"
    )


def _by(filters: Filters) -> str:
    order = SORTS[filters.sort].replace("abs(length)", f"abs({LENGTH})")
    return f"ORDER BY {order + ', ' if order else ''}p.rowid"


def _asked(view: View, filters: Filters, query: Query, start: int, n: int) -> list[Row]:
    places = view.reader.numbers(
        f"SELECT p.rowid AS place {query.source()} {_by(filters)} LIMIT {n} OFFSET {start}",
        query.values,
    )
    known = _by_place(view, places)
    for row in known.values():
        del row["id"]
    return [known[place] for place in places.tolist()]


# The filters that read more than the table of preferences. What they leave is found once, and then
# counted, ordered and drawn.
_WIDE = (
    "principle",
    "judge",
    "judges",
    "tag",
    "reason",
    "mark",
    "orders",
    "people",
    "against",
    "q",
)


def narrowed(view: View, filters: Filters, about: Row) -> tuple[Filters, list[str]]:
    """The filters that are left, and a condition in place of those that read other tables, whose
    preferences are put into a temporary table.
    """
    if not any(getattr(filters, name) for name in _WIDE):
        return filters, []
    against = view.run(filters.against)["run"] if filters.against else None
    wide = Filters(**{name: getattr(filters, name) for name in (*_WIDE, "was")}, sort="stored")
    base = build(wide, about["run"], against)
    view.reader.rows(
        f"CREATE OR REPLACE TEMP TABLE matching AS SELECT p.rowid AS place {base.source()}",
        base.values,
    )
    return filters.without(*_WIDE, "was"), ["p.rowid IN (SELECT place FROM matching)"]


def _whole(
    view: View, filters: Filters, left: Filters, narrow: list[str], about: Row, query: Query
) -> dict[str, Any]:
    """What is shown of all rows that match: counts, histograms, and the choices of each filter."""
    name = digest("grid", about["run"], filters.query())

    def make() -> dict[str, Any]:
        counts = view.reader.rows(
            f"SELECT p.outcome, count(*) AS n {query.source()} GROUP BY ALL", query.values
        )
        by = dict.fromkeys(OUTCOMES, 0) | {row["outcome"]: row["n"] for row in counts}
        return {
            "counts": by,
            "total": sum(by.values()),
            "histograms": histograms(view, left, narrow, about),
        }

    whole: dict[str, Any] = view.reader.cached(name, make)
    state = "building" if view.indexes.building() else "none"
    return {**whole, "index": {"state": state, "as_of": ""}}


def histograms(view: View, filters: Filters, narrow: list[str], about: Row) -> list[dict[str, Any]]:
    """How p_chosen, spread and the difference in length are distributed. Each under all filters but
    its own, so that its own can be changed.
    """
    found = []
    share = max(1, -(-view.size(about["run"]) // LENGTHS_OF))
    for name, (column, low, high, title) in HISTOGRAMS.items():
        query = build(
            replace(filters.without(f"{name}_min", f"{name}_max"), sort="stored"), about["run"]
        )
        query.conditions += narrow
        value = f"p.{column}"
        if name == "length":
            query.lengths, value = True, LENGTH
            if share > 1:
                query.add(f"hash(p.prompt) % {share} = 0")
                title += f" (1 of {share} prompts)"
        counts = _counts(view, query, value, low, high)
        found.append(_histogram(filters, name, title, low, high, counts))
    return found


def _counts(view: View, query: Query, column: str, low: float, high: float) -> list[int]:
    step = (high - low) / STEPS
    rows = view.reader.rows(
        f"SELECT greatest(0, least({STEPS - 1}, floor(({column} - ({low})) / {step})))::INTEGER AS i, "
        f"count(*) AS n {query.source()} AND {column} IS NOT NULL GROUP BY ALL",
        query.values,
    )
    counts = [0] * STEPS
    for row in rows:
        counts[row["i"]] = row["n"]
    return counts


def _choices(view: View, run: int) -> dict[str, list[str]]:
    """The values that each filter can have in this run."""
    at = {"run": run}
    names = {
        "principle": "SELECT DISTINCT principle AS v FROM verdicts WHERE run = $run AND principle <> '' ORDER BY 1",
        "judge": "SELECT DISTINCT judge AS v FROM verdicts WHERE run = $run ORDER BY 1",
        "reason": "SELECT DISTINCT reason AS v FROM verdicts WHERE run = $run AND reason IS NOT NULL ORDER BY 1",
        "mark": "SELECT DISTINCT rule AS v FROM marks WHERE run = $run ORDER BY 1",
        "tag": "SELECT DISTINCT unnest(tags) AS v FROM prompts ORDER BY 1 LIMIT 200",
    }
    found = {
        name: [row["v"] for row in view.reader.rows(sql, at if "$run" in sql else None)]
        for name, sql in names.items()
    }
    found["against"] = [row["named"] for row in view.runs() if row["run"] != run]
    return found


# --- texts ---


def with_texts(view: View, run: int, rows: list[Row]) -> list[Row]:
    """The rows with the beginnings of prompt and answers."""
    prompts = sorted({row["prompt"] for row in rows})
    texts = {
        (row["prompt"], row["index"]): row["text"]
        for row in view.reader.rows(_TEXTS, {"run": run, "prompts": prompts})
    }
    questions = {row["prompt"]: row for row in view.reader.rows(_QUESTIONS, {"prompts": prompts})}
    for row in rows:
        about = questions.get(row["prompt"], {})
        row["question"], row["tags"] = about.get("text"), about.get("tags") or []
        row["text_a"] = texts.get((row["prompt"], row["a"]))
        row["text_b"] = texts.get((row["prompt"], row["b"]))
    return rows


_JUDGED = """
SELECT prompt, a, b, list(DISTINCT principle) AS principles, list(DISTINCT judge) AS judges FROM verdicts
WHERE run = $run GROUP BY ALL"""


def _add_verdicts(view: View, run: int, rows: list[Row]) -> None:
    """The principles and judges of each row, for a filter that runs in the page."""
    known = {
        (row["prompt"], row["a"], row["b"]): row for row in view.reader.rows(_JUDGED, {"run": run})
    }
    for row in rows:
        found = known.get((row["prompt"], row["a"], row["b"]), {})
        row["principles"], row["judges"] = found.get("principles") or [], found.get("judges") or []
