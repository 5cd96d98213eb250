"""The HTTP client of the engines: aiohttp and orjson, one pool for each server, retries, deadlines,
a circuit breaker, and a throttle that obeys rate limits.

Measured against a zero-latency server with 64 in flight: aiohttp with orjson makes 10,000 calls a
second where httpx makes 290 and the OpenAI client 240-580, so neither of those is ever used here.
"""

from __future__ import annotations

import asyncio
import json
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
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.errors import EngineError, TransportError
from prefab.factory.redaction import add_secret, redact_bytes

LIMITED = 429  # the only status that slows all requests down; it costs time, no retries
# worth asking again: besides the standard ones, those of nginx, Cloudflare (52x) and proxies
HEALS = frozenset({408, 409, 425, 500, 502, 503, 504, 507, *range(520, 530), 598})
REDIRECTS = frozenset({301, 302, 307, 308})
MAX_REDIRECTS = 5
DOWN = frozenset({502, 503, 504})  # tell of the server's health, where 500 tells of one request
# no waiting mends these: OpenAI's and others' 429 or 402 for an account without money
NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
BACKOFF_S, BACKOFF_CAP_S = 0.25, 20.0
# uvicorn closes idle connections after 5 s; a client that waits longer meets resets
KEEP_ALIVE_S = 4.0
MAX_BYTES = 16 * 2**20  # of a response, where the request does not say what it can need


class HttpConfig(BaseModel):
    """The settings of every engine that speaks HTTP. `timeout_s` is for one try, `deadline_s` for
    all tries of a call together, waiting for a rate limit included. `retries` counts failures, not
    refusals by a rate limit. A model that thinks before it answers gets `thinking_tokens` beside
    the tokens of its answer.
    """

    model_config = ConfigDict(extra="forbid")

    max_in_flight: int = Field(64, ge=1, le=65536)
    timeout_s: float = Field(600.0, gt=0)
    deadline_s: float = Field(1800.0, gt=0)
    retries: int = Field(6, ge=0)
    down_after_s: float = Field(20.0, ge=0)
    thinking_tokens: int = Field(2048, ge=0)


class Malformed(TransportError):
    """The server's response is not what was asked for: no chat completion, larger than the request
    can need, or the answer to another request.
    """


class Rejected(Exception):
    """The server refused one request with a 4xx that asking again does not heal. The engine decides
    what that means.
    """

    def __init__(self, status: int, message: str, detail: dict[str, Any]) -> None:
        super().__init__(message)
        self.status, self.message, self.detail = status, message, detail


