"""Commands about principles: what each does in a run, and finding them from labelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefab.factory.console import say, table
from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.options import Json, Store, existing_store, hint_command, print_json

if TYPE_CHECKING:
    from prefab.factory.stats import Estimate
    from prefab.pipelines.quality.principle_effects import PrincipleReport

app = typer.Typer()


@app.command()
def principles(
    run: Annotated[
        str,
        typer.Argument(metavar="[RUN]", help="NAME or NAME@VERSION. Default: the latest run."),
    ] = "",
    store: Store = Path("store"),
    gold: Annotated[
        str, typer.Option(help="Gold labels: auto, human, oracle (embedded world only) or none.")
    ] = "auto",
    examples: Annotated[
        int, typer.Option(min=0, help="Prompts that no principle separates to show.")
    ] = 5,
    as_json: Json = False,
) -> None:
    """Show what each principle does in a run: how often it is applied and decides, which principles
    say the same or contradict, and what changes without it. Asks nothing.
    """
    try:
        from prefab.pipelines.quality.principle_effects import principle_effects
    except ImportError as error:
        raise ConfigError(
            f"`prefab principles` needs {error.name}: pip install -e '.[stats]'"
        ) from error

    found = principle_effects(existing_store(store), run, gold, examples)
    if as_json:
        return print_json(found.data())
    _show_effects(found)
    hint_command("diff", "CONSTITUTION.yaml", "--store", store, "--run", found.run)


def _show_effects(found: PrincipleReport) -> None:
    table(
        f"{found.run} · {found.comparisons:,} comparisons of {found.prompts:,} prompts",
        ("principle", "judged", "decides", "strength", "same in both orders", "flips without"),
        [
            (
                e.principle,
                e.comparisons,
                estimate(e.decisive),
                e.strength,
                estimate(e.position_consistency),
                estimate(e.flips),
            )
            for e in found.principles
        ],
        note="decides: names a winner; strength: mean of |2 P(a) - 1|; flips without: outcomes that "
        "change when it is left out. 95% intervals over groups of prompts",
    )
    alone = [e for e in found.principles if e.alone]
    if alone:
        say(
            f"{sum(e.alone for e in alone):,} comparisons were judged under one principle alone "
            f"(selection {found.selection}): nothing can be said of them without it; "
            "`--set panel.selection=all` judges under every principle"
        )
    for e in found.principles:
        if not e.comparisons:
            say(f"{e.principle}: applied to no comparison", "never", "yellow")
    _show_agreement(found)
    critiques = [(e.principle, e.critiques, estimate(e.faults)) for e in found.principles]
    if any(n for _, n, _ in critiques):
        table("critiques", ("principle", "critiques", "name a fault"), critiques)
    _show_pairs(found)
    say(
        f"some principle names a winner in {estimate(found.separated)} of the comparisons; "
        f"{found.n_unseparated:,} of {found.prompts:,} prompts are separated by none"
    )
    for prompt in found.unseparated:
        say(f"  {prompt.prompt[:12]}: {' '.join(prompt.text.split())[:100]}")


def _show_agreement(found: PrincipleReport) -> None:
    """Agreement with gold labels, where there are some."""
    rows = [
        (
            e.principle,
            estimate(e.accuracy),
            e.accuracy.n_items,
            estimate(e.overall),
            e.overall.n_items,
        )
        for e in found.principles
        if e.accuracy.value is not None or e.overall.value is not None
    ]
    if rows:
        table(
            f"agreement with {found.gold}",
            ("principle", "about it", "n", "better over all", "n"),
            rows,
            note="share of its winners that the labels name too",
        )


def _show_pairs(found: PrincipleReport) -> None:
    """The principles that say the same or contradict, or else the closest ones."""
    related = [pair for pair in found.pairs if pair.relation]
    shown = (related or found.pairs)[:10]
    if not shown:
        return
    table(
        "principles that say the same, or contradict" if related else "the closest principles",
        ("principle", "and", "relation", "both decide", "agree", "decide together"),
        [
            (p.first, p.second, p.relation, p.decided, estimate(p.agree), estimate(p.together))
            for p in shown
        ],
        note="agree: same winner where both decide; decide together: both name the same winner "
        "where either decides",
    )


def estimate(found: Estimate) -> str:
    """A share with its interval, or nothing."""
    if found.value is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"
