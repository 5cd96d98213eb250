"""Commands that train models and evaluate policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefab.factory.console import table, warn
from prefab.factory.numbers import Measured, counted
from prefab.pipelines.cli.labels import eval_app
from prefab.pipelines.cli.options import Json, Sets, hint_command, print_json, resumable

app = typer.Typer()
train_app = typer.Typer(no_args_is_help=True, help="Train models on the data of a store.")
app.add_typer(train_app, name="train")

StageFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG.yaml", help="A configuration file, or the name of a preset."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show progress.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only estimate a step's memory and time on a GPU, from the model's shapes.",
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(help="With --dry-run: which GPU, such as H100. Default: the one here, else H100."),
]
CHECKPOINTS = "the last checkpoint is kept"


@train_app.command()
def sft(
    config: StageFile,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
) -> None:
    """Train a policy by supervised fine-tuning on revisions, chosen answers or demonstrations. The
    same command resumes exactly.
    """
    if dry_run:
        return _show_estimate("sft", config, sets, gpu, as_json)
    _offline("sft", config, sets, as_json, quiet)


@train_app.command()
def reward(
    config: StageFile,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
) -> None:
    """Train a reward model, or an ensemble of them, on pairs with probabilities."""
    if dry_run:
        return _show_estimate("reward", config, sets, gpu, as_json)
    _offline("reward", config, sets, as_json, quiet)


@train_app.command()
def process(
    config: StageFile,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
) -> None:
    """Train a process reward model: the probability that each step of an answer is right."""
    if dry_run:
        return _show_estimate("process", config, sets, gpu, as_json)
    _offline("process", config, sets, as_json, quiet)


@train_app.command()
def dpo(
    config: StageFile,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
) -> None:
    """Train a policy on pairs with DPO or a variant of it (--set loss=ipo)."""
    if dry_run:
        return _show_estimate("dpo", config, sets, gpu, as_json)
    _offline("dpo", config, sets, as_json, quiet)


@train_app.command()
def kto(
    config: StageFile,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
) -> None:
    """Train a policy with KTO on single answers labelled good or bad."""
    if dry_run:
        return _show_estimate("kto", config, sets, gpu, as_json)
    _offline("kto", config, sets, as_json, quiet)


def _show_estimate(stage: str, path: Path, sets: list[str], gpu: str | None, as_json: bool) -> None:
    """Print what a step takes; exit with 1 where it does not fit."""
    from prefab.pipelines.training.stages import estimate_step

    found = estimate_step(stage, path, sets, gpu)
    if as_json:
        print_json(found.data())
    else:
        rows = [
            ("parameters", f"{found.parameters:,}"),
            ("weights, gradients, optimiser, GiB", found.weights_gib),
            (f"activations of {found.micro_batch} rows, GiB", found.activations_gib),
            ("together, GiB", found.total_gib),
            ("the GPU has, GiB", found.gpu_gib),
            ("largest micro_batch that fits", found.largest_micro_batch or "none"),
            ("gradient checkpointing", "yes" if found.gradient_checkpointing else "no"),
            ("tokens a step", found.tokens_a_step),
            ("seconds a step", found.step_s),
        ]
        table(
            f"{stage} of {found.model} on {found.gpu}: an estimate, nothing is trained",
            ("at most: every row as long as max_length", ""),
            rows,
            "The time is that of 35% of the GPU's peak, which small models do not reach.",
        )
    if not found.fits:
        warn(f"it does not fit. {found.remedy}")
        raise typer.Exit(1)


def _offline(stage: str, path: Path, sets: list[str], as_json: bool, quiet: bool) -> None:
    from prefab.pipelines.training.train import train
    from prefab.trainers.distributed import is_main

    with resumable(CHECKPOINTS):
        done = train(stage, path, sets, quiet or as_json)
    if not is_main():
        return
    if as_json:
        return print_json(done)
    table(
        f"{stage}: {counted(done['steps'], 'step')} on {counted(done['train'], 'row')}, validated on {done['val']:,}",
        ("on the validation split", ""),
        [(name, float(value)) for name, value in done["metrics"].items()],
        f"The model and its card are in {done['model']}",
    )
    if stage == "reward":
        hint_command("train", "ppo", "ppo", "--set", f"rewards.0.paths=[{done['model']}]")
    elif stage == "process":
        rewards = f"rewards=[{{name: steps, kind: process, paths: [{done['model']}]}}]"
        hint_command("train", "ppo", "ppo", "--set", rewards)
    else:
        base = f"base: {done['base']}, " if done.get("base") else ""
        policies = ("--set", f"policies={{{base}trained: {done['model']}}}")
        where = ("--set", f"store={done['store']}") if done.get("store") else ()
        hint_command("eval", "policy", *policies, *where)


@train_app.command()
def ppo(config: StageFile, sets: Sets = [], as_json: Json = False) -> None:
    """Train a policy with PPO on rewards, with a KL penalty. The same command resumes exactly."""
    _policy_gradient("ppo", config, sets, as_json)


@train_app.command()
def grpo(config: StageFile, sets: Sets = [], as_json: Json = False) -> None:
    """Train a policy with GRPO, which compares answers in groups and needs no value function; or
    RLOO (--set method=rloo).
    """
    _policy_gradient("grpo", config, sets, as_json)


def _policy_gradient(stage: str, path: Path, sets: list[str], as_json: bool) -> None:
    from prefab.pipelines.training.stages import show_gold
    from prefab.pipelines.training.train import train
    from prefab.trainers.distributed import is_main

    with resumable(CHECKPOINTS):
        done = train(stage, path, sets, as_json)
    if not is_main():
        raise typer.Exit(1 if done["stopped"] else 0)
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
            f"{stage}, {counted(done['steps'], 'step')}",
            ("", "first", "last"),
            [(n, float(first[n]), float(last[n])) for n in names],
            f"The policy is in {done['policy']}"
            + (f", the best by gold in {done['best']}" if done["best"] else ""),
        )
        show_gold(done)
    if done["stopped"]:
        warn(f"stopped before its last step: {done['stopped']}")
        raise typer.Exit(1)
    hint_command("serve", done["policy"])


@train_app.command()
def online(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """Train in rounds: sample, judge, train (DPO, PPO or GRPO), with a fixed judge and
    constitution. The same command resumes.
    """
    from prefab.pipelines.training.train import train

    with resumable(CHECKPOINTS):
        done = train("online", config, sets, quiet or as_json)
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
    first = done["rounds"][0]["sampled"]
    hint_command("eval", "policy", "--set", f"policies={{first: {first}, {named}}}")


@app.command()
def sweep(config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False) -> None:
    """Train PPO for several values of beta, seeds and rewards; plot proxy and gold over sqrt(KL)
    and mark the best beta. The same command resumes.
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
    """Print the last and the best point of each beta, and the fit of each set of rewards."""
    from prefab.pipelines.training.sweep import COLUMNS, rows

    table("gain in gold over the reference, means over seeds", COLUMNS, rows(found))
    fits = [
        (arm, told["fit"]["a"], told["fit"]["b"], told["peak_kl"], told["peak_gained"])
        for arm, told in found["arms"].items()
    ]
    table(
        "gain in gold = d (a - b log d), d = sqrt(KL)",
        ("rewards", "a", "b", "peak at KL", "gain in gold at the peak"),
        [(arm, _estimate(a), _estimate(b), kl, gained) for arm, a, b, kl, gained in fits],
        "Without a peak, gold did not fall within the measured range. Charts: "
        + ", ".join(found["files"]),
    )
    if len(found["arms"]) > 1 and found["equal_kl"]:
        table(
            "gain in gold at equal KL",
            ("KL", "rewards", "gain, 95% over seeds", "difference from the first, by seed"),
            [
                (
                    row["kl"],
                    row["arm"],
                    _estimate(row["gained"]),
                    row["more"] and _estimate(row["more"]),
                )
                for row in found["equal_kl"]
            ],
        )
    best = max(found["arms"].values(), key=lambda told: told["best"]["gained"])["best"]
    if best["gained"] > 0:
        hint_command("train", "ppo", "ppo", "--set", f"beta={best['beta']:g}")
    else:
        warn("the ground truth fell with every beta, so none is recommended: mend the reward first")


