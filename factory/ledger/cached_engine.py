"""An engine in front of which stands a ledger: what a run has already asked is not asked again."""

from __future__ import annotations

from pathlib import Path

from prefab.factory.ledger import db
from prefab.factory.types import Completion, Engine, Request


class CachedEngine(Engine):
    """Answers from the ledger at `folder` where it can, else from `engine`. `found` counts the
    former. The ledger is opened for reading only.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.found = engine, 0
        self.identity, self.max_in_flight = engine.identity, engine.max_in_flight
        there = (folder / db.FILE).exists()
        self._ledger = db.connect(folder / db.FILE, readonly=True) if there else None

    @property
    def special_tokens(self) -> tuple[str, ...]:  # type: ignore[override]  # known after `start`
        """Control tokens of the engine's tokenizer."""
        return self.engine.special_tokens

    @property
    def max_model_len(self) -> int | None:  # type: ignore[override]  # known after `start`
        """The engine's longest prompt and answer, in tokens."""
        return self.engine.max_model_len

    @property
    def owns_server(self) -> bool:  # type: ignore[override]
        """Whether the engine starts a server."""
        return self.engine.owns_server

    @property
    def starting(self) -> bool:
        """Whether the engine's server is being started by a first question."""
        return self.engine.starting

    def mute(self) -> None:
        """Print no progress while a server starts."""
        self.engine.mute()

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """Find the token ids of `labels`."""
        await self.engine.prepare(labels)

    async def start(self) -> None:
        """Start the engine."""
        await self.engine.start()

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The ledger's answer, or else the engine's."""
        found = db.lookup(self._ledger, [key]) if self._ledger else {}
        self.found += len(found)
        return found[key] if found else await self.engine.complete(key, request)

    async def stop(self) -> None:
        """Stop the engine."""
        await self.engine.stop()

    def close(self) -> None:
        """Close the ledger that was read."""
        if self._ledger is not None:
            self._ledger.close()
