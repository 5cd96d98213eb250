"""The pages about judges: how far they agree, whether their probabilities come true, where they
err, and what was trained on their labels.

The figures are those of `prefab agreement --json`, asked in a process of its own and kept until the
store changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

from prefab.factory.charts import Chart, Point, Series
from prefab.factory.stats import clustered_share_of_sums, wilson
from prefab.pipelines.store.evaluations import (
    checkpoint_samples,
    latest_policies,
    latest_probes,
    side_by_side,
    win_rates,
)
from prefab.pipelines.store.selection import IN_SAMPLE
from prefab.pipelines.view.jobs import Job
from prefab.pipelines.view.pages import Page, Parameters, View, as_sql, one
from prefab.pipelines.view.reader import Row

PANEL = "mean probability"
Figures = dict[str, Any]


def working(view: View, title: str, job: Job | None, retry: str) -> Page:
    """The page that stands in for one whose figures are being computed, or could not be."""
    data = {
        "running": job is None or job.running,
        "seconds": round(job.seconds) if job else 0,
        "message": job.error if job else "other figures are being computed",
        "retry": retry,
    }
    return Page("working.jinja", title, data, status=202 if data["running"] else 200, live=True)


def agreement(view: View, parameters: Parameters) -> Page:
    """Judge by judge and principle by principle, reliability, position bias, what divides them."""
    run = view.run(one(parameters, "run"))
    job = view.figures(run["run"])
    found: Figures | None = job.result if job else None
    if found is None:
        return working(view, "Agreement", job, "agreement")
    names = [row["judge"] for row in found["judges"]]
    data = {
        "run": run["named"],
        "found": found,
        "names": names,
        "cells": {
            tuple(pair["judges"]): pair for pair in (found["between"] or {"pairs": []})["pairs"]
        },
        "apart": principles_apart(view, run["run"]),
        "of_groups": of_groups(view, run["run"]),
        "reliability": reliability(found, run["named"]),
        "position": position(found["judges"]),
    }
    command = view.command("agreement", "--run", run["named"])
    sql = as_sql("SELECT * FROM readings WHERE run = $run", {"run": run["run"]})
    shown = {**found, "principles_apart": data["apart"]}
    return Page("agreement.jinja", "Agreement", data, command, sql, json=shown)


# Two principles on one comparison, where both decide: whether they prefer the same answer.
_APART = f"""
WITH read AS (
  SELECT prompt, a, b, principle, sign(avg(p_a) - 0.5) AS side FROM verdicts
  WHERE run = $run AND p_a IS NOT NULL AND principle <> '' AND {IN_SAMPLE}
  GROUP BY ALL
  HAVING abs(avg(p_a) - 0.5) > 0.02),
each_group AS (
  SELECT x.principle AS one, y.principle AS other, coalesce(nullif(q."group", ''), x.prompt) AS "group",
    count(*) AS n, count(*) FILTER (x.side = y.side) AS hits
  FROM read x JOIN read y ON x.prompt = y.prompt AND x.a = y.a AND x.b = y.b AND x.principle < y.principle
  LEFT JOIN prompts q ON q.prompt = x.prompt
  GROUP BY ALL)
SELECT one, other, sum(n) AS n, sum(hits) AS hits, count(*) AS groups, sum(hits * hits) AS hits_hits,
  sum(hits * n) AS hits_n, sum(n * n) AS n_n
FROM each_group GROUP BY ALL ORDER BY one, other"""
MOST_PRINCIPLES = 24
MOST_READ = 50_000  # preferences; of a run with more, a share of the groups of prompts is read


def of_groups(view: View, run: int) -> int:
    """One of how many groups of prompts of a run is read for the figures of its principles."""
    return max(1, view.size(run) // MOST_READ)


def principles_apart(view: View, run: int) -> list[Row]:
    """How often each two principles prefer the same answer, with intervals over prompts' groups."""
    rows: list[Row] = view.reader.cached(
        f"apart {run}",
        lambda: view.reader.rows(_APART, {"run": run, "of_groups": of_groups(view, run)}),
    )
    found = []
    for row in rows[: MOST_PRINCIPLES**2]:
        sums = [float(row[k]) for k in ("n", "hits", "groups", "hits_hits", "hits_n", "n_n")]
        share = asdict(clustered_share_of_sums(*sums))
        found.append({"one": row["one"], "other": row["other"], "n": int(row["n"]), "share": share})
    return found


