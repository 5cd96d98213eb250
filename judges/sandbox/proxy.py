"""The proxies that a test holds instead of the answer's objects: every operation on one is done in
the answer's process.

Plain data is sent as copies, so that `==` between a result and what a test expects is decided here,
by Python's own types, whatever the answer's classes say of themselves. Standard library only.

Threat: where a test expects a number, an answer gives an object whose `-` is always 0, so that
`abs(f() - 1.0) < 1e-6` holds; and its `-` would be told the 1.0 that is right. So an object may
calculate with a test's plain data, and turn a calculation into plain data, only when the test made
it itself by calling a class, which is what the test's own code names in CapWords
(`Vector(1, 2) * 2`). Any other object (what a function or method returned) compares, calculates and
contains by what is decided here, and has as many items as it says.
"""

from __future__ import annotations

import builtins
import contextlib
import signal
import socket
import time
import types
from collections.abc import Callable, Iterator
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

    def __init__(self, sock: socket.socket, on_use: Callable[[], None] = lambda: None) -> None:
        self.sock, self.waiting, self.greeted, self.gone, self.broken = sock, False, False, "", ""
        self.on_use, self.used, self.cpu_end = on_use, False, 0.0
        self.functions: list[Any] = []
        self.errors: dict[str, Any] = {}
        self.changes = 0  # operations that may change an object of the answer's

    def greet(self) -> None:
        """Wait until the answer's Python has started; nothing of the answer's has run yet.

        Raises: OSError with what its process could not do.
        """
        message = candidate.receive(self.sock)
        if "failed" in message:
            raise OSError(message["failed"])
        self.greeted = True

    def use(self) -> None:
        """The test has something of the answer's from now on: what takes too long may be due to
        it.
        """
        if not self.used:
            self.used = True
            self.on_use()

    def set_alarm(self, seconds: float) -> None:
        """Set the time limit from now on; 0: no limit. Time spent waiting for the answer counts for
        the answer, all other time for the test.
        """
        self.cpu_end = time.process_time() + seconds
        signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _late(self, *_: Any) -> None:
        if self.waiting:
            raise self._lose("the answer took longer than the time limit")
        if self.used:
            raise self._lose("the test took longer than the time limit with what the answer gave")
        if time.process_time() < self.cpu_end:  # the machine is busy; a test that sleeps is ended
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # by `test_runner.supervise`
            return
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
            self.use()  # before the reply, which may take long to read
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
        self.changes += what in CHANGES
        try:
            packed = candidate.encode(list(args), self.give)
        except (RecursionError, ValueError) as error:
            if self.used:
                raise self._lose("what the answer gave cannot be sent back to it") from None
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
            return {"h": value._proxy_number}
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


CHANGES = frozenset({"call", "setattr", "setitem", "delitem"})


