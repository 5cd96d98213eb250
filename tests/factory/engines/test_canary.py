"""Canaries: a server that serves another model is found, and what it answered is set aside."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from prefab.factory.engines.base import make
from prefab.factory.engines.canary import LABELS, Canary, Fingerprint, difference
from prefab.factory.engines.lifecycle import started_engines
from prefab.factory.engines.vllm import VLLM, VllmConfig
from prefab.factory.errors import EngineError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Engine, Message, Request, Sampling
from prefab.factory.uses import DraftUse

SAMPLING = Sampling(8, 1.0, seed=0)


class FakeVllm:
    """Serves `model`: its answers name the weights, and its log-probabilities follow from them."""

    def __init__(self) -> None:
        self.weights, self.shift, self.tokenizer, self.asked, self.root = "good", 0.0, 0, 0, "org/m"
        self.noise, self.reads = 0.0, 0

    async def models(self, request: web.Request) -> web.Response:
        self.asked += 1
        entry = {"id": "m", "root": self.root, "max_model_len": 4096}
        return web.json_response({"data": [entry]})

    async def tokenize(self, request: web.Request) -> web.Response:
        self.asked += 1
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": [ord(c) + self.tokenizer for c in text]})

    async def chat(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.json()
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        message = {"role": "assistant", "content": f"by {self.weights}"}
        if body.get("logprobs"):
            # one fingerprint is four reads
            self.reads += body["max_tokens"] == 1
            shift = self.shift + self.noise * ((self.reads - 1) // 4 % 2)
            p = 0.6 if self.weights == "good" else 0.3
            logps = {"A": math.log(p) - shift, "B": math.log(0.95 - p) - shift}
            by_id = "logprob_token_ids" in body
            names = {k: f"token_id:{ord(k)}" if by_id else k for k in logps}
            tops = [{"token": names[k], "logprob": v} for k, v in logps.items()]
            choice["logprobs"] = {"content": [{"token": "A", "logprob": -1, "top_logprobs": tops}]}
            message["content"] = "A"
        return web.json_response({"choices": [{**choice, "message": message}], "usage": {}})


@asynccontextmanager
async def serving(*servers: FakeVllm):
    """The servers' addresses."""
    runners, urls = [], []
    for server in servers:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", server.models),
                web.post("/tokenize", server.tokenize),
                web.post("/v1/chat/completions", server.chat),
            ]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        urls.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
    try:
        yield urls
    finally:
        for runner in runners:
            await runner.cleanup()


def engine_of(urls: list[str], every: int) -> Engine:
    return VLLM(VllmConfig(model="m", urls=urls, canary_every=every, batch=1, retries=0), "local")


def hosted(urls: list[str], every: int) -> Engine:
    settings = {"engine": "openai", "model": "m", "base_url": f"{urls[0]}/v1", "retries": 0}
    return make({**settings, "canary_every": every}, "api")


async def ask(ledger: Ledger, engine: Engine, numbers: range, run: int) -> list[str]:
    """Ask questions one after another; the answers' texts."""
    texts = []
    for i in numbers:
        request = Request(engine.identity, (Message("user", f"question {i}"),), SAMPLING)
        texts.append((await ledger.ask(request, DraftUse(run, f"p{i}", 0), engine)).text)
    return texts


async def session(
    folder, urls: list[str], numbers: range, every: int, then=lambda: None, kind=engine_of
):
    """A run over these questions; `then` happens between its two halves."""
    ledger, engine = Ledger.open(folder), kind(urls, every)
    await asyncio.to_thread(getattr, engine, "identity")  # it asks the server without a loop
    try:
        async with started_engines({"local": engine}):
            run = ledger.begin_run("canaries", {}, {}).id
            ledger.probe_first([engine])
            middle = (numbers.start + numbers.stop) // 2
            texts = await ask(ledger, engine, range(numbers.start, middle), run)
            then()
            return texts + await ask(ledger, engine, range(middle, numbers.stop), run)
    finally:
        await ledger.close()


@pytest.mark.parametrize("kind", [engine_of, hosted])
def test_answers_since_the_last_good_check_are_set_aside_and_asked_again(tmp_path, kind):
    server = FakeVllm()

    async def run():
        async with serving(server) as urls:

            def swap():
                server.weights = "other"

            with pytest.raises(EngineError, match=r"no longer serves the model.* answers since"):
                await session(tmp_path, urls, range(40), 10, swap, kind=kind)
            server.weights = "good"
            return await session(tmp_path, urls, range(40), 10, kind=kind)

    assert asyncio.run(run()) == ["by good"] * 40


def test_a_change_after_the_last_check_is_found_at_the_end(tmp_path):
    server = FakeVllm()

    async def run():
        async with serving(server) as urls:

            def swap():
                server.tokenizer = 7

            with pytest.raises(EngineError, match="tokenizer gives other tokens"):
                await session(tmp_path, urls, range(6), 1000, swap)

    asyncio.run(run())


