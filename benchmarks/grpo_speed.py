"""A step of our GRPO against one of TRL's GRPOTrainer on a CPU: same model, prompts, reward, batch
and precision (fp32).

    python -m benchmarks.grpo_speed
    python -m benchmarks.grpo_speed --quick       # a smaller model, 2 rounds: does it work?

All contenders are in one process and take a step each in turns, so that whatever else the machine
does falls on all alike; CPU seconds of one thread, and their median over the rounds, without the
first. A step is all of it: sampling, scoring, one update. The answers differ by chance, so figures
are given a token too. TRL is taken as it comes, without gradient checkpointing, and with as many
answers sampled at once. `in tiles` never has all logits in memory: what a large vocabulary needs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import table, write
from benchmarks.gpu_ppo import reward

TRL, OURS, TILES = "TRL 1.16", "ours", "ours, in tiles"
TILE = 2**18  # numbers in a tile of logits, of the contender in tiles


class Clock:
    """CPU seconds of each step, and of its sampling, and the tokens that it sampled."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.began, self.sampling_s, self.tokens = 0.0, 0.0, 0

    def timed(self, sample: Callable[..., Any], lengths: Callable[[Any], list[int]]) -> Any:
        """`sample` with its seconds and tokens added up."""

        def wrapped(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            found = sample(*args, **more)
            self.sampling_s += time.process_time() - began
            self.tokens += sum(lengths(found))
            return found

        return wrapped

    def start(self) -> None:
        """A step begins."""
        self.began, self.sampling_s, self.tokens = time.process_time(), 0.0, 0

    def stop(self) -> None:
        """The step is done."""
        s = time.process_time() - self.began
        self.steps.append({"s": s, "sampling_s": self.sampling_s, "tokens": self.tokens})


@contextmanager
def tile(numbers: int) -> Iterator[None]:
    """Tiles of logits hold so many numbers."""
    from prefab.trainers import collate

    before, collate.LOGITS_AT_ONCE = collate.LOGITS_AT_ONCE, numbers
    try:
        yield
    finally:
        collate.LOGITS_AT_ONCE = before


def ours(model: str, turns: list[Any], s: argparse.Namespace, out: Path) -> Callable[[], Clock]:
    """A function that does our next step; gives the clock of all of them."""
    from prefab.trainers.rl import grpo, loop, rewards

    config = grpo.GrpoConfig(
        model=model,
        out=str(out),
        steps=s.rounds,
        batch_size=s.batch,
        group=s.group,
        micro_batch=s.micro,
        sample_batch=s.batch,
        max_new_tokens=s.max_new_tokens,
        sampler="transformers",
        learning_rate=s.learning_rate,
        kl_stop=None,
        normalise="none",
        unfinished_score=None,
        threads=1,
    )
    t, clock = grpo.prepare_run(config, turns, rewards.single(reward)), Clock()
    sample = clock.timed(t.sampler.sample, lambda answers: [len(a.ids) for a in answers])

    class Timed:
        """The run's sampler, timed."""

        def sample(self, *args: Any) -> Any:
            """See `rollout.Sampler`."""
            return sample(*args)

        def check(self, gap: float) -> None:
            """See `rollout.Sampler`."""

    t.sampler = Timed()  # type: ignore[assignment]

    def step() -> Clock:
        clock.start()
        loop.step(t)
        clock.stop()
        return clock

    return step


def in_turns(model: str, turns: list[Any], s: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The clocks' steps by contender: TRL's trainer runs, and after each of its steps ours."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    whole, tiled = (ours(model, turns, s, folder / name) for name in ("ours", "tiles"))
    clock, found = Clock(), {}

    class Turns(TrainerCallback):
        """After a step of TRL's, one of each of ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """See transformers."""
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """See transformers."""
            clock.stop()
            found.update({TRL: clock.steps, OURS: whole().steps})
            with tile(TILE):
                found[TILES] = tiled().steps

    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=s.rounds,
        per_device_train_batch_size=s.micro,
        gradient_accumulation_steps=s.batch // s.micro,
        num_generations=s.group,
        max_completion_length=s.max_new_tokens,
        temperature=1.0,
        learning_rate=s.learning_rate,
        beta=0.05,
        scale_rewards="none",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        callbacks=[Turns()],
        train_dataset=Dataset.from_list([{"prompt": row} for row in turns]),
    )
    trainer._generate_single_turn = clock.timed(
        trainer._generate_single_turn, lambda found: [len(ids) for ids in found[0]]
    )
    trainer.train()
    return found


def figures(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of all steps but the first: CPU seconds, of them sampling, and tokens a CPU second of
    the whole step, of its sampling and of the rest.
    """

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(value, steps[1:]))

    return {
        "step_cpu_s": median(lambda x: x["s"]),
        "sampling_cpu_s": median(lambda x: x["sampling_s"]),
        "tokens_a_step": median(lambda x: x["tokens"]),
        "tokens_per_cpu_s": median(lambda x: x["tokens"] / x["s"]),
        "sampled_tokens_per_cpu_s": median(lambda x: x["tokens"] / x["sampling_s"]),
        "updated_tokens_per_cpu_s": median(lambda x: x["tokens"] / (x["s"] - x["sampling_s"])),
        "steps": steps,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Take turns, print and write; the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--rounds", type=int, default=6, help="The first is left out.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument(
        "--learning-rate", type=float, default=1e-6, help="So small that answers stay alike."
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds of 8 short answers.")
    s = parser.parse_args(arguments)
    if s.quick:
        s.model, s.rounds, s.batch, s.micro, s.group = "prefab-nano", 2, 8, 4, 4
        s.max_new_tokens = 16
    import torch

    from prefab.factory.engines.base import resolve_model
    from prefab.factory.microworld import grammar

    torch.set_num_threads(1)
    turns = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", s.rounds * s.batch // s.group, 3)
    ]
    with tempfile.TemporaryDirectory(prefix="grpo-speed-") as place:
        steps = in_turns(resolve_model(s.model), turns, s, Path(place))
    found = {name: figures(steps[name]) for name in (OURS, TILES, TRL)}
    names = ("tokens_per_cpu_s", "sampled_tokens_per_cpu_s", "updated_tokens_per_cpu_s")
    base = found[TRL]
    table(
        ["GRPO, tokens a CPU second", "whole step", "sampling", "the rest", "times TRL"],
        [
            [name, *(f[key] for key in names), f[names[0]] / base[names[0]]]
            for name, f in found.items()
        ],
    )
    arguments_ = {key: str(value) for key, value in vars(s).items()}
    write("grpo_speed", s.quick, arguments=arguments_, results=found)
    return found


if __name__ == "__main__":
    main()
