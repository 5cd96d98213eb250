"""`prefab report`: a run as one HTML file to read, print, attach or send."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefab.factory.console import say, warn
from prefab.factory.errors import ConfigError
from prefab.factory.extras import missing_package
from prefab.factory.numbers import Measured, cell
from prefab.pipelines.cli.options import Json, Store, existing_store, hint_command, print_json

if TYPE_CHECKING:
    from markupsafe import Markup

    from prefab.pipelines.store.run_page import PageSection, RunPage

app = typer.Typer()
FIGURES = ("gold", "broken", "proxy", "kl", "words")  # of policies, where they were measured


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="NAME or NAME@VERSION. Default: the latest run.")
    ] = "",
    store: Store = Path("store"),
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Default: RUN-report.html.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, max=100, help="Examples of each kind that are shown.")
    ] = 6,
    as_json: Json = False,
) -> None:
    """Write a run as one HTML file: how far to trust it, the constitution, charts, examples, and
    what was trained. It needs no other file and no network.
    """
    from prefab.factory.store.store import one_connection
    from prefab.pipelines.store.export.base import find_run
    from prefab.pipelines.store.run_page import run_page, write_run_page

    folder = existing_store(store)
    with one_connection():
        record = find_run(folder, run)
        page = run_page(folder, record, examples)
        biases = _probes(folder)
        page.sections = _agreement(folder, page) + ([biases] if biases else []) + _training(folder)
    out = out or Path(f"{page.name.replace('@', '-')}-report.html")
    write_run_page(out, page, record["started_at"])
    size = out.stat().st_size
    if as_json:
        return print_json(
            {"file": str(out), "bytes": size, "run": page.name, "headline": page.headline}
        )
    say(page.headline)
    say(f"{out}: {size / 1000:,.0f} kB; it needs no other file")
    hint_command("view", store)


def _agreement(folder: Path, page: RunPage) -> list[PageSection]:
    """How reliable the judges are; nothing where that cannot be measured."""
    try:
        from prefab.pipelines.quality import agreement
        from prefab.pipelines.quality.agreement_tables import in_brief

        found = agreement.measure(folder, page.name, examples=0, resamples=200)
    except ImportError as error:
        warn(f"{missing_package(error.name, 'agreement of the judges')}. It is left out")
        return []
    except ConfigError as error:
        warn(f"the judges' agreement is left out: {error}")
        return []
    from prefab.pipelines.store.run_page import PageSection

    page.trust += [line[:1].upper() + line[1:] + "." for line in in_brief(found)]
    columns = ("judge", "verdicts", "right", "both orders agree", "first slot picked", "ties")
    names = ("judge", "verdicts", "accuracy", "position_consistency", "first_slot_share", "ties")
    judges = [tuple(cell(row[name]) for name in names) for row in found["judges"]]
    columns_of = ("principle", "comparisons", "both orders agree", "ties", "right")
    names_of = ("name", "items", "position_consistency", "ties", "accuracy")
    principles = [tuple(cell(row[name]) for name in names_of) for row in found["principles"]]
    tables = [("Judges", columns, judges), ("Principles", columns_of, principles)]
    return [PageSection("How reliable the judges are", found["limitations"], tables)]


def _training(folder: Path) -> list[PageSection]:
    """What policies that were trained and evaluated with this store do, their answers to the same
    prompts, and the curves of policy gradients.
    """
    from prefab.pipelines.store.evaluations import latest_policies, side_by_side
    from prefab.pipelines.store.fill import query
    from prefab.pipelines.store.run_page import PageSection

    names = "('eval policy', 'ppo', 'grpo')"
    rows = query(folder, f"SELECT value FROM evals WHERE name IN {names} ORDER BY rowid")["value"]
    found = [json.loads(text) for text in rows]
    policies = latest_policies(found)
    steps: dict[str, list[dict[str, float]]] = {}
    for value in found:
        if value["metrics"].get("eval/gold") is not None:
            steps.setdefault(value["name"], []).append(value["metrics"])
    if not policies and not steps:
        return []
    charts: list[Markup] = [_curve(name, points) for name, points in steps.items()]
    sentences = [
        "gold: the score of the ground truth; broken: share of answers that break a principle; "
        "proxy: the reward model's score; kl: distance from the base policy in nats an answer; "
        "words: mean length. All models that were evaluated with this store are listed."
    ]
    sections = [PageSection("What was trained", sentences, _policy_tables(policies), charts)]
    if examples := side_by_side(policies, ANSWERED):
        answers = [
            (f"{role}: {text}", ("policy", "score", "answer"), _answers(row["answers"]))
            for row in examples
            for role, text in row["turns"][-1:]
        ]
        words = ["Half of these are the prompts on which the scores differ most."]
        sections.append(PageSection("The policies' answers to the same prompts", words, answers))
    return sections


Table = tuple[str, Sequence[str], list[tuple[str, ...]]]


def _policy_tables(policies: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The figures of each policy, and how each compares with the baseline."""
    from prefab.pipelines.store.evaluations import win_rates

    shown = [name for name in FIGURES if any(name in v["metrics"] for v in policies.values())]
    rows: list[tuple[str, ...]] = [
        (policy, *(_interval(value["metrics"].get(name)) for name in shown))
        for policy, value in policies.items()
    ]
    wins: list[tuple[str, ...]] = [
        (w["policy"], w["against"], w["what"].replace("_", " "), _interval(w["e"]))
        for w in win_rates(policies)
    ]
    tables: list[Table] = [
        ("Policies on held-out prompts, with 95% intervals", ("policy", *shown), rows),
        ("Against the baseline", ("policy", "", "", "95% interval"), wins),
    ]
    return [table for table in tables if table[2]]


