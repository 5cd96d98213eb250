"""A trained reward model: one number for one answer, from a sequence-classification model with a
single label.

Its engine is `factory.engines.reward_model`. The conversation with the answer goes through the
model's own chat template once, without a generation prompt, as TRL trains reward models.
Two answers' rewards become a probability by Bradley-Terry: sigmoid(r_a - r_b).
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
from prefab.factory.spec.control_tokens import neutral_messages
from prefab.factory.tool_calls import answer_turn, message_of
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
    winner_of,
)


class RewardModelConfig(RewardEngineConfig, JudgeConfig):
    """A judge that is a trained model. `model` is a folder or a hub name; `url` a vLLM pooling
    server that runs.

    `dtype` auto is float32 on a CPU and the model's own on a GPU. `args` go to vLLM as they are.
    """

    kind: Literal["reward_model"] = "reward_model"


class RewardModelJudge(ScoreJudge[RewardModelConfig]):
    """A trained model gives one number for one answer; it needs no principle."""

    Config = RewardModelConfig
    per_principle = False
    own = True

    def own_engine(self) -> Engine:
        """The engine of the reward model, not yet started."""
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
        """The conversation that ends with the answer. No text of it becomes a control token of the
        reward model's tokenizer.
        """
        specials = reward_specials(self.config.model)
        tools = any(m.more for m in prompt.messages)
        answer = (
            message_of(answer_turn(sample.text)) if tools else Message("assistant", sample.text)
        )
        messages = neutral_messages([*prompt.messages, answer], specials)
        kwargs = self.config.ordered_kwargs()
        return Request(reward_identity(self.config), messages, Sampling(max_tokens=1), (), kwargs)

    def decode(self, use: Any, completion: Completion) -> Score:
        """The reward, or why there is none. Never raises."""
        if completion.finish == "context" or completion.finish == "refused":
            return Score(None, reason=completion.finish)
        try:
            value = float(completion.text)
        except (TypeError, ValueError):
            return Score(None, reason="parse")
        return Score(value) if math.isfinite(value) else Score(None, reason="parse")

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """P(a is preferred) = sigmoid(r_a - r_b). Source: Bradley and Terry 1952; the loss of
        reward models.
        """
        margin = a[0].known - b[0].known
        odds = math.exp(-min(abs(margin), 700.0))
        p_a = 1 / (1 + odds) if margin >= 0 else 1 - 1 / (1 + odds)
        return Verdict(p_a, winner_of(margin, 0.0, -math.inf))
