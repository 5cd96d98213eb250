"""A server that writes bytes as a test says, in a thread: for what no well-made server does.

A script is called with each request and gives the steps of its response: bytes to write, seconds to
wait, or `CLOSE`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOSE = None
Step = bytes | float | None


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def text(self) -> str:
        """The last message's text."""
        messages = json.loads(self.body).get("messages") if self.body else None
        return str(messages[-1]["content"]) if messages else ""

    @property
    def labels(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(json.loads(self.body).get("logprobs"))


Script = Callable[[Asked], Sequence[Step]]


@dataclass
class WireServer:
    """Where it is and what it was asked. `script` may be exchanged while it runs."""

    script: Script
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    shut: Callable[[], None] = lambda: None  # end the server and its connections

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            while asked := await _request(reader, number):
                self.asked.append(asked)
                for step in self.script(asked):
                    if step is CLOSE:
                        writer.close()
                        return
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    else:
                        writer.write(step)
                        await writer.drain()
        writer.close()


async def _request(reader: asyncio.StreamReader, number: int) -> Asked | None:
    line = (await reader.readline()).decode().split()
    if len(line) < 2:
        return None
    headers = {}
    while (header := (await reader.readline()).decode().strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(line[0], line[1], headers, body, number)


def http(body: bytes | Any, status: int = 200, **headers: Any) -> bytes:
    """A whole response; anything but bytes is written as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"content-type": "application/json", "content-length": len(body), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body


def chat(text: str, name: str = "", tops: Any = None, **more: Any) -> dict[str, Any]:
    """A chat completion; `tops` are the first token's log-probabilities by text."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    if tops is not None:
        entries = [{"token": token, "logprob": logp} for token, logp in tops.items()]
        choice["logprobs"] = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": entries}]}
    usage = {"prompt_tokens": 9, "completion_tokens": 1}
    return {"id": name or "chatcmpl-1", "choices": [choice], "usage": usage, **more}


def answer(asked: Asked) -> dict[str, Any]:
    """A good answer: the question's own text comes back, or A at 0.9."""
    if asked.method == "GET":
        return {"data": [{"id": "m", "root": "m", "max_model_len": 4096}]}
    if asked.path.endswith("/tokenize"):
        return {"tokens": [ord(c) for c in json.loads(asked.body)["prompt"]]}
    return chat(f"said {asked.text}", tops={"A": -0.105, "B": -3.0} if asked.labels else None)


@contextlib.contextmanager
def wire_server(script: Script | None = None, port: int = 0) -> Iterator[WireServer]:
    """A server that runs in a thread until the block ends, its connections with it."""
    server = WireServer(script or (lambda asked: [http(answer(asked))]))
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> asyncio.Server:
        made = await asyncio.start_server(server.serve, "127.0.0.1", port, limit=2**26)
        server.url = f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}"
        started.set()
        return made

    def work() -> None:
        asyncio.set_event_loop(loop)
        listener = loop.run_until_complete(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        listener.close()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait(10)

    def shut() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    server.shut = shut
    try:
        yield server
    finally:
        shut()
