"""Ctrl-C, SIGTERM and SIGHUP: one exception for all of them, in whatever phase of a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The process was told to end. `kept` says what is safe, for the person who told it."""

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        self.number, self.kept = number, kept
        super().__init__(kept)


def heeded() -> list[signal.Signals]:
    """The signals that are not ignored: `nohup` makes a process ignore SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def name_of(number: int) -> str:
    """How a person calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within it, a signal raises Interrupted in the main thread; a second one ends the process at
    once. Processes that are forked within it end at the first one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, caught = os.getpid(), list[int]()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif caught:
            os._exit(128 + number)
        else:
            caught.append(number)
            raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
