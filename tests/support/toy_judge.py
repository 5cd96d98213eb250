"""A kind of judge as another package would write it: a grade from 1 to 9, without a template."""

from typing import Literal

from prefab.factory.types import Message
from prefab.judges.base import (
    JudgeConfig,
    ScoreJudge,
    candidate,
    label_request,
    label_score,
    scale_verdict,
    spellings,
)

GRADES = spellings([str(i) for i in range(1, 10)])
VALUES = [i / 8 for i in range(9)]


class ToyConfig(JudgeConfig):
    """Grades an answer; `politely` has no meaning but to be a field of this kind."""

    kind: Literal["toy"] = "toy"
    politely: bool = False


class ToyJudge(ScoreJudge[ToyConfig]):
    """One label read an answer and principle."""

    Config = ToyConfig
    rewards = True

    def labels(self):
        """The grades, in every spelling."""
        return tuple(GRADES)

    def request(self, prompt, sample, principle, line, repeat, context):
        """The answer, to be graded under one principle."""
        text = candidate(prompt.messages, sample.text, context.specials)
        messages = (Message("user", f"{principle.criterion}\nGrade this from 1 to 9: {text}"),)
        return label_request(context.model, messages, GRADES, self.config, repeat)

    def decode(self, use, completion):
        """The expected grade, from 0 to 1."""
        return label_score(completion, GRADES, VALUES, self.config.min_label_mass)

    def compare(self, a, b, lines):
        """The better grade wins."""
        return scale_verdict(a[0], b[0])
