"""What a server can do wrong with one answer, by name: 40 kinds and more.

A run that meets one must end by itself, without a traceback, without a verdict that is not the
server's, and the same command must mend it once the server is well again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Act = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """`reads`: only label reads meet it. `once`: asking again heals it within the run."""

    act: Act
    reads: bool = False


def http(
    body: bytes,
    status: str = "200 OK",
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> bytes:
    """A response."""
    lines = {
        "content-type": "application/json",
        "content-length": str(len(body) if length is None else length),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


def whole(good: dict[str, Any]) -> bytes:
    return json.dumps(good).encode()


def send(make: Callable[[dict[str, Any]], bytes], then: str = "", reads: bool = False) -> Fault:
    """Write bytes, and `then` close, reset or hang."""

    async def act(writer: asyncio.StreamWriter, good: dict[str, Any]) -> None:
        writer.write(make(good))
        if then == "hang":
            await writer.drain()
            await asyncio.sleep(60)
        elif then == "reset":
            await asyncio.sleep(0.01)
            writer.transport.abort()
        elif then == "close":
            await writer.drain()
            writer.close()

    return Fault(act, reads)


def status(line: str, message: str = "no", headers: dict[str, str] | None = None) -> Fault:
    body = json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()
    return send(lambda good: http(body, line, headers))


def change(edit: Callable[[dict[str, Any]], Any], reads: bool = False) -> Fault:
    """A well-formed response with an edited answer."""

    def make(good: dict[str, Any]) -> bytes:
        edited = edit(good)
        return http(json.dumps(good if edited is None else edited).encode())

    return send(make, reads=reads)


def logp(value: Any) -> Fault:
    def edit(good: dict[str, Any]) -> None:
        for top in good["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            top["logprob"] = value

    return change(edit, reads=True)


def put(**fields: Any) -> Fault:
    return change(lambda good: good["choices"][0].update(fields))


def text(value: Any) -> Fault:
    return change(lambda good: good["choices"][0]["message"].update(content=value))


async def drip(writer: asyncio.StreamWriter, good: dict[str, Any]) -> None:
    """A body without end, a byte at a time."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1\r\n \r\n")
        await asyncio.sleep(0.2)


async def huge(writer: asyncio.StreamWriter, good: dict[str, Any]) -> None:
    """200 MB of white space before the answer."""
    body = whole(good)
    writer.write(http(b"", length=200_000_000 + len(body)))
    for _ in range(200):
        if writer.is_closing():
            return
        writer.write(b" " * 1_000_000)
        await writer.drain()
    writer.write(body)


async def bomb(writer: asyncio.StreamWriter, good: dict[str, Any]) -> None:
    """A gzip body of 1 MB that unpacks to 1 GB."""
    writer.write(http(BOMB, headers={"content-encoding": "gzip"}))


async def late(writer: asyncio.StreamWriter, good: dict[str, Any]) -> None:
    """The answer, and after it another question's, unasked, on the same connection."""
    writer.write(http(whole(good)))
    other = json.loads(json.dumps(good))
    other["choices"][0]["message"]["content"] = "an answer to another question"
    other["choices"][0]["logprobs"] = None
    await asyncio.sleep(0.002)
    writer.write(http(whole(other)))


