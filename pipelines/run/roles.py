"""Which model does what in a run, and which role inherits the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefab.factory.types import Engine
from prefab.pipelines.config.loader import ResolvedPipeline


@dataclass(slots=True)
class Role:
    """Who does what: the engine of a role, its model, and what is to be known of it."""

    role: str
    engine: str
    model: str
    note: str = ""


def roles_of(loaded: ResolvedPipeline, engines: Mapping[str, Engine]) -> list[Role]:
    """Each role with its engine. A role that names none has the policy's."""
    policy = loaded.config.policy.engine
    config = loaded.config

    def role(name: str, engine: str, same: str) -> Role:
        model = config.engines.get(engine, {}).get("model", "")
        shared = engine != policy and engine in engines and policy in engines
        shared = shared and engines[engine].identity == engines[policy].identity
        return Role(name, engine, str(model or engine), same if shared or engine == policy else "")

    found = [role("policy", policy, "")]
    if loaded.revises:
        found.append(
            role("critic", str(loaded.critic.engine), "the policy criticises its own answers")
        )
    for judge in loaded.judges if loaded.compares else ():
        found.append(role(f"judge {judge.name}", judge.engine, "the policy judges its own answers"))
    return found