def test_replicas_with_different_weights_are_refused_at_the_start(tmp_path):
    one, other = FakeVllm(), FakeVllm()
    other.weights = "other"

    async def run():
        async with serving(one, other) as urls:
            with pytest.raises(EngineError, match=r"serves another model than .*moved by"):
                await session(tmp_path, urls, range(4), 10)

    asyncio.run(run())


@pytest.mark.parametrize("kind", [engine_of, hosted])
def test_another_model_than_in_an_earlier_run_is_refused_at_the_start(tmp_path, kind):
    server = FakeVllm()

    async def run():
        async with serving(server) as urls:
            await session(tmp_path, urls, range(4), 10, kind=kind)
            server.weights = "other"
            for _ in range(2):
                with pytest.raises(EngineError, match="that answered in this store before.*moved"):
                    await session(tmp_path, urls, range(8), 10, kind=kind)
            others = await session(tmp_path, urls, range(4, 8), 0, kind=kind)
            server.weights = "good"
            again = await session(tmp_path, urls, range(12), 10, kind=kind)
            return others, again

    others, again = asyncio.run(run())
    assert others == ["by other"] * 4
    assert again == ["by good"] * 4 + others + ["by good"] * 4


@pytest.mark.parametrize(("noise", "found"), [(0.0, True), (0.5, False)])
def test_how_much_a_hosted_model_varies_is_measured_at_the_start(tmp_path, noise, found):
    """Log-probabilities that differ from one reading to the next by 0.5 may differ by 2.0."""
    server = FakeVllm()

    async def run():
        async with serving(server) as urls:

            def moves():
                server.shift += 0.4

            server.noise = noise
            await session(tmp_path, urls, range(40), 10, moves, kind=hosted)

    if found:
        with pytest.raises(EngineError, match="moved by 0.40"):
            asyncio.run(run())
    else:
        asyncio.run(run())


def test_checks_cost_six_requests_and_nothing_where_they_are_off(tmp_path):
    async def asked(every: int) -> int:
        server = FakeVllm()
        async with serving(server) as urls:
            await session(tmp_path / str(every), urls, range(10), every)
        return server.asked

    off, two, three = (asyncio.run(asked(every)) for every in (0, 1000, 9))
    assert (two - off, three - off) == (2 * 6, 3 * 6)


def reads(*pairs: tuple[float, float]) -> tuple[dict[str, float], ...]:
    return tuple(dict(zip(LABELS, pair, strict=True)) for pair in pairs)


@pytest.mark.parametrize(
    ("now", "wrong"),
    [
        (reads((-1.0, -0.5), (-2.0, -0.2)), ""),
        (reads((-1.1, -0.6), (-2.2, -0.1)), ""),  # rounding in bf16
        (reads((-1.5, -0.9), (-2.6, -0.1)), "moved by"),
        (reads((-1.0, -0.5), (-2.0, -3.0)), "moved by"),
        ((), ""),  # nothing can be read
    ],
)
def test_rounding_is_no_difference(now, wrong):
    before = Fingerprint({"id": "m"}, (1, 2), reads((-1.0, -0.5), (-2.0, -0.2)))
    found = difference(before, Fingerprint({"id": "m"}, (1, 2), now))
    assert wrong in found and bool(wrong) == bool(found)


def test_impossible_labels_are_compared_down_to_a_floor():
    one, other = (Fingerprint({}, (), reads((-0.01, low))) for low in (-14.0, -40.0))
    assert difference(one, other) == ""


@pytest.mark.parametrize(
    ("url", "read"), [("http://127.0.0.1:1", True), ("http://gpu-7:8000", False)]
)
def test_a_remote_servers_folder_is_not_read_here(tmp_path, monkeypatch, url, read):
    from prefab.factory.engines import vllm

    (tmp_path / "config.json").write_text("{}")
    listed = {"data": [{"id": "m", "root": str(tmp_path)}]}
    monkeypatch.setattr(vllm, "_get", lambda *_: listed)
    identity = VLLM(VllmConfig(model="m", url=url), "local").identity
    assert (identity == vllm.model_identity(str(tmp_path), vllm.default_dtype())) == read


def test_a_server_that_was_down_at_the_start_is_compared_with_the_others():
    async def run() -> str:
        async def ask() -> Fingerprint:
            return Fingerprint({"id": "other"})

        check = Canary(ask, 100, lambda: 0, lambda wrong, since: wrong)
        check.expect(Fingerprint({"id": "m"}))
        check.answered()
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="its id is 'other', and was 'm'"):
            await check.finish()
        with pytest.raises(EngineError):
            check.answered()
        return check.problem

    assert asyncio.run(run())
