"""The pages about runs and preferences. Each is a function of the view and the parameters of its
address; what it gives is also the page's JSON.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest
from prefab.factory.stats import wilson
from prefab.pipelines.view.filters import (
    LENGTH,
    OUTCOMES,
    SORTS,
    Filters,
    Query,
    build,
    read_filters,
)
from prefab.pipelines.view.jobs import Jobs
from prefab.pipelines.view.reader import Row, StoreReader

ROWS = 50  # of the grid, at a time
MOST_SHOWN = 20_000  # how deep the grid scrolls
STEPS = 20  # bars of a histogram
# The histogram of lengths reads every text: above so many preferences, of a share of the prompts.
LENGTHS_OF = 100_000
LIVE_S = 15.0  # a store that got an answer so recently is being written
Parameters = Sequence[tuple[str, str]]


@dataclass(slots=True)
class Page:
    """A page: its template and what it shows. `command` and `sql` give the same elsewhere; `live`:
    it changes while a run goes on.
    """

    template: str
    title: str
    data: dict[str, Any]
    command: str = ""
    sql: str = ""
    live: bool = False
    status: int = 200
    json: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class View:
    """What all pages share."""

    reader: StoreReader
    jobs: Jobs
    annotator: str = ""
    bundle: bool = False
    rows: int = ROWS

    @property
    def folder(self) -> Path:
        """The store."""
        return self.reader.folder

    def runs(self) -> list[Row]:
        """The runs, the last started first."""
        sql = (
            "SELECT run, name, version, name || '@' || version AS named, recipe, constitution, config, "
            "last_start, started_at FROM runs ORDER BY last_start DESC"
        )
        rows: list[Row] = self.reader.cached("runs", lambda: self.reader.rows(sql))
        return rows

    def run(self, name: str = "") -> Row:
        """The run that NAME, NAME@VERSION or nothing (the last one that is neither an import nor a
        rejudged one) names.

        Raises: ConfigError when there is none.
        """
        rows = self.runs()
        if not rows:
            raise ConfigError(f"{self.folder} is empty: no run has begun")
        if not name:
            own = [row for row in rows if row["recipe"] not in ("import", "rejudge")]
            return (own or rows)[0]
        found = [row for row in rows if name in (row["named"], row["name"])]
        if not found:
            raise ConfigError(
                f"there is no run {name!r}; there are: " + ", ".join(r["named"] for r in rows)
            )
        return found[0]

    def command(self, *words: object) -> str:
        """A `prefab` command about this store, quoted for a shell."""
        return shlex.join(["prefab", *map(str, words), "--store", self.shown])

    @property
    def shown(self) -> str:
        """The store as pages name it: in those that others get, without the folders above it."""
        return self.folder.name if self.bundle else str(self.folder)


PageOf = Callable[[View, Parameters], Page]


def literal(value: Any) -> str:
    """A value as SQL."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, list | tuple):
        return f"[{', '.join(literal(v) for v in value)}]"
    return "NULL" if value is None else str(value)


def as_sql(sql: str, values: Mapping[str, Any]) -> str:
    """A query with its values in place of their names, to be pasted."""
    for name in sorted(values, key=len, reverse=True):
        sql = sql.replace(f"${name}", literal(values[name]))
    return "\n".join(line for line in (line.rstrip() for line in sql.splitlines()) if line.strip())


def one(parameters: Parameters, name: str) -> str:
    """The first value of a parameter; empty without one."""
    return next((value for key, value in parameters if key == name), "")


# --- runs ---

_SUMMARY = "SELECT * FROM summary ORDER BY run DESC"


def runs(view: View, parameters: Parameters) -> Page:
    """All runs with their outcomes, and how fast answers come in now."""
    known = {row["run"]: row for row in view.runs()}
    rows = view.reader.cached("summary", lambda: view.reader.rows(_SUMMARY))
    waiting = {row["run"]: row["prompts"] for row in view.reader.rows("SELECT * FROM waiting")}
    shown = []
    for row in rows:
        about = known.get(row["run"], {})
        told = {key: row[key] for key in row if key != "latest"}
        shown.append(
            {
                **told,
                "named": f"{row['name']}@{row['version']}",
                "recipe": about.get("recipe"),
                "started_at": about.get("started_at"),
                "waiting": waiting.get(row["run"], 0),
            }
        )
    pace = _pace(view)
    data = {"runs": shown, **pace}
    live = pace["calls_per_s"] is not None
    return Page("runs.jinja", "Runs", data, view.command("store", "info"), _SUMMARY, live)


