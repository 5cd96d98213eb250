"""The batch APIs of providers: one answer a question, whatever happens to the process, the batch or
the network."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from prefab import plan, run
from prefab.factory.engines.base import make
from prefab.factory.engines.batch import BatchFile
from prefab.factory.engines.batch_formats import FORMATS
from prefab.factory.errors import EngineError
from prefab.pipelines.run.runner import in_event_loop, run_async
from tests.support import project
from tests.support.batch_server import BatchProvider
from tests.support.family_server import serving

PROVIDERS = pytest.mark.parametrize("provider", ["openai", "anthropic"])


def pipeline(folder, server, provider="openai", **more):
    """A pipeline of two prompts whose model is behind a batch API."""
    base = server.url if provider == "anthropic" else f"{server.url}/v1"
    engine = {
        "engine": "batch",
        "provider": provider,
        "model": "mock",
        "base_url": base,
        "gather_s": 0.05,
        "poll_s": 0.02,
        **more,
    }
    return project.pipeline(folder, prompts=2, engines={"local": engine})


@PROVIDERS
def test_a_run_is_answered_in_batches(tmp_path, provider, monkeypatch):
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", "batch-key-123456")
    with serving(BatchProvider(vary=True)) as server:
        value = pipeline(tmp_path, server, provider)
        result = run(value)
        assert result.state == "done" and result.failed == 0 and result.asked > 6
        assert max(Counter(server.asked).values()) == 1
        assert len(server.batches) < result.asked / 2
        exactness = set(result.verdicts["exactness"])
        assert exactness == ({"bounds"} if provider == "openai" else {"hard"})
        name = "Authorization" if provider == "openai" else "x-api-key"
        assert "batch-key-123456" in server.headers[0][name]
        before = len(server.asked)
        assert run(value).asked == 0 and len(server.asked) == before
        live = {"engine": "openai", "model": "mock", "base_url": f"{server.url}/v1"}
        assert plan({**value, "engines": {"local": live}}).ask == 0  # both share answers


@pytest.mark.slow_but("anthropic-cancelled")
@pytest.mark.parametrize(
    ("provider", "ending"),
    [(provider, ending) for provider in FORMATS for ending in ("expired", "cancelled")],
)
def test_what_a_batch_leaves_is_answered_and_nothing_twice(tmp_path, provider, ending):
    with serving(BatchProvider(vary=True, endings=[ending])) as server:
        value = pipeline(tmp_path, server, provider)
        result = run({**value, "budget": {"failed": None}})
        assert bool(result.failed) == (ending != "expired")
        again = run(value)
        assert again.state == "done" and again.failed == 0
        first = server.batches["batch-0"]["rows"]
        twice = [row["custom_id"] for row in first[server.answered(server.batches["batch-0"]) :]]
        assert Counter(server.asked) == Counter(set(server.asked)) + Counter(twice)


def test_a_batch_that_is_refused_as_a_whole_says_why_and_is_sent_again(tmp_path):
    with serving(BatchProvider(endings=["failed"])) as server:
        value = pipeline(tmp_path, server)
        with pytest.raises(EngineError, match=r"none of 6 calls .*: the file is too large"):
            run(value)
        assert run(value).failed == 0


@PROVIDERS
def test_a_process_that_ended_finds_its_batches_again(tmp_path, provider):
    with serving(BatchProvider(vary=True, looks=-1)) as server:
        value = pipeline(tmp_path, server, provider)

        async def killed():
            from prefab.pipelines.config.loader import resolve_pipeline

            work = asyncio.create_task(run_async(resolve_pipeline(value)))
            while not server.batches:
                await asyncio.sleep(0.01)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

        in_event_loop(killed())
        sent = list(server.asked)
        for batch in server.batches.values():
            batch["looks"] = 1
        server.looks = 1
        assert run(value).state == "done"
        assert server.asked[: len(sent)] == sent and len(sent) == 6
        assert max(Counter(server.asked).values()) == 1


@PROVIDERS
def test_a_creation_whose_answer_is_lost_makes_no_second_batch(tmp_path, provider):
    with serving(BatchProvider(vary=True, lost=1)) as server:
        assert run(pipeline(tmp_path, server, provider)).state == "done"
        assert max(Counter(server.asked).values()) == 1


@PROVIDERS
def test_a_batch_created_just_before_the_process_ended_is_found(tmp_path, provider):
    with serving(BatchProvider(vary=True)) as server:
        value = pipeline(tmp_path, server, provider)
        run(value)
        (file,) = (tmp_path / "store" / "batches").iterdir()
        first = file.read_bytes().splitlines(keepends=True)[0]
        file.write_bytes(first + b'{"token": "half')  # its name was not noted any more
        for name in ("ledger.sqlite", "prefab.duckdb"):
            (tmp_path / "store" / name).unlink()
        sent = len(server.batches["batch-0"]["rows"])
        before = len(server.asked)
        run(value)
        assert len(server.asked) == 2 * before - sent
        assert all(batch.id for batch in BatchFile(file).batches.values())


def test_a_refused_question_fails_alone(tmp_path):
    with serving(BatchProvider(bad="Question 0?")) as server:
        value = pipeline(tmp_path, server)
        result = run({**value, "budget": {"failed": None}})
        assert result.refused == result.failed == 3  # the samples of one prompt
        assert run({**value, "budget": {"failed": None}}).asked == 0


def test_a_form_that_is_refused_is_asked_in_another(tmp_path):
    with serving(BatchProvider(gpt5=True)) as server:
        value = pipeline(tmp_path, server)
        value["policy"]["temperature"] = 1.0
        result = run({**value, "budget": {"failed": None}})
        assert result.failed == 0
        assert "max_completion_tokens" in server.bodies[-1]


def test_an_outage_of_the_provider_is_waited_for(tmp_path):
    with serving(BatchProvider(vary=True, busy=2)) as server:
        assert run(pipeline(tmp_path, server)).failed == 0


def test_without_a_key_nothing_starts(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    engine = make({"engine": "batch", "provider": "anthropic", "model": "m"}, "far")
    with pytest.raises(EngineError, match="ANTHROPIC_API_KEY"):
        asyncio.run(engine.start())


def test_a_full_batch_is_sent_at_once(tmp_path):
    with serving(BatchProvider(vary=True)) as server:
        value = pipeline(tmp_path, server, max_in_flight=2, gather_s=600)

        result = run(
            {
                **value,
                "prompts": {**value["prompts"], "limit": 1},
                "policy": {**value["policy"], "samples": 2},
            }
        )
        assert result.failed == 0
        assert {len(batch["rows"]) for batch in server.batches.values()} == {2}
