"""Canaries: fixed questions that show whether a server still serves the model that it did.

A server can come back with other weights under the same name. At the start, after each outage,
every `canary_every` answers and at the end, each server is asked for what it says of its model, for
the tokens of a fixed text, and for the log-probabilities of two labels after four fixed questions.
Where these differ from those at the start, what it answered since the last check that was passed is
not to be trusted.

Limits: weights that differ little (noise of 5% on every weight of the embedded models moves the
log-probabilities by 0.13 on average) are not told apart from rounding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefab.factory.errors import EngineError
from prefab.factory.types import Message, Request, Sampling

# Questions without a right answer: neither label's probability is close to 0 or 1.
CHOICES = (
    ("tea", "coffee"),
    ("a walk by the river", "an evening with a book"),
    ("the window seat", "the aisle seat"),
    ("four", "several"),
)
LABELS = ("A", "B")
TEXT = (
    "Zwölf Boxkämpfer: 3.14159, naïve façade, \U0001f980 + ≠ [INST] <|end|>\n\tdef f(x): return x"
)
# Of the mean difference of log-probabilities. Measured on the embedded models: 0.015 between bf16
# and float32, 0 between batches of 1 and 64, and 1.3 between the two models. Logits of large models
# are rounded to steps of up to 0.125 in bf16.
TOLERANCE = 0.25
LEAST_LOGP = -12.0  # below, the noise of rounding grows


def questions(model: str, kwargs: tuple[tuple[str, Any], ...] = ()) -> list[Request]:
    """The label reads. `kwargs` are those of the chat template (no thinking, for example)."""
    system = Message("system", "Answer with one letter and nothing else.")
    return [
        Request(
            model,
            (system, Message("user", f"Which do you prefer?\nA: {a}\nB: {b}")),
            Sampling(1),
            LABELS,
            kwargs,
        )
        for a, b in CHOICES
    ]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a server shows of its model: what it says of itself (name, folder, context length), the
    token ids of a fixed text, and a mapping from label to log-probability for each question. What
    cannot be asked is empty, and is not compared.
    """

    served: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    logps: tuple[Mapping[str, float], ...] = ()


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """In what two fingerprints differ more than by rounding; "" where they do not."""
    for name in before.served.keys() & now.served.keys():
        if before.served[name] != now.served[name]:
            return f"its {name} is {now.served[name]!r}, and was {before.served[name]!r}"
    if before.tokens and now.tokens and before.tokens != now.tokens:
        return "its tokenizer gives other tokens for a fixed text"
    moved = [
        abs(max(old[label], LEAST_LOGP) - max(new[label], LEAST_LOGP))
        for old, new in zip(before.logps, now.logps, strict=False)
        for label in old.keys() & new.keys()
    ]
    mean = sum(moved) / len(moved) if moved else 0.0
    if mean > TOLERANCE:
        return (
            f"its log-probabilities for fixed questions moved by {mean:.2f} on average "
            f"(rounding moves them by less than {TOLERANCE})"
        )
    return ""


class Canary:
    """The checks of one server.

    Args:
        ask: Takes a fingerprint. Raises: TransportError, EngineError.
        every: Answers from one check to the next; 0 checks nothing.
        comebacks: How often the server was down and came back so far.
        failed: Told once, with what is wrong and the time (seconds since 1970) at which the last
            check that was passed began: answers since then are not to be trusted.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Fingerprint]],
        every: int,
        comebacks: Callable[[], int],
        failed: Callable[[str, float], str],
    ) -> None:
        self._ask, self.every, self._comebacks, self._failed = ask, every, comebacks, failed
        self.first: Fingerprint | None = None
        self.good_at = time.time()
        self.problem = ""
        self._answers = self._seen = 0
        self._task: asyncio.Task[None] | None = None

    def answered(self) -> None:
        """Count an answer, and begin a check where one is due.

        Raises: EngineError when a check has found another model: the answer is not to be used.
        """
        if self.problem:
            raise EngineError(self.problem)
        if self.first is None or not self.every:
            return
        self._answers += 1
        if self._answers >= self.every or self._comebacks() != self._seen:
            self._answers, self._seen = 0, self._comebacks()
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._quiet_check())

    def expect(self, first: Fingerprint) -> None:
        """Compare this server, which cannot be asked now, with another one's model; its first
        answer begins a check.
        """
        self.first, self._answers = first, self.every

    async def check(self) -> None:
        """Compare the server with what it was at the first check.

        Raises: EngineError when it serves another model; TransportError when it does not answer.
        """
        if not self.every:
            return
        began = time.time()
        now = await self._ask()
        if self.first is None:
            self.first = now
        elif wrong := difference(self.first, now):
            self.problem = self.problem or self._failed(wrong, self.good_at)
            raise EngineError(self.problem)
        self.good_at = began

    async def _quiet_check(self) -> None:
        """A check whose outcome the next answer meets; one that got no answer is made again."""
        try:
            await self.check()
        except EngineError:
            self._answers = self.every

    async def finish(self, within_s: float = 10.0) -> None:
        """The check that is under way, and a last one where answers came since: what follows the
        last check is otherwise not known to be of the same model. Raises: EngineError.
        """
        if self._task is not None and not self._task.done():
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), within_s)
        if self.first is not None and self._answers and not self.problem:
            with suppress(TimeoutError, EngineError):
                await asyncio.wait_for(self.check(), within_s)
        if self.problem:
            raise EngineError(self.problem)
