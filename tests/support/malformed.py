"""Everything that a server can answer but should not: shapes by name, and a server that answers by
them.

`python -m tests.support.malformed` prints its address. A question whose last message is a shape's
name gets that shape; it reads labels as both HTTP engines ask for them (vLLM by token id, others
among the top tokens)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INF, NAN = float("inf"), float("nan")
SPELLINGS = ("A", "B", "T", " A", " B", " T")
Name = Callable[[str], str]  # how a label's token is called in the answer


@dataclass(frozen=True, slots=True)
class Shape:
    """What is answered, and what an `openai` and a `vllm` engine must make of it: an unscored
    reason or a winner."""

    answer: Callable[[Name], Any]  # a JSON value, or a Raw
    openai: str
    vllm: str


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer that is no ordinary JSON response. `cut` promises more bytes than come."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    cut: bool = False


def top(name: Name, **logps: Any) -> list[dict[str, Any]]:
    """Top tokens in which every label is read; those not given are next to impossible. `_A` is the
    label after a space."""
    given = {key.replace("_", " "): value for key, value in logps.items()}
    return [{"token": name(s), "logprob": given.get(s, -9999.0)} for s in SPELLINGS]


def choice(tops: Any, text: Any = "A", finish: Any = "length", **more: Any) -> dict[str, Any]:
    """One choice with these top tokens."""
    logprobs = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": tops}]}
    return {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
        "logprobs": logprobs,
        **more,
    }


def body(*choices: Any, **more: Any) -> dict[str, Any]:
    """A chat completion."""
    return {
        "object": "chat.completion",
        "choices": list(choices),
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
        **more,
    }


def fine(name: Name, **more: Any) -> dict[str, Any]:
    """An answer with nothing wrong: A at 0.9."""
    return body(choice(top(name, A=-0.105, B=-3.0, T=-4.0)), **more)


def bytes_of(value: Any) -> bytes:
    """JSON as Python writes it: NaN and lone surrogates included."""
    return json.dumps(value).encode()


def raw(data: bytes, openai: str = "transport", vllm: str = "", **more: Any) -> Shape:
    """A shape of bytes."""
    return Shape(lambda name: Raw(data, **more), openai, vllm or openai)


def read(
    openai: str,
    vllm: str,
    tops: Callable[[Name], Any],
    text: Any = "A",
    finish: Any = "length",
    **more: Any,
) -> Shape:
    """A shape whose top tokens are wrong."""
    return Shape(lambda name: body(choice(tops(name), text, finish, **more)), openai, vllm)


def label(value: Any) -> Callable[[Name], Any]:
    """Label A has this log-probability; B has 0.55 of the mass, so that leaving A out would make a
    winner."""
    return lambda name: top(name, A=value, B=-0.6)


def bare(text: Any, openai: str, vllm: str = "no_logprobs", **more: Any) -> Shape:
    """No log-probabilities: the text is all there is. Read by id, nothing is known then."""
    return Shape(lambda name: body({**choice(None, text, **more), "logprobs": None}), openai, vllm)


def broken(openai: str, change: Callable[[dict[str, Any]], Any]) -> Shape:
    """A good answer after `change`, which gives what stands instead of its choices."""
    return Shape(
        lambda name: {**fine(name), "choices": change(fine(name)["choices"][0])}, openai, openai
    )


OLDER_LOGPROBS = {
    "tokens": ["A"],
    "token_logprobs": [-0.105],
    "top_logprobs": [{"A": -0.105, "B": -3.0, "T": -4.0}],
}
TEXT = (("Content-Type", "text/html; charset=latin-1"),)
GOOD = bytes_of(body(choice([{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -3.0}])))
SHAPES: dict[str, Shape] = {
    # not a JSON object
    "empty": raw(b""),
    "white space": raw(b" \n"),
    "html": raw(b"<html><body>502</body></html>", headers=TEXT),
    "array": raw(b"[]"),
    "text": raw(b'"A"'),
    "number": raw(b"1"),
    "null": raw(b"null"),
    "true": raw(b"true"),
    "truncated": raw(GOOD[:-40]),
    "half a key": raw(b'{"cho'),
    "two objects": raw(GOOD + GOOD),
    "nested too deep": raw(b"[" * 200_000),
    "deep object": raw(b'{"a":' * 200_000),
    "event stream": raw(b"data: " + GOOD),
    "invalid utf-8": raw(GOOD.replace(b'"A"', b'"\xff\xfe"')),
    "nul bytes": raw(b"\0" * 64),
    "cut off in the middle": raw(GOOD, cut=True),
    "not gzip": raw(GOOD, headers=(("Content-Encoding", "gzip"),)),
    # another status
    "error at 200": raw(b'{"error": {"message": "the model is overloaded", "code": 503}}'),
    "error text at 200": raw(b'{"error": "no"}'),
    "detail at 200": raw(b'{"detail": [{"loc": [], "msg": "no"}]}'),
    "created": raw(GOOD, status=201),
    "no content": raw(b"", status=204),
    "moved": raw(b"", status=307, headers=(("Location", "/v1/chat/completions"),)),
    "bad request": raw(b'{"error": {"message": "no"}}', status=400),
    "server error": raw(b"oops", status=500),
    "teapot": raw(b"{", status=418),
    "busy": raw(b"{}", status=429),
    "too long": raw(
        b'{"error": {"message": "maximum context length is 50 tokens"}}', "context", status=400
    ),
    "too long in words": raw(
        b'{"detail": "prompt is too long: 300 tokens > 200 maximum"}', "context", status=413
    ),
    "filtered": raw(
        b'{"error": {"code": "content_filter", "message": "no"}}', "refused", status=400
    ),
    # choices
    "no choices": Shape(lambda name: {"id": "x"}, "transport", "transport"),
    "null choices": broken("transport", lambda c: None),
    "empty choices": broken("transport", lambda c: []),
    "choices an object": broken("transport", lambda c: c),
    "choices a text": broken("transport", lambda c: "A"),
    "two choices": broken("transport", lambda c: [c, c]),
    "a null choice": broken("transport", lambda c: [None]),
    "a text choice": broken("transport", lambda c: ["A"]),
    "choices in choices": broken("transport", lambda c: [[c]]),
    "no message": broken("transport", lambda c: [{k: v for k, v in c.items() if k != "message"}]),
    "null message": broken("transport", lambda c: [c | {"message": None}]),
    "text message": broken("transport", lambda c: [c | {"message": "A"}]),
    "list message": broken("transport", lambda c: [c | {"message": ["A"]}]),
    "number content": broken("transport", lambda c: [c | {"message": {"content": 1}}]),
    "parts of no text": broken(
        "transport", lambda c: [c | {"message": {"content": [{"type": "text", "image": "A"}]}}]
    ),
    "true content": broken("transport", lambda c: [c | {"message": {"content": True}}]),
    "refusal": broken(
        "refused", lambda c: [c | {"message": {"content": None, "refusal": "I will not."}}]
    ),
    "refusal object": broken(
        "transport", lambda c: [c | {"message": {"content": "A", "refusal": {"a": 1}}}]
    ),
    "finish content_filter": broken("refused", lambda c: [c | {"finish_reason": "content_filter"}]),
    "finish abort": broken("transport", lambda c: [c | {"finish_reason": "abort"}]),
    "finish list": broken("transport", lambda c: [c | {"finish_reason": ["stop"]}]),
    "finish number": broken("transport", lambda c: [c | {"finish_reason": 3}]),
    "finish in capitals": broken("a", lambda c: [c | {"finish_reason": "STOP"}]),
    "finish of another API": broken("a", lambda c: [c | {"finish_reason": "end_turn"}]),
    "finish SAFETY": broken("refused", lambda c: [c | {"finish_reason": "SAFETY"}]),
    "refusal in a part": broken(
        "refused",
        lambda c: [c | {"message": {"content": [{"type": "refusal", "refusal": "I cannot."}]}}],
    ),
    # log-probabilities of the wrong shape
    "logprobs a text": broken("transport", lambda c: [c | {"logprobs": "none"}]),
    "logprobs a list": broken("transport", lambda c: [c | {"logprobs": [1]}]),
    "logprobs content an object": broken(
        "transport", lambda c: [c | {"logprobs": {"content": {"A": -0.1}}}]
    ),
    "logprobs content nulls": broken(
        "transport", lambda c: [c | {"logprobs": {"content": [None]}}]
    ),
    "logprobs content texts": broken("transport", lambda c: [c | {"logprobs": {"content": ["A"]}}]),
    "logprobs old style": broken(
        "transport", lambda c: [c | {"logprobs": {"content": [{"top_logprobs": {"A": -0.1}}]}}]
    ),
    "top a text": read("transport", "transport", lambda name: "A"),
    "top nulls": read("transport", "transport", lambda name: [None]),
    "top pairs": read("transport", "transport", lambda name: [["A", -0.1]]),
    "top a number": read("transport", "transport", lambda name: 3),
    "top empty": read("a", "no_logprobs", lambda name: []),
    "top null": read("a", "no_logprobs", lambda name: None),
    "tokens missing": read("low_label_mass", "no_logprobs", lambda name: [{"logprob": -0.1}] * 3),
    "tokens numbers": read(
        "low_label_mass", "no_logprobs", lambda name: [{"token": 65, "logprob": -0.1}]
    ),
    "tokens lists": read(
        "low_label_mass", "transport", lambda name: [{"token": ["A"], "logprob": -0.1}]
    ),
    "wrong case": read(
        "low_label_mass", "no_logprobs", lambda name: [{"token": t, "logprob": -0.5} for t in "ab"]
    ),
    "other tokens": read(
        "low_label_mass",
        "low_label_mass",
        lambda name: [*top(name), {"token": "Answer", "logprob": -0.1}],
    ),
    "label over two tokens": read(
        "low_label_mass",
        "no_logprobs",
        lambda name: [{"token": "(", "logprob": -0.1}, {"token": "(A", "logprob": -2.5}],
        "(",
    ),
    # log-probabilities that are no numbers: B alone must not win by A's absence
    "logprob NaN": read("transport", "transport", label(NAN)),
    "logprob infinite": read("transport", "transport", label(INF)),
    "logprob null": read("transport", "transport", label(None)),
    "logprob text": read("transport", "transport", label("-0.1")),
    "logprob true": read("transport", "transport", label(True)),
    "logprob false": read("transport", "transport", label(False)),
    "logprob list": read("transport", "transport", label([-0.1])),
    "logprob positive": read("transport", "transport", label(0.7)),
    "logprob a huge integer": read("transport", "transport", label(10**400)),
    "logprob a huge negative integer": read("transport", "transport", label(-(10**400))),
    "logprob missing": read(
        "transport", "transport", lambda name: [{"token": name("A")}, *top(name, B=-0.6)[1:]]
    ),
    "all NaN": read(
        "transport",
        "transport",
        lambda name: [{"token": name(s), "logprob": NAN} for s in SPELLINGS],
    ),
    "one spelling NaN": read(
        "transport", "transport", lambda name: top(name, A=NAN, _A=-5.0, B=-0.6)
    ),
    "logprob false alone": read("transport", "transport", lambda name: top(name, A=False, B=-6.0)),
    "one id missing": read("b", "no_logprobs", lambda name: top(name, _A=-5.0, B=-0.6)[1:]),
    "masses above one": read("transport", "transport", lambda name: top(name, A=0.0, B=-0.1)),
    "duplicated label above one": read(
        "transport",
        "low_label_mass",
        lambda name: [*top(name, A=-1.0, B=-5.0), *top(name, A=-0.1, B=-5.0)],
    ),
    "low label mass": read(
        "low_label_mass", "low_label_mass", lambda name: top(name, A=-2.0, B=-3.0)
    ),
    "impossible labels": read("low_label_mass", "low_label_mass", lambda name: top(name)),
    # no log-probabilities: the bare text
    "bare A": bare("A", "a"),
    "bare T with spaces": bare(" T\n", "tie"),
    "bare wrong case": bare("a", "parse"),
    "bare both": bare("AB", "parse"),
    "bare either": bare("A or B", "parse"),
    "bare neither": bare("C", "parse"),
    "bare nothing": bare("", "parse"),
    "bare null": bare(None, "parse"),
    "bare full stop": bare("A.", "parse"),
    "bare split label": bare("(A", "parse"),
    "bare half-closed JSON": bare('{"winner": "A"', "parse"),
    "bare JSON": bare('{"winner": "A"}', "parse"),
    "bare refusal": bare("I cannot help with that.", "parse"),
    "bare Chinese": bare("答案是A", "parse"),
    "bare fullwidth": bare("Ａ", "parse"),
    "bare Greek Alpha": bare("Α", "parse"),
    "bare thinking": bare("<think>A", "truncated", "truncated"),
    "bare surrogate": bare("\ud83d", "parse"),
    "bare A and surrogate": bare("A\udc00", "parse"),
    "bare zero-width": bare("A\u200b", "parse"),
    "bare NUL": bare("\0A", "parse"),
    "bare enormous": bare("A" * 1_000_000, "transport", "transport"),
    "bare NaN": bare("NaN", "parse"),
    "bare refused": bare("A", "refused", "refused", finish="content_filter"),
    # odd, but nothing is wrong with the answer
    "parts content": broken(
        "a", lambda c: [c | {"message": {"content": [{"type": "text", "text": "A"}]}}]
    ),
    "unknown fields": Shape(lambda name: fine(name, warning="x", service_tier=None), "a", "a"),
    "wrong content type": Shape(lambda name: Raw(bytes_of(fine(name)), headers=TEXT), "a", "a"),
    "byte order mark": Shape(lambda name: Raw(b"\xef\xbb\xbf" + bytes_of(fine(name))), "a", "a"),
    "utf-16": Shape(lambda name: Raw(json.dumps(fine(name)).encode("utf-16")), "a", "a"),
    "usage null": Shape(lambda name: fine(name, usage=None), "a", "a"),
    "usage a list": Shape(lambda name: fine(name, usage=[1]), "a", "a"),
    "usage texts": Shape(lambda name: fine(name, usage={"prompt_tokens": "9"}), "a", "a"),
    "usage huge": Shape(
        lambda name: fine(name, usage={"prompt_tokens": 10**30, "completion_tokens": -1}), "a", "a"
    ),
    "usage a float": Shape(
        lambda name: fine(name, usage={"prompt_tokens": 1e300, "completion_tokens": NAN}), "a", "a"
    ),
    "finish null": broken("a", lambda c: [c | {"finish_reason": None}]),
    "finish missing": broken("a", lambda c: [{k: v for k, v in c.items() if k != "finish_reason"}]),
    "finish stop": broken("a", lambda c: [c | {"finish_reason": "stop"}]),
    "index null": broken("a", lambda c: [c | {"index": None}]),
    "index a list": broken("a", lambda c: [c | {"index": [0]}]),
    "text against numbers": broken("a", lambda c: [c | {"message": {"content": "B"}}]),
    "text a surrogate": broken("a", lambda c: [c | {"message": {"content": "\ud83d"}}]),
    "minus infinity": read("a", "a", lambda name: top(name, A=-0.1, T=-INF)),
    "tokens of a vocabulary": read(
        "a",
        "no_logprobs",
        lambda _: [{"token": t, "logprob": p} for t, p in (("ĠA", -0.1), ("▁B", -3.0))],
    ),
    "the older form": Shape(
        lambda _: body({**choice(None), "logprobs": OLDER_LOGPROBS}), "a", "no_logprobs"
    ),
    "bounds": read("a", "no_logprobs", lambda name: [{"token": name("A"), "logprob": -0.1}]),
}


def named(asked: dict[str, Any]) -> Name:
    """How the engine that asked this wants tokens called."""
    return (
        (lambda s: f"token_id:{token_id(s)}") if asked.get("logprob_token_ids") else (lambda s: s)
    )


def token_id(text: str) -> int:
    """The imitated tokenizer's id of a text of one token."""
    return int.from_bytes(text.encode()[:6], "big")