def _pace(view: View) -> dict[str, Any]:
    """How many answers a second came in over the last minute; None when none did lately."""
    now = time.time()
    with view.reader.ledger() as con:
        last = con.execute("SELECT id, at FROM calls ORDER BY id DESC LIMIT 1").fetchone()
        if not last or now - last[1] > LIVE_S:
            return {
                "calls_per_s": None,
                "last_call_at": last[1] if last else None,
                "calls": last[0] if last else 0,
            }
        first = con.execute(
            "SELECT id, at FROM calls WHERE id > ? AND at > ? ORDER BY id LIMIT 1",
            (last[0] - 60_000, now - 60),
        ).fetchone()
    seconds = max(1.0, last[1] - first[1])
    return {
        "calls_per_s": (last[0] - first[0]) / seconds,
        "last_call_at": last[1],
        "calls": last[0],
    }


_FAULTS = """
SELECT principle, count(*) AS critiques, count(*) FILTER (fault) AS faults, count(*) FILTER (fault IS NULL) AS unread
FROM critiques WHERE run = $run GROUP BY ALL ORDER BY faults DESC, principle"""
_REASONS = "SELECT role, reason, n FROM unscored WHERE run = $run ORDER BY n DESC"
_FAILURES = """
SELECT error, count(*) AS times, count(DISTINCT call) AS calls, max(failed_at) AS last FROM failures
WHERE run = $run GROUP BY ALL ORDER BY times DESC LIMIT 20"""
_TOKENS = """
WITH used AS (
  SELECT call, CASE WHEN parent < 0 THEN 'sample' ELSE 'revise' END AS role FROM samples WHERE run = $run
  UNION SELECT call, 'critique' FROM critiques WHERE run = $run
  UNION SELECT call, 'judge' FROM verdicts WHERE run = $run
  UNION SELECT call, 'score' FROM scores WHERE run = $run
  UNION SELECT call, 'rank' FROM rankings WHERE run = $run)
SELECT u.role, m.name AS model, count(*) AS calls, sum(c.prompt_tokens) AS prompt_tokens,
  sum(c.completion_tokens) AS completion_tokens, min(c.answered_at) AS first, max(c.answered_at) AS last
FROM used u JOIN calls c USING (call) LEFT JOIN models m ON m.model = c.model GROUP BY ALL ORDER BY calls DESC"""


def run(view: View, parameters: Parameters) -> Page:
    """One run: what was asked and what it cost, faults, what could not be read, failures, and its
    configuration.
    """
    about = view.run(one(parameters, "run"))
    at = {"run": about["run"]}
    summary = next(
        row
        for row in view.reader.cached("summary", lambda: view.reader.rows(_SUMMARY))
        if row["run"] == about["run"]
    )
    pairs = summary["decided"] + summary["ties"] + summary["unscored"]
    faults = view.reader.rows(_FAULTS, at)
    for row in faults:
        row["share"] = asdict(wilson(row["faults"], row["critiques"]))
    data = {
        "run": about["named"],
        "recipe": about["recipe"],
        "summary": summary,
        "preferences": pairs,
        "tokens": view.reader.cached(
            f"tokens {about['run']}", lambda: view.reader.rows(_TOKENS, at)
        ),
        "faults": faults,
        "unscored": view.reader.rows(_REASONS, at),
        "reasons": view.reader.rows(
            "SELECT reason, count(*) AS n FROM verdicts WHERE run = $run AND reason IS NOT NULL GROUP BY ALL "
            "ORDER BY n DESC",
            at,
        ),
        "failures": view.reader.rows(_FAILURES, at),
        "marks": view.reader.rows(
            "SELECT rule, count(*) AS n FROM marks WHERE run = $run GROUP BY ALL ORDER BY n DESC",
            at,
        ),
        "config": _config(view, about["config"]),
        "others": [row["named"] for row in view.runs() if row["run"] != about["run"]],
    }
    command = view.command("sql", f"SELECT * FROM summary WHERE run = {about['run']}")
    return Page(
        "run.jinja",
        about["named"],
        data,
        command,
        as_sql(_TOKENS, at),
        _pace(view)["calls_per_s"] is not None,
    )


