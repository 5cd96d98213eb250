"""A run as one page: how far to trust it, what was asked by which constitution, charts, and the
most telling examples.

The page needs no other file, and opens without a network. It is made of the store alone: nothing
is asked. `prefab export` puts it beside the data; `prefab report` adds the judges' agreement and
what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prefab.factory import svg
from prefab.factory.charts import Chart, Point, Series
from prefab.factory.numbers import cell, percent
from prefab.factory.pages import write_page
from prefab.factory.stats import Estimate, clustered_share, undefined
from prefab.pipelines.store.calibrations import NOT_LEARNED, Learned, calibration_of

if TYPE_CHECKING:
    from prefab.pipelines.store.selection import Selection

LONGEST = 1_500  # characters of a text that are shown
WITHOUT_MODEL = ("human", "verifier", "reward_model")  # kinds that no chat model answers for
MOST_VERDICTS = 400_000  # that shares are measured on; more are sampled by prompt
BINS = 20  # of a histogram
# The examples: what each is for, and which preferences it takes first.
_PICKS = (
    ("Nearly even: the judges are least sure", "outcome IN ('a', 'b')", "p_chosen"),
    (
        "Divided: principles or judges contradict each other most",
        "spread IS NOT NULL",
        "spread DESC",
    ),
    ("Clear: the judges are most sure", "outcome IN ('a', 'b')", "p_chosen DESC"),
)
# Ids are sorted, not texts: a sort holds all that it sorts in memory.
_EXAMPLE = """
WITH chosen AS (SELECT * FROM preferences WHERE run = $run AND NOT identical AND {where}
  ORDER BY {order}, preference LIMIT {n})
SELECT p.preference, p.prompt, p.a, p.b, p.outcome, p.p_a, p.p_chosen, p.spread, q.messages,
  x.text AS answer_a, y.text AS answer_b
FROM chosen p JOIN prompts q USING (prompt)
JOIN samples x ON x.run = p.run AND x.prompt = p.prompt AND x."index" = p.a
JOIN samples y ON y.run = p.run AND y.prompt = p.prompt AND y."index" = p.b
ORDER BY p.{order}, p.preference"""


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page that its caller brings: a heading, sentences, tables and charts."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = ()
    charts: Sequence[Markup] = ()


@dataclass(slots=True)
class RunPage:
    """What the page of a run shows.

    Attributes:
        name: NAME@VERSION.
        headline: How far to trust the labels, in one sentence.
        trust: What that rests on, in sentences.
        constitution: Title, licence and principles.
        counts: Names and numbers.
        models: The models that the configuration names.
        histogram: Decided preferences by `p_chosen`, in `BINS` steps from 0 to 1.
        charts: Drawn charts.
        examples: Preferences in full, by what they are examples of.
    """

    name: str
    headline: str
    trust: list[str]
    constitution: dict[str, Any]
    counts: list[tuple[str, Any]]
    models: list[str]
    histogram: list[int]
    charts: list[Markup]
    examples: list[tuple[str, list[dict[str, Any]]]]
    notes: list[str] = field(default_factory=list)
    sections: list[PageSection] = field(default_factory=list)


def run_page(folder: Path, run: dict[str, Any], examples: int = 4) -> RunPage:
    """Collect what the page of a run shows.

    Args:
        folder: The store.
        run: The run's row of the table `runs`.
        examples: How many examples of each kind are shown.
    """
    from prefab.pipelines.store.selection import Selection

    selection = Selection(folder, run)
    learned = calibration_of(folder, run["run"])
    right, source, what = accuracy(selection)
    same = _same_in_both_orders(selection)
    shown, notes = _examples(selection, examples)
    headline = _headline(right, source, what)
    trust = _trust(same, learned, selection)
    return RunPage(
        name=selection.name,
        headline=headline,
        trust=trust,
        constitution=_constitution(selection),
        counts=_counts(selection),
        models=model_names(selection.config),
        histogram=(counts := histogram_of(selection)),
        charts=_charts(selection, learned, counts),
        examples=shown,
        notes=notes,
    )


_DECIDED = {
    "preferences": """
SELECT prompt, a, b, '' AS principle, outcome AS winner, coalesce(nullif("group", ''), prompt) AS "group"
FROM preferences JOIN prompts USING (prompt)
WHERE run = $run AND outcome IN ('a', 'b') ORDER BY preference LIMIT 20000""",
    "verdicts under a principle": """
SELECT prompt, a, b, principle, CASE WHEN p_a > 0.5 THEN 'a' ELSE 'b' END AS winner,
  coalesce(nullif("group", ''), prompt) AS "group"
