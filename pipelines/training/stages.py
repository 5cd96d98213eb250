"""`prefab train STAGE`: from a configuration file to a trained model, with progress and charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory import charts
from prefab.factory.console import Progress, table, warn
from prefab.factory.engines.model_files import check_preset_output
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.store import store
from prefab.pipelines.config.schema import _override as override
from prefab.trainers import distributed
from prefab.trainers.registry import STAGES, Stage

if TYPE_CHECKING:
    from prefab.trainers.offline.estimate import Estimate
    from prefab.trainers.rl.config import RlConfig

PRESETS = PACKAGE / "trainers" / "presets"
SHOWN = ("reward", "kl", "eval/gold", "entropy", "length", "unfinished")


def document(path: Path, sets: Iterable[str]) -> yamlio.Document:
    """A file, or one of the presets by name (`ppo` for trainers/presets/ppo.yaml), with its
    overrides.
    """
    found = yamlio.load_document(yamlio.file_or_preset(path, PRESETS))
    for text in sets:
        override(found, text)
    return found


def load_config(path: Path, model: Any, sets: Iterable[str] = ()) -> Any:
    """The configuration in a file, or in one of the presets by name.

    Raises: ConfigError with every mistake, in the file and in `--set`.
    """
    return yamlio.validate(document(path, sets), model)


def train(name: str, path: Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Run a stage to its end, over stores that are brought up to date first; its result.

    Raises: ConfigError for mistakes in file or data, StoreError, HeldError where a store cannot be
    brought up to date, EngineError, TrainError.
    """
    distributed.end_with_launcher()
    config = load_config(path, STAGES[name].config, sets)
    sources = config.data.sources if config.data else ()
    distributed.main_alone(lambda: catch_up(source.store for source in sources))
    return fit(name, config, quiet)


def estimate_step(
    name: str, path: Path, sets: Iterable[str] = (), gpu: str | None = None
) -> Estimate:
    """What a step of an offline stage takes on a GPU, by the model's shapes; nothing is trained.

    Args:
        name: The stage.
        path: Its configuration file, or the name of a preset.
        sets: Overrides of fields.
        gpu: The name of a GPU; left out: the one here, else an H100.

    Raises:
        ConfigError: A mistake in the configuration, or a GPU that is not known.
    """
    from prefab.trainers.common import default_device
    from prefab.trainers.offline.estimate import estimate

    config = load_config(path, STAGES[name].config, sets)
    if gpu is None:
        import torch

        gpu = torch.cuda.get_device_name() if default_device() == "cuda" else "H100"
    return estimate(config, name, gpu)


def fit(name: str, config: Any, quiet: bool = False) -> dict[str, Any]:
    """As `train`, for a configuration and stores that are up to date."""
    stage = STAGES[name]
    _check_outputs_named(config)
    if stage.with_rewards:
        return _fit_to_rewards(name, stage, config, quiet)
    result: dict[str, Any] = stage.run(config, quiet)
    return result


def _check_outputs_named(config: Any) -> None:
    """Raises: ConfigError where a field names what another stage's preset writes, and it is not
    there.
    """
    named = [(field, getattr(config, field, None)) for field in ("model", "reference")]
    gold = getattr(config, "gold", None)
    for reward in (*getattr(config, "rewards", ()), *([gold] if gold else [])):
        field = "gold" if reward is gold else "rewards"
        named += [(f"{field}: {reward.name}: paths", path) for path in reward.paths]
    for field, model in named:
        if model:
            check_preset_output(model, field)


def _fit_to_rewards(name: str, stage: Stage, config: RlConfig, quiet: bool) -> dict[str, Any]:
    """The first and last metrics, where the policy is, why it stopped early, and the evaluations by
    gold.
    """
    from prefab.pipelines.training.judge_reward import opened
    from prefab.trainers.common import last_checkpoint
    from prefab.trainers.rl.checkpoint import METRICS, read_metrics
    from prefab.trainers.trackers import open_trackers

    out = Path(config.out)
    last = last_checkpoint(out)
    report = config.report if distributed.is_main() else []
    with (
        open_trackers(
            report,
            out,
            config.model_dump(mode="json"),
            int(last.name.rpartition("-")[2]) if last else 0,
        ) as trackers,
        opened(config, quiet) as (sources, gold),
        Progress(name, config.steps, quiet or not distributed.is_main(), "steps") as progress,
    ):

        def show(metrics: dict[str, Any]) -> None:
            facts = {
                metric.rpartition("/")[2]: metrics[metric]
                for metric in SHOWN
                if metrics.get(metric) is not None
            }
            progress.advance(metrics["step"] - progress.done, **facts)
            trackers.log(metrics["step"], metrics)

        state = stage.run(config, sources=sources, gold=gold, on_step=show)
        if not distributed.is_main():
            return {"stage": name, "stopped": state.stopped}
        evaluations = _evaluations(out)
        files = drawn(out, name, evaluations)
        for file in files:
            if file.suffix == ".png":
                trackers.image(state.step, file.stem, file)
    steps = read_metrics(out / METRICS)
    trained = [m for m in steps if m["step"] > 0]
    return {
        "stage": name,
        "policy": str(out / stage.model),
        "steps": state.step,
        "stopped": state.stopped,
        "first": trained[0] if trained else {},
        "last": trained[-1] if trained else {},
        "best": str(out / "best") if evaluations else None,
        "evaluations": evaluations,
        "alarm": next((m["alarm"] for m in steps if m.get("alarm")), ""),
        "charts": [str(file) for file in files],
    }


def _evaluations(out: Path) -> list[dict[str, Any]]:
    """The evaluations by gold of a run."""
    from prefab.trainers.rl.checkpoint import METRICS, read_metrics

    return [
        {
            "step": m["step"],
            "alarm": m["alarm"],
            **{name: m[f"eval/{name}"] for name in ("kl", "proxy", "gold")},
        }
        for m in read_metrics(out / METRICS)
        if "eval/gold" in m
    ]


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
            "KL from the reference, nats an answer",
            what,
            [charts.Series(what, points)],
            kl=True,
        )

    return charts.write(
        out,
        "gold",
        f"{stage}: {out}",
        [
            chart("proxy", "Reward model's score, which PPO raises"),
            chart("gold", "Ground truth, on which nothing is trained"),
        ],
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
