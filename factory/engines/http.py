"""The HTTP client of the engines: aiohttp and orjson, one pool for each server, retries, deadlines,
what is known of the server's health, and a throttle that obeys rate limits.

Measured against a zero-latency server with 64 in flight: aiohttp with orjson makes 10,000 calls a
second where httpx makes 290 and the OpenAI client 240-580, so neither of those is ever used here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import select
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
from math import inf
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.errors import EngineError, TransportError
from prefab.factory.redaction import add_secret, redact_bytes

LOG = logging.getLogger("prefab.servers")
LIMITED = 429  # the only status that slows all requests down; it costs time, no retries
# worth asking again: besides the standard ones, those of nginx, Cloudflare (52x) and proxies
HEALS = frozenset({408, 409, 425, 500, 502, 503, 504, 507, *range(520, 530), 598})
REDIRECTS = frozenset({301, 302, 307, 308})
MAX_REDIRECTS = 5
# a proxy that gave up, and may pass the late answer on all the same
GAVE_UP = frozenset({408, 500, 502, 503, 504, *range(520, 530), 598})
DOWN = frozenset({502, 503, 504})  # tell of the server's health, where 500 tells of one request
# no waiting mends these: OpenAI's and others' 429 or 402 for an account without money
NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
BACKOFF_S, BACKOFF_CAP_S = 0.25, 20.0
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 10.0  # between questions that try whether a server is back
SEVERAL = 3  # failures in a row, until it is checked whether the server is down
SPARED = 3  # tries beyond `retries` of a question whose server passes the check after its failure
CHECK_S = 20.0  # how long such a check waits for the answer to a small question
PACE_EVERY = 64  # answers, until the time that they take is reckoned anew
LEAST_LIMIT_S, LIMIT_P99 = 60.0, 10.0  # of the wait for an answer, once their usual time is known
LEAST_PAUSE_S = 0.12  # after a 429; a shorter one (0 and a little jitter) is not believed
GAP_SHRINKS = 0.998  # with each answer: at 20 a second 4% faster each second
SILENT_S = 30.0  # without an answer, until it is said
# uvicorn closes idle connections after 5 s; a client that waits longer meets resets
KEEP_ALIVE_S = 4.0
MAX_BYTES = 16 * 2**20  # of a response, where the request does not say what it can need


class HttpConfig(BaseModel):
    """The settings of every engine that speaks HTTP. `timeout_s` is for one try, `deadline_s` for
    all tries of a call together, waiting for a rate limit included. `retries` counts failures, not
    refusals by a rate limit, nor those of a server that is down. A server that had answered is
    waited for during `outage_s`; one that never did is given up after `down_after_s`. A model that
    thinks before it answers gets `thinking_tokens` beside the tokens of its answer.
    """

    model_config = ConfigDict(extra="forbid")

    max_in_flight: int = Field(64, ge=1, le=65536)
    timeout_s: float = Field(600.0, gt=0)
    deadline_s: float = Field(1800.0, gt=0)
    retries: int = Field(6, ge=0)
    down_after_s: float = Field(20.0, ge=0)
    outage_s: float = Field(3600.0, ge=0)
    thinking_tokens: int = Field(2048, ge=0)


class Malformed(TransportError):
    """The server's response is not what was asked for: no chat completion, larger than the request
    can need, or the answer to another request.
    """


class ServerDown(TransportError):
    """The server is down, whatever it is asked. `asked`: this question met it, too."""

    def __init__(self, message: str, asked: bool = False) -> None:
        super().__init__(message)
        self.asked = asked


class Denied(EngineError):
    """A 401, 403 or 404. `general`: every question gets it, as far as can be known; else it may be
    about this question alone (a firewall that dislikes its text).
    """

    def __init__(self, status: int, message: str, general: bool = False) -> None:
        super().__init__(message)
        self.status, self.general = status, general


class Rejected(Exception):
    """The server refused one request with a 4xx that asking again does not heal. The engine decides
    what that means.
    """

    def __init__(self, status: int, message: str, detail: dict[str, Any]) -> None:
        super().__init__(message)
        self.status, self.message, self.detail = status, message, detail


class Health:
    """Whether a server answers. It is down once nothing but failures came: from the first one on
    for `down_after_s` (at least five) where it never answered; where it had answered, as soon as
    its client says so. Then one question at a time tries it, after pauses that double up to 10 s;
    an answer brings it back.
    """

    def __init__(self, down_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.down_after_s, self.clock = down_after_s, clock
        self.reason, self.failures, self.since = "", 0, 0.0
        self.down, self.retry_at, self.pause_s = False, 0.0, FIRST_PAUSE_S
        self.answered = False  # a question, ever
        self.comebacks = 0

    def may_try(self) -> bool:
        """Whether a question may be asked now."""
        return not self.down or self.clock() >= self.retry_at

    def admit(self, url: str) -> None:
        """Raises: ServerDown while the server is known to be down, but for one question after each
        pause.
        """
        if not self.down:
            return
        if not self.may_try():
            raise ServerDown(self.words(url))
        self.pause_s = min(MOST_PAUSE_S, 2 * self.pause_s)
        self.retry_at = self.clock() + self.pause_s

    def words(self, url: str) -> str:
        """What to say of a server that is down."""
        wait_s = self.retry_at - self.clock()
        return f"{url} is down ({self.reason}); not asked again for {wait_s:.0f} s"

    def succeeded(self) -> None:
        """A response came, good or bad: the server is up."""
        if self.failures:
            self.comebacks += self.down
            if self.down:
                LOG.info("a server answers again after %d failures", self.failures)
            self.failures, self.down, self.pause_s = 0, False, FIRST_PAUSE_S

    def failed(self, reason: str) -> None:
        """No answer came to a question."""
        now = self.clock()
        self.since = self.since if self.failures else now
        self.failures, self.reason = self.failures + 1, reason
        long = self.failures >= 5 and now - self.since >= self.down_after_s
        if long and not (self.answered or self.down):
            self.fall()

    def fall(self) -> None:
        """The server is down from now on."""
        LOG.info("a server is down after %d failures: %s", self.failures, self.reason)
        self.down, self.retry_at = True, self.clock() + self.pause_s


class Pace:
    """How long answers to one kind of request take: of the last ones the mean and what 99 of 100
    stay below; None before there are enough.
    """

    def __init__(self) -> None:
        self.mean_s: float | None = None
        self.p99_s: float | None = None
        self._recent: deque[float] = deque(maxlen=8 * PACE_EVERY)
        self._until = PACE_EVERY

    def took(self, seconds: float) -> None:
        """An answer took so long."""
        self._recent.append(seconds)
        self._until -= 1
        if self._until == 0:
            self._until = PACE_EVERY
            ordered = sorted(self._recent)
            self.p99_s = ordered[int(0.99 * len(ordered))]
            self.mean_s = sum(ordered) / len(ordered)

    def limit_s(self) -> float:
        """How long to wait for an answer: far longer than any took so far."""
        return inf if self.p99_s is None else max(LEAST_LIMIT_S, LIMIT_P99 * self.p99_s)


class Throttle:
    """How many requests a server may have in flight, and when the next one may start.

    Unlimited until the first 429. Each 429 pauses all requests for as long as the server asks and
    halves the number in flight (once for each generation of requests); every answer adds a little,
    one more after a full round of answers, until `most` is reached again. From the second 429 on
    requests start at the rate at which the server answered since the one before, a little faster
    with every answer: many refused requests would use up a quota as well.
    Source: additive increase, multiplicative decrease: Chiu and Jain 1989.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.clock = most, clock
        self.limit = inf
        self.in_flight = self.pauses = 0
        self.resume_at = self._halved_at = 0.0
        self.gap_s = self._next_at = 0.0  # between the starts of two requests
        self._answers = 0  # since the last 429
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, deadline: float) -> bool:
        """Wait for a place; False when there is none before the deadline."""
        generation = -1.0
        while True:
            now = self.clock()
            start_at = self.resume_at
            if self.gap_s and generation != self._halved_at:
                generation = self._halved_at
                start_at = max(now, start_at, self._next_at)
                self._next_at = start_at + self.gap_s
            if start_at > now:
                if start_at >= deadline:
                    return False
                await asyncio.sleep(start_at - now)
            elif self.in_flight < max(1, int(min(self.limit, 1 << 20))):
                self.in_flight += 1
                return True
            elif not await self._place(deadline - now):
                return False

    async def _place(self, within_s: float) -> bool:
        """Wait until a place is free; False when that takes longer."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await asyncio.wait_for(place, within_s)
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._wake()  # the place was ours; the next one gets it
            raise
        return True

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def answered(self) -> None:
        """An answer came: after a full round of them, one more request may be in flight."""
        self.pauses = 0
        self._answers += 1
        self.gap_s *= GAP_SHRINKS
        if self.limit < self.most:
            before, self.limit = int(self.limit), self.limit + 1 / self.limit
            if int(self.limit) > before:
                self._wake()
        if self.most <= self.limit < inf:
            self.limit, self.gap_s = inf, 0.0

    def limited(self, began: float, wait_s: float | None) -> None:
        """A 429 came for a request sent at `began`. Without a time from the server, the pause
        doubles from one to the next.
        """
        now = self.clock()
        if began >= self._halved_at:
            since_s = now - self._halved_at
            if self._halved_at and self._answers >= SEVERAL and since_s >= 1.0:
                self.gap_s = since_s / self._answers
            self._answers, self._next_at = 0, 0.0
            self.limit = max(1.0, min(self.limit, self.most, self.in_flight) / 2)
            self._halved_at = now
            self.pauses += 1
        if wait_s is None or wait_s < LEAST_PAUSE_S:  # "at once" was tried
            wait_s = min(BACKOFF_CAP_S, BACKOFF_S * 2**self.pauses) * random.uniform(0.5, 1.0)
        self.resume_at = max(self.resume_at, now + wait_s)


class _Call(NamedTuple):
    """One request, as `HttpClient.post` explains it."""

    method: str
    path: str
    body: bytes | None
    final: frozenset[int]
    max_bytes: int
    pace: Pace | None


class HttpClient:
    """One server: its address, its pool of connections, its health and its throttle."""

    def __init__(
        self, url: str, config: HttpConfig, api_key_env: str | None = None, key: str = ""
    ) -> None:
        self.key = key  # of a server that was started here; before that of `api_key_env`
        self.url, self.config, self.api_key_env = url.rstrip("/"), config, api_key_env
        self.health = Health(config.down_after_s)
        self.throttle = Throttle(config.max_in_flight)
        self.tell: Callable[[str], None] = lambda line: None  # where a notice for people goes
        # an engine that owns the server knows when it died, and counts how often it was started
        self.starts = 0
        self.why_down: Callable[[], str | None] = lambda: None
        self._session: Any = None
        self._loop: Any = None
        # of `Replicas`, which decides what a server that is down means
        self.grouped, self.alone = False, True
        self.health_path = "/models"
        # path and body of a question that costs one token, where the engine knows one
        self.small_question: Callable[[], tuple[str, bytes]] | None = None
        self.retries = 0  # of all questions
        self._check: asyncio.Task[bool] | None = None
        self._urls: dict[str, Any] = {}
        self._timeouts: dict[float, Any] = {}
        self._asking = 0
        self._busy_since = self._answered_at = self._silent_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._ids, self._id_prefix = count(), f"prefab-{os.urandom(6).hex()}-"
        self._echoes = False  # whether the server's responses name the request's id

    async def post(
        self,
        path: str,
        body: bytes,
        final: frozenset[int] = frozenset(),
        max_bytes: int = MAX_BYTES,
        pace: Pace | None = None,
    ) -> dict[str, Any]:
        """The JSON object that answers `body`.

        Args:
            path: After the server's address.
            body: JSON.
            final: Statuses that are not asked again, whatever they are.
            max_bytes: A larger response, once decompressed, is refused.
            pace: How long answers to requests of this kind took; this one's time is added. A
                request that takes far longer is given up and tried again.

        Raises:
            Rejected: a 4xx that asking again does not heal.
            Malformed: the response is larger than `max_bytes`.
            ServerDown: the server is down.
            TransportError: no usable answer after all retries.
            Denied: the key is missing or wrong, or a firewall refuses the question.
            EngineError: the account has no money; the server redirects to another one.
        """
        return await self._retrying(_Call("POST", path, body, final, max_bytes, pace))

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises: as `post`."""
        return await self._retrying(_Call("GET", path, None, frozenset(), MAX_BYTES, None))

    async def reachable(self) -> bool:
        """Whether the server answers right now: its health address and, where one is known, a small
        question. Any response that is no sign of an outage counts. Never raises, never retries.
        """
        if not await self._responds("GET", self.health_path, None, 5.0):
            return False
        if self.small_question is None:
            return True
        path, body = self.small_question()
        return await self._responds("POST", path, body, min(CHECK_S, self.config.timeout_s))

    async def _responds(self, method: str, path: str, body: bytes | None, within_s: float) -> bool:
        import aiohttp

        try:
            async with self.session().request(
                method,
                self.url + path,
                data=body,
                timeout=aiohttp.ClientTimeout(total=within_s),
                headers=self._headers(),
                allow_redirects=False,
            ) as answer:
                await self._body(answer, MAX_BYTES)
                return answer.status not in DOWN
        except (TimeoutError, aiohttp.ClientError, OSError, Malformed):
            return False

    async def _retrying(self, call: _Call) -> dict[str, Any]:
        self._begin()
        try:
            return await self._tries(call)
        finally:
            self._asking -= 1

    async def _tries(self, call: _Call) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.deadline_s
        failures, spared, starts = 0, 0, self.starts
        while True:
            if not await self.throttle.enter(deadline):
                raise TransportError(self._too_late(call.path, "its rate limit leaves no time"))
            try:
                self.health.admit(self.url)
                answer, reason, wait_s = await self._once(call, deadline, failures)
            finally:
                self.throttle.leave()
            if answer is not None:
                return answer
            if reason.startswith(f"HTTP {LIMITED}"):
                continue  # the throttle waits
            if died := self.why_down():
                raise TransportError(died)
            failures += 1
            self.retries += 1
            if wait_s is None:
                wait_s = random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2**failures))
            late = time.monotonic() + wait_s >= deadline
            spared = await self._try_again(call, reason, failures, late, spared)
            LOG.debug(
                "%s%s: try %d in %.1f s: %s", self.url, call.path, 1 + failures, wait_s, reason
            )
            await asyncio.sleep(wait_s)
            if self.starts != starts and call.pace is not None:  # its engine asks again, in turn
                raise ServerDown(f"{self.url}{call.path}: {reason}", asked=True)

    async def _try_again(
        self, call: _Call, reason: str, failures: int, late: bool, spared: int
    ) -> int:
        """How many tries beyond `retries` the next one makes: a short outage may have ended between
        the last failure and the check of the server.

        Raises: ServerDown when the server fails, not this question; TransportError when it is
            given up.
        """
        retries = self.config.retries if self.alone else 0
        last, up = late or failures > retries, None
        if last or self.health.failures >= min(SEVERAL, 1 + retries):
            up = await self._is_up()
        if up is False:
            raise ServerDown(f"{self.url}{call.path}: {reason}", asked=True)
        if last and late:
            raise TransportError(self._too_late(call.path, reason))
        if last and (spared == SPARED or not (up and self.alone)):
            raise TransportError(f"{self.url}{call.path}: {reason}; gave up after {failures} tries")
        return spared + last

    async def _is_up(self) -> bool | None:
        """Whether it is this question that fails, not the server, which is asked something else.
        None where the failure says nothing about the server. One that is not up is down from now
        on.
        """
        health = self.health
        if health.down and self.grouped:
            return False
        if not (self.grouped and health.answered and health.failures):
            return None
        if self._check is None or self._check.done() or self._check.get_loop() is not self._loop:
            self._check = asyncio.get_running_loop().create_task(self.reachable())
        if await asyncio.shield(self._check):
            return True
        if health.failures and not health.down:  # no answer came meanwhile
            health.fall()
        return not health.down

    def _begin(self) -> None:
        """Note that a request waits from now on, and look after a while whether answers come."""
        loop = asyncio.get_running_loop()
        if self._watch is None or self._loop is not loop:
            self._asking, self._silent_s = 0, SILENT_S
            self._watch = loop.call_later(SILENT_S / 6, self._look)
        if self._asking == 0:
            self._busy_since = self.throttle.clock()
        self._asking += 1

    def _look(self) -> None:
        """Say it when requests wait and nothing has come for long; less and less often."""
        self._watch = None
        if not self._asking:
            return
        self._watch = asyncio.get_running_loop().call_later(SILENT_S / 6, self._look)
        now = self.throttle.clock()
        silent_s = now - max(self._answered_at, self._busy_since, self.throttle.resume_at)
        if silent_s < SILENT_S:
            self._silent_s = SILENT_S
        elif silent_s >= self._silent_s and not self.health.down:
            self._silent_s *= 4
            waiting = "1 request waits" if self._asking == 1 else f"{self._asking} requests wait"
            self.tell(
                f"{self.url} has not answered for {silent_s:.0f} s; {waiting}, "
                f"each for {self.config.timeout_s:g} s at most (`timeout_s`)"
            )

    def _too_late(self, path: str, reason: str) -> str:
        return f"{self.url}{path}: {reason}; the deadline of {self.config.deadline_s:g} s passed"

    async def _once(
        self, call: _Call, deadline: float, failures: int
    ) -> tuple[dict[str, Any] | None, str, float | None]:
        """One try: the answer, or why there is none and how long the server asked to wait."""
        began = self.throttle.clock()
        response = await self._send(call, deadline, failures)
        if isinstance(response, str):
            self.health.failed(response)
            return None, response, None
        status, headers, raw = response
        if status in DOWN:
            self.health.failed(f"HTTP {status}")
        else:
            self.health.succeeded()
        if status == 200:
            self._took(call, began)
            answer = loads(raw)
            if answer is not None and call.body is not None:
                self.health.answered = True
            return answer, "the answer is not a JSON object", None
        return self._refused(call, status, headers, raw, began)

    def _took(self, call: _Call, began: float) -> None:
        """Note when an answer came, and how long it took."""
        self._answered_at = now = self.throttle.clock()
        if call.pace is not None:
            call.pace.took(now - began)
        self.throttle.answered()

    def _refused(
        self, call: _Call, status: int, headers: Mapping[str, str], raw: bytes, began: float
    ) -> tuple[None, str, float | None]:
        """Why a response with another status than 200 is worth another try.

        Raises: as `post`, when it is not.
        """
        message, detail = error_of(raw)
        if status == 402 or NO_MONEY & {str(detail.get("code")), str(detail.get("type"))}:
            raise EngineError(f"{self.url}: {message}")
        wait_s = wait_hint(headers, message)
        if status == LIMITED:
            self._limited(began, message, wait_s)
        if status in (*HEALS, LIMITED) and status not in call.final:
            return None, f"HTTP {status} {message}", wait_s
        if status in REDIRECTS:
            return None, f"HTTP {status} after {MAX_REDIRECTS} redirections", None
        # some APIs answer 403 to a parameter that this account or model may not use
        if status == 401 or (status == 403 and "logprobs" not in message):
            raise Denied(status, self._key_problem(status, message))
        raise Rejected(status, message, detail)

    async def _send(
        self, call: _Call, deadline: float, failures: int
    ) -> tuple[int, Mapping[str, str], bytes] | str:
        """Status, headers and body of the response; the reason as text when none came.

        Raises: Malformed for a response that is too large; EngineError for a redirection to another
        server.
        """
        import aiohttp

        url = self._urls.get(call.path) or self._url(call.path)
        request_id = f"{self._id_prefix}{next(self._ids)}"
        headers = {**self._headers(), "X-Request-Id": request_id}
        options = self._options(call.pace, deadline, failures)
        try:
            for _ in range(1 + MAX_REDIRECTS):
                async with self.session().request(
                    call.method,
                    url,
                    data=call.body,
                    headers=headers,
                    allow_redirects=False,
                    **options,
                ) as response:
                    transport = response.connection and response.connection.transport
                    raw = await self._body(response, call.max_bytes)
                    status = response.status
                    if status == 200 and call.body is not None and self._is_stray(request_id, raw):
                        if transport is not None:
                            transport.close()  # what comes next on it belongs to no one either
                        return "the response is that of another request"
                    if status not in REDIRECTS:
                        break
                    url = self._redirected(response)
            return status, response.headers, redact_bytes(raw)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return f"no answer ({type(error).__name__}{f': {error}' if str(error) else ''})"

    def _options(self, pace: Pace | None, deadline: float, failures: int) -> dict[str, Any]:
        """The request's timeout, where it is not the usual one: the time left, or a limit by how
        long such answers take, which doubles from try to try.
        """
        import aiohttp

        total_s = min(max(0.01, deadline - time.monotonic()), self.config.timeout_s)
        if pace is not None and pace.p99_s is not None:
            total_s = min(total_s, pace.limit_s() * 2**failures)
        if total_s == self.config.timeout_s:
            return {}
        timeout = self._timeouts.get(total_s)
        if timeout is None:
            if len(self._timeouts) > 100:
                self._timeouts.clear()
            timeout = self._timeouts[total_s] = aiohttp.ClientTimeout(
                total=total_s, sock_connect=30
            )
        return {"timeout": timeout}

    async def _body(self, response: Any, max_bytes: int) -> bytes:
        """The response's body, decompressed as it comes. Raises: Malformed as soon as more than
        `max_bytes` came, or are announced.
        """
        content = response.content
        if (response.content_length or 0) <= max_bytes:
            body: bytes = await content.readany()
            if content.at_eof() and len(body) <= max_bytes:
                return body
            parts, size = [body], len(body)
            while size <= max_bytes:
                part = await content.readany()
                if not part:
                    return b"".join(parts)
                parts.append(part)
                size += len(part)
        response.close()
        raise Malformed(
            f"the response is larger than {max_bytes:,} bytes, more than this request can need"
        )

    def _is_stray(self, request_id: str, raw: bytes) -> bool:
        """Whether this is the response to an earlier request, which nobody waits for any more.
        vLLM's completions are named after `X-Request-Id`; of its other responses (`/tokenize`), and
        of servers that do not repeat it, nothing is known.
        """
        if request_id.encode() in raw:
            self._echoes = True
            return False
        return self._echoes and b'"choices"' in raw

    def _redirected(self, response: Any) -> Any:
        """Where a redirection leads, on the same server: neither key nor prompts go to another.

        Raises: EngineError when it leads to another server.
        """
        from yarl import URL

        said = response.headers.get("Location", "")
        try:
            target = response.url.join(URL(said))
        except ValueError:
            target = None
        here = response.url
        secured = (
            target is not None
            and (here.scheme, target.scheme, target.port) == ("http", "https", 443)
            and here.port == 80
        )
        if target is None or not (target.host == here.host and (secured or _origin(here, target))):
            raise EngineError(
                f"{self.url} redirects (HTTP {response.status}) to {said[:200]!r}, another server. "
                "Neither key nor prompts are sent there: if it is right, name it as the address"
            )
        return target

    def _limited(self, began: float, message: str, wait_s: float | None) -> None:
        self.retries += 1
        LOG.debug("%s limits the rate: %s", self.url, message[:160])
        if self.throttle.limit == inf:
            self.tell(
                f"{self.url} limits the rate: requests wait, and fewer are sent at once ({message[:160]})"
            )
        self.throttle.limited(began, wait_s)

    def session(self) -> Any:
        """The pool of connections of the running loop, made once; a new loop (a second `run`) gets
        a new one.
        """
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            connector = _connector(self.config.max_in_flight + 8)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self.config.timeout_s, sock_connect=30),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                read_bufsize=2**18,
            )
            self._loop, self._sent_headers = loop, None
        return self._session

    async def close(self) -> None:
        """Close the pool. Safe to call twice."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        session, self._session = self._session, None
        if session is not None and self._loop is asyncio.get_running_loop():
            await session.close()

    def _url(self, path: str) -> Any:
        from yarl import URL

        self._urls[path] = URL(self.url + path)
        return self._urls[path]

    def _headers(self) -> dict[str, str]:
        if self._sent_headers is None:
            key = self.key or api_key(self.api_key_env)
            self._sent_headers = {"Content-Type": "application/json"}
            if key:
                self._sent_headers["Authorization"] = f"Bearer {key}"
        return self._sent_headers

    _sent_headers: dict[str, str] | None = None

    def _key_problem(self, status: int, message: str) -> str:
        if not self.api_key_env:
            return f"{self.url} wants a key (HTTP {status} {message}): name its environment variable in `api_key_env`"
        state = "is refused" if os.environ.get(self.api_key_env) else "is not set"
        return f"{self.url}: the key in environment variable {self.api_key_env} {state} (HTTP {status} {message})"


def api_key(variable: str | None) -> str:
    """The key in an environment variable, "" where there is none.

    Raises: EngineError for a key that holds what no key does, such as a line break.
    """
    key = os.environ.get(variable or "", "").strip()
    add_secret(key)
    if not (key.isascii() and key.isprintable()):
        raise EngineError(
            f"the key in environment variable {variable} holds a line break, a control character or a "
            "letter beyond ASCII, which no key does: copy it again"
        )
    return key


def _origin(one: Any, other: Any) -> bool:
    return bool(one.origin() == other.origin())


def _connector(limit: int) -> Any:
    """A pool of connections that closes a connection on which something came while nothing was
    asked, or may still come: it would be taken for the answer to the next request.
    """
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

    class QuietWhenIdle(ResponseHandler):
        _waits: select.poll | None = None

        async def read(self) -> Any:
            """The head of a response and the stream of its body."""
            response = await super().read()
            if response[0].code in GAVE_UP:
                self.force_close()
            return response

        def is_connected(self) -> bool:
            """Asked by the pool alone, before an idle connection is used again: whether it is open,
            and no bytes wait, read or in the socket.
            """
            transport = self.transport
            if transport is None or transport.is_closing() or self.should_close:
                return False
            if self._waits is None:
                self._waits = select.poll()
                self._waits.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
            return not self._waits.poll(0)

    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=limit, keepalive_timeout=KEEP_ALIVE_S)
    # aiohttp has no public way to give it another protocol
    connector._factory = partial(QuietWhenIdle, loop=loop)  # type: ignore[assignment]
    return connector


def loads(raw: bytes) -> dict[str, Any] | None:
    """A JSON object, or None when `raw` is anything else. Some servers write NaN, which JSON does
    not have and Python reads; what it means is decided where the number is used.
    """
    try:
        found = orjson.loads(raw)
    except ValueError:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):  # 200,000 brackets are no answer either
            return None
    return found if isinstance(found, dict) else None


_TRY_AGAIN = re.compile(
    r"(?:(?:try again|retry|wait)\s*(?:in|after|for)?|retryDelay\W+)\s*((?:(?:and\s+)?\d[\d.]*\s*[a-z]+\s*)+)",
    re.I,
)
_LENGTH = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:(ms|milli|s|m|h|d)(?:s|ecs?|econds?|seconds?|ins?|inutes?|rs?|ours?|ays?)?)?(?![a-z])",
    re.I,
)
_UNIT_S = {"ms": 1e-3, "milli": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def wait_hint(headers: Mapping[str, str], message: str) -> float | None:
    """Seconds to wait, by what the server says, with a little jitter; None where it says nothing.

    Read in this order: `retry-after-ms`, `Retry-After`, "try again in 7.3s" in the message, and the
    reset times of those rate limits (`x-ratelimit-reset-requests`,
    `anthropic-ratelimit-tokens-reset` and the like) of which nothing remains. Moments are reckoned
    from the server's own `Date`: its clock may be wrong.
    """
    now = _moment(headers.get("Date") or "")
    found = seconds(headers.get("retry-after-ms"), "ms", now)
    if found is None:
        found = seconds(headers.get("Retry-After"), "s", now)
    if found is None and (said := _TRY_AGAIN.search(message)):
        found = seconds(said[1])
    if found is None:
        found = max(_resets(headers, now), default=None)
    return None if found is None else found + random.uniform(0.0, 0.1)


def _resets(headers: Mapping[str, str], now: float | None) -> list[float]:
    """The times until the exhausted limits are reset; of all limits where none is said to be
    exhausted.
    """
    limits = {name.lower(): value for name, value in headers.items() if "ratelimit" in name.lower()}
    resets = {name: seconds(value, "s", now) for name, value in limits.items() if "reset" in name}
    empty = {n for n in resets if limits.get(n.replace("reset", "remaining")) == "0"} or set(resets)
    return [wait_s for name in empty if (wait_s := resets[name]) is not None]


def seconds(text: str | None, unit: str = "s", now: float | None = None) -> float | None:
    """A time to wait in seconds: a number in `unit`, `6m0s`, `20ms`, `1.5 seconds`, a moment as
    Unix time or as a date; None for anything else. Moments are reckoned from `now` (Unix time;
    default: this machine's clock).
    """
    if not text:
        return None
    text, now = text.strip(), time.time() if now is None else now
    parts = _LENGTH.findall(text)
    if parts and not _LENGTH.sub("", text).strip(" ,and"):
        bare = len(parts) == 1 and not parts[0][1]
        total = sum(
            float(n) * _UNIT_S[(name or (unit if bare else "s")).lower()] for n, name in parts
        )
        if bare and total > 1e9:  # a moment, as Unix time
            total -= now
    else:
        moment = _moment(text)
        if moment is None:
            return None
        total = moment - now
    return max(0.0, total) if total < 1e6 else None


def _moment(text: str) -> float | None:
    """A date in the form of e-mails and HTTP, or in ISO 8601, as Unix time."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        try:
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError):
            return None


def error_of(raw: bytes) -> tuple[str, dict[str, Any]]:
    """The message of an error body and the object around it; servers differ in how deep they put
    it.
    """
    found = loads(raw)
    if found is None:
        return raw[:300].decode("utf-8", "replace").strip(), {}
    detail = found.get("error", found.get("detail", found))
    if not isinstance(detail, dict):
        return str(detail)[:600], found
    return str(detail.get("message") or detail)[:600], detail