FROM readings JOIN prompts USING (prompt) WHERE run = $run AND p_a IS NOT NULL AND p_a <> 0.5 AND principle <> ''
  AND prompt IN (SELECT prompt FROM human_labels) ORDER BY ALL LIMIT 20000""",
}


def accuracy(selection: Selection) -> tuple[Estimate, str, str]:
    """The share of decided preferences that name the better answer, where people or the embedded
    world's oracle know it; where people labelled under principles alone, the same of the verdicts.

    Returns:
        The share, whose word that is (empty: nobody's), and what was counted.
    """
    import numpy as np

    from prefab.pipelines.store.ground_truth import find_gold

    for what, sql in _DECIDED.items():
        rows = selection.query(sql)
        gold, source = find_gold(selection, rows)
        known = np.isin(gold, (0.0, 1.0))
        if known.any():
            hits = (rows["winner"].to_numpy() == "a") == (gold == 1.0)
            return clustered_share(hits[known], rows["group"].to_numpy()[known]), source, what
    return undefined("no better answer is known"), "", ""


def _sampled(selection: Selection) -> str:
    """A condition that keeps about `MOST_VERDICTS` of a run's verdicts: those of some prompts."""
    n = selection.query("SELECT count(*) FROM verdicts WHERE run = $run").item()
    return f"hash(prompt) % {max(1, n // MOST_VERDICTS)} = 0"


def _same_in_both_orders(selection: Selection) -> Estimate:
    rows = selection.query(
        'SELECT coalesce(nullif("group", \'\'), prompt) AS "group", winner_ab = winner_ba AS same '
        "FROM readings JOIN prompts USING (prompt) WHERE run = $run "
        f"AND winner_ab IS NOT NULL AND winner_ba IS NOT NULL AND {_sampled(selection)}"
    )
    return clustered_share(rows["same"].to_numpy(), rows["group"].to_numpy())


def _headline(right: Estimate, source: str, what: str) -> str:
    """How far to trust the labels, in one sentence."""
    if right.value is None:
        return (
            "Nobody has checked these labels: no comparison has a label of a person, so they are "
            "the judges' word alone."
        )
    return (
        f"{percent(right)} of the {what} name the better answer, of {right.n_items:,} that are "
        f"known from {source}."
    )


def _trust(same: Estimate, learned: Learned | None, selection: Selection) -> list[str]:
    """The sentences below the headline."""
    trust = [
        f"The judges name the same winner in both orders in {percent(same)} of {same.n_items:,} "
        "readings."
        if same.value is not None
        else "No comparison was asked in both orders, so a preference for the first answer is not seen.",
        (learned.sentence() if learned else NOT_LEARNED).replace("`", ""),
    ]
    n, unscored = selection.query(
        "SELECT count(*), count(*) FILTER (WHERE p_a IS NULL) FROM verdicts WHERE run = $run"
    ).row(0)
    if unscored:
        trust.append(f"{unscored:,} of {n:,} verdicts could not be read; they count for nothing.")
    trust += judges_of_own_answers(selection.config)
    if (selection.config.get("prompts") or {}).get("source") == "microworld":
        trust.append("The data are of a small artificial world, and say nothing of real models.")
    return trust


def judges_of_own_answers(config: dict[str, Any], name: str = "") -> list[str]:
    """A sentence where a judge (of this name, if one is given) is the model that wrote the answers;
    nothing where none is.

    Source: Panickssery et al. 2024, LLM Evaluators Recognize and Favor Their Own Generations.
    """
    engines, policy = config.get("engines") or {}, (config.get("policy") or {}).get("engine")

    def model(engine: str | None) -> Any:
        of = engines.get(engine) or {}
        return of.get("model") or engine

    own = [
        judge["name"]
        for judge in (config.get("panel") or {}).get("judges") or []
        if judge.get("kind") not in WITHOUT_MODEL
        and name in ("", judge["name"])
        and model(judge.get("engine") or policy) == model(policy)
    ]
    if not own or policy is None:
        return []
    names = ", ".join(own)
    return [
        f"{'Judge' if len(own) == 1 else 'Judges'} {names}: the model that wrote the answers judges "
        "them itself, so a preference for its own answers is in the labels and is not measured. "
        "Name another engine for the judge to avoid it."
    ]


def _constitution(selection: Selection) -> dict[str, Any]:
    about = selection.query(
        "SELECT id, title, licence, source FROM constitutions WHERE constitution = $constitution"
    ).to_dicts()
    principles = selection.query(
        "SELECT p.principle, p.title, p.digest, p.compare, p.weight, count(v.verdict) AS verdicts "
        "FROM principles p LEFT JOIN verdicts v ON v.run = $run AND v.principle = p.principle "
        "WHERE p.constitution = $constitution AND p.enabled GROUP BY ALL ORDER BY min(p.position)"
    ).to_dicts()
    found = about[0] if about else {"id": "", "title": "none", "licence": "", "source": ""}
    version = (selection.run["constitution"] or "")[:12]
    return {**found, "version": version, "principles": principles}


def _counts(selection: Selection) -> list[tuple[str, Any]]:
    row = selection.query("SELECT * FROM summary WHERE run = $run").row(0, named=True)
    prompts = selection.query("SELECT count(DISTINCT prompt) FROM samples WHERE run = $run").item()
    names = ("drafts", "revisions", "critiques", "verdicts", "decided", "ties", "unscored")
    return [("prompts", prompts), *((name, row[name]) for name in names)]


def model_names(config: dict[str, Any]) -> list[str]:
    """The models that a run's configuration names."""
    engines = config.get("engines") or {}
    names = [engine.get("model") or name for name, engine in engines.items()]
    return list(dict.fromkeys(names))


def histogram_of(selection: Selection) -> list[int]:
    """How many decided preferences have a `p_chosen` in each of `BINS` steps from 0 to 1."""
    rows = selection.query(
        f"SELECT least(floor(p_chosen * {BINS}), {BINS - 1})::INTEGER AS bin, count(*) AS n "
        "FROM preferences WHERE run = $run AND outcome IN ('a', 'b') AND p_chosen IS NOT NULL "
        "GROUP BY ALL"
    )
    counts = [0] * BINS
    for at, n in rows.iter_rows():
        counts[at] = n
    return counts


def _charts(selection: Selection, learned: Learned | None, counts: list[int]) -> list[Markup]:
    made = []
    if any(counts):
        title = "p_chosen of the decided preferences (height: how many)"
        made.append(svg.histogram(title, "p_chosen", 0.0, 1.0, counts))
    if learned and learned.fitted and learned.calibration.before and learned.calibration.after:
        both = (
            ("share of the vote", learned.calibration.before),
            ("p_chosen, calibrated", learned.calibration.after),
        )
        series = [
            Series(
                name,
                [Point(p, y, label=f"{n} comparisons") for p, y, n in fit.reliability],
                joined=False,
            )
            for name, fit in both
        ]
        title = "Does p_chosen come true? On the line it does"
        chart = Chart(title, "probability, mean of a bin", "share that came true", series)
        made.append(svg.lines(chart, (0.5, 1.0), (0.0, 1.0), diagonal=True))
    made += _principle_chart(selection)
    return made


def _principle_chart(selection: Selection) -> list[Markup]:
    """How often each principle's readings decide, with intervals."""
    rows = selection.query(
        'SELECT principle, coalesce(nullif("group", \'\'), prompt) AS "group", '
        "abs(p_a - 0.5) > 0.25 AS decides FROM readings JOIN prompts USING (prompt) "
        f"WHERE run = $run AND p_a IS NOT NULL AND {_sampled(selection)}"
    )
    points: list[Point] = []
    for (name,), part in sorted(rows.group_by("principle"), key=lambda item: str(item[0][0])):
        e = clustered_share(part["decides"].to_numpy(), part["group"].to_numpy())
        if e.value is not None:
            points.append(Point(len(points) + 1.0, e.value, e.low, e.high, str(name)))
    if len(points) < 2:
        return []
    names = ", ".join(f"{int(p.x)} {p.label}" for p in points)
    title = "How often a principle decides clearly (P beyond .75), with 95% intervals"
    chart = Chart(
        title, "principle", "share of its readings", [Series(names, points, joined=False)]
    )
    return [svg.lines(chart, y_range=(0.0, None)), Markup("<p>{}</p>").format(names)]


def _examples(
    selection: Selection, each: int
) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[str]]:
    """The examples by kind, and a note that says how many preferences there are."""
    shown: set[str] = set()
    found = []
    for title, where, order in _PICKS:
        sql = _EXAMPLE.format(where=where, order=order, n=each + len(shown))
        rows = [r for r in selection.query(sql).to_dicts() if r["preference"] not in shown][:each]
        shown |= {row["preference"] for row in rows}
        if rows:
            found.append((title, [_example(selection, row) for row in rows]))
    total = selection.query("SELECT count(*) FROM preferences WHERE run = $run").item()
    note = f"{len(shown):,} of {total:,} comparisons are shown; `prefab view` shows them all."
    return found, [note] if total > len(shown) else []


