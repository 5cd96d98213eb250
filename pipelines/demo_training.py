"""The demo's second half: what its data is worth to a policy, by the oracle, on prompts of the test split."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAGES = ("sft", "reward", "dpo")
BASE = "prefab-tiny"
PROMPTS, SAMPLES = 100, 4
DPO_MARGIN = 0.03  # one of eleven principles that decides makes about 0.045


def train(store: Path, run: int, quiet: bool) -> dict[str, Path]:
    """Train each stage by its preset on a run of the store; give the models' folders. What has ended is not run again.

    Raises: as `pipelines.train_offline.train`.
    """
    from pipelines import train_offline
    from pipelines.fill import query

    name, version = query(store, "SELECT name, version FROM runs WHERE run = ?", [run]).row(0)
    found = {}
    for stage in STAGES:
        found[stage] = store / "trained" / f"{name}-{version}" / stage
        source = {"store": str(store), "run": f"{name}@{version}", **({"margin": DPO_MARGIN} if stage == "dpo" else {})}
        sets = [f"out={json.dumps(str(found[stage]))}", f"data.sources={json.dumps([source])}"]
        train_offline.train(stage, Path(stage), sets, quiet)
    return found


def measure(store: Path, models: dict[str, Path], quiet: bool) -> Any:
    """The base policy and the trained ones on the same held-out prompts, with the reward model's score as the proxy."""
    from pipelines.eval_policy import Config, evaluate_policies

    policies = {"base": BASE} | {name: str(folder) for name, folder in models.items() if name != "reward"}
    return evaluate_policies(Config.model_validate({
        "policies": policies, "reward": str(models["reward"]), "prompts": {"limit": PROMPTS}, "samples": SAMPLES,
        "store": str(store)}), quiet)
