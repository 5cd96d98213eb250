"""Our PPO against TRL 1.9's experimental one, the last it had: same model, reward model, prompts,
steps and precision (fp32).

    make peers-venvs                              # TRL 1.9 in an environment of its own
    python -m benchmarks.ppo_speed
    python -m benchmarks.ppo_speed --quick        # without TRL, in this process: does it work?

Each contender is a process that does a step when told and then waits, in turns, so that whatever
else the machine does falls on all alike. Tokens are those of the answers, up to and with their end;
a step is all of it: sampling, scoring, updates. The first step of each is left out. TRL is taken as
it comes, but for its temperature (.7, here 1 on both sides): its default of gradient checkpointing
has no effect in its own loop. Its accumulation spans its minibatches, so it makes fewer optimizer
steps than its settings say; ours makes them all."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, PEERS, table, write

NAMES = ("ours", "trl")


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Prompts as text and as tokens, a reward model with a head drawn from a seed, and the settings
    that all share."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from prefab.factory.engines.base import resolve_model
    from prefab.factory.microworld import grammar
    from prefab.trainers.rl import rollout

    path = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", args.prompts, 3)
    ]
    (folder / "turns.json").write_text(json.dumps(prompts))
    (folder / "prompts.json").write_text(json.dumps(rollout.encode(tokenizer, prompts, None)))
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="float32")
    reward.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(reward.score.weight)  # a fresh head may be all but constant
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    names = (
        "batch",
        "micro",
        "minibatches",
        "epochs",
        "steps",
        "max_new_tokens",
        "learning_rate",
        "beta",
        "threads",
    )
    (folder / "settings.json").write_text(
        json.dumps(
            {name: getattr(args, name) for name in names}
            | {"model": path, "reward": str(folder / "reward")}
        )
    )


def ours(
    folder: Path, turn: Callable[[dict[str, Any]], None], out: str = "ours", **more: Any
) -> None:
    """Our side: as benchmarks/peers/trl_ppo.py. `turn` gets the metrics of each step; `more`:
    settings other than those in the folder.
    """
    import torch

    from prefab.trainers.rl import ppo

    s = json.loads((folder / "settings.json").read_text()) | more
    torch.set_num_threads(s["threads"])
    config = ppo.PpoConfig(
        model=s["model"],
        out=str(folder / out),
        steps=s["steps"],
        batch_size=s["batch"],
        minibatches=s["minibatches"],
        epochs=s["epochs"],
        micro_batch=s["micro"],
        sample_batch=s["batch"],
        max_new_tokens=s["max_new_tokens"],
        learning_rate=s["learning_rate"],
        value_learning_rate=s["learning_rate"],
        beta=s["beta"],
        kl_stop=None,
        threads=s["threads"],
        save_every=10**6,
        reference_samples=32,
        unfinished_stop=1.0,
        rewards=[{"name": "reward", "kind": "model", "paths": [s["reward"]], "batch": s["batch"]}],
    )
    ppo.run(config, json.loads((folder / "turns.json").read_text()), on_step=turn)


def in_turns(folder: Path) -> None:
    """Our side as a process that does one step a line."""

    def turn(metrics: dict[str, Any]) -> None:
        print("STEP " + json.dumps(step_figures(metrics)), flush=True)
        sys.stdin.readline()

    sys.stdin.readline()
    ours(folder, turn)


def step_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Seconds of generation, and tokens, of a step."""
    took = metrics["times"]["seconds"]
    return {
        "generation_s": took * metrics["times"]["sampling_share"],
        "tokens": round(took * metrics["times"]["tokens_per_s"]),
    }


def quick_look(folder: Path) -> dict[str, Any]:
    """Ours with answers a forward as set and twice as many: the losses of each step."""
    found: dict[str, Any] = {}
    for name, times in (("ours", 1), ("ours, double", 2)):
        micro, steps = json.loads((folder / "settings.json").read_text())["micro"], []
        ours(folder, steps.append, name, micro=micro * times)
        found[name] = figures([{"s": m["times"]["seconds"], **step_figures(m)} for m in steps]) | {
            "losses": [[m["policy_loss"], m["value_loss"]] for m in steps]
        }
    return found


class Contender:
    """A process that does one step a line."""

    def __init__(self, name: str, folder: Path, python: Path) -> None:
        command = {
            "ours": [sys.executable, "-m", "benchmarks.ppo_speed", "--ours", str(folder)],
            "trl": [str(python), str(PEERS / "trl_ppo.py"), str(folder)],
        }[name]
        self.log = open(folder / f"{name}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=HERE.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        )
        self.name, self.steps = name, []

    def step(self) -> None:
        """One step, from the word to its line. Raises: SystemExit with what the process said, where
        it ended."""
        began = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return self.steps.append({"s": time.perf_counter() - began, **json.loads(line[5:])})
        self.log.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self.log.read()[-3000:]}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second, the share of generation, and tokens a step, without the first step."""
    kept = steps[1:]
    seconds, tokens = sum(s["s"] for s in kept), sum(s["tokens"] for s in kept)
    return {
        "tokens_per_s": tokens / seconds,
        "generation_share": sum(s["generation_s"] for s in kept) / seconds,
        "tokens_a_step": tokens / len(kept),
        "median_step_s": statistics.median(s["s"] for s in kept),
        "steps": steps,
    }


def both_in_turns(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of ours and of TRL's, step by step in turns."""
    python = args.venvs / "trl" / "bin" / "python"
    if not python.exists():
        sys.exit(f"no environment {args.venvs / 'trl'}: `make peers-venvs` makes it")
    sides = [Contender(name, folder, python) for name in NAMES]
    try:
        for k in range(args.steps):
            for side in sides[k % len(sides) :] + sides[: k % len(sides)]:
                side.step()
                time.sleep(0.2)  # what it still does after its line is its own
    finally:
        for side in sides:
            side.stop()
    return {side.name: figures(side.steps) for side in sides}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Prepare, take turns, print and write; the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--venvs", type=Path, default=Path("peers-venvs"))
    parser.add_argument("--steps", type=int, default=21, help="The first is left out.")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-6,
        help="So small that answers stay alike on all sides.",
    )
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="Ours alone: 2 steps of 8 answers.")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.ours:
        in_turns(args.ours)
        return {}
    if args.quick:
        args.steps, args.batch, args.micro, args.prompts, args.epochs = 2, 8, 4, 64, 2
        args.model, args.max_new_tokens, args.threads = "prefab-nano", 32, 1
    with tempfile.TemporaryDirectory(prefix="ppo-speed-") as place:
        folder = Path(place)
        prepare(args, folder)
        found = quick_look(folder) if args.quick else both_in_turns(args, folder)
    other = list(found)[-1]
    table(
        ["PPO", "tokens/s", f"times {other}", "generation's share", "tokens a step"],
        [
            [
                name,
                f["tokens_per_s"],
                f["tokens_per_s"] / found[other]["tokens_per_s"],
                f["generation_share"],
                f["tokens_a_step"],
            ]
            for name, f in found.items()
        ],
    )
    write(
        "ppo_speed",
        args.quick,
        arguments={k: str(v) for k, v in vars(args).items() if k not in ("ours", "venvs")},
        results=found,
    )
    return found


if __name__ == "__main__":
    main()