def chunked(*parts: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(parts)


def packed(good: dict[str, Any]) -> bytes:
    return gzip.compress(whole(good))


BOMB = gzip.compress(b" " * 50_000_000) * 20
GZIP = {"content-encoding": "gzip"}
NAN, INF = float("nan"), float("inf")
FAULTS: dict[str, Fault] = {
    "reset before the headers": send(lambda good: b"", "reset"),
    "closed before the headers": send(lambda good: b"", "close"),
    "closed in the headers": send(lambda good: b"HTTP/1.1 200 OK\r\ncontent-ty", "close"),
    "reset in the body": send(lambda good: http(whole(good))[:-40], "reset"),
    "closed in the body": send(lambda good: http(whole(good))[:-40], "close"),
    "no answer": send(lambda good: b"", "hang"),
    "hangs in the headers": send(lambda good: b"HTTP/1.1 200 OK\r\n", "hang"),
    "hangs in the body": send(lambda good: http(whole(good))[:-40], "hang"),
    "drips for ever": Fault(drip),
    "200 MB of white space": Fault(huge),
    "gzip bomb": Fault(bomb),
    "late answer to another question": Fault(late),
    "two answers": send(lambda good: http(whole(good)) * 2),
    "closes the kept connection": send(lambda good: http(whole(good)), "close"),
    "not HTTP": send(lambda good: b"\x15\x03\x01\x00\x02\x02\x46SSH-2.0\r\n\r\n", "close"),
    "content-length too short": send(lambda good: http(whole(good), length=30)),
    "content-length too long": send(lambda good: http(whole(good), length=9999), "close"),
    "bad chunk": send(lambda good: chunked(b"zz\r\n", whole(good), b"\r\n0\r\n\r\n"), "close"),
    "cut chunk": send(lambda good: chunked(b"fff\r\n", whole(good)[:50]), "close"),
    "bad gzip": send(lambda good: http(whole(good), headers=GZIP)),
    "cut gzip": send(lambda good: http(packed(good)[:-30], headers=GZIP)),
    "truncated JSON": send(lambda good: http(whole(good)[:-40])),
    "not JSON": send(lambda good: http(b"<html>502 Bad Gateway</html>")),
    "empty body": send(lambda good: http(b"")),
    "deep JSON": send(lambda good: http(b"[" * 200_000 + b"]" * 200_000)),
    "invalid UTF-8": send(
        lambda good: http(whole(good).replace(b'"content": "', b'"content": "\xff'))
    ),
    "half a surrogate": send(
        lambda good: http(whole(good).replace(b'"content": "', b'"content": "\\ud83d'))
    ),
    "number of 5,000 digits": send(
        lambda good: http(whole(good).replace(b'"created": 0', b'"created": ' + b"9" * 5000))
    ),
    "a list": change(lambda good: [good]),
    "null": change(lambda good: "null"),
    "no choices": change(lambda good: good.pop("choices") and None),
    "empty choices": change(lambda good: good["choices"].clear()),
    "two choices": change(lambda good: good["choices"].extend(good["choices"])),
    "message is null": put(message=None),
    "content is a number": text(7),
    "content is a list of numbers": text([1, 2]),
    "finish_reason error": put(finish_reason="error"),
    "error at 200": change(lambda good: {"error": {"message": "overloaded", "code": 503}}),
    "no log-probabilities": Fault(put(logprobs=None).act, reads=True),
    "log-probability NaN": logp(NAN),
    "log-probability infinite": logp(INF),
    "log-probability positive": logp(3.5),
    "log-probability text": logp("x"),
    "400": status("400 Bad Request"),
    "401": status("401 Unauthorized"),
    "403": status("403 Forbidden"),
    "404": status("404 Not Found"),
    "408": status("408 Request Timeout"),
    "413": status("413 Payload Too Large"),
    "422": status("422 Unprocessable Entity"),
    "429": status("429 Too Many Requests"),
    "429, Retry-After 0": status("429 Too Many Requests", headers={"retry-after": "0"}),
    "500": status("500 Internal Server Error"),
    "502": status("502 Bad Gateway"),
    "503": status("503 Service Unavailable", headers={"retry-after": "1"}),
    "504": status("504 Gateway Timeout"),
    "507": status("507 Insufficient Storage"),
    "520": status("520 Unknown"),
    "598": status("598 Network Read Timeout"),
    "301": status("301 Moved", headers={"location": "/v1/chat/completions"}),
    "302": status("302 Found", headers={"location": "/v1/chat/completions"}),
    "307 to another host": status("307 Redirect", headers={"location": "http://127.0.0.1:9/x"}),
}