def _config(view: View, text: str) -> str:
    """A run's configuration as people read it; in pages that others get, without the folders above
    the store.
    """
    config = json.loads(text)
    if view.bundle and "store" in config:
        config["store"] = view.shown
    return json.dumps(config, indent=2, ensure_ascii=False)


_CROSSED = """
SELECT o.outcome AS old, n.outcome AS new, count(*) AS n FROM preferences o
JOIN samples x ON x.run = o.run AND x.prompt = o.prompt AND x."index" = o.a
JOIN samples y ON y.run = o.run AND y.prompt = o.prompt AND y."index" = o.b
JOIN preferences n ON n.run = $new AND n.prompt = o.prompt AND n.a = o.a AND n.b = o.b
JOIN samples u ON u.run = n.run AND u.prompt = n.prompt AND u."index" = n.a AND u.text = x.text
JOIN samples v ON v.run = n.run AND v.prompt = n.prompt AND v."index" = n.b AND v.text = y.text
WHERE o.run = $old AND NOT o.identical GROUP BY ALL"""


def compare(view: View, parameters: Parameters) -> Page:
    """Two runs on the comparisons that both have: outcomes before and after."""
    old, new = view.run(one(parameters, "old")), view.run(one(parameters, "new"))
    at = {"old": old["run"], "new": new["run"]}
    rows = view.reader.rows(_CROSSED, at)
    table = {was: dict.fromkeys(OUTCOMES, 0) for was in OUTCOMES}
    for row in rows:
        table[row["old"]][row["new"]] = row["n"]
    total = sum(row["n"] for row in rows)
    flips = table["a"]["b"] + table["b"]["a"]
    data = {
        "old": old["named"],
        "new": new["named"],
        "table": table,
        "comparisons": total,
        "flips": flips,
        "flip_rate": asdict(wilson(flips, total)),
        "runs": [row["named"] for row in view.runs()],
    }
    command = view.command("diff", old["named"], new["named"])
    return Page(
        "compare.jinja", f"{old['named']} and {new['named']}", data, command, as_sql(_CROSSED, at)
    )


# --- preferences ---

_COLUMNS = (
    "p.preference, p.prompt, p.a, p.b, p.outcome, p.p_chosen, p.p_a, p.spread, p.n_scored, p.n_readings, "
    "p.identical, p.escalation"
)
# The rows are found by their numbers, and only then are texts read: a quarter of the time.
_TEXTS = """
SELECT prompt, "index", substr(text, 1, 400) AS text FROM samples WHERE rowid IN (
  SELECT rowid FROM samples WHERE run = $run AND prompt IN (SELECT unnest($prompts)))"""
_QUESTIONS = """
SELECT prompt, substr(text, 1, 400) AS text, tags FROM prompts WHERE rowid IN (
  SELECT rowid FROM prompts WHERE prompt IN (SELECT unnest($prompts)))"""


def filtered(view: View, parameters: Parameters) -> tuple[Filters, Row, Query]:
    """The filters in an address, the run that they are of, and their SQL."""
    filters = read_filters(parameters)
    about = view.run(filters.run)
    against = view.run(filters.against)["run"] if filters.against else None
    return filters, about, build(filters, about["run"], against)


def ordered(filters: Filters, query: Query, start: int, n: int) -> str:
    """The SQL of `n` rows of the grid from `start` on."""
    order = SORTS[filters.sort].replace("abs(length)", f"abs({LENGTH})")
    by = f"ORDER BY {order + ', ' if order else ''}p.rowid"
    return (
        f"SELECT {_COLUMNS} FROM preferences p WHERE p.rowid IN (SELECT p.rowid {query.source()} {by} "
        f"LIMIT {n} OFFSET {start})"
    )


