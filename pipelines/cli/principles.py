"""Commands about principles: what each does in a run, and finding them from labelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefab.factory.console import say, table
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.pipelines.cli.options import (
    Json,
    Map,
    Pipeline,
    Sets,
    Store,
    existing_store,
    hint_command,
    print_json,
    resumable,
)

if TYPE_CHECKING:
    from prefab.factory.stats import Estimate
    from prefab.pipelines.quality.induction import Induction, LabelledPair
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
        int,
        typer.Option(
            min=0, help="Number of prompts to show on whose answers no principle decides."
        ),
    ] = 5,
    as_json: Json = False,
) -> None:
    """Show what each principle does in a run: how often it is applied and decides, which principles
    say the same or contradict, and what changes without it. Asks nothing.
    """
    from prefab.pipelines.quality.principle_effects import principle_effects

    found = principle_effects(existing_store(store), run, gold, examples)
    if as_json:
        return print_json(found.data())
    _show_effects(found)
    hint_command("diff", "CONSTITUTION.yaml", "--store", store, "--run", found.run)


@app.command()
def induce(
    pipeline: Pipeline,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled pairs, in any layout of `import-preferences`."),
    ] = None,
    run: Annotated[
        str,
        typer.Option(
            help="Take the pairs of this run of the store, with people's labels; with --against, "
            "with the run's own. Default: the latest run."
        ),
    ] = "",
    against: Annotated[
        str, typer.Option(metavar="RUN", help="Only pairs on which --run and this run disagree.")
    ] = "",
    candidates: Annotated[
        list[Path],
        typer.Option(
            metavar="CONSTITUTION.yaml",
            help="Principles to test; may be repeated. Default: the judge's model proposes some.",
        ),
    ] = [],
    out: Annotated[
        Path | None,
        typer.Option(metavar="CONSTITUTION.yaml", help="Write the principles as a constitution."),
    ] = None,
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges. Default: the first.")
    ] = "",
    most: Annotated[int, typer.Option(min=1, help="Keep at most this many principles.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of held-out pairs.")] = 0,
    store: Annotated[
        Path | None, typer.Option(help="The store. Default: the pipeline's, or `store`.")
    ] = None,
    columns: Map = [],
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Find the smallest set of principles that explains labelled pairs, and write it as a
    constitution to edit.
    """
    from prefab.pipelines.quality import induction

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already; name a new file with --out")
    labelled = _labelled(pairs, store, run, against, columns)
    with resumable("all answers so far are kept"):
        found = induction.induce(
            labelled, pipeline, candidates, sets, judge, store, most, seed, quiet=as_json
        )
    text = induction.constitution_text(found, out.stem if out else "induced") if out else ""
    if out:
        out.write_text(text, encoding="utf-8")
    if as_json:
        return print_json(found.data())
    _show_induction(found)
    if out:
        say(f"{out}: {counted(len(found.principles), 'principle')}")
        hint_command("check", out)
    else:
        hint_command("induce", "--help")


def _labelled(
    pairs: Path | None, store: Path | None, run: str, against: str, columns: list[str]
) -> list[LabelledPair]:
    """The labelled pairs that the options name."""
    from prefab.factory.spec.layouts import mapping
    from prefab.pipelines.quality import induction

    if pairs is not None:
        if run or against:
            raise ConfigError("--pairs is a file; leave --run and --against out, or --pairs")
        return induction.pairs_of_file(pairs, mapping(columns))
    folder = existing_store(store or Path("store"))
    if against:
        return induction.pairs_of_runs(folder, run, against)
    return induction.pairs_of_people(folder, run)


def _show_induction(found: Induction) -> None:
    table(
        f"{found.pairs:,} labelled pairs, {found.fitted:,} to choose by and {found.held_out:,} "
        f"held out, judged by {found.judge}",
        ("principle", "weight", "decides", "right", "adds"),
        [
            (
                one.principle.id,
                one.weight,
                estimate(one.decides),
                estimate(one.accuracy),
                one.gain,
            )
            for one in found.principles
        ],
        note="on the held-out pairs: decides: names a winner; right: of these, the preferred "
        "answer; adds: to the accuracy of all together",
    )
    for one in found.principles:
        say(f"{one.principle.compare}", f"{one.principle.id}:", "bold")
        if one.same_as:
            say(f"  the judge answers alike to: {', '.join(one.same_as)}")
        for pair in one.examples[:1]:
            say(f"  preferred: {_line(pair.chosen)}")
            say(f"  other:     {_line(pair.rejected)}")
    if found.principles:
        say(f"all together are right in {estimate(found.accuracy)} of the held-out pairs")
    else:
        say("no principle explains the labels", "none", "yellow")
    say(
        f"{counted(len(found.candidates), 'candidate was', 'candidates were')} tested; {found.stop}"
    )
    if found.unscored:
        say(f"{found.unscored:,} of the judge's answers could not be read; each counts as even")
    say(f"{counted(found.reused, 'answer')} reused, {found.asked:,} asked")


def _line(text: str) -> str:
    return " ".join(text.split())[:160]


def _show_effects(found: PrincipleReport) -> None:
    table(
        f"{found.run} · {counted(found.comparisons, 'comparison')} of {counted(found.prompts, 'prompt')}",
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
            f"{counted(sum(e.alone for e in alone), 'comparison was', 'comparisons were')} judged under one principle alone "
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