def _estimate(e: dict[str, Any]) -> Measured | str:
    if e["value"] is None:
        return str(e["undefined"] or "")
    return Measured(e["value"], e["low"], e["high"])


@eval_app.command("policy")
def eval_policy(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG.yaml]", help="A configuration file. Or use --set for all fields."
        ),
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate policies on held-out prompts: gold or reward model score, win rate over decided
    pairs, KL, length, diversity, refusals, sycophancy.
    """
    from prefab.pipelines.evaluation.policy import run
    from prefab.pipelines.evaluation.report import show

    report = run(config, sets, quiet or as_json)
    if as_json:
        return print_json(report.data())
    show(report)
    if report.store:
        hint_command("view", report.store)


@eval_app.command("weak-to-strong")
def eval_weak_to_strong(
    config: StageFile, sets: Sets = [], as_json: Json = False, quiet: Quiet = False
) -> None:
    """Train the same policy on labels of rising strength (a weak judge, a strong one, the ground
    truth), and show how much of the gap to the strongest each recovers. The same command resumes.
    """
    from prefab.pipelines.evaluation.weak_to_strong import (
        COLUMNS,
        charted,
        shown_figures,
        table_rows,
        weak_to_strong,
    )

    with resumable():
        report = weak_to_strong(config, sets, quiet or as_json)
    if as_json:
        return print_json(report.data())
    table(
        f"The policy trained on each set of labels, {counted(report.seeds, 'seed')}, "
        f"{counted(report.prompts, 'held-out prompt')}",
        COLUMNS,
        table_rows(report),
        f"score: {charted(report.value)}; recovered: the gain as a share of the ceiling's",
    )
    table(
        "Figures of the policies",
        ("", *(r.name for r in report.results)),
        shown_figures(report),
        f"report, chart and card: {', '.join(report.files)}",
    )
    for note in report.notes:
        warn(note)
