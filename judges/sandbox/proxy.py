"""The proxies that a test holds instead of the answer's objects: every operation on one is done in
the answer's process.

Plain data is sent as copies, so that `==` between a result and what a test expects is decided here,
by Python's own types, whatever the answer's classes say of themselves. Standard library only.
"""

from __future__ import annotations

import builtins
import signal
import socket
import types
from typing import Any

from prefab.judges.sandbox import candidate


class CandidateDied(BaseException):
    """The answer's process ended or ran out of time. Not an Exception, so that no `except` of a
    test's catches it.
    """


class NotSerializable(BaseException):
    """The test hands over something that cannot be sent: the test's fault, not the answer's."""


class AnswerError(Exception):
    """The answer raised an exception of its own making."""


class Channel:
    """The connection to the answer's process. `gone` and `broken` keep what happened, whatever a
    test's `except` hides.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.waiting, self.greeted, self.gone, self.broken = sock, False, False, "", ""
        self.functions: list[Any] = []
        self.errors: dict[str, Any] = {}

    def greet(self) -> None:
        """Wait until the answer's Python has started; nothing of the answer's has run yet."""
        candidate.receive(self.sock)
        self.greeted = True

    def set_alarm(self, seconds: float) -> None:
        """Set the time limit from now on; 0: no limit. Time spent waiting for the answer counts for
        the answer, all other time for the test.
        """
        signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _late(self, *_: Any) -> None:
        if self.waiting:
            raise self._lose("the answer took longer than the time limit")
        self.broken = self.broken or "the test itself took longer than the time limit"
        raise NotSerializable(self.broken)

    def _lose(self, why: str) -> CandidateDied:
        self.gone = self.gone or why
        return CandidateDied(self.gone)

    def ask(self, message: dict[str, Any]) -> Any:
        """The answer's reply. Raises: what the answer raised, or CandidateDied."""
        if self.gone:
            raise CandidateDied(self.gone)
        before, self.waiting = self.waiting, True
        try:
            candidate.send(self.sock, message)
            reply = candidate.receive(self.sock)
            while "callback" in reply:
                self._call_back(reply)
                reply = candidate.receive(self.sock)
            failure = reply.get("error")
            if failure is None:
                return candidate.decode(reply["value"], self.take)
            kind = self.error_class(failure[0], failure[1], failure[2])
            error = kind(str(failure[3]))
        except (EOFError, OSError):
            raise self._lose(
                "the answer's process ended: by a limit, or it left by itself"
            ) from None
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ):
            raise self._lose("the answer's process sent what cannot be read") from None
        finally:
            self.waiting = before
        raise error

    def do(self, what: str, *args: Any) -> Any:
        """The operation `what` with these arguments, done on the answer's side."""
        try:
            packed = candidate.encode(list(args), self.give)
        except (RecursionError, ValueError) as error:
            raise self._uncrossable(f"an argument cannot be sent ({error})") from None
        return self.ask({"do": what, "args": packed})

    def _call_back(self, reply: dict[str, Any]) -> None:
        args = candidate.decode(reply["args"], self.take)
        try:
            value = candidate.encode(self.functions[reply["callback"]](*args), self.give)
            candidate.send(self.sock, {"returned": value})
        except Exception as error:
            candidate.send(self.sock, {"raised": f"{type(error).__name__}: {error}"[:300]})

    def give(self, value: Any) -> Any:
        """A reference to something of the test's that is no plain data: a proxy becomes the object
        it stands for, a function becomes a callback.
        """
        if type(value) is Proxy:
            return {"h": object.__getattribute__(value, "_number")}
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
            self.functions.append(value)
            return {"k": len(self.functions) - 1}
        raise self._uncrossable(
            f"the test hands the answer a {type(value).__name__}, which cannot cross"
        )

    def _uncrossable(self, why: str) -> NotSerializable:
        self.broken = self.broken or why
        return NotSerializable(why)

    def take(self, tag: str, inner: Any) -> Any:
        """What stands here for something of the answer's that is no plain data."""
        if tag == "e":
            return self.error_class(inner[0], inner[1], inner[2])
        return Proxy(self, int(inner))

    def error_class(self, name: str, built_in: bool, base: str) -> Any:
        """The class to raise for an error of the answer's: the built-in one, or a proxy under the
        same name.
        """
        if built_in:
            found = getattr(builtins, name, None)
            plain = (
                isinstance(found, type) and issubclass(found, Exception) and "Unicode" not in name
            )
            return found if plain else AnswerError
        if name not in self.errors:
            parent = self.error_class(base, True, base)
            self.errors[name] = type(
                str(name)[:80],
                (parent,) if issubclass(parent, AnswerError) else (AnswerError, parent),
                {},
            )
        return self.errors[name]


class Proxy:
    """An object of the answer's. Never equal to plain data, whatever its `__eq__` says: an object
    that is equal to everything would pass every test.
    """

    def __init__(self, line: Channel, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._line.do("call", self, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._line.do("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.do("setattr", self, name, value)

    def __eq__(self, other: Any) -> bool:
        return type(other) is Proxy and bool(self._line.do("eq", self, other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Proxy and bool(self._line.do("isinstance", instance, self))

    def __enter__(self) -> Any:
        return self._line.do("call", self._line.do("getattr", self, "__enter__"), [], {})

    def __exit__(self, *_: Any) -> Any:
        return self._line.do(
            "call", self._line.do("getattr", self, "__exit__"), [None, None, None], {}
        )

    def __hash__(self) -> int:
        return int(self._line.do("hash", self))

    def __contains__(self, item: Any) -> bool:
        return bool(self._line.do("contains", self, item))


def _order(name: str) -> None:
    def method(self: Proxy, other: Any) -> Any:  # a bool, or NotImplemented
        if type(other) is not Proxy:
            return NotImplemented
        return bool(self._line.do(name, self, other))

    setattr(Proxy, f"__{name}__", method)


def _forward(name: str, what: str) -> None:
    def method(self: Proxy, *args: Any) -> Any:
        return self._line.do(what, self, *args)

    setattr(Proxy, f"__{name.rstrip('_')}__", method)


for _name in (*candidate.FORWARDED, "len", "iter", "next", "bool", "str", "repr", "int", "float"):
    _forward(_name, _name)
for _name in candidate.ORDERS:
    _order(_name)
