"""Commands that train from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefab.factory.console import hint, table, warn
from prefab.pipelines.cli.labels import eval_app
from prefab.pipelines.cli.options import Json, Sets, print_json, resumable

app = typer.Typer()
train_app = typer.Typer(no_args_is_help=True, help="Train from the store.")
app.add_typer(train_app, name="train")

StageFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="A configuration, or a preset's name.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@train_app.command()
def sft(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """A policy on revisions, chosen answers or demonstrations; goes on exactly where it was
    stopped.
    """
    _offline("sft", config, sets, as_json, quiet)


@train_app.command()
def reward(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """A reward model, or an ensemble, on pairs with a probability each."""
    _offline("reward", config, sets, as_json, quiet)


@train_app.command()
def dpo(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """A policy on pairs: DPO and its relatives (--set loss=ipo)."""
    _offline("dpo", config, sets, as_json, quiet)


@train_app.command()
def kto(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """A policy on single answers with a thumb up or down."""
    _offline("kto", config, sets, as_json, quiet)


def _offline(stage: str, path: Path, sets: list[str], as_json: bool, quiet: bool) -> None:
    from prefab.pipelines.training.offline import train
    from prefab.trainers.distributed import is_main

    with resumable():
        done = train(stage, path, sets, quiet or as_json)
    if not is_main():
        return
    if as_json:
        return print_json(done)
    table(
        f"{stage}: {done['steps']:,} steps on {done['train']:,} rows, validated on {done['val']:,}",
        ("validation", ""),
        [(name, float(value)) for name, value in done["metrics"].items()],
        f"The model and its card are in {done['model']}",
    )
    hint(
        f"prefab eval policy --set 'policies={{trained: {done['model']}}}'"
        if stage != "reward"
        else "prefab train ppo CONFIG.yaml, with this reward model"
    )


@train_app.command()
def ppo(config: StageFile, sets: Sets = [], as_json: Json = False) -> None:
    """A policy against rewards on text, held by a KL leash; goes on exactly where it was
    stopped.
    """
    _policy_gradient("ppo", config, sets, as_json)


@train_app.command()
def grpo(config: StageFile, sets: Sets = [], as_json: Json = False) -> None:
    """The same with groups of answers instead of a value function: GRPO, or RLOO with --set
    method=rloo.
    """
    _policy_gradient("grpo", config, sets, as_json)


def _policy_gradient(stage: str, path: Path, sets: list[str], as_json: bool) -> None:
    from prefab.pipelines.training.stages import show_gold, train

    with resumable():
        done = train(stage, path, sets, as_json)
    if as_json:
        print_json(done)
    else:
        first, last = done["first"], done["last"]
        names = [
            name
            for name in last
            if isinstance(last[name], int | float) and name in first and name != "step"
        ]
        table(
            f"{stage}, {done['steps']} steps",
            ("", "first", "last"),
            [(n, float(first[n]), float(last[n])) for n in names],
            f"The policy is in {done['policy']}"
            + (f", the best by gold in {done['best']}" if done["best"] else ""),
        )
        show_gold(done)
    if done["stopped"]:
        warn(f"stopped before its last step: {done['stopped']}")
        raise typer.Exit(1)
    hint(f"prefab serve {done['policy']}")


@train_app.command()
def online(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """Rounds of sample, judge, train (dpo, ppo or grpo), with judge and constitution fixed; goes on
    where it was stopped.
    """
    from prefab.pipelines.training.online import train

    with resumable():
        done = train(config, sets, quiet or as_json)
    if as_json:
        print_json(done)
    else:
        table(
            f"online, in {done['store']}",
            ("round", "run", "sampled from", "calls", "comparisons", "decided", "trained"),
            [
                (
                    row["round"],
                    row["run"],
                    row["weights"][:12],
                    row["asked"],
                    row["comparisons"],
                    row["pairs"],
                    row["trained"][:12],
                )
                for row in done["rounds"]
            ],
            f"The last policy is in {done['policy']}",
        )
    if done["stopped"]:
        warn(f"stopped in round {len(done['rounds'])}: {done['stopped']}")
        raise typer.Exit(1)
    named = ", ".join(f"round-{row['round']}: {row['policy']}" for row in done["rounds"])
    hint(f"prefab eval policy --set 'policies={{first: {done['rounds'][0]['sampled']}, {named}}}'")


@app.command()
def sweep(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """PPO over beta, seeds and rewards: proxy and gold over sqrt(KL), Gao's form fitted, the sweet
    spot marked; resumable.
    """
    from prefab.pipelines.training.sweep import sweep as run

    with resumable():
        found = run(config, sets, quiet or as_json)
    if as_json:
        print_json(found)
    else:
        _show_sweep(found)
    raise typer.Exit(1 if found["failed"] else 0)


def _show_sweep(found: dict[str, Any]) -> None:
    """Each beta's end and best point, and each arm's fit."""
    from prefab.pipelines.training.sweep import COLUMNS, rows

    table("gold gained over the reference, means over seeds", COLUMNS, rows(found))
    fits = [
        (arm, told["fit"]["a"], told["fit"]["b"], told["peak_kl"], told["peak_gained"])
        for arm, told in found["arms"].items()
    ]
    table(
        "gold gained = d (a - b log d), d = sqrt(KL)",
        ("rewards", "a (95%)", "b (95%)", "peak at KL", "gold gained there"),
        [(arm, _interval(a), _interval(b), kl, gained) for arm, a, b, kl, gained in fits],
        "No peak: gold had not turned within what was seen. Charts: " + ", ".join(found["files"]),
    )
    if len(found["arms"]) > 1 and found["equal_kl"]:
        table(
            "gold gained at equal KL",
            ("KL", "rewards", "gold gained (95% over seeds)", "more than the first, by seed"),
            [
                (
                    row["kl"],
                    row["arm"],
                    _interval(row["gained"]),
                    row["more"] and _interval(row["more"]),
                )
                for row in found["equal_kl"]
            ],
        )
    best = max(found["arms"].values(), key=lambda told: told["best"]["gained"])["best"]
    hint(f"prefab train ppo ppo --set beta={best['beta']:g}")


def _interval(e: dict[str, Any]) -> str:
    if e["value"] is None:
        return e["undefined"] or ""
    return f"{e['value']:.3f}" + (
        "" if e["low"] is None else f" ({e['low']:.3f} to {e['high']:.3f})"
    )


@eval_app.command("policy")
def eval_policy(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Or all of it by --set.")
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Checkpoints on held-out prompts: gold or proxy, win rate over decided pairs, KL, length,
    diversity, refusals, sycophancy.
    """
    from prefab.pipelines.evaluation.policy import run
    from prefab.pipelines.evaluation.report import show

    report = run(config, sets, quiet or as_json)
    if as_json:
        return print_json(report.data())
    show(report)
    hint("prefab sql \"SELECT value FROM evals WHERE name = 'eval policy'\"")