class Breaker:
    """Stops asking a server that is down: opens once nothing but failures came for `down_after_s`
    (at least five), then lets one call through after a pause that doubles up to a minute; a success
    closes it.
    """

    def __init__(self, down_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.down_after_s, self.clock = down_after_s, clock
        self.reason, self.failures, self.since = "", 0, 0.0
        self.open, self.retry_at, self.pause_s = False, 0.0, 5.0

    def admit(self, url: str) -> None:
        """Raises: TransportError at once while the server is known to be down."""
        if not self.open:
            return
        wait_s = self.retry_at - self.clock()
        if wait_s > 0:
            raise TransportError(
                f"{url} is down ({self.reason}); not asked again for {wait_s:.0f} s"
            )
        self.retry_at = (
            self.clock() + self.pause_s
        )  # half-open: this call alone tries, the others still fail fast

    def succeeded(self) -> None:
        """An answer came, good or bad: the server is up."""
        if self.failures:
            self.failures, self.open, self.pause_s = 0, False, 5.0

    def failed(self, reason: str) -> None:
        """No answer came from the server."""
        now = self.clock()
        self.since = self.since if self.failures else now
        self.failures, self.reason = self.failures + 1, reason
        if self.open:
            self.pause_s = min(60.0, 2 * self.pause_s)
            self.retry_at = now + self.pause_s
        elif self.failures >= 5 and now - self.since >= self.down_after_s:
            self.open, self.retry_at = True, now + self.pause_s


class Throttle:
    """How many requests a server may have in flight, and when the next one may start.

    Unlimited until the first 429. Each 429 pauses all requests for as long as the server asks and
    halves the number in flight (once for each generation of requests); every answer adds a little,
    one more after a full round of answers, until `most` is reached again.
    Source: additive increase, multiplicative decrease: Chiu and Jain 1989.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.clock = most, clock
        self.limit = inf
        self.in_flight = self.pauses = 0
        self.resume_at = self._halved_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, deadline: float) -> bool:
        """Wait for a place; False when there is none before the deadline."""
        while True:
            now = self.clock()
            if self.resume_at > now:
                if self.resume_at >= deadline:
                    return False
                await asyncio.sleep(self.resume_at - now)
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
        if self.limit < self.most:
            before, self.limit = int(self.limit), self.limit + 1 / self.limit
            if int(self.limit) > before:
                self._wake()
        if self.most <= self.limit < inf:
            self.limit = inf

    def limited(self, began: float, wait_s: float | None) -> None:
        """A 429 came for a request sent at `began`. Without a time from the server, the pause
        doubles from one to the next.
        """
        now = self.clock()
        if began >= self._halved_at:
            self.limit = max(1.0, min(self.limit, self.most, self.in_flight) / 2)
            self._halved_at = now
            self.pauses += 1
        if wait_s is None:
            wait_s = min(BACKOFF_CAP_S, BACKOFF_S * 2**self.pauses) * random.uniform(0.5, 1.0)
        self.resume_at = max(self.resume_at, now + wait_s)


class HttpClient:
    """One server: its address, its pool of connections, its breaker and its throttle."""

    def __init__(
        self, url: str, config: HttpConfig, api_key_env: str | None = None, key: str = ""
    ) -> None:
        self.key = key  # of a server that was started here; before that of `api_key_env`
        self.url, self.config, self.api_key_env = url.rstrip("/"), config, api_key_env
        self.breaker = Breaker(config.down_after_s)
        self.throttle = Throttle(config.max_in_flight)
        self.tell: Callable[[str], None] = lambda line: None  # where a notice for people goes
        # an engine that owns the server knows when it died
        self.why_down: Callable[[], str | None] = lambda: None
        self._session: Any = None
        self._loop: Any = None
        self._urls: dict[str, Any] = {}
        self._ids, self._id_prefix = count(), f"prefab-{os.urandom(6).hex()}-"
        self._echoes = False  # whether the server's responses name the request's id

    async def post(
        self,
        path: str,
        body: bytes,
        final: frozenset[int] = frozenset(),
        max_bytes: int = MAX_BYTES,
    ) -> dict[str, Any]:
        """The JSON object that answers `body`.

        Args:
            path: After the server's address.
            body: JSON.
            final: Statuses that are not asked again, whatever they are.
            max_bytes: A larger response, once decompressed, is refused.

        Raises:
            Rejected: a 4xx that asking again does not heal.
            Malformed: the response is larger than `max_bytes`.
            TransportError: no usable answer after all retries, or the breaker is open.
            EngineError: the key is missing or wrong.
        """
        return await self._retrying("POST", path, body, final, max_bytes)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises: as `post`."""
        return await self._retrying("GET", path, None, frozenset(), MAX_BYTES)

    async def alive(self, path: str = "/health") -> bool:
        """Whether the server answers `path` with 200 right now; never raises, never retries."""
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self.session().get(
                self.url + path, timeout=timeout, headers=self._headers()
            ) as answer:
                return bool(answer.status == 200)
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False

    async def _retrying(
        self,
        method: str,
        path: str,
        body: bytes | None,
        final: frozenset[int],
        max_bytes: int,
    ) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.deadline_s
        failures = 0
        while True:
            if not await self.throttle.enter(deadline):
                raise TransportError(self._too_late(path, "its rate limit leaves no time"))
            try:
                self.breaker.admit(self.url)
                answer, reason, wait_s = await self._once(
                    method, path, body, deadline, final, max_bytes
                )
            finally:
                self.throttle.leave()
            if answer is not None:
                return answer
            if reason.startswith(f"HTTP {LIMITED}"):
                continue  # the throttle waits
            if died := self.why_down():
                raise TransportError(died)
            failures += 1
            if failures > self.config.retries:
                raise TransportError(f"{self.url}{path}: {reason}; gave up after {failures} tries")
            if wait_s is None:
                wait_s = random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2**failures))
            if time.monotonic() + wait_s >= deadline:
                raise TransportError(self._too_late(path, reason))
            await asyncio.sleep(wait_s)

    def _too_late(self, path: str, reason: str) -> str:
        return f"{self.url}{path}: {reason}; the deadline of {self.config.deadline_s:g} s passed"

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        deadline: float,
        final: frozenset[int],
        max_bytes: int,
    ) -> tuple[dict[str, Any] | None, str, float | None]:
        """One try: the answer, or why there is none and how long the server asked to wait."""
        began = self.throttle.clock()
        response = await self._send(method, path, body, deadline, max_bytes)
        if isinstance(response, str):
            self.breaker.failed(response)
            return None, response, None
        status, headers, raw = response
        if status in DOWN:
            self.breaker.failed(f"HTTP {status}")
        else:
            self.breaker.succeeded()
        if status == 200:
            self.throttle.answered()
            return loads(raw), "the answer is not a JSON object", None
        message, detail = _error_of(raw)
        if status == 402 or NO_MONEY & {str(detail.get("code")), str(detail.get("type"))}:
            raise EngineError(f"{self.url}: {message}")
        wait_s = wait_hint(headers, message)
        if status == LIMITED:
            self._limited(began, message, wait_s)
        if status in (*HEALS, LIMITED) and status not in final:
            return None, f"HTTP {status} {message}", wait_s
        if status in REDIRECTS:
            return None, f"HTTP {status} after {MAX_REDIRECTS} redirections", None
        # some APIs answer 403 to a parameter that this account or model may not use
        if status == 401 or (status == 403 and "logprobs" not in message):
            raise EngineError(self._key_problem(status, message))
        raise Rejected(status, message, detail)

    async def _send(
        self, method: str, path: str, body: bytes | None, deadline: float, max_bytes: int
    ) -> tuple[int, Mapping[str, str], bytes] | str:
        """Status, headers and body of the response; the reason as text when none came.

        Raises: Malformed for a response that is too large; EngineError for a redirection to another
        server.
        """
        import aiohttp

        url = self._urls.get(path) or self._url(path)
        left_s = max(0.01, deadline - time.monotonic())
        options = (
            {}
            if left_s >= self.config.timeout_s
            else {"timeout": aiohttp.ClientTimeout(total=left_s)}
        )
        request_id = f"{self._id_prefix}{next(self._ids)}"
        headers = {**self._headers(), "X-Request-Id": request_id}
        try:
            for _ in range(1 + MAX_REDIRECTS):
                async with self.session().request(
                    method, url, data=body, headers=headers, allow_redirects=False, **options
                ) as response:
                    transport = response.connection and response.connection.transport
                    raw = await self._body(response, max_bytes)
                    status = response.status
                    if status == 200 and body is not None and self._is_stray(request_id, raw):
                        if transport is not None:
                            transport.close()  # what comes next on it belongs to no one either
                        return "the response is that of another request"
                    if status not in REDIRECTS:
                        break
                    url = self._redirected(response)
            return status, response.headers, redact_bytes(raw)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return f"no answer ({type(error).__name__}{f': {error}' if str(error) else ''})"

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
        session, self._session = self._session, None
        if session is not None and self._loop is asyncio.get_running_loop():
            await session.close()

    def _url(self, path: str) -> Any:
        from yarl import URL

        self._urls[path] = URL(self.url + path)
        return self._urls[path]

    def _headers(self) -> dict[str, str]:
        if self._sent_headers is None:
            self._sent_headers = {"Content-Type": "application/json"}
            key = self.key or os.environ.get(self.api_key_env or "")
            if key:
                add_secret(key)
                self._sent_headers["Authorization"] = f"Bearer {key.strip()}"
        return self._sent_headers

    _sent_headers: dict[str, str] | None = None

    def _key_problem(self, status: int, message: str) -> str:
        if not self.api_key_env:
            return f"{self.url} wants a key (HTTP {status} {message}): name its environment variable in `api_key_env`"
        state = "is refused" if os.environ.get(self.api_key_env) else "is not set"
        return f"{self.url}: the key in environment variable {self.api_key_env} {state} (HTTP {status} {message})"


def _origin(one: Any, other: Any) -> bool:
    return bool(one.origin() == other.origin())


def _connector(limit: int) -> Any:
    """A pool of connections that closes a connection on which something came while nothing was
    asked: it would be taken for the answer to the next request.
    """
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

    class QuietWhenIdle(ResponseHandler):
        def is_connected(self) -> bool:
            """Asked by the pool alone, before an idle connection is used again."""
            return super().is_connected() and not self.should_close and not _readable(self)

    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=limit, keepalive_timeout=KEEP_ALIVE_S)
    connector._factory = partial(QuietWhenIdle, loop=loop)
    return connector


def _readable(protocol: Any) -> bool:
    """Whether bytes wait in the connection's socket that the event loop has not read yet."""
    socket = protocol.transport.get_extra_info("socket")
    if socket is None:
        return False
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))


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


def _error_of(raw: bytes) -> tuple[str, dict[str, Any]]:
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