async def respond(http: Any, answer: Any) -> Any:
    """The HTTP response for a shape's answer."""
    from aiohttp import web

    if not isinstance(answer, Raw):
        answer = Raw(bytes_of(answer))
    if not answer.cut:
        return web.Response(status=answer.status, body=answer.body, headers=dict(answer.headers))
    response = web.StreamResponse(headers={"Content-Length": str(2 * len(answer.body))})
    await response.prepare(http)
    await response.write(answer.body)
    http.transport.close()
    return response


async def serve() -> None:
    """Serve until killed; the first line printed is the address. /batch answers as the first
    message's `batch:` says."""
    from aiohttp import web

    async def chat(http: Any) -> Any:
        asked = await http.json()
        shape = SHAPES.get(asked["messages"][-1]["content"])
        return await respond(http, shape.answer(named(asked)) if shape else fine(named(asked)))

    async def batch(http: Any) -> Any:
        asked = await http.json()
        talks = asked["messages"]
        good = [
            choice(top(named(asked), A=-0.105, B=-3.0, T=-4.0)) | {"index": i}
            for i in range(len(talks))
        ]
        return await respond(http, BATCHES[talks[0][-1]["content"].split()[0]](good))

    async def tokenize(http: Any) -> Any:
        text = (await http.json()).get("prompt") or ""
        ids = [token_id(text)] if len(text) <= 2 and "\n" not in text else [ord(c) for c in text]
        return web.json_response({"count": len(ids), "max_model_len": 4096, "tokens": ids})

    async def models(http: Any) -> Any:
        return web.json_response(
            {"object": "list", "data": [{"id": "m", "root": "m", "max_model_len": 4096}]}
        )

    app = web.Application(client_max_size=2**28)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.post("/v1/chat/completions/batch", batch),
            web.post("/tokenize", tokenize),
            web.get("/v1/models", models),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


BATCHES: dict[
    str, Callable[[list[dict[str, Any]]], Any]
] = {  # what /batch answers, from the good choices
    "fewer": lambda good: body(*good[:-1]),
    "more": lambda good: body(*good, good[0]),
    "same": lambda good: body(*(c | {"index": 0} for c in good)),
    "none": lambda good: body(*({k: v for k, v in c.items() if k != "index"} for c in good)),
    "texts": lambda good: body(*(c | {"index": str(c["index"])} for c in good)),
    "lists": lambda good: body(*(c | {"index": [c["index"]]} for c in good)),
    "nulls": lambda good: body(*(None for _ in good)),
    "object": lambda good: {"choices": dict(enumerate(good))},
    "html": lambda good: Raw(b"<html>"),
    "missing": lambda good: Raw(b"{}", status=404),
    "poisoned": lambda good: body(*good[:-1], good[-1] | {"message": None}),
}

if __name__ == "__main__":
    asyncio.run(serve())
