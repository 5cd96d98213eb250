"""A store that has something on every page of `prefab view`: three judges of known faults on the
embedded world's prompts, a second run under an edited constitution, people's labels, measured
figures of policies (benchmarks/results), a made-up curve of reinforcement learning, and answers
that attack the page."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefab.factory.ledger.ledger import Ledger
from prefab.factory.microworld import oracle
from prefab.factory.types import Engine, Message
from prefab.judges.kinds import human
from prefab.pipelines.quality import labeling
from prefab.pipelines.run.rejudge import panel_of, pipeline_of, rejudge
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.fill import fill
from tests.support import noisyworld

ROOT = Path(__file__).resolve().parents[2]
JUDGES = {
    "careful": {"right": 0.92, "sure": 0.9},
    "hasty": {"right": 0.8, "sure": 0.95, "pull": 0.6},
    "drawn": {"right": 0.85, "first": 0.15, "sure": 0.8},
}
ATTACK = (
    "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 2'>"
    "[link](javascript:alert(1)) \x1b]0;title\x07\x1b[31mred \u202egnitirw desrever\u202c "
    "{{ 7 * 7 }} &lt;b&gt; \u2028" + "w" * 3000
)
NAME = "<img src=x onerror='window.attacked = 3'>\u202eevil"  # of what people and trainers name
LONG = "w" * 200_000


def make(folder: Path, prompts: int = 40, attack: bool = False) -> Path:
    """The store."""
    value, engines = noisyworld.pipeline(folder, JUDGES, prompts)
    if attack:
        engines = {name: _attacking(engine) for name, engine in engines.items()}
        value["constitution"] = str(_attacking_constitution(folder))
    made: dict[str, Engine] = dict(engines)
    run({**value, "budget": {"unscored": 1.0}}, engines=made)
    store = folder / "store"
    _label(store)
    _edited(store, made)
    _evals(store)
    if attack:
        _attacking_evals(store)
    fill(store)
    return store


def _attacking(engine: Any) -> Any:
    """The engine, whose answers to prompts end with a text that attacks the page; the first of them
    is one word of 200,000 letters.
    """
    answer, long = engine.answer, [LONG]

    def attack(request: Any) -> Any:
        made = answer(request)
        if request.labels:
            return made
        return replace(made, text=f"{made.text} {ATTACK}{long.pop() if long else ''}")

    engine.answer = attack
    return engine


def _attacking_constitution(folder: Path) -> Path:
    """The embedded world's constitution with titles that attack the page."""
    text = (ROOT / "constitutions/microworld.yaml").read_text()
    text = text.replace("title: No insults", f"title: {json.dumps(NAME)}")
    text = text.replace("title: The embedded world", f"title: {json.dumps(NAME)}")
    path = folder / "attack.yaml"
    path.write_text(text)
    return path


def _attacking_evals(store: Path) -> None:
    """Evaluations, benchmarks, probes and labels whose names and texts attack the page."""
    ledger = Ledger.open(store)
    share = {"value": 0.3, "low": 0.2, "high": 0.4}
    example = {"turns": [["user", ATTACK]], "text": ATTACK + LONG, "score": 0.5}
    metrics = {"gold": share, f"against {NAME}: win_rate": share, NAME: share}
    found = {"metrics": metrics, "policy": NAME, "examples": [example]}
    ledger.add_eval({"name": "eval policy", "subject": NAME, **found})
    ledger.add_eval({"name": f"judge on {NAME}", "subject": NAME, "metrics": {NAME: 0.7}})
    probe = {"pairs": 20, "right": 16, "flips": share, "again": share}
    ledger.add_eval({"name": "audit judge", "subject": NAME, "metrics": {NAME: probe}})
    trained = {"metrics": {NAME: 0.5}, "steps": 4, "history": []}
    ledger.add_eval({"name": f"train {NAME}", "subject": NAME, **trained})
    stopped = {"step": 41, "kl": 1.0, "alarm": ATTACK, "stopped": ATTACK}
    ledger.add_eval({"name": "ppo", "subject": "ppo@41", "metrics": stopped})
    asyncio.run(ledger.close())
    with labeling.open_session(store, "world", NAME, "random", 0) as session:
        session.say("a")


