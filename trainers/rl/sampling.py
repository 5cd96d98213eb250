"""The answers of a PPO or GRPO step, by the sampler that the configuration names: sampled when they
are needed, or ahead, while the step before is updated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefab.trainers import distributed
from prefab.trainers.rl import checkpoint, processes
from prefab.trainers.rl.rollout import SampledAnswer
from prefab.trainers.rl.rollout_vllm import VllmSampler
from prefab.trainers.rl.state import Run


@contextmanager
def running_sampler(t: Run) -> Iterator[None]:
    """`t.sampler` is the one that the configuration names; a server ends with the block."""
    if t.config.chosen_sampler() == "transformers":
        yield
        return
    if not distributed.is_main():
        t.sampler = processes.MainSampler(None)
        yield
        return
    found = VllmSampler(t)
    t.sampler = processes.MainSampler(found) if distributed.world_size() > 1 else found
    try:
        yield
    finally:
        found.stop()
        shutil.rmtree(found.folder, ignore_errors=True)


def step_answers(t: Run, prompts: Sequence[list[int]], step: int) -> list[SampledAnswer]:
    """Answers to prompts in this step: those sampled ahead, else by the policy as it is now."""
    answers = t.ahead() if t.ahead else None
    if answers is not None and [a.prompt for a in answers] != list(prompts):
        answers = None
    t.off_policy, t.ahead = answers is not None, None
    if answers is None:
        answers = t.sampler.sample(prompts, checkpoint.seed_step(t.config.seed, step, "sample"))
    return answers


def begin_ahead(t: Run, prompts: Sequence[list[int]]) -> None:
    """Begin to sample the next step's answers, where that is wanted. Not after the last step, and
    not where a checkpoint lies between: a run that goes on from it has no such answers.
    """
    c, step, later = t.config, t.state.step, t.state.step + 1
    if c.sample_ahead and later < c.steps and step // c.save_every == later // c.save_every:
        t.ahead = t.sampler.ahead(prompts, checkpoint.seed_step(c.seed, later, "sample"))
