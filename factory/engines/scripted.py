"""For tests: an engine whose answers are a pure function of the question, in this process or as a
server process.

`python -m prefab.factory.engines.scripted --port 0 --delay-ms 5 --fail-every 50` prints its
address, counts every question it is asked (`GET /counts`) and can be slow, fail, drop connections
or answer malformed things. It imitates vLLM's `/tokenize`, `/v1/models` and both chat endpoints, so
the `vllm` (with `url:`) and `openai` engines talk to it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.engines.chat import LONGEST_FORM
from prefab.factory.engines.family import PROBE
from prefab.factory.errors import TransportError
from prefab.factory.label_text import opening_label
from prefab.factory.spec.control_tokens import KNOWN_SPECIALS
from prefab.factory.types import Completion, Engine, Message, Request

AnswerFunction = Callable[[Request], "Completion | str"]


class Rule(BaseModel):
    """Where `match` (a regular expression) is found in the last message, `text` or these
    probabilities answer.
    """

    model_config = ConfigDict(extra="forbid")
    match: str
    text: str | None = None
    labels: dict[str, float] | None = None


class ScriptedConfig(BaseModel):
    """`fail_every`: each n-th question asked is a transport failure (it heals when asked again)."""

    model_config = ConfigDict(extra="forbid")
    engine: Literal["scripted"] = "scripted"
    model: str = "scripted"
    max_in_flight: int = Field(64, ge=1)
    delay_s: float = Field(0.0, ge=0)
    fail_every: int = Field(0, ge=0)
    max_model_len: int | None = None
    rules: list[Rule] = []


class Scripted(Engine):
    """The engine. `answer` (a function of the request) comes before the rules. `asked` counts by
    key.
    """

    Config = ScriptedConfig
    special_tokens = KNOWN_SPECIALS

    def __init__(
        self, config: ScriptedConfig | None = None, answer: AnswerFunction | None = None
    ) -> None:
        self.config = config or ScriptedConfig()
        self.identity, self.max_in_flight = f"name:{self.config.model}", self.config.max_in_flight
        self.answer, self.max_model_len = answer, self.config.max_model_len
        self.asked: Counter[bytes] = Counter()
        self.total = self.in_flight = self.most_in_flight = 0
        self.started = False

    @classmethod
    def make(cls, config: ScriptedConfig, name: str) -> Scripted:
        """The engine for this configuration."""
        return cls(config)

    async def start(self) -> None:
        """Nothing to start."""
        self.started = True

    async def stop(self) -> None:
        """Nothing to stop."""
        self.started = False

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The scripted answer. Raises: TransportError as `fail_every` says."""
        self.asked[key] += 1
        self.total += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        fails = self.config.fail_every and self.total % self.config.fail_every == 0
        try:
            await asyncio.sleep(self.config.delay_s)
            if fails:
                raise TransportError(f"scripted failure of question {self.total}")
            return self._answer(request)
        finally:
            self.in_flight -= 1

    def _answer(self, request: Request) -> Completion:
        tokens = sum(len(m.content.split()) for m in request.messages)
        if self.max_model_len and tokens > self.max_model_len:
            return Completion("", "context", limit=self.max_model_len)
        if self.answer is not None:
            found = self.answer(request)
            return (
                found
                if isinstance(found, Completion)
                else Completion(found, "stop", None, "exact", tokens, 1)
            )
        alone = request.sampling.max_tokens == 1
        text, probabilities = script(
            self.config.rules, request.messages, request.labels, seed_of(request), alone
        )
        logps = (
            {label: math.log(p) for label, p in probabilities.items()} if request.labels else None
        )
        return Completion(
            text,
            "length" if request.labels and alone else "stop",
            logps,
            "exact",
            tokens,
            len(text.split()) or 1,
        )


def seed_of(request: Request) -> str:
    """A text that differs between two samples of one prompt."""
    return f"{request.repeat}" if request.sampling.temperature > 0 else ""


def script(
    rules: Sequence[Rule],
    messages: Sequence[Message],
    labels: Sequence[str],
    seed: str,
    alone: bool = True,
) -> tuple[str, dict[str, float]]:
    """Text and label probabilities for a conversation: by the first rule that matches, else by its
    digest. A label that does not stand `alone` begins a text; it is the likeliest.
    """
    last = messages[-1].content
    rule = next((r for r in rules if re.search(r.match, last)), None)
    h = hashlib.sha256("\0".join([seed, *(m.role + m.content for m in messages)]).encode()).digest()
    if labels:
        return _with_labels(rule, labels, h, alone)
    if rule is not None and rule.text is not None:
        return rule.text, {}
    first = "Fault. " if h[0] % 2 else "None. "
    return first + " ".join(f"word{b}" for b in h[1 : 4 + h[1] % 8]), {}