def reliability(found: Figures, run: str) -> dict[str, Any] | None:
    """The reliability diagram: of people's labels or the known truth where there is one, else of
    what the run's own calibration was learned from.
    """
    if found["calibration"]:
        rows = {row["what"]: row["reliability"] for row in found["calibration"]}
        name = PANEL if PANEL in rows else next(iter(rows))
        series = {name: [(b["mean_p"], b["mean_y"], b["n"]) for b in rows[name]]}
        bounds = [(b["low"], b["high"]) for b in rows[name]]
        truth = found["gold"]
    elif found["learned"] and found["learned"]["calibration"]["after"]:
        learned = found["learned"]["calibration"]
        series = {
            "p_chosen": learned["after"]["reliability"],
            "share of the vote": learned["before"]["reliability"],
        }
        truth, bounds = found["learned"]["source"], []
    else:
        return None
    links = {}
    drawn = []
    for name, bins in series.items():
        ends = [0.5, *((x[0] + y[0]) / 2 for x, y in pairwise(bins)), 1.0]
        points = []
        for i, (p, y, n) in enumerate(bins):
            low, high = bounds[i] if bounds else _wilson(y, n)
            label = f"{n:,} comparisons with a mean of {p:.3f}"
            points.append(Point(p, y, low, high, label))
            links[label] = "preferences?" + urlencode(
                {"run": run, "p_min": f"{ends[i]:.4g}", "p_max": f"{ends[i + 1]:.4g}"}
            )
        drawn.append(Series(name, points))
    chart = Chart(
        "Does p_chosen come true?",
        "probability of the preferred answer",
        "share that is right",
        drawn,
    )
    return {"chart": chart, "links": links, "truth": truth}


def _wilson(share: float, n: int) -> tuple[float | None, float | None]:
    found = wilson(share * n, n)
    return found.low, found.high


Interval = tuple[str, float, float | None, float | None]


def position(rows: Sequence[Mapping[str, Any]]) -> list[Interval]:
    """How often each judge picks the first slot, where its two orders decide: name, share and the
    ends of its interval.
    """
    return [
        (row["judge"], e["value"], e["low"], e["high"])
        for row in rows
        if (e := row["first_slot_share"])["value"] is not None
    ]


# Each judge's reading beside what most people say under the same principle.
_CONFUSED = """
WITH said AS (
  SELECT s.prompt, least(s."index", t."index") AS a, greatest(s."index", t."index") AS b,
    coalesce(h.value->>'$.principle', '') AS principle,
    sum(CASE h.winner WHEN 'a' THEN 1 WHEN 'b' THEN -1 ELSE 0 END
      * CASE WHEN s."index" < t."index" THEN 1 ELSE -1 END) AS vote
  FROM human_labels h
  JOIN samples s ON s.run = $run AND s.prompt = h.prompt AND s.sample = h.value->>'$.a'
  JOIN samples t ON t.run = $run AND t.prompt = h.prompt AND t.sample = h.value->>'$.b'
  WHERE h.winner IN ('a', 'b', 'tie')
    AND h.label NOT IN (SELECT value->>'$.undo' FROM human_labels WHERE value->>'$.undo' IS NOT NULL)
  GROUP BY ALL)
SELECT r.judge, CASE WHEN vote > 0 THEN 'a' WHEN vote < 0 THEN 'b' ELSE 'tie' END AS people,
  CASE WHEN r.p_a IS NULL THEN 'unscored' WHEN r.p_a > 0.52 THEN 'a' WHEN r.p_a < 0.48 THEN 'b' ELSE 'tie' END AS judged,
  count(*) AS n
FROM said JOIN readings r ON r.run = $run AND r.prompt = said.prompt AND r.a = said.a AND r.b = said.b
  AND r.principle = said.principle AND r.repeat = 0
GROUP BY ALL"""


def judges(view: View, parameters: Parameters) -> Page:
    """Each judge: what it could read, its stability, its pull to a slot, its confusion with people,
    and who errs together.
    """
    run = view.run(one(parameters, "run"))
    job = view.figures(run["run"])
    found: Figures | None = job.result if job else None
    if found is None:
        return working(view, "Judges", job, "judges")
    confused: dict[str, dict[str, dict[str, int]]] = {}
    rows = view.reader.rows(_CONFUSED, {"run": run["run"]})
    for row in rows:
        confused.setdefault(row["judge"], {}).setdefault(row["people"], {})[row["judged"]] = row[
            "n"
        ]
    names = [row["judge"] for row in found["judges"]]
    benchmarks = evaluations(view, "judge on ")
    probes = latest_probes(evaluations(view, "audit judge"))
    data = {
        "run": run["named"],
        "found": found,
        "names": names,
        "confused": confused,
        "together": {
            tuple(pair["judges"]): pair for pair in (found["between"] or {"pairs": []})["pairs"]
        },
        "position": position(found["judges"]),
        "benchmarks": benchmarks,
        "probes": probes,
        "probe_names": list(dict.fromkeys(k for v in probes.values() for k in v["metrics"])),
    }
    shown = {
        "judges": found["judges"],
        "between": found["between"],
        "confusion": confused,
        "benchmarks": benchmarks,
        "probes": probes,
    }
    command = view.command("agreement", "--run", run["named"])
    return Page(
        "judges.jinja", "Judges", data, command, as_sql(_CONFUSED, {"run": run["run"]}), json=shown
    )