ANSWERED = 4  # prompts whose answers by each policy are shown


def _answers(answers: Sequence[tuple[str, str, float | None]]) -> list[tuple[str, str, str]]:
    from prefab.pipelines.store.run_page import cut

    return [(policy, cell(score), cut(text)) for policy, text, score in answers]


def _probes(folder: Path) -> PageSection | None:
    """How often edits that should not matter flip the verdicts of judges; None where that was not
    measured.
    """
    from prefab.pipelines.store.evaluations import latest_probes
    from prefab.pipelines.store.fill import query
    from prefab.pipelines.store.run_page import PageSection

    sql = "SELECT value FROM evals WHERE name = 'audit judge' ORDER BY rowid"
    found = latest_probes(json.loads(text) for text in query(folder, sql)["value"])
    rows = [
        (judge, probe, *(_interval(f.get(name)) for name in ("flips", "again")))
        for judge, value in found.items()
        for probe, f in value["metrics"].items()
    ]
    words = [
        "Share of right verdicts that flip when the losing answer is edited in a way that should "
        "not matter, and when the judge is only asked again."
    ]
    table = ("", ("judge", "probe", "flips", "asked again"), rows)
    return PageSection("Known biases of the judges", words, [table]) if rows else None


def _interval(value: Any) -> str:
    """A recorded figure with its interval."""
    return cell(_measured(value), intervals=True)


def _measured(value: Any) -> Measured | float | None:
    if isinstance(value, float):
        return value
    if not isinstance(value, dict) or value.get("value") is None:
        return None
    return Measured(value["value"], value.get("low"), value.get("high"))


def _curve(stage: str, steps: list[dict[str, float]]) -> Markup:
    """The reward model's score and the ground truth over the KL from the reference."""
    from prefab.factory import svg
    from prefab.factory.charts import Chart, Point, Series

    series = [
        Series(
            words,
            [
                Point(max(0.0, m["eval/kl"]), m[f"eval/{name}"], label=f"step {m['step']:.0f}")
                for m in steps
            ],
        )
        for words, name in (("Reward model's score", "proxy"), ("Ground truth", "gold"))
    ]
    title = f"{stage.upper()}: reward model's score and ground truth during training"
    return svg.lines(Chart(title, "KL from the reference, nats an answer", "score", series))
