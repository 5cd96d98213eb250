"""The answer's side of a Python test: runs the answer's code and executes the operations that the
test runner asks for. It never sees the tests.

Run in a sandbox (see `isolation.py`) from its text alone, standard library only. Nothing here is
trusted: the code that it runs can change all of it. What it sends back is read as data; the test
runner decides what passed.
"""

from __future__ import annotations

import builtins
import json
import operator
import struct
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST_BYTES = 8 << 20  # of one message
MOST_EXPONENT = 4300  # of a Decimal: as many digits as Python reads into an integer
PLAIN: dict[type[Any], str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
NUMBERS: dict[str, type[Any]] = {"Fraction": Fraction, "Decimal": Decimal}
# functions of `operator` that a test may use on an object; a proxy forwards FORWARDED as they are
CALCULATIONS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and_", "or_", "xor", "lshift", "rshift"),
)
FORWARDED = ("neg", "pos", "abs", "invert", "getitem", "setitem", "delitem", "index")
ORDERS = ("lt", "le", "gt", "ge")
OPS = (*CALCULATIONS, *FORWARDED, *ORDERS, "eq", "ne", "contains")


def send(sock: Any, message: Any) -> None:
    """One message: four bytes of length, then JSON."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MOST_BYTES:
        raise ValueError("the value is larger than 8 MiB")
    sock.sendall(struct.pack(">I", len(data)) + data)


def receive(sock: Any) -> Any:
    """The next message.

    Raises: EOFError when the other side is gone, ValueError for a message that is not valid.
    """
    size = struct.unpack(">I", _exactly(sock, 4))[0]
    if size > MOST_BYTES:
        raise ValueError("a message is larger than 8 MiB")
    return json.loads(_exactly(sock, size))


def _exactly(sock: Any, size: int) -> bytes:
    parts = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, other: Any) -> Any:
    """A value as JSON. Plain data is copied, whatever class it pretends to be; `other` encodes
    everything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"i": format(int.__int__(value), "x")}
    if isinstance(value, float):
        return {"f": float.__repr__(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if isinstance(value, dict):
        return {"d": [[encode(k, other), encode(v, other)] for k, v in dict.items(value)]}
    for kind, tag in PLAIN.items():
        if isinstance(value, kind):
            return {tag: [encode(v, other) for v in kind.__iter__(value)]}
    for name, kind in NUMBERS.items():
        if type(value) is kind:
            return {"n": [name, str(value)]}
    return other(value)


def decode(value: Any, other: Any) -> Any:
    """The inverse of `encode`: new plain data, whoever sent it. `other` decodes everything else."""
    if isinstance(value, (float, list)):
        raise ValueError("not a message")
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag in SCALARS:
        return SCALARS[tag](inner)
    if tag == "d":
        return {decode(k, other): decode(v, other) for k, v in inner}
    kind = next((kind for kind, mark in PLAIN.items() if mark == tag), None)
    return other(tag, inner) if kind is None else kind(decode(v, other) for v in inner)


def _number(inner: Any) -> Any:
    if inner[0] == "Fraction" and not set(inner[1]) <= set("-/0123456789"):
        raise ValueError("not a message")  # "1e999999999" would take all memory
    number = NUMBERS[inner[0]](inner[1])
    if isinstance(number, Decimal) and abs(number.adjusted()) > MOST_EXPONENT:
        raise ValueError("not a message")  # as an integer it would take all memory
    return number


SCALARS: dict[str, Callable[[Any], Any]] = {
    "i": lambda inner: int(inner, 16),
    "f": float,
    "b": bytes.fromhex,
    "c": lambda inner: complex(float(inner[0]), float(inner[1])),
    "n": _number,
}


def base_of(error: type[BaseException]) -> str:
    """The name of the first built-in class that this one inherits from."""
    return next(kind.__name__ for kind in error.__mro__ if kind.__module__ == "builtins")


class Host:
    """Keeps the answer's objects by number; 0 is its namespace."""

    def __init__(self, sock: Any) -> None:
        self.sock, self.objects = sock, [None]

    def load(self, source: str) -> Any:
        """Run the answer's code. Returns the names that it defines."""
        import types

        module = types.ModuleType("answer")
        sys.modules["answer"] = self.objects[0] = module  # type: ignore[call-overload]
        exec(compile(source, "<answer>", "exec"), module.__dict__)
        return [name for name in vars(module) if not name.startswith("_")]

    def do(self, what: str, args: Any) -> Any:
        """One operation that the test runner asks for."""
        if what == "call":
            return args[0](*args[1], **args[2])
        if what == "isinstance":
            return isinstance(args[0], args[1])
        if what in OPS:
            return getattr(operator, what)(*args)
        return getattr(builtins, what)(
            *args
        )  # getattr, setattr, len, iter, next, bool, str, repr, hash

    def name(self, value: Any) -> Any:
        """A reference to an object that stays here, for the test runner."""
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"e": [value.__name__, value.__module__ == "builtins", base_of(value)]}
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return encode(value.item(), self.name)
        self.objects.append(value)
        return {"h": len(self.objects) - 1}

    def find(self, tag: str, inner: Any) -> Any:
        """The object behind a reference that came back, or a stub for a function of the test
        runner's.
        """
        if tag == "k":
            return lambda *args: self.callback(inner, args)
        return self.objects[inner]

    def callback(self, number: int, args: Any) -> Any:
        """Ask the test runner to call one of its own functions, which the test handed over."""
        send(self.sock, {"callback": number, "args": encode(list(args), self.name)})
        return self.serve()

    def serve(self) -> Any:
        """Execute requests until the test runner returns from a callback."""
        while True:
            message = receive(self.sock)
            if "returned" in message:
                return decode(message["returned"], self.find)
            if "raised" in message:
                raise RuntimeError("the test's own function raised " + message["raised"])
            try:
                if "load" in message:  # noqa: SIM108
                    value = self.load(message["load"])
                else:
                    value = self.do(message["do"], decode(message["args"], self.find))
                reply = {"value": encode(value, self.name)}
            except EOFError:
                raise
            except (
                BaseException
            ) as error:  # SystemExit too: an answer that wants to leave has failed, not passed
                kind = type(error)
                reply = {
                    "error": [
                        kind.__name__,
                        kind.__module__ == "builtins",
                        base_of(kind),
                        str(error)[:500],
                    ]
                }
            send(self.sock, reply)


if __name__ == "__main__":
    import socket

    sys.path += sys.argv[1:]
    sys.argv = [""]
    line = socket.socket(fileno=3)
    send(line, {"value": "ready"})
    Host(line).serve()
