"""What a server or a network does to requests: late responses, bodies without end, redirections,
outages. Each call gets its own answer or a typed failure."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from email.utils import formatdate
from functools import cache

import pytest

from prefab.factory.engines import http as http_module
from prefab.factory.engines import replicas
from prefab.factory.engines import vllm as vllm_module
from prefab.factory.engines.base import make
from prefab.factory.engines.http import HEALS, wait_hint
from prefab.factory.engines.vllm_process import port_in_use
from prefab.factory.errors import EngineError, RequestRefused, TransportError, failure_kind
from prefab.factory.keys import request_key
from prefab.factory.types import Completion, Message, Request, Sampling
from tests.support.wire_server import CLOSE, Asked, WireServer, answer, chat, http, wire_server

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
            await asyncio.sleep(0.03)
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


@pytest.mark.parametrize(
    "early", [http(b"", 504), http({"error": "time"}, 408), http(b"<html>", 500)]
)
def test_what_comes_after_a_response_that_gave_up_is_never_taken(early):
    """A proxy that stops waiting, and passes the late answer on all the same."""

    def script(asked):
        if len(server.asked) == 1:
            return [early, 0.4, stray("chatcmpl-x")]
        return [http(answer(asked))]

    async def scenario(engine):
        await engine.start()
        first, second = (
            asyncio.create_task(engine.complete(bytes([i]) * 32, question(str(i))))
            for i in range(2)
        )
        answers = await asyncio.gather(first, second)
        await engine.stop()
        return answers

    with wire_server(script) as server:
        answers = asyncio.run(scenario(openai(server.url, retries=9)))
    assert [a.text for a in answers] == ["said 0", "said 1"]


def test_every_request_has_an_id_of_its_own():
    with wire_server(lambda asked: [http(echoing(asked))]) as server:
        run(openai(server.url), *(question(str(i)) for i in range(9)))
        ids = [asked.headers["x-request-id"] for asked in server.asked]
    assert len(set(ids)) == 9 and all(i.startswith("prefab-") for i in ids)


@pytest.mark.parametrize(
    ("times", "after"), [(1, ""), (2, ""), (9, ""), (2, " and more"), (9, " and more")]
)
def test_a_letter_cut_in_two_is_asked_again_and_at_last_taken_at_the_end(times, after):
    cut = chat("CUT" + after)

    def script(asked):
        text = json.dumps(cut).replace("CUT", "\\ud83d")
        return [http(text.encode() if len(server.asked) <= times else answer(asked))]

    with wire_server(script) as server:
        (found,) = run(openai(server.url), question("a"))
        tries = len(server.asked)
    if times > 2 and after:
        assert isinstance(found, TransportError) and "surrogate" in str(found) and tries == 3
        assert failure_kind(str(found), refused=False) == "malformed"
        return
    assert (found.text, tries) == ("\ud83d" if times > 2 else "said a", min(3, times + 1))


# --- more than a request can need, and what is no answer ---

HUGE = b" " * 300_000_000


@cache
def bomb(kind: str) -> bytes:
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 31 if kind == "gzip" else 15)
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


# --- refusals of one question, and servers that are down ---


def vllm(*urls: str, **config):
    settings = {"engine": "vllm", "model": "m", "urls": list(urls), **QUICK, **config}
    engine = make(settings, "local")
    engine.said = []
    engine.progress = engine.said.append
    return engine


def refuses(status: int, text: str):
    """Good answers, but this status for one text (as a firewall does)."""

    def script(asked):
        if text in asked.text:
            return [http(b"<html>blocked</html>", status)]
        return [http(answer(asked))]

    return script


@pytest.mark.parametrize(
    ("status", "kind"), [(401, TransportError), (403, RequestRefused), (404, RequestRefused)]
)
def test_one_refused_question_after_answers_is_its_own_failure(status, kind):
    with wire_server(refuses(status, "attack")) as server:
        asked = [question(t) for t in ("a", "b", "attack", "c")]
        answers = run(openai(server.url), *asked, at_once=1)
    assert [type(a) for a in answers] == [Completion, Completion, kind, Completion]
    assert f"HTTP {status}" in str(answers[2]) and "has no model" not in str(answers[2])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_before_any_answer_or_of_all_questions_ends_the_run(status):
    with wire_server(refuses(status, "q")) as server:
        (first,) = run(openai(server.url), question("q"))
        asked = [question("a"), *(question(f"q{i}") for i in range(30))]
        later = run(openai(server.url), *asked, at_once=1)
    assert isinstance(first, EngineError) and not isinstance(first, TransportError)
    assert isinstance(later[0], Completion)
    assert sum(isinstance(a, TransportError) for a in later) < 20
    assert isinstance(later[-1], EngineError) and not isinstance(later[-1], TransportError)


def test_a_model_that_is_gone_ends_the_run_at_once():
    def script(asked):
        if gone and asked.method == "GET":
            return [http({"data": [{"id": "another"}]})]
        return [http({"error": "no such model"}, 404) if gone else http(answer(asked))]

    gone = False
    with wire_server(script) as server:
        engine = openai(server.url)

        async def scenario():
            nonlocal gone
            await engine.start()
            await engine.complete(b"k" * 32, question("a"))
            gone = True
            with pytest.raises(EngineError, match="has no model 'm'; it has: another") as told:
                await engine.complete(b"l" * 32, question("b"))
            await engine.stop()
            return told.value

        assert not isinstance(asyncio.run(scenario()), TransportError)


async def through_an_outage(engine, down, up, questions: int = 40):
    """Ask, `down()` after the first answers, `up()` after 2 s; the answers, failures returned."""
    await engine.start()
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(8)

    async def one(i):
        async with gate:
            if i == 12:
                down()
                loop.call_later(2.0, up)
            asked = question(str(i))
            return await engine.complete(request_key(asked), asked)

    try:
        return await asyncio.wait_for(
            asyncio.gather(*map(one, range(questions)), return_exceptions=True), 40
        )
    finally:
        await engine.stop()


OUTAGES = {
    "the connection is closed": lambda asked: [CLOSE],
    "502": lambda asked: [http(b"<html>", 502)],
    "503": lambda asked: [http(b"loading", 503)],
    "in the middle of a response": lambda asked: [http(answer(asked))[:-30], CLOSE],
    # the address of models answers, that of questions does not
    "503 of questions alone": lambda asked: [
        http(answer(asked)) if asked.method == "GET" else http(b"busy", 503)
    ],
}


@pytest.mark.slow_but(
    "openai-502-6",
    "openai-the connection is closed-0",
    "vllm-503-1",
    "vllm-503 of questions alone-6",
    "vllm-in the middle of a response-0",
)
@pytest.mark.parametrize("retries", [0, 1, 6])
@pytest.mark.parametrize("how", OUTAGES)
@pytest.mark.parametrize("kind", [openai, vllm])
def test_a_server_that_had_answered_is_waited_for(kind, how, retries, capsys):
    def good(asked):
        return [0.02, http(answer(asked))]

    with wire_server(good) as server:
        answers = asyncio.run(
            through_an_outage(
                kind(server.url, retries=retries),
                lambda: setattr(server, "script", OUTAGES[how]),
                lambda: setattr(server, "script", good),
            )
        )
    assert [a.text for a in answers] == [f"said {i}" for i in range(40)]


@pytest.mark.parametrize("how", OUTAGES)
def test_the_last_question_of_a_run_waits_for_its_server(how):
    """Nothing else is in flight that could tell an outage from a question's own failure."""
    with wire_server() as server:
        engine = openai(server.url, retries=1)

        async def scenario():
            await engine.start()
            await engine.complete(b"k" * 32, question("a"))
            server.script, good = OUTAGES[how], server.script
            asyncio.get_running_loop().call_later(2.0, setattr, server, "script", good)
            answer = await engine.complete(b"l" * 32, question("last"))
            await engine.stop()
            return answer

        assert asyncio.run(scenario()).text == "said last"


