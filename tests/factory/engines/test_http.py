"""The HTTP client, the openai engine and the scripted server: every way a server can answer,
typed."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from math import exp, inf, nan

import orjson
import pytest

from prefab.factory.engines.base import engine_class, make, resolve_model
from prefab.factory.engines.chat import Chat, Malformed, TopRead, _drawn, _share, claim, log_add
from prefab.factory.engines.http import (
    Health,
    HttpClient,
    HttpConfig,
    Rejected,
    Throttle,
    loads,
    wait_hint,
)
from prefab.factory.errors import ConfigError, EngineError, TransportError
from prefab.factory.keys import request_key
from prefab.factory.types import Completion, Message, Request, Sampling
from tests.support.family_server import family_server

LABELS = ("A", "B", " A", " B")


@contextlib.contextmanager
def scripted_process(*options: str):
    """A scripted server in its own process, and its address."""
    command = [sys.executable, "-m", "prefab.factory.engines.scripted", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def scripted_server(*options: str):
    """The address of a scripted server."""
    with scripted_process(*options) as (_, address):
        yield address


def counts(url: str) -> dict:
    return orjson.loads(urllib.request.urlopen(f"{url}/counts").read())


def label_read(text: str, labels=LABELS) -> Request:
    return Request("m", (Message("user", text),), Sampling(max_tokens=1), labels)


def openai(url: str, **config):
    return make({"engine": "openai", "model": "scripted", "base_url": f"{url}/v1", **config}, "api")


async def ask(engine, *requests: Request):
    """All at once; failures are returned."""
    await engine.start()
    try:
        asks = (engine.complete(request_key(r), r) for r in requests)
        return await asyncio.gather(*asks, return_exceptions=True)
    finally:
        await engine.stop()


def run(engine, *requests: Request):
    return asyncio.run(ask(engine, *requests))


@pytest.fixture(scope="module")
def url():
    with scripted_server("--context", "50") as address:
        yield address


def test_label_reads_and_text(url):
    read, text = run(
        openai(url),
        label_read("which?"),
        Request("m", (Message("user", "hi"),), Sampling(max_tokens=9)),
    )
    assert read.exactness == "bounds" and set(read.label_logps) == {
        "A",
        "B",
    }  # the server's top k has no " A"
    assert 0 < sum(map(exp, read.label_logps.values())) < 1
    assert text.label_logps is None and text.finish == "stop" and text.text


def test_a_server_without_token_ids_is_told():
    """What is drawn is known by its ids; an answer without them, or with others than it has numbers
    for, is none."""
    answer = {
        "prompt_token_ids": [1, 2],
        "choices": [
            {
                "finish_reason": "length",
                "token_ids": [3, 4],
                "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
            }
        ],
    }
    assert _drawn(answer) == ([1, 2], [3, 4], [-0.5, -0.25], False)
    for place, value in (
        ("token_ids", None),
        ("token_ids", ["3", "4"]),
        ("token_ids", [3]),
        ("token_ids", []),
        ("logprobs", None),
        ("logprobs", {"content": [{"logprob": nan}, {"logprob": -1.0}]}),
    ):
        with pytest.raises(Malformed, match="token ids|no log-probability"):
            _drawn({**answer, "choices": [{**answer["choices"][0], place: value}]})
    with pytest.raises(Malformed):
        _drawn({"choices": answer["choices"]})


def test_batches_equal_single_reads(url):
    requests = [label_read(f"question {i}") for i in range(70)]
    before = counts(url)
    single = run(openai(url), *requests)
    batched = run(openai(url, batch=32), *requests)
    after = counts(url)
    assert [r.label_logps for r in single] == [r.label_logps for r in batched]
    assert sum(r.prompt_tokens for r in batched) == sum(r.prompt_tokens for r in single)
    assert after["posts"] - before["posts"] == 70 + 3


def test_one_conversation_too_long_spoils_only_itself(url):
    answers = run(
        openai(url, batch=8), *[label_read("w " * (60 if i == 3 else 5 + i)) for i in range(8)]
    )
    assert [a.finish == "context" for a in answers] == [i == 3 for i in range(8)]
    assert answers[3].limit == 50 and answers[3].label_logps is None


def test_sampled_answers_differ_by_repeat_and_not_by_order(url):
    hot = Sampling(9, temperature=1.0, seed=0)
    draws = [Request("m", (Message("user", "go"),), hot, repeat=(i,)) for i in range(6)]
    forward, backward = run(openai(url), *draws), run(openai(url), *reversed(draws))
    assert len({a.text for a in forward}) > 1
    assert [a.text for a in forward] == [a.text for a in reversed(backward)]


@pytest.mark.parametrize(
    "mischief", ["--fail-every", "--drop-every", "--limit-every", "--malform-every"]
)
def test_what_heals_is_asked_again(mischief):
    with scripted_server(mischief, "3") as address:
        answers = run(openai(address), *[label_read(f"q{i}") for i in range(9)])
    assert all(set(a.label_logps) == {"A", "B"} for a in answers)


def test_a_failing_batch_falls_apart_into_single_reads():
    with scripted_server("--malform-every", "2") as address:
        answers = run(openai(address, batch=4), *[label_read(f"q{i}") for i in range(8)])
    assert all(set(a.label_logps) == {"A", "B"} for a in answers)


def test_nan_is_no_answer():
    """A label that was there without a number is not one below the k-th token: B must not win by
    it, and nothing is recorded as its answer."""
    with scripted_server("--nan") as address:
        (answer,) = run(openai(address), label_read("q"))
    assert isinstance(answer, TransportError) and "no log-probability" in str(answer)


def test_wrong_model_names_the_models_there_are(url):
    (answer,) = run(openai(url, model="nope"), label_read("q"))
    assert not isinstance(answer, TransportError)
    assert isinstance(answer, EngineError) and "'nope'" in str(answer) and "scripted" in str(answer)
    answers = run(openai(url, model="nope", batch=4), label_read("q"), label_read("r"))
    assert all(isinstance(a, EngineError) for a in answers)


def test_wrong_path_says_so(url):
    (answer,) = run(
        make({"engine": "openai", "model": "m", "base_url": f"{url}/v7"}, "api"), label_read("q")
    )
    assert isinstance(answer, EngineError) and "OpenAI-compatible" in str(answer)


@pytest.mark.parametrize("key", [None, "sk-planted-1…", "sk-planted-1\nsk-planted-2", "sk-\x01"])
def test_no_key_or_one_that_no_header_can_hold_names_the_variable(key, monkeypatch):
    if key is None:
        monkeypatch.delenv("SOME_KEY", raising=False)
    else:
        monkeypatch.setenv("SOME_KEY", key)
    where = {"base_url": "https://x.invalid/v1", "api_key_env": "SOME_KEY"}
    engine = make({"engine": "openai", "model": "m", **where}, "api")
    with pytest.raises(EngineError, match="SOME_KEY") as told:
        asyncio.run(engine.start())
    assert "sk-" not in str(told.value)


def test_nobody_there_is_a_transport_error_and_soon_fails_fast():
    async def scenario():
        engine = make(
            {
                "engine": "openai",
                "model": "m",
                "base_url": "http://127.0.0.1:9/v1",
                "retries": 5,
                "down_after_s": 0,
            },
            "api",
        )
        await engine.start()
        first = [label_read(f"q{i}") for i in range(8)]
        failed = await asyncio.gather(
            *(engine.complete(request_key(r), r) for r in first), return_exceptions=True
        )
        took_s = []
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(TransportError, match="is down"):
                await engine.complete(b"0" * 16, label_read("later"))
            took_s.append(time.monotonic() - began)
        await engine.stop()
        return failed, min(took_s)

    failed, took_s = asyncio.run(scenario())
    assert all(isinstance(f, TransportError) for f in failed)
    assert took_s < 0.5  # the shortest of three: a busy machine may stop a process for seconds


def test_a_server_killed_in_the_middle_and_started_again_answers():
    async def scenario():
        with scripted_process("--delay-ms", "60000") as (first, address):
            engine = openai(address, retries=9)
            await engine.start()
            asks = [
                asyncio.create_task(engine.complete(b"k" * 16, label_read(f"q{i}")))
                for i in range(4)
            ]
            while (await asyncio.to_thread(counts, address))["asked"] < 4:
                await asyncio.sleep(0.01)
            first.kill()
            first.wait()
            with scripted_process("--port", address.rsplit(":", 1)[1]):
                answers = await asyncio.gather(*asks)
            await engine.stop()
        return answers

    assert all(a.label_logps for a in asyncio.run(scenario()))


def test_a_server_that_is_down_is_tried_by_one_question_at_a_time():
    now = [0.0]
    health = Health(10.0, clock=lambda: now[0])
    for now[0] in (0.0, 1.0, 2.0, 3.0, 9.0):
        health.failed("refused")
        health.admit("u")  # five failures, but not for ten seconds yet
    now[0] = 10.0
    health.failed("refused")
    with pytest.raises(TransportError, match="refused"):
        health.admit("u")
    now[0] = 11.0
    health.admit("u")  # this one may try
    with pytest.raises(TransportError):
        health.admit("u")  # the next may not
    health.failed("refused")
    now[0] = 12.9
    with pytest.raises(TransportError):
        health.admit("u")  # the pause has doubled
    now[0] = 13.0
    health.admit("u")
    health.succeeded()
    health.admit("u")
    health.admit("u")


def test_json_objects():
    assert loads(b'{"a": 1}') == {"a": 1} and loads(b"[1]") is None and loads(b"<html>") is None
    assert str(loads(b'{"a": NaN}')["a"]) == "nan"


@pytest.mark.parametrize(
    ("headers", "message", "wait_s"),
    [
        ({"Retry-After": "2"}, "", 2.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "", 0.0),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, "", 1.5),
        ({"Retry-After": "soon"}, "Rate limit reached. Please try again in 7.3s. See", 7.3),
        ({}, "Please try again in 6m0s.", 360.0),
        ({}, "quota exceeded, retry after 20ms", 0.02),
        ({}, "Please retry in 1 minute and 5 seconds", 65.0),
        ({}, 'RESOURCE_EXHAUSTED "retryDelay": "34s"', 34.0),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, "", 360.0),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "1000",
            },
            "slow down",
            1.0,
        ),
        ({"anthropic-ratelimit-requests-reset": "2015-10-21T07:28:00Z"}, "", 0.0),
        ({"RateLimit-Reset": "3"}, "", 3.0),
        ({"Retry-After": "nan"}, "try again in 5 bananas", None),
        ({}, "slow down", None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, message, wait_s):
    found = wait_hint(headers, message)
    assert found is None if wait_s is None else wait_s <= found <= wait_s + 0.1


def throttled(most: int) -> tuple[list[float], Throttle]:
    now = [0.0]
    return now, Throttle(most, clock=lambda: now[0])


def test_a_429_pauses_everyone_and_halves_what_is_in_flight_once():
    now, throttle = throttled(64)

    async def scenario():
        assert all([await throttle.enter(60.0) for _ in range(16)])
        now[0] = 1.0
        throttle.limited(0.5, 5.0)
        throttle.limited(0.5, 3.0)  # sent before the first halving: the same news
        assert throttle.limit == 8.0 and throttle.resume_at == 6.0
        assert not await throttle.enter(5.5)  # the pause ends after this one's deadline
        for _ in range(16):
            throttle.leave()
        now[0] = 7.0
        assert all([await throttle.enter(60.0) for _ in range(8)])
        assert not await throttle.enter(7.01)  # the ninth finds no place
        waiting = asyncio.create_task(throttle.enter(60.0))
        await asyncio.sleep(0)
        throttle.leave()
        assert await waiting

    asyncio.run(scenario())


def test_concurrency_grows_back_slowly_after_a_429():
    _, throttle = throttled(8)
    throttle.in_flight = 8
    throttle.limited(0.0, 0.0)
    sizes = []
    for _ in range(30):
        throttle.answered()
        sizes.append(throttle.limit)
    assert sizes[0] == 4.25 and sizes[4] > 5 and sizes[-1] == inf
    assert all(b - a <= 0.25 for a, b in pairwise(sizes) if b < inf)


def test_a_rate_limit_costs_time_and_no_retries():
    """Six calls where a server takes two in each 0.3 s, with no retry allowed."""
    with family_server(quota=2) as server:
        engine = openai(server.url, model="mock", retries=0)
        answers = run(engine, *(label_read(f"A or B? {i}") for i in range(6)))
    assert all(isinstance(a, Completion) for a in answers)


def test_a_rate_limit_beyond_the_deadline_is_a_transport_failure():
    with family_server(quota=1, window_s=60.0) as server:
        engine = openai(server.url, model="mock", deadline_s=1)
        answers = run(engine, *(label_read(f"A or B? {i}") for i in range(3)))
    failed = [a for a in answers if isinstance(a, TransportError)]
    assert len(failed) == 2 and all("deadline of 1 s" in str(a) for a in failed)


def test_top_reads():
    entries = [
        {"token": "A", "logprob": -1.0},
        {"token": "A", "logprob": -1.0},
        {"token": "x", "logprob": -0.5},
        {"token": " A", "logprob": -inf},
        {"token": "B", "logprob": nan},
        {"token": "T", "logprob": None},
    ]
    logps, exactness = TopRead().parse(entries[:4], ("A", "B", "T", " A"))
    assert logps == {"A": pytest.approx(-1.0 + 0.6931471805599453)} and exactness == "bounds"
    for n in (5, 6):
        with pytest.raises(Malformed):
            TopRead().parse(entries[n - 1 :], ("A", "B", "T", " A"))
    assert TopRead().parse(entries[:1], ("A",)) == ({"A": -1.0}, "exact")
    assert TopRead().parse(None, ("A",)) == (None, "hard")
    assert log_add(0.0, -inf) == 0.0


def test_shares_of_a_batch_add_up():
    assert _share(101, [10, 20, 70]) == [10, 20, 71]
    assert sum(_share(7, [1, 1, 1])) == 7


def test_one_read_mode_a_server():
    claim("http://one.example/v1", "top")
    claim("http://one.example/v1/", "top")
    with pytest.raises(EngineError, match="corrupt"):
        claim("http://one.example", "ids")


def test_configuration_errors_are_named():
    with pytest.raises(ConfigError, match="not one of vllm, openai"):
        make({"engine": "vlm"}, "local")
    with pytest.raises(ConfigError, match=r"engines.api.max_in_fligt"):
        make({"engine": "openai", "model": "m", "max_in_fligt": 3}, "api")
    assert engine_class("openai").Config.model_fields["top_logprobs"].default == 20
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_a_deadline_is_kept():
    async def scenario():
        server = HttpClient("http://127.0.0.1:9", HttpConfig(deadline_s=0.4, retries=99))
        try:
            await server.post("/x", b"{}")
        finally:
            await server.close()

    began = time.monotonic()
    with pytest.raises(TransportError, match="deadline|down"):
        asyncio.run(scenario())
    assert time.monotonic() - began < 120  # 99 retries take half an hour


def test_scripted_engine_counts_fails_and_heals():
    engine = make({"engine": "scripted", "fail_every": 3}, "s")
    answers = run(engine, *[label_read(f"q{i}") for i in range(6)])
    assert [isinstance(a, TransportError) for a in answers] == [False, False, True] * 2
    assert engine.total == 6 and len(engine.asked) == 6
    again = run(engine, label_read("q2"))
    assert set(again[0].label_logps) == set(LABELS) and again[0].exactness == "exact"


def test_scripted_rules():
    rules = [
        {"match": "polite", "labels": {"A": 0.9, "B": 0.05}},
        {"match": "critique", "text": "None. Fine."},
    ]
    engine = make({"engine": "scripted", "rules": rules}, "s")
    read, text = run(
        engine,
        label_read("more polite?"),
        Request("m", (Message("user", "critique"),), Sampling(9)),
    )
    assert exp(read.label_logps["A"]) == pytest.approx(0.9) and text.text == "None. Fine."


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        (
            "This model's maximum context length is 8,192 tokens. However, you requested 9000 "
            "tokens",
            8192,
        ),
        (
            "'max_tokens' is too large: 100. This model's maximum context length is 512 tokens "
            "and your request has",
            512,
        ),
        ("prompt is too long: 205000 tokens > 200000 maximum", 200000),
        ("Input exceeds the context window of this model.", 77),
    ],
)
def test_what_too_long_sounds_like(message, limit):
    assert _refusal(400, message) == Completion("", "context", limit=limit)


def test_other_refusals_have_their_type():
    assert _refusal(400, "filtered by Azure OpenAI's content management policy").finish == "refused"
    assert _refusal(400, "no", {"code": "content_filter"}).finish == "refused"
    with pytest.raises(TransportError, match="HTTP 400 temperature does not apply"):
        _refusal(400, "temperature does not apply")


def _refusal(status: int, message: str, detail=None) -> Completion:
    chat = Chat(HttpClient("http://x.invalid", HttpConfig()), "/chat/completions", "m", TopRead())
    chat.max_model_len = 77
    return asyncio.run(chat._refused(Rejected(status, message, detail or {})))
