"""The training part of the demo: train on its data, and evaluate the policies with the oracle on
the test split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefab.factory.console import say

STAGES = ("sft", "reward", "dpo")
BASE = "prefab-tiny"
PROMPTS, SAMPLES = 100, 4
# DPO leaves out pairs whose p_chosen is within this of a half. It is for runs that could not be
# calibrated: there, one deciding principle of eleven is a share of votes of about 0.545. After
# calibration the least sure of the demo's 180 pairs has 0.90, and 99% are right: none is left out.
DPO_MARGIN = 0.03
PPO: dict[str, Any] = {
    "steps": 12,
    "eval_every": 4,
    "eval_prompts": 96,
    "epochs": 2,
    "value": "shared",
}
FULL_PPO = {**PPO, "steps": 24, "eval_every": 6, "eval_prompts": 256}  # 2 minutes on two cores
ABOUT = (
    "SFT learns the revisions; the reward model and DPO learn which answer was chosen; PPO learns\n"
    "to please the reward model. Nothing is trained on what the oracle knows."
)
SHOWN = ("gold", "broken", "helps_harmless", "coherent", "words", "kl")


def train(store: Path, run: int, full: bool, quiet: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """Train each stage with its preset on a run of the store. A finished stage is not run again.

    Args:
        store: The store.
        run: The number of the run in it.
        full: Train PPO for longer.
        quiet: Do not show progress.

    Returns:
        The folder of each model, and the result of PPO.

    Raises:
        ConfigError, StoreError, TrainError: As `prefab.pipelines.training.train.train`.
    """
    from prefab.pipelines.store.fill import query
    from prefab.pipelines.training.train import train as train_stage

    name, version = query(store, "SELECT name, version FROM runs WHERE run = ?", [run]).row(0)
    out, source = (
        store / "trained" / f"{name}-{version}",
        {"store": str(store), "run": f"{name}@{version}"},
    )
    found = {stage: out / stage for stage in STAGES}
    for stage in STAGES:
        sources = [{**source, "margin": DPO_MARGIN} if stage == "dpo" else source]
        train_stage(stage, stage, overrides(out=str(found[stage]), data__sources=sources), quiet)
    rewards = [{"name": "preference", "kind": "model", "paths": [str(found["reward"])]}]
    ppo = FULL_PPO if full else PPO
    told = train_stage(
        "ppo",
        "ppo",
        overrides(
            model=BASE,
            out=str(out / ("ppo-full" if full else "ppo")),
            store=str(store),
            rewards=rewards,
            data__sources=[source, {"files": str(watched(out, ppo["eval_prompts"]))}],
            **ppo,
        ),
        quiet,
    )
    return {**found, "ppo": Path(told["policy"])}, told


def overrides(**values: Any) -> list[str]:
    """Values in the form of `--set`, as JSON, which is valid YAML. `__` in a name becomes `.`."""
    return [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]


def watched(out: Path, n: int = FULL_PPO["eval_prompts"]) -> Path:
    """Write a file of n prompts of the validation split, on which PPO's gold score is measured."""
    from prefab.factory.microworld import grammar

    rows = [
        {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "split": "val"}
        for p in grammar.prompts("val", n, 1)
    ]
    file = out / "watched.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measure(store: Path, models: dict[str, Path], quiet: bool) -> Any:
    """Evaluate the base policy and the trained ones on the same held-out prompts; the proxy is the
    reward model's score.
    """
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, evaluate_policies

    policies = {"base": BASE} | {
        name: str(folder) for name, folder in models.items() if name != "reward"
    }
    return evaluate_policies(
        PolicyEvalConfig.model_validate(
            {
                "policies": policies,
                "reward": str(models["reward"]),
                "prompts": {"limit": PROMPTS},
                "samples": SAMPLES,
                "store": str(store),
            }
        ),
        quiet,
    )


def show_policies(report: Any) -> None:
    """The oracle's figures of each policy, the most important ones alone."""
    from prefab.pipelines.evaluation.report import show

    show(report, SHOWN)
    say("Look at: gold (the oracle's score) against the base, and kl, which says how far it moved.")
