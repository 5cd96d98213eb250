"""A trained reward model: one number for one answer, from a sequence-classification model with a
single label.

Served in this process by transformers, or by vLLM's pooling runner. The conversation with the
answer goes through the model's own chat template once, without a generation prompt, as TRL trains
reward models. Two answers' rewards become a probability by Bradley-Terry: sigmoid(r_a - r_b).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from prefab.factory.engines.reward_model import (
    RewardEngineConfig,
    reward_engine,
    reward_identity,
    reward_specials,
)
from prefab.factory.spec.templates import neutralise
from prefab.factory.types import (
    Completion,
    Engine,
    Message,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    Verdict,
)
from prefab.judges.base import (
    JudgeConfig,
    RequestContext,
    RubricLines,
    Score,
    ScoreJudge,
    kwargs_of,
)

PARSER_VERSION = 1


class RewardModelConfig(RewardEngineConfig, JudgeConfig):
    """A judge that is a trained model. `model` is a folder or a hub name; `url` a vLLM pooling
    server that runs.

    `dtype` auto is float32 on a CPU and the model's own on a GPU. `args` go to vLLM as they are.
    """

    kind: Literal["reward_model"] = "reward_model"


def request(
    config: RewardModelConfig,
    prompt: Prompt,
    sample: Sample,
    repeat: int = 0,
    specials: tuple[str, ...] | None = None,
) -> Request:
    """The conversation that ends with the answer. No text of it becomes a control token of the
    model's.
    """
    specials = reward_specials(config.model) if specials is None else specials
    turns = [*prompt.messages, Message("assistant", sample.text)]
    messages = tuple(Message(m.role, neutralise(m.content, specials)) for m in turns)
    return Request(
        reward_identity(config),
        messages,
        Sampling(max_tokens=1),
        (),
        kwargs_of(config),
        (repeat,) if repeat else (),
    )


def parse(completion: Completion, config: RewardModelConfig | None = None) -> Score:
    """The reward, or why there is none. Never raises."""
    if completion.finish in ("context", "refused"):
        return Score(None, reason=completion.finish)
    try:
        value = float(completion.text)
    except (TypeError, ValueError):
        return Score(None, reason="parse")
    return Score(value) if math.isfinite(value) else Score(None, reason="parse")


def verdict(a: Score, b: Score, config: RewardModelConfig | None = None) -> Verdict:
    """P(a is preferred) = sigmoid(r_a - r_b). Source: Bradley and Terry 1952; the loss of reward
    models.
    """
    if a.value is None or b.value is None:
        return Verdict(None, None, a.reason or b.reason or "parse")
    margin = a.value - b.value
    p_a = (
        1 / (1 + math.exp(-margin)) if margin >= 0 else 1 - 1 / (1 + math.exp(max(margin, -700.0)))
    )
    return Verdict(p_a, "tie" if margin == 0 else "a" if margin > 0 else "b")


class RewardModelJudge(ScoreJudge[RewardModelConfig]):
    """A trained model gives one number for one answer."""

    Config = RewardModelConfig
    PARSER_VERSION = PARSER_VERSION
    per_principle = False
    own = True

    def own_engine(self) -> Engine:
        """The engine that answers it, not yet started."""
        return reward_engine(self.config)

    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The question about one answer; it needs no principle."""
        return request(self.config, prompt, sample)

    def decode(self, use: Any, completion: Completion) -> Score:
        """The score."""
        return parse(completion, self.config)

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """Two answers' scores as a verdict."""
        return verdict(a[0], b[0], self.config)
