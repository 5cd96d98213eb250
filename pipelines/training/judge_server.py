"""A judge as an HTTP server: trainers of other packages send prompts and answers, and get scores
under the pipeline's constitution.

Answers of the judge are kept in STORE/reward as for training in Prefab, so an answer that was
scored before costs no call. The server listens on the loopback interface and wants a key.

Routes (docs/judge-server.md describes them):

- POST /score: `{prompt, answer}`, or `{items: [{prompt, answer}, ...]}`
- POST /v1/score: `{text_1, text_2}`, vLLM's score API
- POST /v1/classify: `{messages}`, or a list of conversations as `input`, vLLM's classify API
- POST /get_reward: `{query, prompts}`, as OpenRLHF sends
- GET /health: the judge, its model and its constitution
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from prefab.factory import keys
from prefab.factory.errors import ConfigError, EngineError, PrefabError
from prefab.factory.printable import printable
from prefab.factory.types import Engine, Message, Prompt
from prefab.pipelines.config.loader import ResolvedPipeline, resolve_pipeline
from prefab.pipelines.run.asking import AskingSession, asking_session, engine_for
from prefab.pipelines.training.judge_reward import NO_ANSWER, AnswerScore, answer_scorer, find

MOST_BYTES = 64 << 20  # of one request
ScoreAnswer = Callable[[Prompt, str], Coroutine[Any, Any, AnswerScore]]
Item = tuple[Prompt, str]


def serve_judge(
    pipeline: str | Path,
    judge: str = "",
    port: int = 8100,
    key: str = "",
    sets: Sequence[str] = (),
    engines: Mapping[str, Engine] | None = None,
    tell: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a judge of a pipeline until the process is stopped.

    Args:
        pipeline: A pipeline file, or the name of a preset.
        judge: The name of a pointwise judge of its panel; default: the first one.
        port: The port on the loopback interface; 0: a free one.
        key: What clients must send; they are refused without it.
        sets: Overrides of fields of the pipeline.
        engines: Engines by name, instead of those that the pipeline would start.
        tell: Called with the address once the server answers.

    Raises:
        ConfigError: A mistake in the pipeline, no such judge, no key, or the port is in use.
        EngineError: The judge's engine cannot be started.
    """
    if not key:
        raise ConfigError("a judge server needs a key that its clients send")
    loaded = resolve_pipeline(pipeline, sets)
    asyncio.run(_serve(loaded, judge, port, key, engines, tell))


async def _serve(
    loaded: ResolvedPipeline,
    name: str,
    port: int,
    key: str,
    engines: Mapping[str, Engine] | None,
    tell: Callable[[str], None],
) -> None:
    judge = find(loaded, name, loaded.config.name)
    budget = loaded.config.budget.model_copy(update={"failed": None})  # each client is told
    config = loaded.config.model_copy(update={"budget": budget})
    loaded = replace(loaded, config=config)
    folder = Path(loaded.config.store)
    engine = engine_for(loaded, judge, engines)
    settings = (folder / "reward", f"reward-{judge.name}", {"recipe": "reward"})
    async with asking_session(loaded, judge, engine, *settings, behind=folder) as session:
        runner = web.AppRunner(make_app(loaded, session, key), access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            try:
                await site.start()
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"port {port} cannot be used ({error}). Choose another with --port, or 0 for any"
                ) from error
            tell(f"http://127.0.0.1:{runner.addresses[0][1]}")
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


