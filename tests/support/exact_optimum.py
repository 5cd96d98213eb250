"""One training of a policy of a few thousand weights, and how far it ends from its method's
optimum.

The trainers are those of `prefab train` at their default settings, but for sizes and learning
rates; the worlds are those of `answer_world`, whose optimum is known in closed form.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.support import answer_world as aw

METHODS = ("ppo", "rloo", "grpo reverse", "grpo forward")
# This reference and this draw of rewards are taken because every state is come to by 5% of the
# answers under each of the optima, and these stand 0.1 apart: what is never visited cannot be
# learned, and what is alike cannot be told apart.
REFERENCE, DRAW, SPREAD = 101, 29, 0.2
GROUP, BATCH, LEARNING_RATE, GOAL = 8, 256, 5e-3, 0.03
STEPS = {
    "ppo": {1: 100, 2: 400},
    "rloo": {1: 120, 2: 400},
    "grpo reverse": {1: 250, 2: 700},
    "grpo forward": {1: 250, 2: 700},
}


def run_one(
    folder: Path,
    method: str,
    length: int,
    beta: float,
    start: int,
    steps: int | None = None,
    rate: float = LEARNING_RATE,
    kind: type[aw.World] = aw.World,
    **changes: Any,
) -> dict[str, Any]:
    """Train one policy; its total variation from the method's optimum at start and end, the largest
    over all states. `changes` are those of the configuration."""
    from prefab.trainers.common import load_policy

    world, began = kind(length=length, draw=DRAW), time.monotonic()
    steps = steps or STEPS[method][length]
    reference = aw.build(folder / "reference", REFERENCE, spread=SPREAD)
    first = aw.build(folder / f"start-{start}", start, spread=SPREAD)
    out = folder / f"{method}-{length}-{beta}-{start}-{steps}".replace(" ", "-")
    _train(method, world, beta, str(first), str(reference), str(out), steps, rate, **changes)
    p_ref = aw.table(world, load_policy(str(reference)))
    optimum = optimum_of(method, world, p_ref, beta)
    tv = {
        name: aw.total_variation(aw.table(world, load_policy(str(where))), optimum)
        for name, where in (("start", first), ("end", out / "policy"))
    }
    others = {
        name: max(aw.total_variation(optimum, other).values())
        for name, other in _others(world, p_ref, beta).items()
    }
    return {
        "method": method,
        "length": length,
        "beta": beta,
        "start": start,
        "steps": steps,
        "learning_rate": rate,
        "tv_start": max(tv["start"].values()),
        "tv_end": max(tv["end"].values()),
        "states": len(tv["end"]),
        "seldomest_state": min(aw.visits(world, optimum).values()),
        "tv_to_other_optima": others,
        "seconds": round(time.monotonic() - began, 1),
    }


def optimum_of(method: str, world: aw.World, p_ref: aw.Table, beta: float) -> aw.Table:
    """The closed form that this method must arrive at; GRPO's beta is corrected for its group
    mean."""
    if method in ("ppo", "rloo"):
        return aw.reverse_optimum(world, p_ref, beta)
    return aw.token_optimum(
        world, p_ref, beta * GROUP / (GROUP - 1), forward=method == "grpo forward"
    )


def _others(world: aw.World, p_ref: aw.Table, beta: float) -> dict[str, aw.Table]:
    """Where a method would end if it were another, or if beta were not corrected: what the test
    tells apart."""
    return {
        "ppo, rloo": aw.reverse_optimum(world, p_ref, beta),
        "no training": p_ref,
        "grpo reverse, beta as it stands": aw.token_optimum(world, p_ref, beta, forward=False),
        **{m: optimum_of(m, world, p_ref, beta) for m in ("grpo reverse", "grpo forward")},
    }


def _train(
    method: str,
    world: aw.World,
    beta: float,
    model: str,
    reference: str,
    out: str,
    steps: int,
    rate: float,
    **changes: Any,
) -> None:
    from prefab.trainers.rl import grpo, ppo, rewards

    prompts, sources = list(world.prompts) * (BATCH // 2), rewards.single(world.reward)
    shared = {
        "model": model,
        "reference": reference,
        "out": out,
        "steps": steps,
        "batch_size": BATCH,
        "micro_batch": BATCH,
        "max_new_tokens": world.length,
        "learning_rate": rate,
        "beta": beta,
        "kl_stop": None,
        "normalise": "none",
        "unfinished_score": None,
        "threads": 1,
        "save_every": 10_000,
        **changes,
    }
    if method == "ppo":
        ppo.run(
            ppo.PpoConfig(
                **shared, value_learning_rate=rate, sample_batch=BATCH, epochs=2, value_clip=None
            ),
            prompts,
            sources,
        )
    else:
        kind, _, form = method.partition(" ")
        grpo.run(
            grpo.GrpoConfig(**shared, method=kind, group=GROUP, kl=form or "reverse"),
            prompts,
            sources,
        )