def _example(selection: Selection, row: dict[str, Any]) -> dict[str, Any]:
    verdicts = selection.query(
        "SELECT judge, principle, p_ab, p_ba, p_a FROM readings WHERE run = $run AND prompt = $prompt "
        "AND a = $a AND b = $b ORDER BY abs(p_a - 0.5) DESC NULLS LAST, judge, principle LIMIT 5",
        {"prompt": row["prompt"], "a": row["a"], "b": row["b"]},
    )
    messages = json.loads(row["messages"])
    return {
        **row,
        "turns": [(role, cut(text)) for role, text, *_ in messages],
        "answer_a": cut(row["answer_a"]),
        "answer_b": cut(row["answer_b"]),
        "told": _outcome(row),
        "verdicts": [tuple(map(cell, verdict)) for verdict in verdicts.iter_rows()],
    }


def _outcome(row: dict[str, Any]) -> str:
    if row["outcome"] in ("a", "b"):
        return f"{row['outcome'].upper()} is better, with probability {cell(row['p_chosen'])}"
    return "A tie" if row["outcome"] == "tie" else "Unscored"


def cut(value: Any) -> str:
    """A text of at most `LONGEST` characters; what was left out is said."""
    text: str = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} [... {len(text) - LONGEST:,} more characters]"