def _with_labels(
    rule: Rule | None, labels: Sequence[str], h: bytes, alone: bool
) -> tuple[str, dict[str, float]]:
    """As `script`, where labels are read."""
    probabilities = _by_digest(labels, h)
    if rule is not None and rule.labels is not None:
        probabilities = {k: p for k, p in rule.labels.items() if k in labels and p > 0}
    elif rule is not None and rule.text is not None:
        return rule.text, probabilities if alone else _opened(rule.text, labels)
    return _best(probabilities, "" if alone else f". {h.hex()[:8]}"), probabilities


def _best(probabilities: dict[str, float], more: str) -> str:
    """The likeliest label, and the text that goes on after it."""
    best = max(probabilities, key=probabilities.__getitem__, default="")
    return best.strip() + more if more else best


def _opened(text: str, labels: Sequence[str]) -> dict[str, float]:
    """Probabilities of labels where a text begins with one of them; none where it does not."""
    found = opening_label(text, labels)
    if found is None:
        return {}
    return {label: 0.9 if label == found.label else 0.09 / len(labels) for label in labels}


def _by_digest(labels: Sequence[str], h: bytes) -> dict[str, float]:
    weights = {label: 1 + h[i % 16] ** 2 for i, label in enumerate(labels)}
    return {label: 0.98 * w / sum(weights.values()) for label, w in weights.items()}


def tokens_of(text: str) -> list[int]:
    """Token ids of the imitated tokenizer: one a spelling of at most three characters, else one a
    character.
    """
    return [int.from_bytes(text.encode()[:6], "big")] if len(text) <= 3 else [ord(c) for c in text]


class Service:
    """The server's behaviour and its counts. `--fail-every n` and the like make each n-th POST
    fail.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rules = (
            args,
            [Rule.model_validate(r) for r in json.loads(args.script or "[]")],
        )
        self.asked: Counter[str] = Counter()
        self.posts = self.in_flight = self.most_in_flight = 0
        self.last_at = 0.0

    async def chat(self, http: Any) -> Any:
        """Both chat endpoints: `messages` is a conversation or, at /batch, a list of them."""
        from aiohttp import web

        body = await http.json()
        batch = http.path.endswith("/batch")
        talks = body["messages"] if batch else [body["messages"]]
        if talks[0][-1]["content"] == PROBE[-1].content:  # no question of a run: not counted
            answer = {"choices": [self._choice(0, talks[0], body)]}
            return web.json_response(answer)
        self.posts += 1
        self.last_at = time.time()
        self.in_flight += len(talks)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for talk in talks:
            same = {k: v for k, v in body.items() if k != "messages"} | {"m": talk}
            self.asked[
                hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
            ] += 1
        try:
            if self.args.delay_ms:
                await asyncio.sleep(self.args.delay_ms / 1000)
            failure = self._failure(http, body, talks)
            if failure is not None:
                return failure
            choices = [self._choice(i, talk, body) for i, talk in enumerate(talks)]
        finally:
            self.in_flight -= len(talks)
        tokens = sum(len(m["content"].split()) for talk in talks for m in talk)
        usage = {
            "prompt_tokens": tokens,
            "completion_tokens": len(choices),
            "total_tokens": tokens + len(choices),
        }
        text = json.dumps(
            {
                "object": "chat.completion",
                "model": body.get("model"),
                "choices": choices,
                "usage": usage,
            }
        )
        return web.Response(text=text, content_type="application/json")

    def _failure(self, http: Any, body: dict[str, Any], talks: list[Any]) -> Any:
        from aiohttp import web

        def error(status: int, message: str, **headers: str) -> Any:
            return web.json_response(
                {"error": {"message": message, "code": status}}, status=status, headers=headers
            )

        def due(n: int) -> bool:
            return bool(n) and self.posts % n == 0

        longest = max(sum(len(m["content"].split()) for m in talk) for talk in talks)
        if body.get("model") != self.args.model:
            return error(404, f"The model `{body.get('model')}` does not exist.")
        if self.args.context and longest > self.args.context:
            return error(400, f"This model's maximum context length is {self.args.context} tokens.")
        if due(self.args.drop_every):
            http.transport.abort()
            return error(500, "dropped")
        if due(self.args.fail_every):
            return error(500, "scripted failure")
        if due(self.args.limit_every):
            return error(429, "slow down", **{"Retry-After": "0.05"})
        if due(self.args.malform_every):
            return web.json_response({"choices": [{"surprise": 1}]})
        return None

    def _choice(
        self, index: int, talk: list[dict[str, str]], body: dict[str, Any]
    ) -> dict[str, Any]:
        ids, labels = _asked_labels(talk, body)
        text, p = script(
            self.rules,
            [_message(m) for m in talk],
            labels,
            str(body.get("seed", "")),
        )
        # every id that was asked for comes back, however unlikely: with -9999, as vLLM writes it
        if ids:
            p = {label: p.get(label, 0.0) for label in labels}
        tops = [
            {
                "token": f"token_id:{tokens_of(k)[0]}" if ids else k,
                "logprob": math.log(v) if v else -9999.0,
            }
            for k, v in p.items()
        ]
        if self.args.nan and tops:
            tops[0]["logprob"] = float("nan")
        logprobs = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": tops}]}
        return {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": logprobs if body.get("logprobs") else None,
            "finish_reason": "length" if labels else "stop",
        }

    async def tokenize(self, http: Any) -> Any:
        """vLLM's /tokenize, for a prompt or for messages."""
        from aiohttp import web

        body = await http.json()
        text = body.get("prompt") or " ".join(m["content"] for m in body.get("messages", ()))
        ids = [0] * len(text.split()) if "messages" in body else tokens_of(text)
        return web.json_response(
            {"count": len(ids), "max_model_len": self.args.context or 4096, "tokens": ids}
        )

    async def models(self, http: Any) -> Any:
        """The one model there is."""
        from aiohttp import web

        listed = [
            {
                "id": self.args.model,
                "root": self.args.model,
                "max_model_len": self.args.context or 4096,
            }
        ]
        return web.json_response({"object": "list", "data": listed})

    async def counts(self, http: Any) -> Any:
        """What was asked: questions, different ones, those asked more than once, and when the last
        one came (seconds since 1970); with ?full each one's count.
        """
        from aiohttp import web

        repeated = sum(n - 1 for n in self.asked.values())
        told = {
            "asked": sum(self.asked.values()),
            "distinct": len(self.asked),
            "repeated": repeated,
            "posts": self.posts,
            "most_in_flight": self.most_in_flight,
            "last_at": self.last_at,
        }
        return web.json_response(
            told | ({"counts": dict(self.asked)} if "full" in http.query else {})
        )


