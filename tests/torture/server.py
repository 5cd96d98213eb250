"""A chat server of the OpenAI protocol whose answers are functions of the question, which logs what
it was asked and can be told to fail.

`python -m tests.torture.server` prints its port. `POST /_control {"rules": [...]}` sets the faults
(see tests/torture/faults.py) and clears the log. `GET /_log` gives what was asked, once all other
connections are closed: until then what an ended process had sent may not be counted yet.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from tests.torture import faults

WORDS = ("river", "soil", "rock", "season", "wind", "light", "heat", "cost", "people", "travel")
DELAY_S = 0.004


def digest(messages: list[dict[str, Any]], seed: int | None, max_tokens: int, reads: bool) -> str:
    """Names a question. It can be computed from a request of the ledger as well."""
    parts = [[(m["role"], m["content"]) for m in messages], seed, max_tokens, reads]
    return sha256(json.dumps(parts).encode()).hexdigest()[:20]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A function of the question: 8 to 20 words, or the probabilities of A, B and T."""
    drawn = sha256(json.dumps([body["messages"], body.get("seed")]).encode()).digest()
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if body.get("logprobs"):
        first, second = "AB" if drawn[0] & 1 else "BA"
        p = 0.55 + 0.4 * drawn[1] / 255
        logps = {first: math.log(p), second: math.log(0.96 - p), "T": math.log(0.03)}
        tops = [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in logps.items()]
        content = [{**tops[0], "top_logprobs": tops}]
        choice |= {"message": {"role": "assistant", "content": first}}
        choice |= {"finish_reason": "length", "logprobs": {"content": content}}
    else:
        draw = random.Random(drawn)
        text = " ".join(draw.choices(WORDS, k=draw.randint(8, 20)))
        choice |= {"message": {"role": "assistant", "content": f"{text}."}}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model"),
        "choices": [choice],
        "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
    }


@dataclass
class State:
    rules: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)  # of first arrival, from 1
    reads: dict[str, int] = field(default_factory=dict)  # the same, among label reads
    faulty: int = 0
    open: int = 0

    def fault(self, name: str, reads: bool) -> str:
        """The kind of fault that this question meets now; "" for none."""
        tries = self.log.count(name) if self.rules else 0
        for rule in self.rules:
            place = (self.reads if rule["reads"] else self.order).get(name)
            if (
                place in rule["places"]
                and reads >= rule["reads"]
                and (rule["sticky"] or tries <= 1)
            ):
                return str(rule["kind"])
        return ""


STATE = State()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        return first, headers, await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def control(path: str, body: bytes) -> dict[str, Any] | None:
    """The answer to a request of the harness."""
    if path == "/_control":
        STATE.__init__(rules=json.loads(body)["rules"], open=STATE.open)  # type: ignore[misc]
        return {}
    if path == "/_log":
        return {"log": STATE.log, "faulty": STATE.faulty, "others": STATE.open - 1}
    return None


async def serve_question(body: bytes, writer: asyncio.StreamWriter, delay_s: float) -> None:
    question = json.loads(body)
    reads = bool(question.get("logprobs"))
    tokens = question.get("max_tokens") or question.get("max_completion_tokens")
    name = digest(question["messages"], question.get("seed"), tokens, reads)
    STATE.log.append(name)
    STATE.order.setdefault(name, len(STATE.order) + 1)
    if reads:
        STATE.reads.setdefault(name, len(STATE.reads) + 1)
    kind = STATE.fault(name, reads)
    if delay_s:
        await asyncio.sleep(random.random() * delay_s)
    good = answer(question)
    if kind:
        STATE.faulty += 1
        await faults.FAULTS[kind].act(writer, good)
    else:
        writer.write(faults.http(json.dumps(good).encode()))


async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    STATE.open += 1
    try:
        while request := await read_request(reader):
            first, _, body = request
            path = first.split()[1]
            if (told := control(path, body)) is not None:
                writer.write(faults.http(json.dumps(told).encode()))
            elif path.endswith("/chat/completions"):
                await serve_question(body, writer, DELAY_S)
            elif path.endswith("/models"):
                writer.write(faults.http(b'{"data": [{"id": "mock", "object": "model"}]}'))
            else:
                writer.write(faults.http(b'{"error": {"message": "none"}}', "404 Not Found"))
            await writer.drain()
            if writer.is_closing():
                break
    except (ConnectionError, asyncio.CancelledError):
        pass
    finally:
        STATE.open -= 1
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    watch = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # ends with its parent
    await watch


if __name__ == "__main__":
    asyncio.run(main())
