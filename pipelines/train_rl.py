"""`prefab train ppo` and `prefab train grpo`: a configuration file to a policy, with what happens shown on the way."""
from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from factory import store, yamlio
from factory.console import Progress
from pipelines.config import _override as override

PRESETS = Path(__file__).resolve().parent.parent / "trainers"
SHOWN = ("reward", "kl", "eval/gold", "entropy", "length", "unfinished")


def document(path: Path, sets: Iterable[str]) -> yamlio.Document:
    """A file, or one of the presets by name (`ppo` for trainers/ppo.yaml), with its overrides."""
    preset = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    found = yamlio.load(preset if not path.exists() and len(path.parts) == 1 and preset.exists() else path)
    for text in sets:
        override(found, text)
    return found


def load(path: Path, model: Any, sets: Iterable[str]) -> Any:
    """The configuration in a file, or in one of the presets by name.

    Raises: ConfigError with every mistake, in the file and in `--set`.
    """
    return yamlio.validate(document(path, sets), model)


def train(stage: str, path: Path, sets: Iterable[str], quiet: bool) -> dict[str, Any]:
    """Run a stage to its end; its last metrics, where the policy is, and why it stopped where it did before its end."""
    config = load(path, importlib.import_module(f"trainers.{stage}").Config, sets)
    catch_up(source.store for source in (config.data.sources if config.data else ()))
    return fit(stage, config, quiet)


def fit(stage: str, config: Any, quiet: bool) -> dict[str, Any]:
    """As `train`, for a configuration and stores that are up to date."""
    from pipelines.judge_reward import opened
    from trainers.resume import METRICS, read_metrics

    module = importlib.import_module(f"trainers.{stage}")
    with opened(config, quiet) as (sources, gold), Progress(stage, config.steps, quiet, "steps") as progress:
        def show(metrics: dict[str, Any]) -> None:
            progress.advance(metrics["step"] - progress.done)
            progress.show(**{name.rpartition("/")[2]: metrics[name] for name in SHOWN if metrics.get(name) is not None})

        state = module.run(config, sources=sources, gold=gold, on_step=show)
    steps = read_metrics(Path(config.out) / METRICS)
    return {"stage": stage, "policy": str(Path(config.out) / "policy"), "steps": state.step, "stopped": state.stopped,
            "first": steps[0] if steps else {}, "last": steps[-1] if steps else {},
            "best": str(Path(config.out) / "best") if state.evaluations else None}

def catch_up(folders: Iterable[str | None]) -> None:
    """Bring stores up to their ledgers, where there is one. Raises: HeldError where another program keeps one from it."""
    from pipelines.fill import fill

    for folder in {f for f in folders if f and (Path(f) / "ledger.sqlite").exists()}:
        report = fill(folder)
        if report.held:
            raise store.HeldError(f"{report.held}. The store is {report.behind:,} ledger rows behind")
