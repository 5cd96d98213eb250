"""What a PPO or GRPO run consists of: configuration, models, prompts, rewards, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefab.trainers.rl.config import GrpoConfig, PpoConfig, RlConfig
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.rewards import Scales, Source
from prefab.trainers.rl.rollout import Ahead, Prompt, Sampler


@dataclass(slots=True)
class State:
    """What a run knows beside weights and optimizer; saved with them."""

    step: int = 0
    beta: float = 0.0
    scales: Scales = field(default_factory=dict)
    bad_in_a_row: int = 0
    bad: int = 0
    unfinished_in_a_row: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    seen: list[CachedEval] = field(default_factory=list)
    stopped: str = ""
    call: int = 0  # columns that a forward's overhead is worth; 0: not measured (a CPU)


@dataclass(slots=True, kw_only=True)
class Run:
    """A run's models and data; `reference` None means the policy with its adapter off."""

    config: RlConfig
    policy: Any
    reference: Any
    tokenizer: Any
    accelerator: Any
    ends: list[int]  # the tokens that end an answer
    room: int  # tokens that a prompt may have
    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]
    sources: Sequence[Source]
    state: State
    sampler: Sampler
    ahead: Ahead | None = None  # the next step's answers, where they are sampled already
    off_policy: bool = False  # this step's were


@dataclass(slots=True, kw_only=True)
class PpoRun(Run):
    """A PPO run, with its value function and its optimizer."""

    config: PpoConfig
    critic: Any
    optimizer: Any


@dataclass(slots=True, kw_only=True)
class GrpoRun(Run):
    """A GRPO or RLOO run; TRL's trainer has the optimizer."""

    config: GrpoConfig