@pytest.mark.parametrize("retries", [0, 1])
def test_a_server_that_fails_for_a_moment_loses_no_question(retries):
    """It works again before anybody checks it."""
    failing = []

    def script(asked):
        if asked.method == "POST" and asked.text == "7" and len(failing) <= retries:
            failing.append(asked)
            return [CLOSE]
        return [http(answer(asked))]

    with wire_server(script) as server:
        answers = run(openai(server.url, retries=retries), *(question(str(i)) for i in range(9)))
    assert [a.text for a in answers] == [f"said {i}" for i in range(9)]


def test_a_short_outage_is_not_worth_a_notice(capsys):
    with wire_server(slow) as server:
        engine = vllm(server.url)
        answers = asyncio.run(
            through_an_outage(
                engine,
                lambda: setattr(server, "script", OUTAGES["503"]),
                lambda: setattr(server, "script", slow),
            )
        )
    assert [a.text for a in answers] == [f"said {i}" for i in range(40)]
    assert not engine.said


def test_a_server_that_goes_away_and_comes_back_is_waited_for_and_it_is_said(monkeypatch):
    """A listener that is closed, and opened again after 2 s: a restart."""
    monkeypatch.setattr(replicas, "SAY_AFTER_S", 0.5)
    servers = contextlib.ExitStack()
    with wire_server(lambda asked: [0.02, http(answer(asked))]) as first, servers:
        port = int(first.url.rsplit(":", 1)[1])
        engine = vllm(first.url, retries=0)
        answers = asyncio.run(
            through_an_outage(
                engine, first.shut, lambda: servers.enter_context(wire_server(port=port))
            )
        )
    assert [a.text for a in answers] == [f"said {i}" for i in range(40)]
    said = "\n".join(engine.said)
    assert "does not answer since" in said and "waits for it until" in said
    assert "answers again" in said and len(engine.said) == 2


