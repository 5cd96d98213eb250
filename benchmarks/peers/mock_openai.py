"""A mock judge that speaks OpenAI's protocol (and the parts of vLLM's that matter here), to measure
clients by.

    python mock_openai.py --port 8399 --latency-ms 50

One `asyncio.Protocol` on uvloop and httptools, so that it stays ahead of any client in Python.
Answers are a function of the request's bytes. The model's name picks what it says: `mock-ab` "A" or
"B" with log-probabilities, `mock-prometheus` a short reasoning and "[RESULT] A", `mock-policy` some
ninety words. /v1/chat/completions/batch takes a list of conversations. GET /stats counts what was
asked; POST /reset zeroes it."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
import time
import zlib
from typing import Any

import httptools
import orjson
import uvloop
from workload import WORDS

IDS = {"A": 32, "B": 33, "T": 51, " A": 362, " B": 425, " T": 350}
SPELLING = {number: label for label, number in IDS.items()}
MAX_MODEL_LEN = 32768


class Stats:
    """What was asked so far. `judgments` counts conversations put to a judge; `calls` also those to
    the policy."""

    judgments = calls = posts = in_flight = max_in_flight = connections = 0
    first = last = 0.0

    @classmethod
    def reset(cls) -> None:
        cls.judgments = cls.calls = cls.posts = cls.max_in_flight = cls.connections = 0
        cls.first = cls.last = 0.0

    @classmethod
    def read(cls) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "judgments": cls.judgments,
            "calls": cls.calls,
            "posts": cls.posts,
            "window_s": cls.last - cls.first,
            "max_in_flight": cls.max_in_flight,
            "connections": cls.connections,
            "cpu_s": used.ru_utime + used.ru_stime,
        }


def words(seed: int, n: int = 90) -> str:
    """`n` words that depend on the seed alone."""
    out = []
    for _ in range(n):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        out.append(WORDS[seed % len(WORDS)])
    return " ".join(out)


def choice(body: dict[str, Any], model: str, raw: bytes, index: int = 0) -> dict[str, Any]:
    """One answer. A judge's log-probabilities go over A and B with little on T, in the form that
    was asked for."""
    h = zlib.crc32(raw)
    first, second = "AB" if h & 1 else "BA"
    if model == "mock-policy":
        text = words(h)
    elif model == "mock-prometheus":
        text = f"Feedback: Response {first} follows the rubric more closely. [RESULT] {first}"
    else:
        text = first
    out = {
        "index": index,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": None,
    }
    if body.get("logprobs"):
        p = 0.55 + 0.40 * ((h >> 8) & 0xFFFF) / 65535.0
        logps = {first: math.log(p), second: math.log(0.96 - p), "T": math.log(0.03)}
        ids = body.get("logprob_token_ids")
        as_ids = body.get("return_tokens_as_token_ids")
        spellings = (
            [SPELLING.get(i, "?") for i in ids]
            if ids
            else list(logps)[: body.get("top_logprobs") or 1]
        )
        tops = [
            {
                "token": f"token_id:{IDS.get(s, 0)}" if as_ids else s,
                "logprob": logps.get(s, -12.0),
                "bytes": list(s.encode()),
            }
            for s in spellings
        ]
        out["logprobs"] = {
            "content": [
                {
                    "token": first,
                    "logprob": logps[first],
                    "bytes": list(first.encode()),
                    "top_logprobs": tops,
                }
            ]
        }
    return out


def complete(raw: bytes, batch: bool) -> tuple[bytes, int, bool]:
    """The answer's JSON, how many conversations it was, and whether a judge was asked."""
    body = orjson.loads(raw)
    model = str(body.get("model", "")).rsplit("/", 1)[-1]
    if batch:  # noqa: SIM108
        choices = [choice(body, model, orjson.dumps(m), i) for i, m in enumerate(body["messages"])]
    else:
        choices = [choice(body, model, raw)]
    n = len(raw) // 4
    made = len(choices) if body.get("max_tokens") == 1 else 90 * len(choices)
    answer = {
        "id": f"chatcmpl-{zlib.crc32(raw):08x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model"),
        "choices": choices,
        "usage": {"prompt_tokens": n, "completion_tokens": made, "total_tokens": n + made},
    }
    return json.dumps(answer).encode(), len(choices), model != "mock-policy"


def tokenized(raw: bytes) -> dict[str, Any]:
    """vLLM's /tokenize: a label is one token, any other text a token for four characters."""
    text = orjson.loads(raw).get("prompt", "")
    line_break, rest = text[:1] == "\n", text.removeprefix("\n")
    tokens = [198] * line_break + ([IDS[rest]] if rest in IDS else [100] * -(-len(rest) // 4))
    return {
        "count": len(tokens),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": tokens,
        "token_strs": None,
    }


def page(url: bytes, raw: bytes) -> Any:
    """Everything but completions."""
    if url.endswith(b"/stats"):
        return Stats.read()
    if url.endswith(b"/reset"):
        return Stats.reset()
    if url.endswith(b"/tokenize"):
        return tokenized(raw)
    if url.endswith(b"/version"):
        return {"version": "0.32.0"}
    if url.endswith(b"/models"):
        return {
            "object": "list",
            "data": [
                {
                    "id": m,
                    "object": "model",
                    "created": 0,
                    "owned_by": "mock",
                    "root": m,
                    "max_model_len": MAX_MODEL_LEN,
                }
                for m in ("mock-ab", "mock-prometheus", "mock-policy")
            ],
        }
    return {}


def http(body: bytes, status: bytes = b"200 OK") -> bytes:
    """A reply that keeps the connection open."""
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
        status,
        len(body),
    )
    return head + body


class Connection(asyncio.Protocol):
    """One client connection."""

    latency_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.parser = transport, httptools.HttpRequestParser(self)
        self.url, self.body = b"", []
        Stats.connections += 1

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        url, raw = self.url, b"".join(self.body)
        self.url, self.body = b"", []
        batch = url.endswith(b"/completions/batch")
        if not batch and not url.endswith(b"/completions"):
            self.transport.write(http(orjson.dumps(page(url, raw))))
            return
        Stats.first = Stats.first or time.perf_counter()
        Stats.in_flight += 1
        Stats.max_in_flight = max(Stats.max_in_flight, Stats.in_flight)
        if self.latency_s:
            asyncio.get_running_loop().call_later(self.latency_s, self.finish, raw, batch)
        else:
            self.finish(raw, batch)

    def finish(self, raw: bytes, batch: bool) -> None:
        try:
            body, n, judged = complete(raw, batch)
            answer = http(body)
        except (ValueError, KeyError, TypeError) as error:
            answer, n, judged = (
                http(orjson.dumps({"error": {"message": repr(error)}}), b"400 Bad Request"),
                0,
                False,
            )
        if not self.transport.is_closing():
            self.transport.write(answer)
        Stats.posts += 1
        Stats.calls += n
        Stats.judgments += n if judged else 0
        Stats.in_flight -= 1
        Stats.last = time.perf_counter()


async def serve(port: int) -> None:
    """Serve until terminated."""
    server = await asyncio.get_running_loop().create_server(
        Connection, "127.0.0.1", port, backlog=4096
    )
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--cpu", type=int, help="pin to this core")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    Connection.latency_s = options.latency_ms / 1e3
    uvloop.install()
    asyncio.run(serve(options.port))