_BODY = """
<h1>{{ page.name }}</h1>
<p class="headline">{{ page.headline }}</p>
{% for line in page.trust %}<p>{{ line }}</p>
{% endfor %}
<h2>What was asked</h2>
{{ plain_table(("", ""), counts) }}
<p>Models: {{ page.models | join(", ") or "none" }}. Recorded {{ when }}.</p>
<h3>Constitution: {{ page.constitution.title }}
{%- if page.constitution.version %}, version {{ page.constitution.version }}{% endif %}
{%- if page.constitution.licence %} ({{ page.constitution.licence }}){% endif %}</h3>
{% if principles %}
{{ plain_table(("principle", "title", "question to the judge", "weight", "verdicts"), principles, 3) }}
{% endif %}
{% if page.charts %}<h2>Charts</h2>
<div class="charts">{% for chart in page.charts %}{{ chart }}{% endfor %}</div>{% endif %}
{% for section in page.sections %}<h2>{{ section.title }}</h2>
{% for line in section.sentences %}<p>{{ line }}</p>
{% endfor %}{% for title, columns, rows in section.tables %}<h3>{{ title }}</h3>
{{ plain_table(columns, rows) }}{% endfor %}
<div class="charts">{% for chart in section.charts %}{{ chart }}{% endfor %}</div>
{% endfor %}
{% if page.examples %}<h2>Examples</h2>{% endif %}
{% for note in page.notes %}<p class="quiet">{{ note }}</p>{% endfor %}
{% for title, examples in page.examples %}<h3>{{ title }}</h3>
{% for e in examples %}<section class="example">
{% for role, text in e.turns %}<p class="text"><b>{{ role }}</b> {{ text }}</p>
{% endfor %}
<div class="pair">
{% for name, side, text in (("A", "a", e.answer_a), ("B", "b", e.answer_b)) %}
<div{% if e.outcome == side %} class="now"{% endif %}><b>{{ name }}</b>
{% if e.outcome == side %}✓ preferred{% endif %}<div class="text">{{ text }}</div></div>
{% endfor %}</div>
<p>{{ e.told }} <span class="quiet">(preference {{ e.preference[:12] }})</span></p>
{% if e.verdicts %}
{{ plain_table(("judge", "principle", "P(A), A first", "P(A), B first", "P(A)"), e.verdicts, 2) }}
{% endif %}
</section>
{% endfor %}{% endfor %}
"""


def write_run_page(file: Path, page: RunPage, started: float | None) -> None:
    """Write the page.

    Args:
        file: The HTML file.
        page: What it shows.
        started: When the run began, in seconds since 1970.

    Raises:
        ConfigError: The file cannot be written.
    """
    when = datetime.fromtimestamp(started or 0, UTC).strftime("%Y-%m-%d")
    principles = [
        (p["principle"], p["title"], p["compare"], f"{p['weight']:g}", cell(p["verdicts"]))
        for p in page.constitution["principles"]
    ]
    counts = [(name, cell(n)) for name, n in page.counts]
    shown = {"page": page, "when": when, "principles": principles, "counts": counts}
    write_page(file, page.name, _BODY, **shown)