def test_the_wait_for_a_server_ends():
    with wire_server() as server:
        engine = openai(server.url, outage_s=1, retries=1)
        began = time.monotonic()
        answers = asyncio.run(
            through_an_outage(
                engine, lambda: setattr(server, "script", OUTAGES["503"]), lambda: None
            )
        )
    failed = [a for a in answers if isinstance(a, TransportError)]
    assert len(failed) >= 20 and "outage_s" in str(failed[0])
    assert time.monotonic() - began < 120


def test_a_question_that_breaks_its_server_is_given_up(monkeypatch):
    """Each time it is asked the connection breaks; the others are answered."""
    monkeypatch.setattr(http_module, "BACKOFF_S", 0.02)
    monkeypatch.setattr(http_module, "FIRST_PAUSE_S", 0.05)

    def script(asked):
        poison = asked.method == "POST" and asked.text == "7"
        return [CLOSE] if poison else [http(answer(asked))]

    with wire_server(script) as server:
        answers = run(openai(server.url, retries=2), *(question(str(i)) for i in range(20)))
        alone = run(openai(server.url, retries=2), question("a"), question("7"), at_once=1)
    assert [i for i, a in enumerate(answers) if not isinstance(a, Completion)] == [7]
    assert isinstance(answers[7], TransportError) and isinstance(alone[1], TransportError)


# --- several servers ---


def slow(asked: Asked) -> list:
    return [0.02, http(answer(asked))]


SICK = {
    "its key is refused": lambda asked: [http({"error": "key"}, 401)],
    "it has no such model": lambda asked: [http({"error": "no"}, 404)],
    "each question is an error": lambda asked: [http({"error": "cuda"}, 500)],
    "it closes connections": lambda asked: [CLOSE],
    "its answers are no JSON": lambda asked: [http(b"<html>")],
    "it is silent": lambda asked: [30.0],
}


