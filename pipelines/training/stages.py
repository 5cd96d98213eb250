"""`prefab train ppo` and `prefab train grpo`: a configuration file to a policy, with what happens
shown on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefab.factory import charts
from prefab.factory.console import Progress, table, warn
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.store import store
from prefab.pipelines.config.schema import _override as override
from prefab.trainers.registry import CONFIGS, STAGES

PRESETS = PACKAGE / "trainers" / "presets"
SHOWN = ("reward", "kl", "eval/gold", "entropy", "length", "unfinished")


def document(path: Path, sets: Iterable[str]) -> yamlio.Document:
    """A file, or one of the presets by name (`ppo` for trainers/presets/ppo.yaml), with its
    overrides.
    """
    preset = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    found = yamlio.load_document(
        preset if not path.exists() and len(path.parts) == 1 and preset.exists() else path
    )
    for text in sets:
        override(found, text)
    return found


def load_config(path: Path, model: Any, sets: Iterable[str]) -> Any:
    """The configuration in a file, or in one of the presets by name.

    Raises: ConfigError with every mistake, in the file and in `--set`.
    """
    return yamlio.validate(document(path, sets), model)


def train(stage: str, path: Path, sets: Iterable[str], quiet: bool) -> dict[str, Any]:
    """Run a stage to its end; its last metrics, where the policy is, and why it stopped where it
    did before its end.
    """
    config = load_config(path, CONFIGS[stage], sets)
    catch_up(source.store for source in (config.data.sources if config.data else ()))
    return fit(stage, config, quiet)


def fit(stage: str, config: Any, quiet: bool) -> dict[str, Any]:
    """As `train`, for a configuration and stores that are up to date."""
    from prefab.pipelines.training.judge_reward import opened
    from prefab.trainers.rl.checkpoint import METRICS, read_metrics

    module = STAGES[stage]
    with (
        opened(config, quiet) as (sources, gold),
        Progress(stage, config.steps, quiet, "steps") as progress,
    ):

        def show(metrics: dict[str, Any]) -> None:
            facts = {
                name.rpartition("/")[2]: metrics[name]
                for name in SHOWN
                if metrics.get(name) is not None
            }
            progress.advance(metrics["step"] - progress.done, **facts)

        state = module.run(config, sources=sources, gold=gold, on_step=show)
    out = Path(config.out)
    steps = read_metrics(out / METRICS)
    trained = [m for m in steps if m["step"] > 0]
    evaluations = [
        {
            "step": m["step"],
            "alarm": m["alarm"],
            **{name: m[f"eval/{name}"] for name in ("kl", "proxy", "gold")},
        }
        for m in steps
        if "eval/gold" in m
    ]
    return {
        "stage": stage,
        "policy": str(out / "policy"),
        "steps": state.step,
        "stopped": state.stopped,
        "first": trained[0] if trained else {},
        "last": trained[-1] if trained else {},
        "best": str(out / "best") if evaluations else None,
        "evaluations": evaluations,
        "alarm": next((m["alarm"] for m in steps if m.get("alarm")), ""),
        "charts": [str(file) for file in drawn(out, stage, evaluations)],
    }


def drawn(out: Path, stage: str, evaluations: Sequence[dict[str, float]]) -> list[Path]:
    """Proxy and gold of a run over the square root of its KL, as a page and a PNG; nothing where
    gold was not asked.
    """
    if len(evaluations) < 2 or not charts.can():
        return []

    def chart(what: str, title: str) -> charts.Chart:
        points = [charts.Point(e["kl"], e[what], label=f"{e['step']:.0f}") for e in evaluations]
        return charts.Chart(
            f"{title} (numbers: steps)",
            "KL to the reference, nats an answer",
            what,
            [charts.Series(what, points)],
            kl=True,
        )

    return charts.write(
        out,
        "gold",
        f"{stage}: {out}",
        [chart("proxy", "What is trained on"), chart("gold", "What nothing is trained on")],
    )


def show_gold(done: dict[str, Any]) -> None:
    """Proxy and gold at each evaluation, the alarm, and where the chart is; nothing where gold was
    not asked.
    """
    if done["evaluations"]:
        names = ("step", "kl", "proxy", "gold")
        table(
            f"{done['stage'].upper()} on prompts that it is not trained on",
            ("step", "KL, nats", "proxy", "gold"),
            [[e[name] for name in names] for e in done["evaluations"]],
            f"charts: {', '.join(done['charts'])}" if done["charts"] else "",
        )
    if done["alarm"]:
        warn(done["alarm"])


def catch_up(folders: Iterable[str | None]) -> None:
    """Bring stores up to their ledgers, where there is one. Raises: HeldError where another program
    keeps one from it.
    """
    from prefab.pipelines.store.fill import fill

    for folder in {f for f in folders if f and (Path(f) / "ledger.sqlite").exists()}:
        report = fill(folder)
        if report.held:
            raise store.HeldError(
                f"{report.held}. The store is {report.behind:,} ledger rows behind"
            )
