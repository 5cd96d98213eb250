"""What all pages share, and the pages about runs. Each page is a function of the view and the
parameters of its address; what it gives is also the page's JSON.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.stats import clustered_share_of_sums
from prefab.pipelines.view.filters import OUTCOMES
from prefab.pipelines.view.index import Indexes, PageIndex
from prefab.pipelines.view.jobs import Job, Jobs
from prefab.pipelines.view.reader import Row, StoreReader

ROWS = 50  # of the grid, at a time
SAMPLE = 5000  # prompts of a run with more; a share of their comparisons is known to about 1%
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
    indexes: Indexes = field(init=False)

    def __post_init__(self) -> None:
        self.indexes = Indexes(self.reader.folder)
        self.jobs.folder = self.indexes.out / "figures"

    def size(self, run: int) -> int:
        """How many preferences a run has."""
        sql = "SELECT count(*) FROM preferences WHERE run = $run"
        n: int = self.reader.cached(f"size {run}", lambda: self.reader.value(sql, {"run": run}))
        return n

    def index(self, run: int, beside: int | None = None) -> PageIndex | None:
        """The index of a run's preferences; None while there is none, or where none is needed: for
        the run and for another one that it is compared with.
        """
        sizes = [self.size(one_run) for one_run in (run, beside) if one_run is not None]
        found = self.indexes.get(run, max(sizes))
        if found and found.state == list(self.reader.state()) and not self.pace()["calls_per_s"]:
            self.figures(run)
            self.comparisons(run)
        return found

    def is_large(self, run: int) -> bool:
        """Whether a run is read by an index, and its figures are those of a sample."""
        return self.size(run) >= self.indexes.smallest

    def figures(self, run: int) -> Job | None:
        """The command that measures what `prefab agreement` does of a run; None where too many
        commands run.
        """
        words = ["agreement", "--store", str(self.folder), "--run", self.named(run)]
        words += ["--json", "--resamples", "0", "--examples", "3", "--sample", str(SAMPLE)]
        name = f"agreement {run} {self.reader.state()}"
        return self.jobs.get(name, words, wait=self.bundle, keep=self.is_large(run))

    def comparisons(self, run: int, first: str = "unsure", principle: str = "") -> Job | None:
        """The program that reads what people may label of a large run; None where too many run."""
        words = ["-m", "prefab.pipelines.view.label_tasks", str(self.folder), self.named(run)]
        name = f"label {run} {first} {principle} {self.reader.state()}"
        return self.jobs.get(name, [*words, first, principle], keep=True)

    def named(self, run: int) -> str:
        """NAME@VERSION of a run."""
        return str(next(row["named"] for row in self.runs() if row["run"] == run))

    def pace(self) -> dict[str, Any]:
        """How many answers a second came in over the last minute; None when none did lately."""
        now = time.time()
        with self.reader.ledger() as con:
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
        return {
            "calls_per_s": (last[0] - first[0]) / max(1.0, last[1] - first[1]),
            "last_call_at": last[1],
            "calls": last[0],
        }

    def end(self) -> None:
        """Stop what runs in the background, and close the store."""
        self.indexes.end()
        self.jobs.end()
        self.reader.end()

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
    pace = view.pace()
    data = {"runs": shown, **pace}
    live = pace["calls_per_s"] is not None
    if known and not live:
        view.index(view.run()["run"])  # begun here, it may be there when the preferences are opened
    return Page("runs.jinja", "Runs", data, view.command("store", "info"), _SUMMARY, live)


_FAULTS = """
WITH each_group AS (
  SELECT principle, coalesce(nullif("group", ''), prompt) AS "group", count(*) AS n,
    count(*) FILTER (fault) AS hits, count(*) FILTER (fault IS NULL) AS unread
  FROM critiques JOIN prompts USING (prompt) WHERE run = $run GROUP BY ALL)
SELECT principle, sum(n)::BIGINT AS critiques, sum(hits)::BIGINT AS faults, sum(unread)::BIGINT AS unread,
  count(*) AS groups, sum(hits * hits)::BIGINT AS hits_hits, sum(hits * n)::BIGINT AS hits_n,
  sum(n * n)::BIGINT AS n_n
FROM each_group GROUP BY ALL ORDER BY faults DESC, principle"""
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
  UNION SELECT call, 'step' FROM steps WHERE run = $run
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
        sums = [float(row.pop(name)) for name in ("groups", "hits_hits", "hits_n", "n_n")]
        row["share"] = asdict(clustered_share_of_sums(row["critiques"], row["faults"], *sums))
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
        view.pace()["calls_per_s"] is not None,
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
# The same as sums over groups of prompts, for the interval of the share that flips.
_FLIPPED = f"""
WITH each_group AS (
  SELECT coalesce(nullif("group", ''), prompt) AS "group", sum(n) AS n,
    sum(n) FILTER (old IN ('a', 'b') AND new IN ('a', 'b') AND old <> new) AS hits
  FROM ({_CROSSED.replace("SELECT", "SELECT o.prompt,", 1)}) JOIN prompts USING (prompt) GROUP BY ALL)
SELECT sum(n) AS n, sum(coalesce(hits, 0)) AS hits, count(*) AS groups, sum(coalesce(hits, 0) ** 2) AS hits_hits,
  sum(coalesce(hits, 0) * n) AS hits_n, sum(n ** 2) AS n_n
FROM each_group"""


def _crossed(view: View, old: int, new: int) -> tuple[dict[str, dict[str, int]], Row]:
    """How many comparisons that both runs have went from one outcome to another, and sums over
    groups of prompts of those that flip.
    """
    before, after = (view.index(run, beside) for run, beside in ((old, new), (new, old)))
    if before and after:
        return before.crossed(after)
    at = {"old": old, "new": new}
    table = {was: dict.fromkeys(OUTCOMES, 0) for was in OUTCOMES}
    for row in view.reader.rows(_CROSSED, at):
        table[row["old"]][row["new"]] = row["n"]
    return table, view.reader.rows(_FLIPPED, at)[0]


def compare(view: View, parameters: Parameters) -> Page:
    """Two runs on the comparisons that both have: outcomes before and after."""
    old, new = view.run(one(parameters, "old")), view.run(one(parameters, "new"))
    at = {"old": old["run"], "new": new["run"]}
    table, flipped = _crossed(view, old["run"], new["run"])
    total = sum(n for row in table.values() for n in row.values())
    flips = table["a"]["b"] + table["b"]["a"]
    data = {
        "old": old["named"],
        "new": new["named"],
        "table": table,
        "comparisons": total,
        "flips": flips,
        "flip_rate": asdict(clustered_share_of_sums(*(float(x or 0) for x in flipped.values()))),
        "runs": [row["named"] for row in view.runs()],
    }
    command = view.command("diff", old["named"], new["named"])
    return Page(
        "compare.jinja", f"{old['named']} and {new['named']}", data, command, as_sql(_CROSSED, at)
    )
