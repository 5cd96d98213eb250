"""What logs and traces are told: each model call once it has ended, and stages of the work.

Nothing observes by default, and then a call costs one look at an empty list. `logs` and `tracing`
add the observers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from prefab.factory.types import Completion, Engine, Request
from prefab.factory.uses import Use

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class CallEvent:
    """A call of an engine that has ended.

    Attributes:
        engine: What was asked, below its wrappers.
        key: The digest of the question.
        request: The question.
        use: What the first to ask it asked it for.
        outcome: The answer, or the error.
        began_ns: Nanoseconds since 1970.
        ended_ns: Nanoseconds since 1970.
    """

    engine: Engine
    key: bytes
    request: Request
    use: Use
    outcome: Completion | BaseException
    began_ns: int
    ended_ns: int

    @property
    def seconds(self) -> float:
        """How long the call took, with its retries."""
        return (self.ended_ns - self.began_ns) / 1e9


class Observer(Protocol):
    """Is told of calls and stages. It must not raise."""

    def call(self, event: CallEvent) -> None:
        """A call has ended."""

    def stage(self, name: str, attributes: dict[str, Value]) -> AbstractContextManager[object]:
        """A context that begins and ends with a stage."""


observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within it, this observer is told, too."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


async def observed_call(
    engine: Engine, key: bytes, request: Request, use: Use, context: Context
) -> Completion:
    """What the engine answers; the observers are told in `context`. Raises: as the engine."""
    began = time.time_ns()
    outcome: Completion | BaseException | None = None
    try:
        outcome = await engine.complete(key, request)
        return outcome
    except BaseException as error:
        outcome = error
        raise
    finally:
        if outcome is not None:
            while isinstance(inner := getattr(engine, "engine", None), Engine):
                engine = inner
            event = CallEvent(engine, key, request, use, outcome, began, time.time_ns())
            for observer in observers:
                context.run(observer.call, event)


@contextmanager
def stage(name: str, /, **attributes: Value) -> Iterator[None]:
    """A stage of the work, such as `run` or `fill store`."""
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.stage(name, attributes))
        yield
