"""The demo's second half: what its data is worth to a policy, by the oracle, on prompts of the test
split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAGES = ("sft", "reward", "dpo")
BASE = "prefab-tiny"
PROMPTS, SAMPLES = 100, 4
DPO_MARGIN = 0.03  # one of eleven principles that decides makes about 0.045
PPO: dict[str, Any] = {
    "steps": 24,
    "eval_every": 6,
    "eval_prompts": 256,
    "epochs": 2,
    "value": "shared",
}  # two minutes on two cores


def train(store: Path, run: int, quiet: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """Train each stage by its preset on a run of the store; the models' folders, and what PPO told
    on the way.

    What has ended is not run again. Raises: as `prefab.pipelines.training.offline.train`.
    """
    from prefab.pipelines.store.fill import query
    from prefab.pipelines.training import offline, stages

    name, version = query(store, "SELECT name, version FROM runs WHERE run = ?", [run]).row(0)
    out, source = (
        store / "trained" / f"{name}-{version}",
        {"store": str(store), "run": f"{name}@{version}"},
    )
    found = {stage: out / stage for stage in STAGES}
    for stage in STAGES:
        sources = [{**source, "margin": DPO_MARGIN} if stage == "dpo" else source]
        offline.train(
            stage, Path(stage), overrides(out=str(found[stage]), data__sources=sources), quiet
        )
    rewards = [{"name": "preference", "kind": "model", "paths": [str(found["reward"])]}]
    told = stages.train(
        "ppo",
        Path("ppo"),
        overrides(
            model=BASE,
            out=str(out / "ppo"),
            store=str(store),
            rewards=rewards,
            data__sources=[source, {"files": str(watched(out))}],
            **PPO,
        ),
        quiet,
    )
    return {**found, "ppo": Path(told["policy"])}, told


def overrides(**values: Any) -> list[str]:
    """Values as `--set` takes them; JSON is YAML, whatever a path holds. Two underscores stand for
    a point.
    """
    return [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]


def watched(out: Path, n: int = PPO["eval_prompts"]) -> Path:
    """A file of prompts of the validation split, on which gold is watched while PPO trains."""
    from prefab.factory.microworld import grammar

    rows = [
        {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "split": "val"}
        for p in grammar.prompts("val", n, 1)
    ]
    file = out / "watched.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measure(store: Path, models: dict[str, Path], quiet: bool) -> Any:
    """The base policy and the trained ones on the same held-out prompts, with the reward model's
    score as the proxy.
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