def make_app(loaded: ResolvedPipeline, session: AskingSession, key: str) -> web.Application:
    """The server's routes, for an open session of the judge."""
    server = JudgeServer(loaded, session, answer_scorer(loaded, session))
    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_gate(key), _errors])
    app.router.add_get("/health", server.health)
    for path, handler in (
        ("/score", server.score),
        ("/v1/score", server.pairs_of_texts),
        ("/v1/classify", server.classify),
        ("/get_reward", server.rewards),
    ):
        app.router.add_post(path, handler)
    return app


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _gate(key: str) -> Any:
    """Refuse what comes without the key, in the header `Authorization` or in the address (`?key=`,
    for clients that send no headers).
    """

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = given or request.query.get("key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            return _reply({"error": "send the server's key: Authorization: Bearer KEY"}, 401)
        return await handler(request)

    return gate


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A mistake of the client's as 422 with its words, a failure of the engine as 503."""
    try:
        return await handler(request)
    except ValueError as error:  # a ConfigError is one too
        return _reply({"error": printable(str(error))}, 422)
    except PrefabError as error:
        return _reply({"error": printable(str(error))}, 503)


class JudgeServer:
    """The handlers of a judge's routes."""

    def __init__(
        self, loaded: ResolvedPipeline, session: AskingSession, score_answer: ScoreAnswer
    ) -> None:
        self._session, self._score = session, score_answer
        self._about = {
            "judge": session.judge.name,
            "model": session.engine.identity,
            "constitution": loaded.constitution.id,
        }

    async def health(self, request: web.Request) -> web.Response:
        """The judge, its model and constitution, and how many calls were made and reused."""
        calls = {"asked": self._session.asked, "reused": self._session.reused}
        return _reply({**self._about, **calls})

    async def score(self, request: web.Request) -> web.Response:
        """Scores with all that the judge said."""
        body = await _body(request)
        many = "items" in body
        items = [
            (_prompt(_field(item, "prompt")), _answer(_field(item, "answer")))
            for item in (_list(body, "items") if many else [body])
        ]
        found = [
            {
                "score": of.score,
                "probability": _probability(of),
                "principles": [asdict(one) for one in of.principles],
            }
            for of in await self._all(items)
        ]
        return _reply({"scores": found} if many else found[0])

    async def pairs_of_texts(self, request: web.Request) -> web.Response:
        """vLLM's score API: `text_1` holds the prompt or prompts, `text_2` the answers."""
        body = await _body(request)
        prompts, answers = (_texts(body, name) for name in ("text_1", "text_2"))
        if len(prompts) == 1:
            prompts *= len(answers)
        found = await self._all(_zipped(prompts, answers))
        value = _unscored(request)
        data = [
            {"index": i, "object": "score", "score": _filled(_probability(of), value, of)}
            for i, of in enumerate(found)
        ]
        return _reply({"object": "list", "model": self._about["model"], "data": data})

    async def classify(self, request: web.Request) -> web.Response:
        """vLLM's classify API: whole conversations, whose last turn is the answer."""
        body = await _body(request)
        talks = [body["messages"]] if "messages" in body else _list(body, "input")
        found = await self._all([_split_talk(talk) for talk in talks])
        data = []
        for i, of in enumerate(found):
            p = _filled(_probability(of), _unscored(request), of)
            label = "good" if p >= 0.5 else "bad"
            data.append({"index": i, "label": label, "probs": [1 - p, p], "num_classes": 2})
        return _reply({"object": "list", "model": self._about["model"], "data": data})

    async def rewards(self, request: web.Request) -> web.Response:
        """OpenRLHF's remote reward: `query` is the prompt with the answer after it."""
        body = await _body(request)
        prompts, queries = (_list(body, name) for name in ("prompts", "query"))
        answers = [
            query[len(prompt) :] if str(query).startswith(str(prompt)) else query
            for prompt, query in zip(prompts, queries, strict=False)
        ]
        if len(prompts) != len(queries):
            raise ValueError(f"{len(prompts)} prompts and {len(queries)} texts in query")
        value = _unscored(request)
        found = await self._all(_zipped(prompts, answers))
        scores = [_filled(of.score, value, of) for of in found]
        share = sum(of.score is None for of in found) / len(found)
        return _reply({"rewards": scores, "scores": scores, "extra_logs": {"unscored": share}})

    async def _all(self, items: Sequence[Item]) -> list[AnswerScore]:
        if not items:
            raise ValueError("there is nothing to score")
        found = list(await asyncio.gather(*(self._score(*item) for item in items)))
        if any(of.score is None and NO_ANSWER in (p.reason for p in of.principles) for of in found):
            raise EngineError("the judge's engine gave no answer; send the request again")
        return found


def _reply(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def _body(request: web.Request) -> dict[str, Any]:
    """The object in the body. Raises: ValueError."""
    try:
        body = orjson.loads(await request.read())
    except ValueError:
        raise ValueError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise ValueError("the body is not a JSON object")
    return body


def _field(of: Any, name: str) -> Any:
    if not isinstance(of, dict) or name not in of:
        raise ValueError(f"{name} is missing")
    return of[name]


def _list(of: dict[str, Any], name: str) -> list[Any]:
    value = _field(of, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _texts(of: dict[str, Any], name: str) -> list[Any]:
    """One text, or a list of them, as a list."""
    value = _field(of, name)
    return value if isinstance(value, list) else [value]


def _zipped(prompts: Iterable[Any], answers: Iterable[Any]) -> list[Item]:
    pairs = zip(prompts, answers, strict=True)
    return [(_prompt(prompt), _answer(answer)) for prompt, answer in pairs]


def _prompt(value: Any) -> Prompt:
    """A text or a list of turns as a prompt; its id is that of its text. Raises: ValueError."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        return Prompt(keys.prompt_id(messages), messages)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("a prompt is a text, or a list of turns with role and content") from None


def _answer(value: Any) -> str:
    """A text, or a list whose last turn is the answer, as text. Raises: ValueError."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ValueError("an answer is a text, or a list of turns that ends with it")
    return value


def _split_talk(talk: Any) -> Item:
    """A conversation as its prompt and the answer in its last turn. Raises: ValueError."""
    if not isinstance(talk, list) or len(talk) < 2:
        raise ValueError("a conversation is a list of turns that ends with the answer")
    return _prompt(talk[:-1]), _answer(talk)


def _probability(of: AnswerScore) -> float | None:
    """The score on 0 to 1."""
    return None if of.score is None else (of.score + 1) / 2


def _unscored(request: web.Request) -> float | None:
    """What the client takes for an answer that is unscored (`?unscored=-1`): this layout has no
    place for one.
    """
    given = request.query.get("unscored")
    return None if given is None else float(given)


def _filled(value: float | None, otherwise: float | None, of: AnswerScore) -> float:
    """The value, or the client's. Raises: ValueError where there is neither."""
    if value is not None:
        return value
    if otherwise is None:
        reasons = sorted({one.reason or "" for one in of.principles if one.reason}) or ["no answer"]
        raise ValueError(
            f"an answer is unscored ({', '.join(reasons)}), and this layout has no place for it. "
            "Add ?unscored=NUMBER to the address to take a number of your own for such answers"
        )
    return otherwise
