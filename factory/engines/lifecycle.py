"""Start the engines of a run together, or each at its first question, and stop them in every
case.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import Any

from prefab.factory.errors import TransportError
from prefab.factory.types import Completion, Engine, Request, ServerReport

Labels = Collection[tuple[str, ...]]  # the labels that each judge of an engine reads


def lazily(engine: Engine) -> Engine:
    """Delay the start of an engine to its first question, when it would start a server of its own
    and knows its tokenizer without it: when every answer is in the ledger, nothing is started.
    """
    return LazyEngine(engine) if engine.owns_server and engine.special_tokens else engine


class LazyEngine(Engine):
    """An engine that is started when first asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.max_in_flight = engine, engine.max_in_flight
        self.owns_server, self.log_folder = engine.owns_server, engine.log_folder
        self.labels: Labels = ()
        self._ready: asyncio.Task[None] | None = None
        self._learn()

    def _learn(self) -> None:
        self.special_tokens = self.engine.special_tokens
        self.max_model_len = self.engine.max_model_len
        self.findings, self.fingerprint = self.engine.findings, self.engine.fingerprint

    @cached_property
    def identity(self) -> str:  # type: ignore[override]  # learned when first needed
        """Which model this is. Raises: EngineError when only a server knows and none answers."""
        return self.engine.identity

    def mute(self) -> None:
        """Print no progress while the server starts."""
        self.engine.mute()

    @property
    def servers(self) -> Sequence[ServerReport]:
        """The engine's servers."""
        return self.engine.servers

    @property
    def starting(self) -> bool:
        """Whether the server is being started: no question of this engine is in flight yet."""
        return self._ready is not None and not self._ready.done()

    async def start(self) -> None:
        """Nothing yet."""

    async def complete(self, key: bytes, request: Request) -> Completion:
        """Start if need be, then answer. Raises: EngineError when it cannot start."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        if not self._ready.done() or self._ready.exception():
            await asyncio.shield(self._ready)
        return await self.engine.complete(key, request)

    async def _start(self) -> None:
        began = time.monotonic()
        try:
            self.engine.quarantine = self.quarantine
            self.engine.known_fingerprint = self.known_fingerprint
            await self.engine.start()
            await _prepare(self.engine, self.labels)
            with suppress(TransportError):  # the first question will tell
                await self.engine.probe()
            self._learn()
        finally:
            self.starting_s = time.monotonic() - began

    async def probe(self) -> Mapping[str, Any]:
        """What the probe at the start found; nothing before."""
        return self.findings

    async def verify(self) -> None:
        """As the engine's, if it was started. Raises: EngineError."""
        if self._ready is not None and self._ready.done() and not self._ready.exception():
            await self.engine.verify()

    async def stop(self) -> None:
        """Stop what was started."""
        if self._ready is not None:
            self._ready.cancel()
            await asyncio.gather(self._ready, return_exceptions=True)
        await self.engine.stop()


class KeptEngine(LazyEngine):
    """An engine that stays started between runs, until `end`."""

    async def start(self) -> None:
        """Start an engine whose control tokens only its server knows; others at their first
        question.
        """
        if self._ready is None and not (self.owns_server and self.special_tokens):
            self._ready = asyncio.create_task(self._start())
        if self._ready is not None:
            await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """Stay started."""

    async def end(self) -> None:
        """Stop what was started."""
        await super().stop()


async def _prepare(engine: Engine, labels: Labels) -> None:
    """Check at the start, not after hours of sampling, that each label is one token."""
    for spellings in labels:
        await engine.prepare(spellings)


async def _start(engine: Engine, labels: Labels) -> None:
    if isinstance(engine, LazyEngine):
        engine.labels = labels
    await engine.start()
    if not isinstance(engine, LazyEngine):
        await _prepare(engine, labels)


@asynccontextmanager
async def started_engines(
    engines: dict[str, Engine], quiet: bool = True, labels: Mapping[str, Labels] = {}
) -> AsyncIterator[None]:
    """Start all engines at once, and stop every one of them in every case. `labels` are those to
    be read, by engine.

    Raises: EngineError of the first that cannot start, or whose tokenizer splits a label.
    """
    for engine in engines.values() if quiet else ():
        engine.mute()
    try:
        results = await asyncio.gather(
            *(_start(engine, labels.get(name, ())) for name, engine in engines.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        yield
        for engine in engines.values():
            await engine.verify()
    finally:
        await asyncio.shield(
            asyncio.gather(*(e.stop() for e in engines.values()), return_exceptions=True)
        )
