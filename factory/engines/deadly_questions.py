"""Finds the questions of which a server that Prefab started dies, so that one of them does not end
the run.

After the first death all questions are asked again as before. After the next one, those that were
under way both times are asked one at a time, while all others wait. Where the server dies of one
asked alone, and answers something else once it is up again, that question has failed for good, and
the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefab.factory.errors import RequestRefused

T = TypeVar("T")


class Question:
    """A question on its way: the start of the server that it was last sent to (0: none yet), and,
    once the server died of it alone, how.
    """

    __slots__ = ("died", "sent_to")

    def __init__(self) -> None:
        self.sent_to, self.died = 0, ""


class DeadlyQuestions:
    """What one server was asked when it died.

    Args:
        confirm: Asks the server a small question. Raises TransportError where it does not answer.
        tell: Where notices for people go.
    """

    def __init__(self, confirm: Callable[[], Awaitable[None]], tell: Callable[[str], None]) -> None:
        self.confirm, self.tell = confirm, tell
        self.found = 0  # questions of which the server dies
        self._starts = 1
        self._open: set[Question] = set()
        self._before: set[Question] = set()  # under way at the last death
        self._suspects: set[Question] = set()
        self._alone: Question | None = None  # of the suspects, the one that is asked
        self._changed = asyncio.Event()

    @property
    def searching(self) -> bool:
        """Whether questions are asked one at a time."""
        return bool(self._suspects)

    @contextmanager
    def question(self) -> Iterator[Question]:
        """A question, until it is answered or given up."""
        one = Question()
        self._open.add(one)
        try:
            yield one
        finally:
            self._open.discard(one)
            self._before.discard(one)
            if self._suspects:
                self._leaves(one)

    async def ask(self, one: Question, send: Callable[[], Awaitable[T]]) -> T:
        """What `send` gives, once it is this question's turn.

        Raises:
            RequestRefused: The server dies of this question.
            TransportError: The server does not answer.
        """
        while self._suspects and self._alone is not one:
            if self._alone is None and one in self._suspects:
                self._alone = one
            else:
                await self._changed.wait()
        if one.died:
            await self.confirm()
            raise self._deadly(one)
        one.sent_to = self._starts
        return await send()

    def died(self, why: str) -> None:
        """The server has died, and is started again."""
        under_way = {one for one in self._open if one.sent_to == self._starts}
        self._starts += 1
        if self._alone is not None:
            self._alone.died = why.splitlines()[0] if self._alone in under_way else ""
        elif under_way and (self._before or self.found):
            self._suspects = (under_way & self._before) or under_way
            self.tell(
                f"it died again: the {len(self._suspects)} questions that were under way are asked "
                "one at a time, to find whether it dies of one of them"
            )
        self._before = under_way

    def _deadly(self, one: Question) -> RequestRefused:
        self.found += 1
        self.tell(
            "it dies of one question, which is not asked again (kind `engine_died` in the table "
            "`failures`); the others go on"
        )
        return RequestRefused(f"the server dies of this question, also asked alone: {one.died}")

    def _leaves(self, one: Question) -> None:
        """Let the next one be asked."""
        self._suspects.discard(one)
        if self._alone is one:
            self._alone = None
        self._changed.set()
        self._changed = asyncio.Event()
