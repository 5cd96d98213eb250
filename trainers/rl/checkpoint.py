"""Checkpoints that a killed run goes on from exactly, its metrics, and the policies that it leaves
behind.

Seeds are drawn from (seed, step, purpose), so no random state needs to be saved: a step is the same
whenever it is run.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.trainers.common import (
    checkpoints,
    last_checkpoint,
    mark_complete,
    record_eval,
    remove_old,
    seed_everything,
    write_ends,
)
from prefab.trainers.model_card import reward_chart, write_card
from prefab.trainers.rl import processes
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.state import Run, State

METRICS = "metrics.jsonl"
KEPT = 2  # checkpoints; the older one is what a stop by KL goes back to
FREE = ("store", "save_every", "vllm", "report")  # settings that may differ when a run goes on


def seed_step(seed: int, step: int, purpose: str, threads: int | None = None) -> int:
    """Seed python, numpy and torch for one purpose in one step; gives the seed."""
    drawn = (
        int.from_bytes(hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()[:4], "big")
        % 2**31
    )
    seed_everything(drawn, threads)
    return drawn


def save(t: Run) -> Path:
    """Write all that the run is into `out`/checkpoint-STEP, and remove older ones once it is
    whole.
    """
    return processes.on_main(lambda: _save(t))


def _save(t: Run) -> Path:
    import torch

    out = Path(t.config.out)
    folder = out / f"checkpoint-{t.state.step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.save(
        {
            "policy": _trained(t.policy),
            "critic": None if t.critic is None else _trained(t.critic),
            "optimizer": t.optimizer.state_dict(),
            "state": asdict(t.state),
        },
        folder / "state.pt",
    )
    mark_complete(folder)
    remove_old(out, KEPT)
    return folder


def restore(t: Run) -> None:
    """Go on from the newest whole checkpoint, if there is one, and forget metrics of later steps.

    Raises: ConfigError (see `claim`).
    """
    folder = claim(t)
    if folder is not None:
        _restore(t, folder)
    kept = t.state.step if folder else -1
    processes.on_main(lambda: forget_after(Path(t.config.out) / METRICS, kept))


def claim(t: Run) -> Path | None:
    """The newest whole checkpoint in `out`, which is now this run's. Under a constant learning rate
    it may have more steps.

    Raises: ConfigError when the folder holds a run of another configuration or other prompts.
    """
    return processes.on_main(lambda: _claim(t))


def _claim(t: Run) -> Path | None:
    out = Path(t.config.out)
    out.mkdir(parents=True, exist_ok=True)
    origin, now = out / "origin.json", orjson.dumps(_origin(t))
    if origin.exists():
        saved, now_ = orjson.loads(origin.read_bytes()), orjson.loads(now)
        more = now_["schedule"] == "constant" and now_["steps"] > saved.get("steps", now_["steps"])
        other = sorted(
            name
            for name in now_.keys() | saved.keys()
            if now_.get(name) != saved.get(name) and not (more and name == "steps")
        )
        if other:
            raise ConfigError(
                f"{out}: holds a run that differs in {', '.join(other)}. Name another folder with out, or "
                "delete this one to begin anew"
            )
    new = origin.with_suffix(".new")
    new.write_bytes(now)
    new.replace(origin)
    return last_checkpoint(out)


def rewind(t: Run) -> None:
    """Back to the newest checkpoint of an earlier step, whose KL has been measured and was within
    bounds.
    """
    stopped = t.state.stopped
    earlier = [
        p for p in checkpoints(Path(t.config.out)) if int(p.name.rpartition("-")[2]) < t.state.step
    ]
    if earlier:
        _restore(t, earlier[-1])
        stopped += f". The policy kept is that of step {t.state.step}"
    t.state.stopped = stopped


def _restore(t: Run, folder: Path) -> None:
    import torch

    saved = torch.load(folder / "state.pt", map_location=t.accelerator.device, weights_only=True)
    for model, weights in ((t.policy, saved["policy"]), (t.critic, saved["critic"])):
        if model is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in weights:
                        parameter.copy_(weights[name])
    t.optimizer.load_state_dict(saved["optimizer"])
    t.state = restored_state(saved["state"])


def restored_state(saved: dict[str, Any]) -> State:
    """A state from what `asdict` made of it."""
    return State(
        **{
            **saved,
            "scales": {
                name: [(mean, deviation) for mean, deviation in pairs]
                for name, pairs in saved["scales"].items()
            },
            "evaluations": [
                Evaluation(**{**e, "gold": tuple(e["gold"])}) for e in saved["evaluations"]
            ],
            "seen": [CachedEval(**one) for one in saved["seen"]],
        }
    )


def _trained(model: Any) -> dict[str, Any]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _origin(t: Run) -> dict[str, Any]:
    """What makes two runs the same: configuration, prompts as tokens, and which rewards there
    are.
    """
    digest = hashlib.sha256(orjson.dumps(t.prompt_ids)).hexdigest()
    config = {k: v for k, v in t.config.model_dump(mode="json").items() if k not in (*FREE, "out")}
    config["sampler"] = t.config.chosen_sampler()
    return {**config, "the prompts": digest, "the rewards": [s.name for s in t.sources]}


def record(t: Run, metrics: dict[str, Any]) -> None:
    """Append a step's metrics to metrics.jsonl and, without its times, to the store's evaluations
    under the method's name.

    Without times a step repeated after a kill is the same object, which the store records once.
    """
    processes.on_main(lambda: _record(t, metrics))


def _record(t: Run, metrics: dict[str, Any]) -> None:
    with open(Path(t.config.out) / METRICS, "ab") as file:
        file.write(orjson.dumps(metrics, option=orjson.OPT_APPEND_NEWLINE))
    kept = {key: value for key, value in metrics.items() if key != "times"}
    record_eval(t.config.store, t.method.name, f"{Path(t.config.out).name}@{metrics['step']}", kept)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The steps recorded; a line that a kill cut short is left out."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [orjson.loads(line) for line in lines if line.endswith(b"\n")]


def forget_after(file: Path, step: int) -> None:
    """Drop metrics of steps that will be done again."""
    if not file.exists():
        return
    kept = [m for m in read_metrics(file) if m["step"] <= step]
    new = file.with_suffix(".new")
    new.write_bytes(b"".join(orjson.dumps(m, option=orjson.OPT_APPEND_NEWLINE) for m in kept))
    new.replace(file)


def write_policy(t: Run, folder: Path) -> None:
    """The policy as an ordinary checkpoint with its tokenizer; adapters are merged into the
    weights.
    """
    processes.on_main(lambda: _write_policy(t, folder))


def _write_policy(t: Run, folder: Path) -> None:
    model = t.policy
    if t.config.lora is not None:
        model = copy.deepcopy(model).merge_and_unload()
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    write_ends(model, t.tokenizer)
    model.save_pretrained(new)
    t.tokenizer.save_pretrained(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def finish(t: Run) -> None:
    """Leave the policy in `out`/policy, with its card."""
    processes.on_main(lambda: _finish(t))


def _finish(t: Run) -> None:
    folder = Path(t.config.out) / "policy"
    write_policy(t, folder)
    steps = read_metrics(folder.parent / METRICS)
    told = f"{counted(t.state.step, 'step')} of {counted(t.config.batch_size, 'answer')}."
    if t.state.stopped:
        told += f" Stopped early: {t.state.stopped}."
    last = {name: value for step in steps for name, value in step.items()}
    write_card(folder, t.method.stage, t.config, told, last, reward_chart(steps))
