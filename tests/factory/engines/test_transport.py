"""What a server or a network does to requests: late responses, bodies without end, redirections,
outages. Each call gets its own answer or a typed failure."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from email.utils import formatdate

import pytest

from prefab.factory.engines.base import make
from prefab.factory.engines.http import HEALS, wait_hint
from prefab.factory.errors import EngineError, TransportError
from prefab.factory.keys import request_key
from prefab.factory.types import Completion, Message, Request, Sampling
from tests.support.wire_server import Asked, answer, chat, http, wire_server

QUICK = {"retries": 2, "deadline_s": 20, "timeout_s": 5, "down_after_s": 600}


def question(text: str, labels: tuple[str, ...] = (), most: int = 16) -> Request:
    return Request("m", (Message("user", text),), Sampling(max_tokens=most), labels)


def openai(url: str, **config):
    settings = {"engine": "openai", "model": "m", "base_url": f"{url}/v1", **QUICK, **config}
    return make(settings, "api")


async def ask(engine, *requests: Request, at_once: int = 8):
    """The answers; failures are returned."""
    await engine.start()
    gate = asyncio.Semaphore(at_once)

    async def one(request):
        async with gate:
            return await engine.complete(request_key(request), request)

    try:
        return await asyncio.gather(*map(one, requests), return_exceptions=True)
    finally:
        await engine.stop()


def run(engine, *requests: Request, **options):
    return asyncio.run(ask(engine, *requests, **options))


# --- responses to other requests ---


def echoing(asked: Asked) -> dict:
    """A good answer, named as vLLM names it."""
    return {**answer(asked), "id": f"chatcmpl-{asked.headers.get('x-request-id')}"}


def stray(name: str) -> bytes:
    return http(chat("an answer to another question", name))


@pytest.mark.parametrize(
    ("named", "steps"),
    [
        # two responses to one request, at once and a moment later
        (True, lambda good: [good + stray("chatcmpl-x")]),
        (True, lambda good: [good, 0.003, stray("chatcmpl-x")]),
        (True, lambda good: [stray("chatcmpl-x"), good]),
        (False, lambda good: [good + stray("chatcmpl-x")]),
        # a server that repeats no id writes it while nothing is asked
        (False, lambda good: [good, 0.001, stray("chatcmpl-x")]),
    ],
)
def test_a_response_to_another_request_is_never_taken(named, steps):
    def script(asked):
        good = http(echoing(asked) if named else answer(asked))
        first = [a.body for a in server.asked].count(asked.body) == 1
        return steps(good) if first and int(asked.text) % 3 == 1 else [good]

    async def scenario(engine):
        await engine.start()
        answers = []
        for i in range(
            30
        ):  # one after another, with pauses: all on one connection where it is kept
            asked = question(str(i))
            answers.append(await engine.complete(request_key(asked), asked))
            await asyncio.sleep(0.004)
        await engine.stop()
        return answers

    with wire_server(script) as server:
        answers = asyncio.run(scenario(openai(server.url)))
    assert [a.text for a in answers] == [f"said {i}" for i in range(30)]


def test_a_cancelled_or_late_request_leaves_no_response_behind():
    """The connection of a request that was given up is closed."""

    def script(asked):
        return [0.4, http(answer(asked))] if asked.text == "slow" else [http(answer(asked))]

    async def scenario(engine):
        await engine.start()
        given_up = asyncio.create_task(engine.complete(b"k" * 32, question("slow")))
        await asyncio.sleep(0.1)
        given_up.cancel()
        late = await asyncio.gather(
            engine.complete(b"l" * 32, question("slow")), return_exceptions=True
        )
        answers = []
        for i in range(6):
            answers.append(await engine.complete(b"m" * 32, question(str(i))))
            await asyncio.sleep(0.1)
        await engine.stop()
        return late, answers

    with wire_server(script) as server:
        late, answers = asyncio.run(scenario(openai(server.url, timeout_s=0.2, retries=0)))
    assert isinstance(late[0], TransportError)
    assert [a.text for a in answers] == [f"said {i}" for i in range(6)]


def test_every_request_has_an_id_of_its_own():
    with wire_server(lambda asked: [http(echoing(asked))]) as server:
        run(openai(server.url), *(question(str(i)) for i in range(9)))
        ids = [asked.headers["x-request-id"] for asked in server.asked]
    assert len(set(ids)) == 9 and all(i.startswith("prefab-") for i in ids)


# --- more than a request can need, and what is no answer ---

HUGE = b" " * 300_000_000


def bomb(kind: str) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31 if kind == "gzip" else 15)
    packed = b"".join(squeeze.compress(HUGE[: 2**24]) for _ in range(20)) + squeeze.flush()
    return http(packed, content_encoding=kind)


LABELS = ("A", "B")
BAD = {
    "a gzip bomb": lambda asked: [bomb("gzip")],
    "a deflate bomb": lambda asked: [bomb("deflate")],
    "an announced body of 300 MB": lambda asked: [
        b"HTTP/1.1 200 OK\r\ncontent-length: 300000000\r\n\r\n",
        *[HUGE[: 2**20]] * 300,
    ],
    "chunks without end": lambda asked: [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        *[b"100000\r\n" + HUGE[: 2**20] + b"\r\n"] * 300,
    ],
    "a text of 3 MB": lambda asked: [http(chat("word " * 600_000))],
    "an error message of 3 MB": lambda asked: [http({"error": "no " * 10**6}, 400)],
    "headers without end": lambda asked: [
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: v\r\n" % i for i in range(2000)) + b"\r\n{}"
    ],
    "10,000 choices": lambda asked: [http({**answer(asked), "choices": [{}] * 10_000})],
    "1,000 tokens for one": lambda asked: [http(many_tokens(1000))],
    "brackets": lambda asked: [http(b"[" * 200_000)],
    "nested objects": lambda asked: [http(b'{"a":' * 40_000 + b"1" + b"}" * 40_000)],
    "a number of 5,000 digits": lambda asked: [tops(b"-" + b"1" * 5000)],
    "a number of 5,000 digits and NaN": lambda asked: [tops(b"-" + b"1" * 5000, b"NaN")],
    "a small exponent": lambda asked: [tops(b"-1e400000000", b"NaN")],
    "NaN": lambda asked: [tops(b"NaN")],
    "infinity": lambda asked: [tops(b"Infinity")],
    "positive": lambda asked: [tops(b"0.7")],
    "null": lambda asked: [tops(b"null")],
    "a text": lambda asked: [tops(b'"-0.1"')],
    "true": lambda asked: [tops(b"true")],
    "a list": lambda asked: [tops(b"[-0.1]")],
    "more than all": lambda asked: [tops(b"-0.01", b"-0.01")],
    "an id that is no text": lambda asked: [http({**answer(asked), "choices": 1, "id": [1]})],
}


def tops(first: bytes, second: bytes = b"-3.0") -> bytes:
    whole = json.dumps(chat("A", tops={"A": 1111, "B": 2222})).encode()
    return http(whole.replace(b"1111", first).replace(b"2222", second))


def many_tokens(n: int) -> dict:
    made = chat("A", tops={"A": -0.1, "B": -3.0})
    made["choices"][0]["logprobs"]["content"] *= n
    return made


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_a_typed_failure_in_bounded_memory(name):
    script = BAD[name]
    with wire_server(lambda asked: script(asked)) as server:
        engine = openai(server.url, retries=0)
        tracemalloc.start()
        # four at once, so that memory for each counts
        answers = run(engine, *(question(f"A or B? {i}", LABELS, 1) for i in range(2)))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert all(isinstance(a, TransportError) for a in answers), answers
    assert most < 40 * 2**20


def test_a_compressed_answer_and_one_in_pieces_are_read():
    def script(asked):
        body = json.dumps(answer(asked)).encode()
        if asked.text == "gzip":
            return [http(gzip.compress(body), content_encoding="gzip")]
        head, rest = http(body)[:-40], http(body)[-40:]
        return [head, 0.02, rest[:20], 0.02, rest[20:]]

    with wire_server(script) as server:
        answers = run(openai(server.url), question("gzip"), question("pieces"))
    assert [a.text for a in answers] == ["said gzip", "said pieces"]


def test_a_long_answer_that_was_asked_for_is_read():
    with wire_server(lambda asked: [http(chat("word " * 4000))]) as server:
        (found,) = run(openai(server.url), question("q", most=4000))
    assert found.text == "word " * 4000


# --- redirections and statuses ---


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_on_the_same_server_stays_a_post(status):
    def script(asked):
        if asked.path == "/v1/chat/completions":
            return [http(b"", status, location="/v2/chat")]
        return [http(answer(asked))]

    with wire_server(script) as server:
        (found,) = run(openai(server.url), question("q"))
        assert [(a.method, a.path) for a in server.asked] == [
            ("POST", "/v1/chat/completions"),
            ("POST", "/v2/chat"),
        ]
    assert found.text == "said q"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_to_another_server_gets_nothing(status, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-planted")
    with wire_server() as other:
        moved = f"{other.url.replace('127.0.0.1', 'localhost')}/v1/chat/completions"
        with wire_server(lambda asked: [http(b"", status, location=moved)]) as server:
            (found,) = run(openai(server.url, api_key_env="SOME_KEY", retries=0), question("q"))
        assert other.asked == []
    assert isinstance(found, EngineError)
    assert "redirects" in str(found) or "HTTP 303" in str(found)


def test_endless_redirections_end():
    with wire_server(lambda asked: [http(b"", 307, location=asked.path)]) as server:
        (found,) = run(openai(server.url, retries=0), question("q"))
        assert len(server.asked) < 10
    assert isinstance(found, TransportError)


@pytest.mark.parametrize("status", [507, 520, 521, 523, 525, 526, 527, 529, 598])
def test_statuses_that_heal(status):
    def script(asked):
        first = len([a for a in server.asked if a.method == "POST"]) == 1
        return [http({"error": "wait"}, status) if first else http(answer(asked))]

    with wire_server(script) as server:
        (found,) = run(openai(server.url), question("q"))
    assert isinstance(found, Completion) and status in HEALS


@pytest.mark.parametrize("ahead_s", [-7200, 0, 86400])
def test_dates_are_reckoned_by_the_servers_clock(ahead_s):
    now = 1_700_000_000 + ahead_s
    headers = {"Date": formatdate(now, usegmt=True)}
    for name, value in (
        ("Retry-After", formatdate(now + 30, usegmt=True)),
        ("x-ratelimit-reset-requests", str(now + 30)),
        ("anthropic-ratelimit-requests-reset", "2023-11-14T22:13:50Z" if ahead_s == 0 else None),
    ):
        if value:
            assert 30.0 <= wait_hint({**headers, name: value}, "") <= 30.2