async def serve(args: argparse.Namespace) -> None:
    """Serve until killed; the first line printed is the address."""
    from aiohttp import web

    service = Service(args)
    app = web.Application(client_max_size=2**28)
    app.add_routes(
        [
            web.post("/v1/chat/completions", service.chat),
            web.post("/v1/chat/completions/batch", service.chat),
            web.post("/tokenize", service.tokenize),
            web.get("/v1/models", service.models),
            web.get("/counts", service.counts),
            web.get("/health", lambda _: asyncio.sleep(0, web.Response())),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, args.host, args.port)
    await site.start()
    print(f"http://{args.host}:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A scripted OpenAI-compatible server that counts what it is asked."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--model", default="scripted")
    parser.add_argument(
        "--script", help='JSON: [{"match": "regex", "text": "...", "labels": {"A": 0.9}}, ...]'
    )
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--context", type=int, default=0, help="longest prompt in words")
    parser.add_argument("--nan", action="store_true", help="one label's log-probability is NaN")
    for what in ("fail", "drop", "limit", "malform"):
        parser.add_argument(f"--{what}-every", type=int, default=0, help=f"{what} each n-th POST")
    return parser.parse_args()


def _asked_labels(talk: list[dict[str, str]], body: dict[str, Any]) -> tuple[list[int], list[str]]:
    """The token ids that a request wants read, and their labels. None of a text: the tokens of its
    label are not imitated.
    """
    if body.get("max_tokens", 1) > LONGEST_FORM and talk[-1]["content"] != PROBE[-1].content:
        return [], []
    ids = body.get("logprob_token_ids") or []
    labels = [i.to_bytes(6, "big").lstrip(b"\0").decode() for i in ids]
    return ids, labels or (["A", "B", "T"] if body.get("logprobs") else [])


def _message(turn: dict[str, Any]) -> Message:
    return Message(turn["role"], turn.get("content") or "")


if __name__ == "__main__":
    asyncio.run(serve(_arguments()))
