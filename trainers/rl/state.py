"""What a run of PPO, GRPO or RLOO consists of: configuration, models, prompts, rewards, its state,
the answers of a step, and what its method adds to the shared loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefab.trainers.rl.batches import Packed
from prefab.trainers.rl.config import GrpoConfig, PpoConfig, RlConfig
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.rewards import Scales, Source
from prefab.trainers.rl.rollout import Ahead, Prompt, SampledAnswer, Sampler

if TYPE_CHECKING:
    from torch import Tensor


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
class Batch:
    """Answers of one step and what the update needs of them: B T, left-aligned, padded to the
    longest answer. Log-probabilities are those before the update.

    Attributes:
        advantages: B T; of a method that takes whole answers, B 1.
        values, returns: B T, where there is a value function.
        sums: What the loss reports, where the step's only gradient is already computed, by the
            forward that log-probabilities and entropies were taken from.
    """

    answers: list[SampledAnswer]
    mask: Tensor
    logps: Tensor
    reference: Tensor
    entropy: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    sums: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """What PPO, GRPO and RLOO differ in.

    Attributes:
        name: What its steps are called in the store's evaluations.
        stage: The stage of `prefab train`.
        whole_answers: Whether ratio and advantage are those of whole answers, and the loss a mean
            over answers; else over tokens.
        scores_alone: Whether advantages follow from scores alone. A step of one update then needs
            no forward of the policy before it: the loss fills in the batch's log-probabilities and
            entropies where `loop.in_one_pass`.
        advantages: Of a batch whose log-probabilities are known (unless `scores_alone`), its
            scores, and the group of each answer; may add returns to the batch and metrics to the
            dictionary. B T or B 1.
        loss: Of some rows of a batch, packed: (the loss to minimise, summed over tokens or answers;
            the sums that are reported, in the order of `reported`).
        reported: Names of those sums, which are divided as the loss is.
    """

    name: str
    stage: str
    whole_answers: bool
    scores_alone: bool
    advantages: Callable[[Any, Batch, Sequence[float], Sequence[int], dict[str, Any]], Tensor]
    loss: Callable[[Any, Batch, Tensor, Packed], tuple[Tensor, tuple[Tensor, ...]]]
    reported: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Run:
    """A run's models and data; `reference` None means the policy with its adapter off, `critic`
    None that there is no value function.
    """

    method: Method
    config: RlConfig
    policy: Any
    reference: Any
    critic: Any
    optimizer: Any
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
    """A PPO run."""

    config: PpoConfig


@dataclass(slots=True, kw_only=True)
class GrpoRun(Run):
    """A GRPO or RLOO run."""

    config: GrpoConfig