@pytest.mark.slow_but("its key is refused", "it closes connections", "its answers are no JSON")
@pytest.mark.parametrize("how", SICK)
def test_a_sick_server_is_left_out_the_others_go_on_and_it_gets_questions_again(how, monkeypatch):
    monkeypatch.setattr(replicas, "OUT_S", 0.5)
    said: list[str] = []
    with wire_server(slow) as one, wire_server(slow) as two:
        silent = how == "it is silent"
        engine = vllm(one.url, two.url, timeout_s=1.5 if silent else 10, max_in_flight=8)
        engine.progress = said.append

        async def scenario():
            await engine.start()
            gate = asyncio.Semaphore(8)

            async def asks(first, last):
                async def one_of(i):
                    async with gate:
                        return await engine.complete(b"k" * 32, question(f"{i} {'x' * i}"))

                return await asyncio.gather(
                    *map(one_of, range(first, last)), return_exceptions=True
                )

            answers = await asks(0, 40)
            two.script = SICK[how]
            answers += await asks(40, 120)
            sick = engine.servers[1]
            two.script, before = slow, engine.servers[1].calls
            await asyncio.sleep(2.1)
            answers += await asks(120, 240)
            await engine.stop()
            return answers, sick, engine.servers[1].calls - before

        answers, sick, after = asyncio.run(scenario())
    assert all(isinstance(a, Completion) for a in answers), answers
    assert sick.failures >= 1 and sick.url == two.url
    left_out = any("is left out for now" in line for line in said)
    assert (left_out or sick.state.startswith("down")) and after >= 20
    assert {a.replica for a in answers} == {one.url, two.url}


def missing_then(there: WireServer, late: Callable[[Asked], list], questions: int = 60):
    """Ask with two servers, of which the second one answers only after some questions; the
    answers, what was said, and how many questions the second one got."""
    # below the ports that clients' connections get
    port = next(p for p in random.sample(range(20000, 32000), 99) if not port_in_use(p))
    engine = vllm(there.url, f"http://127.0.0.1:{port}", max_in_flight=8, batch=1)

    async def scenario(servers):
        await engine.start()
        await engine.probe()
        answers = []
        for i in range(questions):
            if i == 10:
                servers.enter_context(wire_server(late, port))
                while len([line for line in engine.said if "tool calls" not in line]) < 2:
                    await asyncio.sleep(0.05)
            first, second = (question(f"{i} {half} {'x' * 300}") for half in "ab")
            answers += await asyncio.gather(
                engine.complete(b"k" * 32, first), engine.complete(b"l" * 32, second)
            )
        await engine.verify()
        await engine.stop()
        return answers

    with contextlib.ExitStack() as servers:
        answers = asyncio.run(asyncio.wait_for(scenario(servers), 300))
    return answers, [line for line in engine.said if "tool calls" not in line], engine.servers


def test_a_server_that_is_missing_at_the_start_is_asked_once_it_answers(monkeypatch):
    monkeypatch.setattr(vllm_module, "MISSING_S", 0.2)
    with wire_server(slow) as there:
        answers, said, servers = missing_then(there, slow)
    assert len(answers) == 120 and all(isinstance(a, Completion) for a in answers)
    assert len(said) == 2
    assert "does not answer; the others go on" in said[0]
    assert "answers now and gets questions" in said[1]
    assert len({a.replica for a in answers}) == 2 == len(servers)


def test_a_server_that_is_missing_at_the_start_and_serves_another_model_is_not_asked(monkeypatch):
    monkeypatch.setattr(vllm_module, "MISSING_S", 0.2)

    def other(asked):
        if asked.path == "/tokenize":
            return [http({"tokens": [1 + n for n in answer(asked)["tokens"]]})]
        return slow(asked)

    with wire_server(slow) as there:
        answers, said, servers = missing_then(there, other)
        assert {a.replica for a in answers} == {there.url}
    assert len(said) == 2 and "serves another model than the others" in said[1]
    assert (servers[1].calls, len(servers)) == (0, 2) and "another model" in servers[1].state