def _label(store: Path) -> None:
    """Two people, who are right about most of what has a right answer: one errs in one of twenty,
    the other in one of six.
    """
    for who, every in (("ann", 20), ("ben", 6)):
        with labeling.open_session(store, "world", who, "random", 0) as session:
            said = 0
            for task in list(session.todo):
                talk = tuple(Message(role, text) for role, text in task.conversation)
                truth = oracle.compare(talk, task.text_a, task.text_b, task.principle)
                if truth == "tie" and said % 9:
                    continue
                said += 1
                word: human.Said = truth if said % every else human.swapped(truth)
                session.say(word if task.order == "ab" else human.swapped(word), task)
                if said == 90:
                    break


def _edited(store: Path, engines: dict[str, Engine]) -> None:
    """The first comparisons judged again under a constitution with one principle less."""
    panel = panel_of(store, "world", 30, 0)
    old = panel.constitution
    new = replace(old, principles=old.principles[:-1])
    rejudge(panel, new, pipeline_of(panel, None, ()), engines=engines)


def _evals(store: Path) -> None:
    """Measured figures of policies and made-up curves, as the trainers record them."""
    ledger = Ledger.open(store)
    curves = json.loads((ROOT / "benchmarks/results/demo_policies.json").read_text())
    for name, figures in curves["policies"].items():
        metrics = {
            k: {"value": v["value"], "low": v["low"], "high": v["high"], "n": v["n_items"]}
            for k, v in figures.items()
        }
        against = {
            f"against base: {k}": v
            if isinstance(v, float)
            else {b: v[b] for b in ("value", "low", "high")}
            for k, v in curves["against"].get(name, {}).items()
            if isinstance(v, (float, dict)) and (isinstance(v, float) or "value" in v)
        }
        ledger.add_eval(
            {
                "name": "eval policy",
                "subject": name,
                "metrics": metrics | against,
                "policy": name,
                "examples": [
                    {"turns": [["user", "Is it open?"]], "text": f"{name} says yes", "score": 0.5}
                ],
                "prompts": curves["prompts"],
                "samples": curves["samples"],
            }
        )
    for step in range(41):
        kl = step**1.3 / 12
        metrics = {
            "step": step,
            "kl": kl,
            "reward": 0.2 + 0.12 * kl**0.5,
            "length": 18 + kl,
            "entropy": 2 - kl / 9,
        }
        if step % 4 == 0:
            metrics |= {
                "eval/kl": kl,
                "eval/proxy": 0.2 + 0.12 * kl**0.5,
                "eval/gold": 0.6 + 0.1 * kl**0.5 - 0.018 * kl,
                "eval/samples": [
                    {
                        "turns": [["user", "Where is it?"]],
                        "text": f"It is there, at step {step}. {ATTACK}",
                        "proxy": 0.2,
                        "gold": 0.7,
                    }
                ],
            }
        ledger.add_eval({"name": "ppo", "subject": f"ppo@{step}", "metrics": metrics})
    history = [{"step": s, "eval_loss": 0.7 - 0.03 * s**0.5} for s in range(5, 41, 5)]
    ledger.add_eval(
        {
            "name": "train dpo",
            "subject": "trained/dpo",
            "metrics": {"loss": 0.51, "rewards/accuracies": 0.74},
            "steps": 40,
            "history": history,
        }
    )
    for flips in (0.3, 0.125):  # the last audit of a probe counts
        share = {"value": flips, "low": 0.04, "high": 0.4}
        probe = {"pairs": 20, "right": 16, "flips": share, "again": {**share, "value": 0.0625}}
        ledger.add_eval(
            {"name": "audit judge", "subject": "hasty", "metrics": {"authority": probe}}
        )
    asyncio.run(ledger.close())
