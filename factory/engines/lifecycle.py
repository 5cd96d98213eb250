"""Engines of a run: started together or when first asked, and stopped whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

from prefab.factory.types import Completion, Engine, Request

Labels = Collection[tuple[str, ...]]  # what each judge of an engine reads


def lazily(engine: Engine) -> Engine:
    """An engine that would start a server of its own, and knows its tokenizer without it, starts at
    the first question: when every answer is in the ledger, nothing is started.
    """
    return (
        Lazy(engine) if getattr(engine, "owns_server", False) and engine.special_tokens else engine
    )


class Lazy:
    """An engine that is started when first asked. `starting_s` is the time that this took."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.starting_s = engine, 0.0
        self.labels: Labels = ()
        self._ready: asyncio.Task | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def starting(self) -> bool:
        """Whether the server is on its way up: nothing is in flight yet that would be worth waiting
        for.
        """
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
            await self.engine.start()
            await _prepare(self.engine, self.labels)
        finally:
            self.starting_s = time.monotonic() - began

    async def stop(self) -> None:
        """Stop what was started."""
        if self._ready is not None:
            self._ready.cancel()
            await asyncio.gather(self._ready, return_exceptions=True)
        await self.engine.stop()


async def _prepare(engine: Engine, labels: Labels) -> None:
    """Each label is one token of the served tokenizer: seen to at the start, not after hours of
    sampling.
    """
    for spellings in labels if hasattr(engine, "prepare") else ():
        await engine.prepare(spellings)


async def _start(engine: Engine, labels: Labels) -> None:
    if isinstance(engine, Lazy):
        engine.labels = labels
    await engine.start()
    if not isinstance(engine, Lazy):
        await _prepare(engine, labels)


@asynccontextmanager
async def started_engines(
    engines: dict[str, Engine], quiet: bool = True, labels: Mapping[str, Labels] = {}
) -> AsyncIterator[None]:
    """Start all engines at once, and stop every one of them whatever happens. `labels` by engine:
    those to be read.

    Raises: EngineError of the first that cannot start, or whose tokenizer splits a label.
    """
    for engine in engines.values() if quiet else ():
        if hasattr(engine, "progress"):
            getattr(engine, "engine", engine).progress = lambda line: None
    try:
        results = await asyncio.gather(
            *(_start(engine, labels.get(name, ())) for name, engine in engines.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        yield
    finally:
        await asyncio.shield(
            asyncio.gather(*(e.stop() for e in engines.values()), return_exceptions=True)
        )
