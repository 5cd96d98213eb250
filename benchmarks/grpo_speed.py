"""A step of our GRPO against one of TRL's GRPOTrainer on a CPU: same model, prompts, reward, batch
and precision (fp32).

    python -m benchmarks.grpo_speed
    python -m benchmarks.grpo_speed --shared      # prompts and answers of several lengths
    python -m benchmarks.grpo_speed --quick       # a smaller model, 2 rounds: does it work?

All contenders are in one process and take a step each in turns, so that whatever else the machine
does falls on all alike; CPU seconds of one thread, and their median over the rounds, without the
first. A step is all of it: sampling, scoring, one update. The answers differ by chance, so figures
are given a token too. TRL is taken as it comes, without gradient checkpointing, and with as many
answers sampled at once. `in tiles` never has all logits in memory: what a large vocabulary needs.
`prompts apart` computes a prompt for each of its answers, as TRL does.

`--shared` compares our step with prompts computed once and with prompts apart, for prompts and
answers of several lengths: the whole step, and the update alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import table, write
from benchmarks.gpu_ppo import reward

TRL, OURS, TILES, APART = "TRL 1.16", "ours", "ours, in tiles", "ours, prompts apart"
PROMPTS, ANSWERS = (30, 200, 600), (32, 128)  # tokens of prompts and answers of `--shared`
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


@contextmanager
def apart() -> Iterator[None]:
    """No prompt is computed once for several answers."""
    from prefab.trainers.rl import rollout

    before, rollout.can_share = rollout.can_share, lambda _: False
    try:
        yield
    finally:
        rollout.can_share = before


def ours(
    model: str, turns: list[Any], s: argparse.Namespace, out: Path, prompt: int | None = None
) -> Callable[[], Clock]:
    """A function that does our next step; gives the clock of all of them. With `prompt` all prompts
    have so many tokens, and all answers as many as they may.
    """
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
    if prompt is not None:
        t.prompt_ids = [(ids * -(-prompt // len(ids)))[-prompt:] for ids in t.prompt_ids]
        t.ends[:] = [-1]  # the sampler's too
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

    conditions = {OURS: nullcontext, TILES: partial(tile, TILE), APART: apart}
    steps = {name: ours(model, turns, s, folder / str(k)) for k, name in enumerate(conditions)}
    clock, found = Clock(), {}

    class Turns(TrainerCallback):
        """After a step of TRL's, one of each of ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """See transformers."""
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """See transformers."""
            clock.stop()
            found[TRL] = clock.steps
            for name, condition in conditions.items():
                with condition():
                    found[name] = steps[name]().steps

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


@contextmanager
def timed_updates() -> Iterator[list[float]]:
    """CPU seconds of each update's forwards and backwards."""
    from prefab.trainers.rl import loop

    gradient, seconds = loop._gradient, list[float]()

    def timed(*args: Any) -> dict[str, float]:
        began = time.process_time()
        found = gradient(*args)
        seconds.append(time.process_time() - began)
        return found

    loop._gradient = timed
    try:
        yield seconds
    finally:
        loop._gradient = gradient


def by_lengths(model: str, turns: list[Any], s: argparse.Namespace, folder: Path) -> Any:
    """Our steps by (tokens of prompts, of answers) and contender, which take turns."""
    found = []
    for prompt, answer in product(s.prompts, s.answers):
        settings = argparse.Namespace(**{**vars(s), "max_new_tokens": answer})
        place = folder / f"{prompt}-{answer}"
        steps = {
            name: ours(model, turns, settings, place / str(k), prompt)
            for k, name in enumerate((OURS, APART))
        }
        seen: dict[str, Any] = {}
        with timed_updates() as updates:
            for _ in range(s.rounds):
                for name, step in steps.items():
                    with apart() if name == APART else nullcontext():
                        seen[name] = step().steps
                    seen[name][-1]["update_s"] = updates.pop()
        medians = {
            name: {key: statistics.median(x[key] for x in of[1:]) for key in of[0]}
            for name, of in seen.items()
        }
        times = {key: medians[APART][key] / medians[OURS][key] for key in medians[OURS]}
        found.append({"prompt": prompt, "answer": answer, **medians, "times": times})
        print(f"{prompt} and {answer} tokens: {times['s']:.2f} times as fast", flush=True)
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
    parser.add_argument("--shared", action="store_true", help="Without TRL, by lengths.")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="Of --shared.")
    parser.add_argument("--answers", type=int, nargs="+", default=ANSWERS, help="Of --shared.")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 8 short answers.")
    s = parser.parse_args(arguments)
    if s.quick:
        s.model, s.rounds, s.batch, s.micro, s.group = "prefab-nano", 2, 8, 4, 4
        s.max_new_tokens, s.prompts, s.answers = 16, (60,), (8,)
    import torch

    from prefab.factory.engines.base import resolve_model
    from prefab.factory.microworld import grammar

    torch.set_num_threads(1)
    turns = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", s.rounds * s.batch // s.group, 3)
    ]
    with tempfile.TemporaryDirectory(prefix="grpo-speed-") as place:
        take = by_lengths if s.shared else in_turns
        steps = take(resolve_model(s.model), turns, s, Path(place))
    arguments_ = {key: str(value) for key, value in vars(s).items()}
    if s.shared:
        names_ = ("s", "sampling_s", "update_s")
        table(
            [
                "prompt",
                "answer",
                *(f"{n}, {k}" for n in ("step", "sampling", "update") for k in ("apart", "times")),
            ],
            [
                [
                    row["prompt"],
                    row["answer"],
                    *(x[key] for key in names_ for x in (row[APART], row["times"])),
                ]
                for row in steps
            ],
        )
        write("grpo_shared_prompts", s.quick, arguments=arguments_, results=steps)
        return {"shared": steps}
    found = {name: figures(steps[name]) for name in (OURS, TILES, APART, TRL)}
    names = ("tokens_per_cpu_s", "sampled_tokens_per_cpu_s", "updated_tokens_per_cpu_s")
    base = found[TRL]
    table(
        ["GRPO, tokens a CPU second", "whole step", "sampling", "the rest", "times TRL"],
        [
            [name, *(f[key] for key in names), f[names[0]] / base[names[0]]]
            for name, f in found.items()
        ],
    )
    write("grpo_speed", s.quick, arguments=arguments_, results=found)
    return found


if __name__ == "__main__":
    main()
