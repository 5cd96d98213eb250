"""The batch APIs of hosted providers: questions are gathered into a batch, which is answered within
a day at half the price.

Each batch is noted in a file beside the ledger before it is created, with the names of its
questions. A process that was killed finds it again: a question whose batch is known waits for that
batch, and is not sent twice. Questions and answers are those of `openai` (`Chat`), so that both
engines share answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import Field

from prefab.factory.console import say, warn
from prefab.factory.engines.batch_formats import FORMATS, BatchState, Line
from prefab.factory.engines.chat import Chat, TopRead
from prefab.factory.engines.family import Family, MaxTokensField
from prefab.factory.engines.http import (
    BACKOFF_CAP_S,
    HEALS,
    LIMITED,
    LOG,
    MAX_BYTES,
    Denied,
    HttpClient,
    HttpConfig,
    Pace,
    Rejected,
    api_key,
    error_of,
    loads,
    wait_hint,
)
from prefab.factory.engines.openai import api_identity
from prefab.factory.errors import EngineError, TransportError
from prefab.factory.paths import cache_folder
from prefab.factory.spec.control_tokens import KNOWN_SPECIALS
from prefab.factory.types import Completion, Engine, Request

RESULT_BYTES = 2**31  # of a file of results
CLOCKS_DIFFER_S = 300.0  # the provider's clock and ours
_KEY: ContextVar[bytes] = ContextVar("key", default=b"")


class BatchConfig(HttpConfig):
    """`provider` decides the form of the batches, and the defaults of `base_url` and `api_key_env`.
    A batch is sent when no question came for `gather_s`, or when it is full (`max_in_flight`
    questions, or what the provider takes); every `poll_s` the provider is asked how far it is. A
    question that a batch leaves without an answer is sent in up to `retries` more. `revision` and
    the other fields: as of `openai`.
    """

    engine: Literal["batch"] = "batch"
    provider: Literal["openai", "anthropic"] = "openai"
    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    revision: str = ""
    max_in_flight: int = Field(10_000, ge=1, le=100_000)
    gather_s: float = Field(5.0, gt=0)
    poll_s: float = Field(30.0, gt=0)
    top_logprobs: int = Field(20, ge=0, le=20)
    max_tokens_field: MaxTokensField = "max_tokens"
    max_model_len: int | None = None
    extra_body: dict[str, Any] = {}


@dataclass(slots=True, eq=False)
class Batch:
    """A batch that was sent, now or by an earlier process; `id` is empty until it is known.

    Attributes:
        token: Our name for it.
        ids: Its questions.
        at: When it was noted, in seconds since 1970.
        ours: Whether this process sent it: what it left unanswered is a failure then.
        lines: Its results, once they are there, by question.
    """

    token: str
    ids: list[str]
    at: float
    id: str = ""
    ours: bool = False
    lines: dict[str, Line] | None = None
    failure: str = ""
    task: asyncio.Task[None] | None = None


class BatchFile:
    """The file that names the batches: a JSON object a line, on disk before anything is sent."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.batches: dict[str, Batch] = {}
        self.of_question: dict[str, Batch] = {}
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            data = b""
        self._begin = b"\n" if data and not data.endswith(b"\n") else b""  # of a killed process
        for raw in data.splitlines():
            row = loads(raw)
            if row is None:
                continue
            if "ids" in row:
                self._take(Batch(row["token"], row["ids"], row["at"]))
            elif row["token"] in self.batches:
                self.batches[row["token"]].id = row["id"]

    def _take(self, batch: Batch) -> None:
        self.batches[batch.token] = batch
        self.of_question.update((name, batch) for name in batch.ids)

    def note(self, batch: Batch) -> None:
        """Note a batch that is about to be created."""
        self._take(batch)
        self._write({"token": batch.token, "at": batch.at, "ids": batch.ids})

    def created(self, batch: Batch) -> None:
        """Note the provider's name of a batch."""
        self._write({"token": batch.token, "id": batch.id})

    def _write(self, row: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as out:
            out.write(self._begin + orjson.dumps(row) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        self._begin = b""


@dataclass(slots=True, eq=False)
class Waiting:
    """A question that waits for its answer, as the provider is asked it."""

    name: str
    question: bytes
    future: asyncio.Future[Line]
    tries: int = field(default=0)


class BatchClient(HttpClient):
    """Sends what `Chat` posts in batches."""

    def __init__(self, config: BatchConfig, name: str, folder: Path) -> None:
        self.format = FORMATS[config.provider]
        super().__init__(
            config.base_url or self.format.base_url,
            config,
            config.api_key_env or self.format.api_key_env,
        )
        self.settings, self.name = config, name
        where = hashlib.sha256(f"{self.url} {config.model}".encode()).hexdigest()[:8]
        self.file = BatchFile(folder / f"{name}-{where}.jsonl")
        self.say = lambda line: say(f"engines.{name}: {line}", stderr=True)
        self._queue: list[Waiting] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._posted: dict[tuple[bytes, bytes], int] = {}
        self._open: dict[str, list[Waiting]] = {}  # by token of their batch

    def _headers(self) -> dict[str, str]:
        return self.format.headers(self.key or api_key(self.api_key_env))

    async def post(
        self,
        path: str,
        body: bytes,
        final: frozenset[int] = frozenset(),
        max_bytes: int = MAX_BYTES,
        pace: Pace | None = None,
    ) -> dict[str, Any]:
        """The answer to `body`, once its batch is there. Raises: as `HttpClient.post`."""
        key = _KEY.get()
        digest = hashlib.sha256(path.encode() + body).digest()
        # the same question asked again by this process wants another answer
        attempt = self._posted[key, digest] = 1 + self._posted.get((key, digest), -1)
        name = f"{key.hex()[:40]}-{digest.hex()[:16]}-{attempt}"
        question = self.format.question(name, orjson.loads(body))
        waiting = Waiting(name, question, asyncio.get_running_loop().create_future())
        batch = self.file.of_question.get(name)
        if batch is None:
            self._enqueue(waiting)
        else:
            self._await(batch, waiting)
        line = await waiting.future
        if line.outcome == "refused":
            raise Rejected(line.status, line.reason, line.body)
        if line.outcome != "answered":
            raise TransportError(f"{self.url}: batch: {line.reason}")
        return line.body

    def _enqueue(self, waiting: Waiting) -> None:
        """Add a question to the next batch."""
        loop = asyncio.get_running_loop()
        most = min(self.format.max_questions, self.settings.max_in_flight)
        if self._bytes + len(waiting.question) > self.format.max_bytes:
            self._flush()
        self._queue.append(waiting)
        self._bytes += len(waiting.question) + 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if len(self._queue) >= most:
            self._flush()
        else:
            self._timer = loop.call_later(self.settings.gather_s, self._flush)

    def _flush(self) -> None:
        """Send the questions that were gathered."""
        waiting, self._queue, self._bytes = self._queue, [], 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waiting:
            names = [one.name for one in waiting]
            batch = Batch(secrets.token_hex(16), names, time.time(), ours=True)
            self._open[batch.token] = waiting
            self._follow(batch)

    def _await(self, batch: Batch, waiting: Waiting) -> None:
        """Wait for a batch that an earlier process sent."""
        if batch.task is not None and batch.task.done():
            self._settle(batch, [waiting])
            return
        self._open.setdefault(batch.token, []).append(waiting)
        if batch.task is None:
            self._follow(batch)

    def _follow(self, batch: Batch) -> None:
        batch.task = asyncio.get_running_loop().create_task(self._work(batch))
        self._tasks.add(batch.task)
        batch.task.add_done_callback(self._tasks.discard)

    async def _work(self, batch: Batch) -> None:
        """Create a batch if need be, wait for it, and hand its answers over."""
        try:
            if not batch.id:
                await self._create_or_find(batch)
            if batch.id:
                await self._results(batch)
        except Exception as error:  # nobody awaits this task
            if not isinstance(error, (EngineError, Rejected)):
                told = f"{self.url}: not understood ({type(error).__name__}: {error})"
                error = TransportError(told)
            for one in self._open.pop(batch.token, []):
                if not one.future.done():
                    one.future.set_exception(error)
            return
        self._settle(batch, self._open.pop(batch.token, []))

    async def _create_or_find(self, batch: Batch) -> None:
        """Create our batch; find one that an earlier process may have created."""
        if not batch.ours:
            found = await self._find(batch)
            if found is not None:
                batch.id = found
                self.file.created(batch)
            return
        self.file.note(batch)
        questions = [one.question for one in self._open[batch.token]]
        file = await self._upload(questions) if self.format.uploads else ""
        body = self.format.create(questions, file, batch.token)
        for tries_left in reversed(range(1 + self.config.retries)):
            try:
                made = await self._request("POST", self.format.path, body, retries=0)
                batch.id = self.format.state(_object(made)).id
                break
            except TransportError:  # it may have been created all the same
                batch.id = await self._find(batch) or ""
                if batch.id:
                    break
                if not tries_left:
                    raise
                await asyncio.sleep(min(BACKOFF_CAP_S, self.settings.poll_s))
        self.file.created(batch)
        self.say(f"batch {batch.id} of {len(questions):,} questions is sent")

    async def _upload(self, questions: list[bytes]) -> str:
        """The provider's name of a file with these questions."""
        import aiohttp

        def form() -> aiohttp.FormData:
            made = aiohttp.FormData()
            made.add_field("purpose", "batch")
            made.add_field("file", b"\n".join(questions), filename="prefab.jsonl")
            return made

        made = _object(await self._request("POST", "/files", form))
        return str(made["id"])

    async def _find(self, batch: Batch) -> str | None:
        """The provider's name of a batch of which we know only that it may have been created: by
        its token; where the provider keeps none, the first one of its size since then.
        """
        listed = _object(await self._request("GET", f"{self.format.path}?limit=100"))
        known = {one.id for one in self.file.batches.values()}
        states = [self.format.state(row) for row in listed.get("data") or ()]
        for state in sorted(states, key=lambda one: one.created):
            same_size = not self.format.uploads and state.total == len(batch.ids)
            late = state.created >= batch.at - CLOCKS_DIFFER_S
            if state.token == batch.token or (same_size and late and state.id not in known):
                return state.id
        return None

    async def _results(self, batch: Batch) -> None:
        """Wait until a batch has ended, and read its results."""
        state = await self._state(batch)
        said = -1
        while not state.ended:
            if state.done != said:
                said = state.done
                LOG.debug("batch %s: %d of %d done", batch.id, state.done, state.total)
            await asyncio.sleep(self.settings.poll_s)
            state = await self._state(batch)
        batch.failure, batch.lines = state.failure, {}
        for file in state.files:
            for raw in (await self._request("GET", file)).splitlines():
                if raw.strip():
                    line = self.format.line(orjson.loads(raw))
                    batch.lines[line.custom_id] = line
        self.say(f"batch {batch.id} has ended: {state.done:,} of {len(batch.ids):,} questions done")

    async def _state(self, batch: Batch) -> BatchState:
        return self.format.state(
            _object(await self._request("GET", f"{self.format.path}/{batch.id}"))
        )

    def _settle(self, batch: Batch, waiting: list[Waiting]) -> None:
        """Give each question its line, or send it again."""
        for one in waiting:
            line = (batch.lines or {}).pop(one.name, None)
            if line is not None and line.outcome in ("answered", "refused"):
                if not one.future.done():
                    one.future.set_result(line)
                continue
            one.tries += batch.ours
            reason = batch.failure or (line.reason if line else "the batch has no answer to it")
            final = batch.failure or (line and line.outcome == "cancelled")
            if batch.ours and (final or one.tries > self.config.retries):
                if not one.future.done():
                    one.future.set_result(Line(one.name, "again", {}, reason=reason))
                continue
            self._enqueue(one)

    async def _request(
        self, method: str, path: str, data: Any = None, retries: int | None = None
    ) -> bytes:
        """The body of a response. `path` may be a whole address of the same server.

        Raises: Rejected, Denied, EngineError, TransportError as `HttpClient.post`.
        """
        import aiohttp

        url = path if "://" in path else self.url + path
        if urlsplit(url)[:2] != urlsplit(self.url)[:2]:
            raise EngineError(f"{self.url} names results at {url[:200]}, another server")
        headers = self._headers()
        if isinstance(data, bytes):
            headers["Content-Type"] = "application/json"
        tries = self.config.retries if retries is None else retries
        for n in range(1 + tries):
            wait_s, reason = min(BACKOFF_CAP_S, 0.25 * 2**n), ""
            try:
                async with self.session().request(
                    method,
                    url,
                    data=data() if callable(data) else data,
                    headers=headers,
                    allow_redirects=False,
                ) as answer:
                    raw = await self._body(answer, RESULT_BYTES)
                    status, got = answer.status, answer.headers
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                reason = f"no answer ({type(error).__name__})"
            else:
                if status < 300:
                    return raw
                message, _ = error_of(raw)
                reason, hint = f"HTTP {status} {message}", wait_hint(got, message)
                wait_s = hint if hint is not None else wait_s
                if status in (401, 403):
                    raise Denied(status, self._key_problem(status, message), general=True)
                if status not in HEALS and status != LIMITED:
                    raise EngineError(f"{url}: {reason}")
            if n < tries:
                self.retries += 1
                LOG.debug("%s: try %d in %.1f s: %s", url, n + 2, wait_s, reason)
                await asyncio.sleep(wait_s)
        raise TransportError(f"{url}: {reason}; gave up after {1 + tries} tries")

    async def close(self) -> None:
        """Stop following the batches, which go on, and close the pool."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in [*self._queue, *(one for some in self._open.values() for one in some)]:
            one.future.cancel()
        self._queue.clear()
        self._open.clear()
        await super().close()


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a response. Raises: TransportError for anything else."""
    found = loads(raw)
    if found is None:
        raise TransportError("the answer is not a JSON object")
    return found


class BatchEngine(Engine):
    """An engine behind a batch API."""

    Config = BatchConfig

    def __init__(self, config: BatchConfig, name: str = "batch") -> None:
        self.config, self.name, self.max_in_flight = config, name, config.max_in_flight
        self.identity = api_identity(config.model, config.revision, config.extra_body)
        self.special_tokens, self.max_model_len = KNOWN_SPECIALS, config.max_model_len
        self.in_batches, self._muted = True, False
        self._chat: Chat | None = None

    def mute(self) -> None:
        """Print no notices."""
        self._muted = True

    async def start(self) -> None:
        """Read which batches there are. Raises: EngineError when the key's variable is not set."""
        form = FORMATS[self.config.provider]
        key = self.config.api_key_env or form.api_key_env
        url = self.config.base_url or form.base_url
        if not api_key(key) and "://127." not in url and "://localhost" not in url:
            raise EngineError(
                f"engines.{self.name}: set environment variable {key} to the key of {url}"
            )
        store = self.log_folder.parent if self.log_folder else cache_folder()
        client = BatchClient(self.config, self.name, store / "batches")
        if self._muted:
            client.say = lambda line: LOG.info(line)
        family = Family(
            max_tokens_field=self.config.max_tokens_field,
            logprobs=form.logprobs and self.config.top_logprobs > 0,
            left_out=() if form.logprobs else ("seed",),
        )
        read = TopRead(self.config.top_logprobs)
        model, extra = self.config.model, self.config.extra_body
        self._chat = Chat(
            client, "/chat/completions", model, read, extended=False, family=family, extra=extra
        )
        if not self._muted:
            self._chat.tell = lambda line: warn(f"engines.{self.name}: {model} {line}")

    async def complete(self, key: bytes, request: Request) -> Completion:
        """Answer one request, hours later. Raises: TransportError, EngineError."""
        assert self._chat is not None  # started
        _KEY.set(key)
        return await self._chat.complete(key, request)

    async def stop(self) -> None:
        """Leave the batches to the provider: the next run fetches their answers."""
        if self._chat is not None:
            await self._chat.stop()
