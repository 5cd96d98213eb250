"""`python -m tests.torture.load --calls 200000`: that many calls to a server of which 1 in 100
fails its first try, and the memory of the process that asks.

All calls must be answered, each once; the memory must not grow with their number. The faults are a
500, a 503, a 408, a connection that is reset, a body that is cut off, and one that is no JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from zlib import crc32

import psutil

from prefab.factory.engines.base import make
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion, Message, Request, Sampling
from prefab.factory.uses import DraftUse

FAULT_SHARE = 100  # one call in so many
AT_ONCE = 2000  # questions handed over together; the engine has 64 in flight


class Server(asyncio.Protocol):
    """Answers each question with its own number; faults by the digest of the question."""

    failed: set[int] = set()
    posts = faults = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(body)

    def answer(self, body: bytes) -> None:
        at = body.find(b"question ")
        if at < 0:
            text = json.dumps({"data": [{"id": "m"}], **completion("yes")})
            return self.respond(text.encode())
        number = int(body[at + 9 : body.find(b'"', at)])
        Server.posts += 1
        good = json.dumps(completion(f"answer {number}")).encode()
        kind = crc32(b"%d" % number)
        if kind % FAULT_SHARE or number in Server.failed:
            return self.respond(good)
        Server.failed.add(number)
        Server.faults += 1
        self.fail(kind // FAULT_SHARE % 6, good)

    def fail(self, kind: int, good: bytes) -> None:
        if kind == 0:
            self.respond(b'{"error": {"message": "cuda"}}', b"500 Error")
        elif kind == 1:
            self.respond(b'{"error": {"message": "busy"}}', b"503 Busy")
        elif kind == 2:
            self.transport.abort()
        elif kind == 3:
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(good))
            self.transport.write(good[:40])
            self.transport.close()
        elif kind == 4:
            self.respond(b"<html>bad gateway</html>")
        else:
            self.respond(b'{"error": {"message": "time"}}', b"408 Timeout")

    def respond(self, body: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)


def completion(text: str) -> dict[str, object]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": text}}
    return {"id": "x", "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}


async def serve() -> None:
    """The server, in its own process until its input ends; prints its port, then its counts."""
    loop = asyncio.get_running_loop()
    made = await loop.create_server(Server, "127.0.0.1", 0)
    print(made.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps({"posts": Server.posts, "faults": Server.faults}), flush=True)


async def ask(folder: Path, url: str, calls: int) -> dict[str, object]:
    """Ask; the figures of this process."""
    engine = make(
        {"engine": "openai", "model": "m", "base_url": url, "canary_every": 0, "max_in_flight": 64},
        "api",
    )
    ledger = Ledger.open(folder)
    await engine.start()
    run = ledger.begin_run("load", {}, {}).id
    me, memory, wrong = psutil.Process(), [], 0
    for begin in range(0, calls, AT_ONCE):
        numbers = range(begin, min(calls, begin + AT_ONCE))
        asks = [
            (
                Request("m", (Message("user", f"question {i}"),), Sampling(16)),
                DraftUse(run, f"p{i}", 0),
            )
            for i in numbers
        ]
        answers = await ledger.ask_many(asks, engine)
        texts = [a.text if isinstance(a, Completion) else str(a) for a in answers]
        wrong += sum(text != f"answer {i}" for i, text in zip(numbers, texts, strict=True))
        memory.append(round(me.memory_info().rss / 2**20, 1))
    asked = ledger.stats.asked
    await engine.stop()
    await ledger.close()
    tenth = max(1, len(memory) // 10)
    return {
        "tried": calls,
        "failed": wrong,
        "asked": asked,
        "mb_after_a_tenth": memory[tenth - 1],
        "mb_at_most_later": max(memory[tenth:] or memory),
    }


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.load", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="JSON file with the figures of all parts")
    options = parser.parse_args()
    began = time.monotonic()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.torture.load", "serve"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    port = int(await server.stdout.readline())
    with tempfile.TemporaryDirectory() as folder:
        found = await ask(Path(folder), f"http://127.0.0.1:{port}/v1", options.calls)
    server.stdin.close()
    found |= json.loads(await server.stdout.readline())
    await server.wait()
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "what": "calls, of which 1 in 100 failed at the first try",
        "command": f"python -m tests.torture.load --calls {options.calls}",
        **found,
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**earlier, "load": found}, indent=1) + "\n")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(asyncio.run(serve() if sys.argv[1:] == ["serve"] else main()))