def test_servers_that_are_all_missing_end_the_run():
    engine = vllm("http://127.0.0.1:9", "http://127.0.0.1:13", retries=0)
    with pytest.raises(EngineError, match="no vLLM server at http://127.0.0.1:9"):
        asyncio.run(engine.start())


def test_a_question_that_all_servers_refuse_is_its_own_failure():
    with wire_server(refuses(403, "attack")) as one, wire_server(refuses(403, "attack")) as two:
        engine = vllm(one.url, two.url)
        asked = [question(t) for t in ("a", "b", "attack", "c", "attack 2", "d")]
        answers = run(engine, *asked, at_once=1)
    kinds = [type(a) for a in answers]
    assert kinds == [Completion, Completion, RequestRefused, Completion, RequestRefused, Completion]


def test_a_server_that_is_much_slower_gets_less():
    def at(seconds):
        return lambda asked: (
            [seconds, http(answer(asked))] if asked.method == "POST" else [http(answer(asked))]
        )

    with wire_server(at(0.05)) as one, wire_server(at(2.0)) as two:
        engine = vllm(one.url, two.url)
        answers = run(engine, *(question(f"{i}") for i in range(600)), at_once=32)
        fast, slower = engine.servers
    assert all(isinstance(a, Completion) for a in answers)
    # less than a tenth on an idle machine; a busy one may add half a second to each answer
    assert slower.calls < 0.5 * fast.calls and "slower" in slower.state


def test_a_question_that_takes_long_is_asked_of_another_server_too():
    """Of the second server's answers one in 40 never comes, once its pace is known."""
    came = itertools.count(1)

    def stuck(asked):
        never = asked.method == "POST" and (n := next(came)) > 60 and n % 40 == 0
        return [300.0] if never else slow(asked)

    with wire_server(slow) as one, wire_server(stuck) as two:
        engine = vllm(one.url, two.url, timeout_s=100)
        answers = run(engine, *(question(f"{i}") for i in range(400)))
        hedged = sum(s.hedged for s in engine.servers)
    assert [a.text for a in answers] == [f"said {i}" for i in range(400)]
    assert 1 <= hedged <= 20


# --- silence ---


def test_silence_is_said_and_ends_by_the_time_that_answers_took(monkeypatch):
    monkeypatch.setattr(http_module, "SILENT_S", 0.5)
    monkeypatch.setattr(http_module, "LEAST_LIMIT_S", 1.0)
    hung = []

    def script(asked):
        if asked.method == "POST" and asked.text == "99" and not hung:
            hung.append(asked)
            return [300.0]
        return [http(answer(asked))]

    with wire_server(script) as server:
        engine = vllm(server.url, timeout_s=600.0, deadline_s=1800)
        began = time.monotonic()
        answers = run(engine, *(question(str(i)) for i in range(100)), at_once=1)
    assert [a.text for a in answers] == [f"said {i}" for i in range(100)]
    assert time.monotonic() - began < 200
    # on a busy machine the 279 questions of the start can wait as long
    (said,) = [line for line in engine.said if "; 279 requests wait" not in line]
    assert "has not answered for" in said and "; 1 request waits" in said


# --- rate limits ---


@pytest.mark.parametrize("hint", ["0", "1"])
def test_a_rate_limit_is_not_run_against(hint):
    """40 requests a second are allowed, in a bucket of 40; 64 are in flight."""
    rate, n = 40.0, 280
    bucket = {"left": rate, "at": time.monotonic(), "refused": 0}

    def script(asked):
        now = time.monotonic()
        left = min(rate, bucket["left"] + rate * (now - bucket["at"]))
        bucket["at"] = now
        if left >= 1:
            bucket["left"] = left - 1
            return [http(answer(asked))]
        bucket["left"] = left
        bucket["refused"] += 1
        return [http({"error": "slow down"}, 429, Retry_After=hint)]

    with wire_server(script) as server:
        asked = [question(str(i)) for i in range(n)]
        answers = run(openai(server.url, retries=0), *asked, at_once=64)
    assert all(isinstance(a, Completion) for a in answers)
    assert bucket["refused"] < 0.5 * n
