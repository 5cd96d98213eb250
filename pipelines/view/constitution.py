"""The page of a run's constitution: what each principle does, and an editor whose text is checked,
tried on comparisons of the run, and saved as a file.

Checking is `prefab check` and trying is `prefab diff`, each as a process of its own on a file in a
temporary folder. Nothing is written elsewhere: the browser saves the text.
"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.stats import clustered_share_of_sums
from prefab.pipelines.store.selection import IN_SAMPLE
from prefab.pipelines.view.analysis import of_groups
from prefab.pipelines.view.jobs import Job, written
from prefab.pipelines.view.pages import Page, Parameters, View, as_sql, one
from prefab.pipelines.view.preference import principles_of
from prefab.pipelines.view.reader import Row

LONGEST = 1_000_000  # characters of an edited constitution
SAMPLE = 32  # comparisons that an edit is tried on, unless another number is given
MOST_SAMPLED = 10_000
_FOLDER = tempfile.TemporaryDirectory(prefix="prefab-view-")

# By principle: comparisons, those that it decides, both orders that agree, and sums for intervals.
_EFFECT = f"""
WITH read AS (
  SELECT principle, prompt, a, b, judge, avg(p_a) AS p, count(*) = count(p_a) AS scored,
    count(DISTINCT "order") AS orders, count(DISTINCT winner) AS winners
  FROM verdicts WHERE run = $run AND repeat = 0
    AND {IN_SAMPLE}
  GROUP BY ALL),
each_group AS (
  SELECT principle, coalesce(nullif("group", ''), prompt) AS "group",
    count(DISTINCT (prompt, a, b)) AS comparisons,
    count(*) FILTER (scored) AS n, count(*) FILTER (scored AND abs(p - 0.5) > 0.02) AS decided,
    count(*) FILTER (scored AND orders = 2) AS two, count(*) FILTER (scored AND orders = 2 AND winners = 1) AS same,
    count(*) FILTER (NOT scored) AS unscored
  FROM read JOIN prompts USING (prompt) GROUP BY ALL)
SELECT principle, sum(comparisons) AS comparisons, sum(unscored) AS unscored,
  sum(n) AS n, sum(decided) AS decided, count(*) FILTER (n > 0) AS m, sum(decided * decided) AS dd,
  sum(decided * n) AS dn, sum(n * n) AS nn,
  sum(two) AS two, sum(same) AS same, count(*) FILTER (two > 0) AS m_two, sum(same * same) AS ss,
  sum(same * two) AS st, sum(two * two) AS tt
FROM each_group GROUP BY ALL"""


def constitution(view: View, parameters: Parameters) -> Page:
    """A run's principles with their effect, and its text to edit."""
    run = view.run(one(parameters, "run"))
    rows = view.reader.rows(
        "SELECT * FROM constitutions WHERE constitution = $name", {"name": run["constitution"]}
    )
    about = rows[0] if rows else {}
    effect = view.reader.cached(f"effect {run['run']}", lambda: _effect(view, run["run"]))
    principles = []
    for name, row in principles_of(view, run["constitution"]).items():
        shown = {k: row[k] for k in ("title", "compare", "weight", "enabled", "tags")}
        principles.append({"principle": name, **shown, **effect.get(name, _NONE)})
    at = {"run": run["run"], "of_groups": of_groups(view, run["run"])}
    data = {
        "run": run["named"],
        "of_groups": at["of_groups"],
        "about": {k: about.get(k) for k in ("id", "title", "licence", "selection")},
        "principles": principles,
        "source": about.get("source") or "",
        "sample": SAMPLE,
    }
    command = view.command("sql", "SELECT principle, title, compare FROM principles")
    return Page("constitution.jinja", "Constitution", data, command, as_sql(_EFFECT, at))


_NONE: dict[str, Any] = {"comparisons": 0, "unscored": 0, "decisive": None, "consistent": None}


def _effect(view: View, run: int) -> dict[str, dict[str, Any]]:
    """By principle: how often it was applied, decisive and consistent."""
    found = {}
    for row in view.reader.rows(_EFFECT, {"run": run, "of_groups": of_groups(view, run)}):
        decisive = clustered_share_of_sums(*_sums(row, "n", "decided", "m", "dd", "dn", "nn"))
        consistent = clustered_share_of_sums(*_sums(row, "two", "same", "m_two", "ss", "st", "tt"))
        found[row["principle"]] = {
            "comparisons": int(row["comparisons"]),
            "unscored": int(row["unscored"]),
            "decisive": asdict(decisive),
            "consistent": asdict(consistent),
        }
    return found


def _sums(row: Row, *names: str) -> tuple[float, float, float, float, float, float]:
    a, b, c, d, e, f = (float(row[name] or 0) for name in names)
    return a, b, c, d, e, f


def edited(view: View, fields: Parameters) -> Page:
    """What the editor asks: `check` its text, or `try` it on comparisons of the run."""
    text, run = one(fields, "text").replace("\r\n", "\n"), view.run(one(fields, "run"))
    if len(text) > LONGEST:
        raise ConfigError(f"a constitution has at most {LONGEST:,} characters")
    name = sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    file = written(Path(_FOLDER.name), text, f"edited-{name}.yaml")
    if one(fields, "do") == "try":
        return _tried(view, file, run, one(fields, "sample"))
    job = view.jobs.get(f"check {name}", ["check", str(file), "--json"])
    problems = [
        problem.replace(str(file), "line")
        for problem in (job.error.split("; ") if job and job.error else [])
    ]
    if job and isinstance(job.result, dict):
        problems = [str(p).replace(str(file), "line") for p in job.result.get("problems", [])]
    data = {"job": job, "running": job is None or job.running, "problems": problems}
    command = shlex.join(["prefab", "check", "CONSTITUTION.yaml"])
    return Page(
        "checked.jinja",
        "Check",
        data,
        command,
        status=202 if data["running"] else 200,
        json={"problems": problems, "running": data["running"]},
    )


def _tried(view: View, file: Path, run: Row, sample: str) -> Page:
    """The edit judged on comparisons of the run, beside the run's own constitution."""
    number = int(sample) if sample.isdecimal() and 0 < int(sample) <= MOST_SAMPLED else SAMPLE
    words = [
        "diff",
        str(file),
        "--store",
        str(view.folder),
        "--run",
        run["named"],
        "--sample",
        str(number),
        "--json",
    ]
    name = f"try {file.name} {run['named']} {number}"
    job = view.jobs.get(name, words)
    found = job.result if job and isinstance(job.result, dict) else None
    if job and not job.running and job.error:
        view.jobs.forget(name)  # a server that was not there may be there next time
    data = {
        "job": job,
        "running": job is None or job.running,
        "found": found,
        "sample": number,
        "run": run["named"],
        "seconds": round(job.seconds) if job else 0,
        "error": _plain(job, file),
    }
    command = view.command("diff", "CONSTITUTION.yaml", "--run", run["named"], "--sample", number)
    return Page(
        "tried.jinja",
        "Try",
        data,
        command,
        status=202 if data["running"] else 200,
        json={"running": data["running"], "found": found},
    )


def _plain(job: Job | None, file: Path) -> str:
    return job.error.replace(str(file), "line") if job and not job.running else ""


def download(fields: Parameters) -> tuple[str, str]:
    """The name and the text of the file that the browser saves."""
    text = one(fields, "text").replace("\r\n", "\n")
    name = "".join(c for c in one(fields, "name") if c.isalnum() or c in "-_") or "constitution"
    return f"{name[:60]}.yaml", text
