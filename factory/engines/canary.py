"""Canaries: fixed questions that show whether a server still serves the model that it did.

A server can come back with other weights under the same name. At the start, after each outage,
every `canary_every` answers and at the end, each server is asked for the log-probabilities of two
labels after four fixed questions; a vLLM server also for what it says of its model, and for the
tokens of a fixed text. Where these differ from those at the start, what it answered since the last
check that was passed is not to be trusted. The first fingerprint of a model is kept in the store's
ledger, and the next run's is compared with it.

Limits: weights that differ little (noise of 5% on every weight of the embedded models moves the
log-probabilities by 0.13 on average) are not told apart from rounding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prefab.factory.errors import EngineError
from prefab.factory.numbers import counted
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
NOISE = 4.0  # times the difference of two readings at the start, where that is more than TOLERANCE


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
    cannot be asked is empty, and is not compared. `noise`: how much two readings at the start
    differed, where it was read twice.
    """

    served: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    logps: tuple[Mapping[str, float], ...] = ()
    noise: float = 0.0

    def data(self) -> dict[str, Any]:
        """What stays the same from run to run, as a JSON object: not the server's names for it."""
        logps = [dict(one) for one in self.logps]
        return {"tokens": list(self.tokens), "logps": logps, "noise": self.noise}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint that `data` gave."""
        return cls({}, tuple(data["tokens"]), tuple(data["logps"]), data["noise"])


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """In what two fingerprints differ more than by rounding; "" where they do not."""
    for name in before.served.keys() & now.served.keys():
        if before.served[name] != now.served[name]:
            return f"its {name} is {now.served[name]!r}, and was {before.served[name]!r}"
    if before.tokens and now.tokens and before.tokens != now.tokens:
        return "its tokenizer gives other tokens for a fixed text"
    mean, most = moved(before, now), max(TOLERANCE, NOISE * before.noise)
    if mean > most:
        return (
            f"its log-probabilities for fixed questions moved by {mean:.2f} on average "
            f"(rounding moves them by less than {most:.2f})"
        )
    return ""


def moved(before: Fingerprint, now: Fingerprint) -> float:
    """By how much the log-probabilities of two fingerprints differ on average."""
    found = [
        abs(max(old[label], LEAST_LOGP) - max(new[label], LEAST_LOGP))
        for old, new in zip(before.logps, now.logps, strict=False)
        for label in old.keys() & new.keys()
    ]
    return sum(found) / len(found) if found else 0.0


async def first_checks(
    engine: str, checks: Mapping[str, Canary], earlier: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The first check of each server of an engine, by address; all must serve one model, that of
    earlier runs. One that is down, or refuses, is compared with the others when it comes back.

    Args:
        engine: Its name.
        checks: The servers' checks.
        earlier: `data` of the fingerprint that an earlier run with this store took; empty for none.

    Returns:
        This run's, empty when nothing could be asked.

    Raises:
        EngineError: A server serves another model.
    """
    await asyncio.gather(*map(_checked, checks.values()))
    known = next((check.first for check in checks.values() if check.first is not None), None)
    if known is None:
        return {}
    for url, check in checks.items():
        if check.first is None:
            check.expect(known)
        elif wrong := difference(known, check.first):
            raise EngineError(
                f"engines.{engine}: {url} serves another model than the others: {wrong}"
            )
    if earlier and (wrong := difference(Fingerprint.of(earlier), known)):
        raise EngineError(
            f"engines.{engine}: {next(iter(checks))} does not serve the model that answered in "
            f"this store before: {wrong}. Serve that model, or change `revision` to ask another "
            "model everything anew; `canary_every: 0` compares nothing"
        )
    return known.data()


async def _checked(check: Canary) -> None:
    """Check a server where it answers."""
    with suppress(EngineError):
        await check.check()


def other_model(engine: str, url: str, wrong: str, since: float, count: int) -> str:
    """What to say when a server serves another model: `count` answers since a time were set
    aside.
    """
    at = time.strftime("%H:%M:%S", time.localtime(since))
    return (
        f"engines.{engine}: {url} no longer serves the model that it did: {wrong}. "
        f"{counted(count, 'answer')} since {at} set aside, to be asked again. Serve the right "
        "model there and run the same command; for another model, change `revision`"
    )


class Canary:
    """The checks of one server.

    Args:
        ask: Takes a fingerprint. Raises: TransportError, EngineError.
        every: Answers from one check to the next; 0 checks nothing.
        comebacks: How often the server was down and came back so far.
        failed: Told once, with what is wrong and the time (seconds since 1970) at which the last
            check that was passed began: answers since then are not to be trusted.
        twice: Whether the first fingerprint is taken twice, to learn how much the server's
            log-probabilities differ from one request to the next.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Fingerprint]],
        every: int,
        comebacks: Callable[[], int],
        failed: Callable[[str, float], str],
        twice: bool = False,
    ) -> None:
        self.noise = None if twice else 0.0  # None: not known yet
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
            if self.noise is None:
                self.noise = moved(now, await self._ask()) if now.logps else 0.0
            self.first = replace(now, noise=self.noise)
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