class Proxy:
    """An object of the answer's. Never equal to plain data, whatever its `__eq__` says: an object
    that is equal to everything would pass every test.

    `_proxy_name` is the name of the attribute that it was found as; `_proxy_made` says whether a
    test made it by calling a class, or calculated it with such an object. `_proxy_length` is the
    number of its items, and after how many changes that was found.
    """

    __slots__ = ("_proxy_length", "_proxy_line", "_proxy_made", "_proxy_name", "_proxy_number")

    def __init__(self, line: Channel, number: int) -> None:
        values = ((-1, 0), line, False, "", number)
        for slot, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, slot, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        result = self._proxy_line.do("call", self, list(args), kwargs)
        return _marked(result, "_proxy_made", _names_class(self._proxy_name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in DESCRIPTIONS:
            raise AttributeError(name)  # numpy would read memory where __array_interface__ says
        if name in PREDICATES and not self._proxy_made and not _names_class(self._proxy_name):
            raise AttributeError(f"the answer gave an object of its own, and the test asks {name}")
        return _marked(self._proxy_line.do("getattr", self, name), "_proxy_name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy_line.do("setattr", self, name, value)

    def __eq__(self, other: Any) -> bool:
        return type(other) is Proxy and bool(self._proxy_line.do("eq", self, other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Proxy and bool(self._proxy_line.do("isinstance", instance, self))

    def __enter__(self) -> Any:
        return self._proxy_line.do(
            "call", self._proxy_line.do("getattr", self, "__enter__"), [], {}
        )

    def __exit__(self, *_: Any) -> Any:
        return self._proxy_line.do(
            "call", self._proxy_line.do("getattr", self, "__exit__"), [None, None, None], {}
        )

    def __hash__(self) -> int:
        return int(self._proxy_line.do("hash", self))

    def __iter__(self) -> Any:
        items = _marked(self._proxy_line.do("iter", self), "_proxy_made", self._proxy_made)
        return items if self._proxy_made else _counted(self, items)

    def __len__(self) -> int:
        length = int(self._proxy_line.do("len", self))
        if not self._proxy_made:
            _check_length(self, length)
        return length

    def __contains__(self, item: Any) -> bool:
        if self._proxy_made:
            return bool(self._proxy_line.do("contains", self, item))
        # compared here, and nobody is told the item
        return any(each == item for each in self)


# Of other attributes with two underscores, those that a test may look at.
_DESCRIPTIONS = """
__name__ __qualname__ __annotations__ __version__ __all__ __mro__ __bases__ __members__ __dict__
__dataclass_fields__ __abstractmethods__ __post_init__
"""
DESCRIPTIONS = frozenset(_DESCRIPTIONS.split())
# Questions to a text, set or number with yes or no for an answer, which may not answer themselves.
_PREDICATES = """
startswith endswith isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric
isprintable isspace istitle isupper isdisjoint issubset issuperset is_integer
"""
PREDICATES = frozenset(_PREDICATES.split())


def _counted(owner: Proxy, items: Any) -> Iterator[Any]:
    """The items of an object, which must be as many as its length."""
    count = 0
    with contextlib.suppress(StopIteration):
        while True:
            item = next(items)
            count += 1
            yield item
    _check_length(owner, count)


def _check_length(owner: Proxy, length: int) -> None:
    """Raises: TypeError when an object that nothing has changed had another length before: a loop
    over no items would pass, and so would the test of its length.
    """
    changes, before = owner._proxy_length
    if changes == owner._proxy_line.changes and before != length:
        raise TypeError(f"the answer gave an object of its own with {before} and {length} items")
    object.__setattr__(owner, "_proxy_length", (owner._proxy_line.changes, length))


def top_level(line: Channel, name: str) -> Any:
    """What the answer defines by this name."""
    return _marked(line.do("getattr", Proxy(line, 0), name), "_proxy_name", name)


def _names_class(name: str) -> bool:
    """Whether a name is written as a class's, in CapWords. The test wrote it, not the answer."""
    return len(name) > 1 and name[0].isupper()


def _marked(value: Any, slot: str, mark: Any) -> Any:
    if type(value) is Proxy:
        object.__setattr__(value, slot, mark)
    return value


def _order(name: str) -> None:
    def method(self: Proxy, other: Any) -> Any:  # a bool, or NotImplemented
        if type(other) is not Proxy:
            return NotImplemented
        return bool(self._proxy_line.do(name, self, other))

    setattr(Proxy, f"__{name}__", method)


def _calculation(name: str) -> None:
    """An operator between two values; see above for what it may do."""

    def method(self: Proxy, other: Any) -> Any:
        made = self._proxy_made or (type(other) is Proxy and other._proxy_made)
        if type(other) is not Proxy and not made:
            raise TypeError(f"{name}: the answer gave an object of its own, not plain data")
        result = self._proxy_line.do(name, self, other)
        if type(result) is not Proxy and not made:
            raise TypeError(f"{name}: objects of the answer's own make plain data")
        return _marked(result, "_proxy_made", made)

    setattr(Proxy, f"__{name.rstrip('_')}__", method)


def _forward(name: str) -> None:
    def method(self: Proxy, *args: Any) -> Any:
        return _marked(self._proxy_line.do(name, self, *args), "_proxy_made", self._proxy_made)

    setattr(Proxy, f"__{name}__", method)


for _name in candidate.CALCULATIONS:
    _calculation(_name)
for _name in (*candidate.FORWARDED, "next", "bool", "str", "repr", "int", "float"):
    _forward(_name)
for _name in candidate.ORDERS:
    _order(_name)