# --- training ---

_EVALS = "SELECT name, value, evaluated_at FROM evals WHERE starts_with(name, $prefix) ORDER BY evaluated_at"


def evaluations(view: View, prefix: str = "") -> list[dict[str, Any]]:
    """The recorded evaluations whose names begin so, oldest first."""
    rows = view.reader.rows(_EVALS, {"prefix": prefix})
    return [{**json.loads(row["value"]), "at": row["evaluated_at"]} for row in rows]


def training(view: View, parameters: Parameters) -> Page:
    """Curves of each training, and the trained policies side by side."""
    found = evaluations(view)
    online: dict[str, list[dict[str, Any]]] = {}
    offline, policies = [], []
    for value in found:
        name, subject = str(value.get("name", "")), str(value.get("subject", ""))
        if name in ("ppo", "grpo", "rloo", "reinforce") or (
            "@" in subject and "step" in value.get("metrics", {})
        ):
            words = dict.fromkeys((name, subject.rpartition("@")[0]))  # often the same
            online.setdefault(" ".join(words), []).append(value["metrics"])
        elif name.startswith("train "):
            offline.append(value)
        elif name == "eval policy":
            policies.append(value)
    latest = latest_policies(policies)
    data = {
        "online": [
            {"name": name, **curves(rows), "samples": checkpoint_samples(rows)}
            for name, rows in online.items()
        ],
        "offline": [{**value, "curve": loss(value)} for value in offline],
        "policies": list(latest.values()),
        "columns": columns(latest.values()),
        "win_rates": win_rates(latest),
        "side_by_side": side_by_side(latest),
    }
    shown = {"online": online, "offline": offline, "policies": data["policies"]}
    shown["side_by_side"] = data["side_by_side"]
    sql = as_sql(_EVALS, {"prefix": ""})
    return Page("training.jinja", "Training", data, view.command("sql", sql), sql, json=shown)


def _value(x: Any) -> Point | None:
    """A metric as a point without its x: a number, or one with bounds."""
    if isinstance(x, Mapping):
        value = x.get("value")
        return None if value is None else Point(0.0, value, x.get("low"), x.get("high"))
    return Point(0.0, float(x)) if isinstance(x, int | float) and not isinstance(x, bool) else None


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str, name: str) -> Series | None:
    points = []
    for row in rows:
        at, value = _value(row.get(x)), _value(row.get(y))
        if at and value:
            points.append(
                Point(at.y, value.y, value.low, value.high, f"step {row.get('step', '')}")
            )
    return Series(name, points) if points else None


# Title, the metric on the x axis and its words, those of the y axis, and metrics with their names.
_CURVES = (
    (
        "Reward model's score and ground truth",
        ("eval/kl", "KL from the reference, nats an answer"),
        "mean over the same prompts",
        (("eval/proxy", "reward model (proxy)"), ("eval/gold", "ground truth")),
    ),
    (
        "KL from the reference",
        ("step", "step"),
        "nats an answer",
        (("kl", "in training"), ("eval/kl", "held out")),
    ),
    ("Reward", ("step", "step"), "mean of a step's answers", (("reward", "reward"),)),
    ("Length of the answers", ("step", "step"), "tokens", (("length", "tokens"),)),
    ("Entropy", ("step", "step"), "nats a token", (("entropy", "entropy"),)),
)


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The charts of one run of reinforcement learning, and its alarm."""
    ordered = sorted(rows, key=lambda row: row.get("step", 0))
    charts = []
    for title, (x, x_words), y_words, metrics in _CURVES:
        series = [s for key, name in metrics if (s := _series(ordered, x, key, name))]
        if any(len(s.points) > 1 for s in series):
            charts.append(Chart(title, x_words, y_words, series))
    alarms = [str(row["alarm"]) for row in ordered if row.get("alarm")]
    stopped = [str(row["stopped"]) for row in ordered if row.get("stopped")]
    return {
        "charts": charts,
        "steps": len(ordered),
        "last": dict(ordered[-1]),
        "notes": [*alarms[-1:], *stopped[-1:]],
    }


def loss(value: Mapping[str, Any]) -> Chart | None:
    """The validation loss of a training by step."""
    points = [
        Point(h["step"], h["eval_loss"], label=f"step {h['step']}")
        for h in value.get("history", ())
    ]
    series = [Series("validation loss", points)]
    return Chart("Validation loss", "step", "loss", series) if len(points) > 1 else None


def columns(policies: Any) -> list[str]:
    """The figures that the evaluations of policies have, without those against the baseline."""
    names: dict[str, None] = {}
    for value in policies:
        names |= dict.fromkeys(k for k in value["metrics"] if not k.startswith("against "))
    return list(names)
