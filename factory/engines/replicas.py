"""The servers that answer for one engine: which of them is asked, what is done when one is down,
slow or refuses, and what is said of it.

A failure of a server is told from a failure of a question. A server that had answered and is down
is waited for, and its questions lose no retries; one that refuses what the others take is left out
for a while; a question that all of them refuse is that question's own failure, and the run goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from prefab.factory.engines.http import (
    BACKOFF_S,
    Denied,
    HttpClient,
    HttpConfig,
    Pace,
    ServerDown,
)
from prefab.factory.engines.prefix_router import PrefixRouter
from prefab.factory.errors import RequestRefused, TransportError
from prefab.factory.types import Message, ServerReport

T = TypeVar("T")
LOOK_EVERY_S = 0.5  # while waiting for a server, whether another question got an answer
SAY_AFTER_S = 5.0  # an outage that ends before is not worth a notice
OUT_S, MOST_OUT_S = 15.0, 300.0  # how long a server that refuses or fails is left out
# so many questions refused in a row, and no answer: it is the server, not the questions
DENIED_IN_A_ROW = 20
FAILED_IN_A_ROW = 3  # of a server beside others, until it is left out
LEAST_COMEBACKS = 3  # of a server under one question, until it is the question that ends it
SLOW = 2.0  # times the others' time; less is chance, and a prefix cache
HEDGE_FLOOR_S = 0.25  # a second request is not worth it before
HEDGES = 0.05  # of a server's calls are asked of another one too, at most


@dataclass(slots=True)
class Replica:
    """One server: what it did, and until when it is left out. `slowness` is its time for a
    question as a multiple of all servers' together.
    """

    server: HttpClient
    calls: int = 0
    failures: int = 0
    hedged: int = 0
    in_flight: int = 0
    in_a_row: int = 0  # failures since its last answer
    slowness: float = 1.0
    out_until: float = 0.0
    out_s: float = 0.0
    reason: str = ""
    told: bool = field(default=False)  # that it is left out or down

    def usable(self, now: float) -> bool:
        """Whether it may be asked now; one that is down, when it is time to try it again."""
        return now >= self.out_until and self.server.health.may_try()

    def report(self) -> ServerReport:
        """What a run says of it at its end."""
        state = "answers"
        if self.server.health.down:
            state = f"down: {self.server.health.reason}"
        elif time.monotonic() < self.out_until:
            state = f"left out: {self.reason}"
        elif self.slowness >= SLOW:
            state = f"{self.slowness:.1f} times slower than the others"
        return ServerReport(
            self.server.url, self.calls, self.failures, self.hedged, state, self.server.retries
        )


class Replicas:
    """Asks one of several servers that serve the same model, or the only one.

    Args:
        servers: Their clients.
        config: `retries` for each question, and `outage_s`, how long a server that had answered is
            waited for.
        tell: Where notices for people go.
    """

    def __init__(
        self, servers: Sequence[HttpClient], config: HttpConfig, tell: Callable[[str], None]
    ) -> None:
        self.all, self.config, self.tell = [Replica(s) for s in servers], config, tell
        self._router = PrefixRouter(max(1, len(servers)))
        self._paces: dict[Hashable, Pace] = {}
        for server in servers:
            server.grouped, server.alone = True, len(servers) == 1

    def add(self, server: HttpClient) -> None:
        """Ask this server, too, from now on."""
        self.all.append(Replica(server))
        self._router.add()
        for replica in self.all:
            replica.server.grouped, replica.server.alone = True, len(self.all) == 1

    async def ask(
        self,
        messages: Sequence[Message],
        call: Callable[[int], Awaitable[T]],
        kind: Hashable = None,
    ) -> T:
        """What `call` gives for one of the servers, named by its index.

        Args:
            messages: Decide which server has their prefix in its cache.
            call: Asks the server with this index.
            kind: Questions of one kind take about the same time.

        Raises:
            TransportError: No answer came after all retries, or the wait for a server that is down
                was over.
            RequestRefused: Every server refuses this question for good.
            EngineError: Every server refuses every question.
        """
        attempt = _Attempt(self.config.retries)
        while True:
            at = self._pick(messages, attempt.tried)
            if at is None:
                await self._wait(attempt)
                continue
            replica = self.all[at]
            try:
                return await self._hedged(at, messages, call, kind, attempt)
            except RequestRefused:
                raise
            except Denied as error:
                self._denied(replica, error, attempt)
            except ServerDown as error:
                if error.asked:
                    attempt.down(error, replica.server.health.comebacks)
                self._say_down(replica)
            except TransportError as error:
                if len(self.all) == 1:
                    raise
                self._failed(replica, str(error))
                attempt.failed(at, error)
            await attempt.next_round(len(self.all))

    async def _hedged(
        self,
        at: int,
        messages: Sequence[Message],
        call: Callable[[int], Awaitable[T]],
        kind: Hashable,
        attempt: _Attempt,
    ) -> T:
        """Ask server `at`; where it takes longer than 99 of 100 questions of this kind did, another
        one too: the first answer is taken, and the other request is given up.
        """
        if len(self.all) == 1:
            return await self._counted(at, call, kind)
        pace, replica = self._paces.get(kind), self.all[at]
        first = self._send(at, call, kind)
        second: asyncio.Future[T] | None = None
        try:
            if pace is not None and pace.p99_s is not None:
                after_s = max(HEDGE_FLOOR_S, pace.p99_s)
                await asyncio.wait((first,), timeout=after_s)
                may = not first.done() and replica.hedged <= HEDGES * replica.calls
                other = self._pick(messages, {*attempt.tried, at}) if may else None
                if other is not None:
                    replica.hedged += 1
                    second = self._send(other, call, kind)
                    await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
                    if _failed(first):
                        await asyncio.wait((second,))
                    if second.done() and not _failed(second):
                        self._slower(replica, 2 * after_s, pace)
                        return second.result()
            return await first
        finally:
            for future in filter(None, (first, second)):
                future.cancel()

    def _send(
        self, at: int, call: Callable[[int], Awaitable[T]], kind: Hashable
    ) -> asyncio.Future[T]:
        """Begin to ask server `at`, which counts at once: others are asked in the same turn."""
        replica = self.all[at]
        replica.in_flight += 1

        def ended(_: asyncio.Future[T]) -> None:
            replica.in_flight -= 1

        future = asyncio.ensure_future(self._counted(at, call, kind))
        future.add_done_callback(ended)
        return future

    async def _counted(self, at: int, call: Callable[[int], Awaitable[T]], kind: Hashable) -> T:
        replica = self.all[at]
        began = time.monotonic()
        try:
            found = await call(at)
        except (TransportError, Denied) as error:
            replica.failures += not isinstance(error, RequestRefused)
            raise
        replica.calls += 1
        if replica.in_a_row or replica.told:
            self._answers(replica)
        if len(self.all) > 1:
            self._took(replica, kind, time.monotonic() - began)
        return found

    def _took(self, replica: Replica, kind: Hashable, took_s: float) -> None:
        pace = self._paces.get(kind)
        if pace is None:
            pace = self._paces[kind] = Pace()
        pace.took(took_s)
        self._slower(replica, took_s, pace)

    def _slower(self, replica: Replica, took_s: float, pace: Pace) -> None:
        if pace.mean_s:
            replica.slowness += 0.05 * (took_s / pace.mean_s - replica.slowness)

    def _pick(self, messages: Sequence[Message], tried: set[int]) -> int | None:
        """The server to ask; None when there is none to ask now. Slow ones count as busier."""
        if len(self.all) == 1:
            return 0 if self.all[0].server.health.may_try() else None
        now = time.monotonic()
        usable = [i for i, r in enumerate(self.all) if i not in tried and r.usable(now)]
        if not usable:
            return None
        best = min(self.all[i].slowness for i in usable)
        load: list[float] = [
            r.in_flight * (r.slowness / best if r.slowness > SLOW * best else 1.0) for r in self.all
        ]
        return self._router.pick(messages, load, usable)

    async def _wait(self, attempt: _Attempt) -> None:
        """Until a server may be asked again. Raises: as `_give_up`."""
        now = time.monotonic()
        others = bool(attempt.tried) and any(r.usable(now) for r in self.all)
        attempt.tried.clear()
        if not others:
            self._give_up(attempt, now)
            for replica in self.all:
                self._say_down(replica)
            await asyncio.sleep(LOOK_EVERY_S)

    def _give_up(self, attempt: _Attempt, now: float) -> None:
        """Raises: an error when no server had answered before, when ours has died, when the wait
        was over, or when all refuse.
        """
        servers = [r.server for r in self.all]
        healths = [s.health for s in servers]
        if died := next((d for s in servers if (d := s.why_down())), None):
            raise TransportError(died)
        if all(h.down for h in healths):
            if not any(h.answered for h in healths):
                raise ServerDown(healths[0].words(servers[0].url))
            waited_s = now - max(h.since for h in healths)
            if waited_s >= self.config.outage_s:
                raise TransportError(
                    f"{servers[0].url} has not answered for {waited_s:.0f} s "
                    f"({healths[0].reason}); the wait for it (`outage_s`) is over"
                )
        elif isinstance(attempt.error, Denied) and not any(h.down for h in healths):
            raise attempt.error

    def _denied(self, replica: Replica, error: Denied, attempt: _Attempt) -> None:
        """Decide what a 401, 403 or 404 means.

        Raises: the error when every question would get it; RequestRefused or TransportError when it
        is this question's own.
        """
        at = self.all.index(replica)
        replica.in_a_row += 1
        attempt.failed(at, error, counts=False)
        attempt.denied.add(at)
        others = [i for i in range(len(self.all)) if i not in attempt.denied]
        if any(self.all[i].usable(time.monotonic()) for i in others):
            if error.general or not replica.server.health.answered or replica.in_a_row >= 3:
                self._leave_out(replica, str(error))
            return
        answered = any(r.server.health.answered for r in self.all)
        if error.general or not answered or replica.in_a_row >= DENIED_IN_A_ROW:
            raise error
        if (
            error.status == 401
        ):  # a key does not depend on the question: asked again by the next run
            raise TransportError(str(error)) from error
        raise RequestRefused(str(error)) from error

    def _failed(self, replica: Replica, reason: str) -> None:
        replica.in_a_row += 1
        if replica.in_a_row >= FAILED_IN_A_ROW:
            self._leave_out(replica, reason)

    def _leave_out(self, replica: Replica, reason: str) -> None:
        """Ask the others for a while; each time in a row twice as long."""
        now = time.monotonic()
        if now < replica.out_until:
            return
        replica.out_s = min(MOST_OUT_S, 2 * replica.out_s) or OUT_S
        replica.out_until, replica.reason = now + replica.out_s, reason
        if not replica.told:
            replica.told = True
            self.tell(f"{replica.server.url} is left out for now, the others go on: {reason[:300]}")

    def _say_down(self, replica: Replica) -> None:
        """Print that a server is down, once it has been for a few seconds."""
        health = replica.server.health
        short = time.monotonic() - health.since < SAY_AFTER_S
        if replica.told or short or not (health.down and health.answered):
            return
        replica.told = True
        since = time.time() - (time.monotonic() - health.since)
        words = f"{replica.server.url} does not answer since {_clock(since)} ({health.reason})"
        if any(r is not replica and r.usable(time.monotonic()) for r in self.all):
            self.tell(f"{words}; the others go on")
        else:
            self.tell(
                f"{words}; the run waits for it until {_clock(since + self.config.outage_s)} and "
                "goes on by itself"
            )

    def _answers(self, replica: Replica) -> None:
        replica.in_a_row, replica.out_until, replica.out_s = 0, 0.0, 0.0
        if replica.told:
            replica.told = False
            self.tell(f"{replica.server.url} answers again")


@dataclass(slots=True)
class _Attempt:
    """What one question has met so far."""

    retries: int
    failures: int = 0
    tried: set[int] = field(default_factory=set)
    denied: set[int] = field(default_factory=set)
    comebacks: set[int] = field(default_factory=set)
    error: Exception | None = None

    def failed(self, at: int, error: Exception, counts: bool = True) -> None:
        """Raises: the error when the retries are used up."""
        self.error = error
        self.tried.add(at)
        self.failures += counts
        if self.failures > self.retries:
            raise error

    def down(self, error: Exception, comebacks: int) -> None:
        """Raises: the error when servers went down under this question, came back and went down
        again: it is the question.
        """
        self.error = error
        self.comebacks.add(comebacks)
        if len(self.comebacks) > 1 + max(LEAST_COMEBACKS, self.retries):
            raise error

    async def next_round(self, servers: int) -> None:
        """A pause once every server has been tried."""
        if len(self.tried) >= servers:
            await asyncio.sleep(BACKOFF_S * min(8, 1 + self.failures))


def _failed(future: asyncio.Future[T]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")
