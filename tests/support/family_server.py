"""A chat server in a thread that behaves as model families and providers do. It keeps every body it
was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

THOUGHTS = "Okay, the user wants something. Answer A could be better, or is it?"
CRITIQUES = ("None", "Fault")
CHOOSE = "A or B"  # a message with this is answered with a label


@dataclass
class Family:
    """What the server does.

    Args:
        system: `refused` is HTTP 400 for a system turn.
        gpt5: Refuses `max_tokens`, other temperatures than 1, and log-probabilities (HTTP 403).
        refuses: Names of other fields that are refused when they are there at all.
        logprobs: `given`, `refused` (HTTP 403), `absent` (null) or `of_thoughts` (of another text
            than the answer).
        think: None; `open` (`<think>...</think>` in the text), `close` (only the closing tag),
            `apart` (as `reasoning_content`), `hidden` (counted in the usage alone).
        deaf: Thinks also where `enable_thinking` is false.
        thoughts_alone: Thinks and never answers.
        quota: Requests in `window_s`; more are HTTP 429.
        hints: How a 429 tells the time to wait: `header`, `message` or nothing.
        bad: A message with this text is HTTP 400 for good.
        vary: Give each free text another number.
        form: What stands around a label; a space is the end of a token.
        critique: What a critic says; its words and marks are tokens.
        tools: With tools: `called` (`tool_calls`, null as content), `written` (in the text, as the
            model writes calls) or `refused` (HTTP 400 without `tool_choice: none`).
    """

    system: str = "taken"
    gpt5: bool = False
    refuses: tuple[str, ...] = ()
    logprobs: str = "given"
    think: str | None = None
    deaf: bool = False
    thoughts_alone: bool = False
    quota: int = 0
    window_s: float = 0.3
    hints: str = "message"
    bad: str = ""
    label: str = "A"
    vary: bool = False
    form: str = "{}"
    critique: str = "None."
    tools: str = "called"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    url: str = ""
    times: list[float] = field(default_factory=list)

    async def chat(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.bodies.append(body)
        refused = self._limited() or self._refused(body)
        if refused is not None:
            self.counts[str(refused.status)] += 1
            return refused
        self.counts["answered"] += 1
        usage: dict[str, Any] = {"prompt_tokens": 50, "completion_tokens": 20}
        if self.think == "hidden":
            usage["completion_tokens_details"] = {"reasoning_tokens": 64}
        choice = self._choice(body)
        return web.json_response({"choices": [choice], "usage": usage})

    def _limited(self) -> web.Response | None:
        if not self.quota:
            return None
        now = time.monotonic()
        self.times = [t for t in self.times if now - t < self.window_s]
        if len(self.times) < self.quota:
            self.times.append(now)
            return None
        wait_s = self.window_s - (now - self.times[0])
        headers = {"Retry-After": str(math.ceil(wait_s))} if self.hints == "header" else {}
        said = f" Please try again in {wait_s:.2f}s." if self.hints == "message" else ""
        return error(429, f"Rate limit reached.{said}", "rate_limit_exceeded", **headers)

    def _refused(self, body: dict[str, Any]) -> web.Response | None:
        talk = body["messages"]
        if self.system == "refused" and any(m["role"] == "system" for m in talk):
            return error(400, "System role not supported")
        if self.bad and any(self.bad in (m["content"] or "") for m in talk):
            return error(400, "Invalid content in messages[0]", "invalid_value")
        if self.tools == "refused" and body.get("tools") and body.get("tool_choice") != "none":
            return error(400, '"auto" tool choice requires --enable-auto-tool-choice to be set')
        if self.gpt5 and "max_tokens" in body:
            return unsupported("max_tokens", "Use 'max_completion_tokens' instead.")
        if self.gpt5 and body.get("temperature", 1) != 1:
            return unsupported("temperature", "Only the default (1) value is supported.")
        for name in self.refuses:
            if name in body:
                return unsupported(name)
        if body.get("logprobs") and (self.gpt5 or self.logprobs == "refused"):
            return error(403, "You are not allowed to request logprobs from this model")
        return None

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 1 << 30
        asked = body["messages"][-1]["content"]
        said = "Yes, you can come."
        said += f" It is answer {len(self.bodies)}." if self.vary else ""
        critique = "Reply with None" in asked
        said = self.critique if critique else said
        said = self.form.format(self.label) if CHOOSE in asked else said
        wanted = (body.get("chat_template_kwargs") or {}).get("enable_thinking", True)
        thinks = self.think if self.deaf or wanted else None
        words, apart = said.split(" "), None
        if thinks == "open":
            words = ["<think>\n", *THOUGHTS.split(" "), "\n</think>\n\n", *words]
        elif thinks == "close":
            words = [*THOUGHTS.split(" "), "\n</think>\n\n", *words]
        elif thinks:
            apart = THOUGHTS
            room = limit > len(THOUGHTS.split(" ")) and not self.thoughts_alone
            words = words if room else []
        finish = "length" if len(words) > limit or not words else "stop"
        words = words[:limit]
        message: dict[str, Any] = {"role": "assistant", "content": " ".join(words) or None}
        if apart and thinks == "apart":
            message["reasoning_content"] = apart
        logprobs = None
        if body.get("logprobs") and self.logprobs == "given" and not (apart and not words):
            tokens = re.findall(r" ?\w+|\W", " ".join(words)) if critique else words
            logprobs = {"content": [_token(word, self.label) for word in tokens]}
        if body.get("logprobs") and self.logprobs == "of_thoughts":
            logprobs = {"content": [_token("Okay", "")]}
        if body.get("tools"):
            day = json.dumps({"day": f"day {len(self.bodies)}"})
            message["content"] = None
            call = {"name": "find_slot", "arguments": day}
            if self.tools == "called":
                message["tool_calls"] = [{"id": "x", "type": "function", "function": call}]
                finish = "tool_calls"
            else:
                written = f'{{"name": "find_slot", "arguments": {day}}}'
                message["content"] = f"<tool_call>\n{written}\n</tool_call>"
        return {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}

    def routes(self) -> list[web.RouteDef]:
        """What is served where."""
        return [
            web.post("/v1/chat/completions", self.chat),
            web.get("/v1/models", self.models),
        ]

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "mock", "root": "mock", "max_model_len": 4096}]})


def _token(word: str, label: str) -> dict[str, Any]:
    masses = {word: 0.97}
    if word.strip() in CRITIQUES:
        other = "None" if word.strip() == "Fault" else "Fault"
        masses = {word: 0.6, other: 0.2}
    if word == label:
        masses = {label: 0.7, "B" if label == "A" else "A": 0.25}
    tops = [{"token": token, "logprob": math.log(p)} for token, p in masses.items()]
    return {"token": word, "logprob": math.log(masses[word]), "top_logprobs": tops}


def error(status: int, message: str, code: str | None = None, **headers: str) -> web.Response:
    found = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
    return web.json_response(found, status=status, headers=headers)


def unsupported(name: str, more: str = "") -> web.Response:
    message = f"Unsupported parameter: '{name}' is not supported with this model. {more}"
    found = {"message": message, "code": "unsupported_parameter", "param": name}
    return web.json_response({"error": found}, status=400)


F = TypeVar("F", bound=Family)


@contextlib.contextmanager
def family_server(**behaviour: Any) -> Iterator[Family]:
    """A server that runs in a thread; `url` is its address."""
    with serving(Family(**behaviour)) as family:
        yield family


@contextlib.contextmanager
def serving(family: F) -> Iterator[F]:
    """The server of this behaviour, which runs in a thread."""
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes(family.routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        family.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield family
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
