"""The one HTTP client of the hot path: aiohttp and orjson, one pool a server, retries, deadlines
and a circuit breaker.

Measured against a zero-latency server with 64 in flight: aiohttp with orjson makes 10,000 calls a
second where httpx makes 290 and the OpenAI client 240-580, so neither of those is ever used here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.errors import EngineError, TransportError

HEALS = frozenset(
    {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
)  # worth asking again
DOWN = frozenset(
    {502, 503, 504}
)  # speak of the server's health, where 429 and 500 speak of one request
BACKOFF_S, BACKOFF_CAP_S = 0.25, 20.0
KEEP_ALIVE_S = (
    4.0  # uvicorn closes idle connections after 5 s; a client that waits longer meets resets
)


class HttpConfig(BaseModel):
    """What every engine that speaks HTTP can be told. `timeout_s` is for one try, `deadline_s` for
    all of a call's.
    """

    model_config = ConfigDict(extra="forbid")

    max_in_flight: int = Field(64, ge=1, le=65536)
    timeout_s: float = Field(600.0, gt=0)
    deadline_s: float = Field(1800.0, gt=0)
    retries: int = Field(6, ge=0)
    down_after_s: float = Field(20.0, ge=0)


class Rejected(Exception):
    """The server refused one request for good (a 4xx that does not heal). The engine gives it its
    meaning.
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


class HttpClient:
    """One server: its address, its pool of connections, its breaker."""

    def __init__(self, url: str, config: HttpConfig, api_key_env: str | None = None) -> None:
        self.url, self.config, self.api_key_env = url.rstrip("/"), config, api_key_env
        self.breaker = Breaker(config.down_after_s)
        self.why_down: Callable[[], str | None] = lambda: (
            None
        )  # an engine that owns the server knows when it died
        self._session: Any = None
        self._loop: Any = None
        self._urls: dict[str, Any] = {}

    async def post(
        self, path: str, body: bytes, final: frozenset[int] = frozenset()
    ) -> dict[str, Any]:
        """The JSON object that answers `body`. Statuses in `final` are not asked again, whatever
        they are.

        Raises:
            Rejected: a 4xx that asking again does not heal.
            TransportError: no usable answer after all retries, or the breaker is open.
            EngineError: the key is missing or wrong.
        """
        return await self._retrying("POST", path, body, final)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises: as `post`."""
        return await self._retrying("GET", path, None, frozenset())

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
        self, method: str, path: str, body: bytes | None, final: frozenset[int]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.deadline_s
        attempt = 0
        while True:
            self.breaker.admit(self.url)
            answer, reason, wait_s = await self._once(method, path, body, deadline, final)
            if answer is not None:
                return answer
            died = self.why_down()
            if died:
                raise TransportError(died)
            attempt += 1
            if attempt > self.config.retries:
                raise TransportError(f"{self.url}{path}: {reason}; gave up after {attempt} tries")
            pause_s = (
                random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2**attempt))
                if wait_s is None
                else wait_s
            )
            if time.monotonic() + pause_s >= deadline:
                raise TransportError(
                    f"{self.url}{path}: {reason}; the deadline of {self.config.deadline_s:g} s passed"
                )
            await asyncio.sleep(pause_s)

    async def _once(
        self, method: str, path: str, body: bytes | None, deadline: float, final: frozenset[int]
    ) -> tuple[dict[str, Any] | None, str, float | None]:
        """One try: the answer, or why there is none and how long the server asked to wait."""
        import aiohttp

        url = self._urls.get(path) or self._url(path)
        left_s = max(0.01, deadline - time.monotonic())
        options = (
            {}
            if left_s >= self.config.timeout_s
            else {"timeout": aiohttp.ClientTimeout(total=left_s)}
        )
        try:
            async with self.session().request(
                method, url, data=body, headers=self._headers(), **options
            ) as response:
                raw = await response.read()
                status, headers = response.status, response.headers
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = f"no answer ({type(error).__name__}{f': {error}' if str(error) else ''})"
            self.breaker.failed(reason)
            return None, reason, None
        if status in DOWN:
            self.breaker.failed(f"HTTP {status}")
        else:
            self.breaker.succeeded()
        if status == 200:
            answer = loads(raw)
            return answer, "the answer is not a JSON object", None
        message, detail = _error_of(raw)
        if detail.get("code") == "insufficient_quota":  # OpenAI's 429 that no waiting mends
            raise EngineError(f"{self.url}: {message}")
        if status in HEALS and status not in final:
            return None, f"HTTP {status} {message}", retry_after(headers.get("Retry-After"))
        if status in (401, 403):
            raise EngineError(self._key_problem(status, message))
        raise Rejected(status, message, detail)

    def session(self) -> Any:
        """The pool of connections of the running loop, made once; a new loop (a second `run`) gets
        a new one.
        """
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            connector = aiohttp.TCPConnector(
                limit=self.config.max_in_flight + 8, keepalive_timeout=KEEP_ALIVE_S
            )
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
            key = os.environ.get(self.api_key_env or "")
            if key:
                self._sent_headers["Authorization"] = f"Bearer {key.strip()}"
        return self._sent_headers

    _sent_headers: dict[str, str] | None = None

    def _key_problem(self, status: int, message: str) -> str:
        if not self.api_key_env:
            return f"{self.url} wants a key (HTTP {status} {message}): name its environment variable in `api_key_env`"
        state = "is refused" if os.environ.get(self.api_key_env) else "is not set"
        return f"{self.url}: the key in environment variable {self.api_key_env} {state} (HTTP {status} {message})"


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


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (a number or a date), with a little jitter; None when
    absent or bad.
    """
    if not value:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return (
        max(0.0, wait_s) + random.uniform(0.0, 0.1) if wait_s == wait_s and wait_s < 1e6 else None
    )


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