def rows_of(view: View, filters: Filters, query: Query, start: int, n: int) -> list[Row]:
    """`n` rows of the grid from `start` on, in their order, without texts."""
    order = SORTS[filters.sort].replace("abs(length)", f"abs({LENGTH})")
    by = f"ORDER BY {order + ', ' if order else ''}p.rowid"
    found = view.reader.rows(
        f"SELECT p.rowid AS place {query.source()} {by} LIMIT {n} OFFSET {start}", query.values
    )
    places = [row["place"] for row in found]
    known = {
        row.pop("place"): row
        for row in view.reader.rows(
            f"SELECT p.rowid AS place, {_COLUMNS} FROM preferences p WHERE p.rowid IN (SELECT unnest($places))",
            {"places": places},
        )
    }
    return [known[place] for place in places]


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


def preferences(view: View, parameters: Parameters) -> Page:
    """The grid: filters, histograms, and a page of rows."""
    filters, about, query = filtered(view, parameters)
    start = _start(parameters)
    with view.reader.together():
        left, narrow = narrowed(view, filters, about)
        found = build(left, about["run"])
        found.conditions += narrow
        rows = rows_of(view, left, found, start, view.rows + 1)
        whole = _whole(view, filters, left, narrow, about, found)
    rows = with_texts(view, about["run"], rows)
    data: dict[str, Any] = {
        "run": about["named"],
        "filters": filters,
        "start": start,
        "rows": rows[: view.rows],
        "more": len(rows) > view.rows and start + view.rows < MOST_SHOWN,
        "of": view.rows,
    }
    if view.bundle:
        _add_verdicts(view, about["run"], data["rows"])
    data |= whole
    sql = as_sql(ordered(filters, query, start, view.rows), query.values)
    shown = {
        **data,
        "filters": {k: v for k, v in asdict(filters).items() if v not in (None, "", ())},
    }
    return Page("preferences.jinja", "Preferences", data, view.command("sql", sql), sql, json=shown)


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


def _start(parameters: Parameters) -> int:
    text = one(parameters, "start")
    return min(int(text), MOST_SHOWN) if text.isdecimal() and len(text) < 9 else 0


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

    choices = view.reader.cached(f"choices {about['run']}", lambda: _choices(view, about["run"]))
    whole: dict[str, Any] = view.reader.cached(name, make)
    return {**whole, "choices": choices}


def histograms(view: View, filters: Filters, narrow: list[str], about: Row) -> list[dict[str, Any]]:
    """How p_chosen, spread and the difference in length are distributed. Each under all filters but
    its own, so that its own can be changed.
    """
    found = []
    size = view.reader.cached(
        f"size {about['run']}",
        lambda: view.reader.value(
            "SELECT count(*) FROM preferences WHERE run = $run", {"run": about["run"]}
        ),
    )
    share = max(1, -(-size // LENGTHS_OF))
    ends = {
        "p": (0.5, 1.0, "p.p_chosen"),
        "spread": (0.0, 0.5, "p.spread"),
        "length": (None, None, LENGTH),
    }
    titles = {
        "p": "p_chosen",
        "spread": "spread of the readings",
        "length": "preferred answer longer by, characters",
    }
    for name, (low, high, column) in ends.items():
        query = build(
            replace(filters.without(f"{name}_min", f"{name}_max"), sort="stored"), about["run"]
        )
        query.conditions += narrow
        if name == "length":
            query.lengths = True
            if share > 1:
                query.add(f"hash(p.prompt) % {share} = 0")
            low, high = -400.0, 400.0
        counts = _counts(view, query, column, float(low or 0.0), float(high or 0.0))
        title = titles[name]
        if name == "length" and share > 1:
            title += f" (1 of {share} prompts)"
        chosen = (getattr(filters, f"{name}_min"), getattr(filters, f"{name}_max"))
        found.append(
            {
                "name": name,
                "title": title,
                "low": low,
                "high": high,
                "counts": counts,
                "chosen": chosen,
            }
        )
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
