"""Chat completions as vLLM and OpenAI-compatible servers speak them: bodies, label reads, answers,
typed refusals.

A label read asks for one unconstrained token and its log-probabilities. Constrained decoding is
never used for it: it renormalises over the labels, and the probability mass that they really had is
lost.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson

from prefab.factory.engines.http import HttpClient, Rejected
from prefab.factory.errors import EngineError, TransportError
from prefab.factory.keys import derived_seed
from prefab.factory.types import Completion, Exactness, Finish, Message, Request, Sampling

# a label read waits this long for company while others are under way, and not at all otherwise
FLUSH_AFTER_S = 0.002
_CONTEXT = re.compile(
    r"context[ _](?:length|window|size)|prompt is too long|max_model_len|too many tokens", re.I
)
_LIMIT = re.compile(r"(?:context[ _](?:length|window|size)\D{0,40}|tokens > )(\d[\d,]*)", re.I)
_POLICY = re.compile(
    r"content[ _-]?(?:filter|policy|management)|responsible ?ai|safety (?:system|policy)", re.I
)
_FINISH: dict[str, Finish] = {
    "stop": "stop",
    "eos": "stop",
    "tool_calls": "stop",
    "length": "length",
    "content_filter": "refused",
}


T = TypeVar("T")
LabelRead = tuple[dict[str, float] | None, Exactness]


class Malformed(Exception):
    """The server answered 200 with something that is not a chat completion."""


class Read(Protocol):
    """How label log-probabilities are asked for and found in the answer; one way a server (see
    `claim`).
    """

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """Find out what `fields` and `parse` need about these labels."""

    def fields(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """The fields of the body that ask for them."""

    def parse(self, entries: Sequence[Any] | None, labels: tuple[str, ...]) -> LabelRead:
        """Log-probabilities by spelling from the first token's `top_logprobs`; spellings not there
        are left out.
        """


class TopRead:
    """Reads the labels among the top k tokens. What is missing there lies below the k-th:
    `bounds`.
    """

    def __init__(self, top: int = 20) -> None:
        self.top = top

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """Nothing to find out: tokens come back as texts."""

    def fields(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """`top` = 0 asks for no log-probabilities at all (for servers that refuse them): `hard`
        labels.
        """
        return {"logprobs": True, "top_logprobs": self.top} if self.top else {}

    def parse(self, entries: Sequence[Any] | None, labels: tuple[str, ...]) -> LabelRead:
        """As `Read.parse`; None and `hard` when the server gives no log-probabilities; nothing, as
        an exact read that mentions no label, where a label's is no number.
        """
        if not entries:
            return None, "hard"
        found: dict[str, float] = {}
        for entry in entries:
            token = entry.get("token")
            if token not in labels:
                continue
            logp = log_probability(entry.get("logprob"))
            if (
                logp is None
            ):  # the label was there, so it is not below the k-th token: nothing is known of it
                return {}, "exact"
            if logp > -math.inf:  # two tokens can have one text: their masses add up
                found[token] = log_add(found[token], logp) if token in found else logp
        return found, "exact" if len(found) == len(labels) else "bounds"


class Drawn(NamedTuple):
    """A sampled answer as token ids: the prompt's as the server's template wrote it, the answer's
    with its end token, and the log-probability of each of these when it was drawn. `ended`: by an
    end token, not by its length.
    """

    prompt: list[int]
    ids: list[int]
    logps: list[float]
    ended: bool


class Group(NamedTuple):
    """What label reads that may share one POST have in common: the body before its messages, and
    the labels.
    """

    head: bytes
    labels: tuple[str, ...]


class Chat:
    """Asks one server. `path` is that of chat completions; `batch` > 1 coalesces label reads into
    `path`/batch.
    """

    def __init__(
        self,
        server: HttpClient,
        path: str,
        model: str,
        read: Read,
        *,
        batch: int = 1,
        extended: bool = True,
        max_tokens_field: str = "max_tokens",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.server, self.path, self.model, self.read, self.batch = server, path, model, read, batch
        self.extended, self.max_tokens_field, self.extra = (
            extended,
            max_tokens_field,
            dict(extra or {}),
        )
        self.max_model_len = self.in_flight = 0
        self._heads: dict[tuple[Any, ...], Group] = {}
        self._waiting: dict[Group, list[tuple[bytes, asyncio.Future[Completion]]]] = {}
        self._timer: Any = None
        self._posts: set[asyncio.Task[None]] = set()

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The answer to one request. Raises: TransportError, EngineError (as `Server.post`)."""
        self.in_flight += 1
        try:
            group = await self._group(request)
            messages = message_bytes(request.messages)
            if request.labels and self.batch > 1 and request.sampling.temperature == 0:
                return await self._join(group, messages)
            seed = b',"seed":%d' % derived_seed(key) if request.sampling.temperature > 0 else b""
            return await self._single(group, messages, seed)
        finally:
            self.in_flight -= 1

    async def draw(self, key: bytes, request: Request, stops: Sequence[int]) -> Drawn:
        """The answer to one request as token ids (`return_token_ids`, which vLLM has), ended by any
        token of `stops`.

        Raises: TransportError; EngineError for a request that the server refuses.
        """
        self.in_flight += 1
        try:
            group, messages = await self._group(request), message_bytes(request.messages)
            more = orjson.dumps(
                {
                    "return_token_ids": True,
                    "logprobs": True,
                    "stop_token_ids": list(stops),
                    "seed": derived_seed(key),
                }
            )
            return await self._parsed(b"%b%b,%b" % (group.head, messages, more[1:]), _drawn)
        except Rejected as refusal:
            raise EngineError(
                f"{self.server.url}{self.path}: HTTP {refusal.status} {refusal.message}"
            ) from refusal
        finally:
            self.in_flight -= 1

    async def _group(self, request: Request) -> Group:
        """The head of the body, serialised once for all requests of one kind."""
        kwargs = orjson.dumps(dict(request.template_kwargs)) if request.template_kwargs else b""
        kind = (request.sampling, request.labels, kwargs)
        group = self._heads.get(kind)
        if group is None:
            if request.labels:
                await self.read.prepare(request.labels)
            body = {
                "model": self.model,
                **self._sampling(request.sampling),
                "n": 1,
                "stream": False,
                **self.extra,
            }
            if request.labels:
                body |= self.read.fields(request.labels)
            if kwargs:
                body["chat_template_kwargs"] = dict(request.template_kwargs)
            group = Group(orjson.dumps(body)[:-1] + b',"messages":', request.labels)
            self._heads[kind] = group
        return group

    def _sampling(self, s: Sampling) -> dict[str, Any]:
        """Every field: a server fills what is left out from the model's own generation_config.json.
        Fields that only vLLM and its like know are left out for others (`extended` False) while
        they say nothing.
        """
        plain = {
            self.max_tokens_field: s.max_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty,
        }
        more = {
            "top_k": (s.top_k, 0),
            "min_p": (s.min_p, 0.0),
            "repetition_penalty": (s.repetition_penalty, 1.0),
        }
        more_fields = {
            name: value
            for name, (value, neutral) in more.items()
            if self.extended or value != neutral
        }
        return plain | more_fields | ({"stop": list(s.stop)} if s.stop or self.extended else {})

    async def _single(self, group: Group, messages: bytes, seed: bytes) -> Completion:
        try:
            return await self._parsed(
                b"%b%b%b}" % (group.head, messages, seed),
                lambda answer: self._completion(
                    _choices(answer, 1)[0], group.labels, *_usage(answer)
                ),
            )
        except Rejected as refusal:
            return await self._refused(refusal)

    async def _parsed(self, body: bytes, parse: Callable[[dict[str, Any]], T]) -> T:
        """What `parse` finds in the answer to `body`, which is asked thrice where it finds nothing
        of the kind.

        Raises: Rejected, TransportError, EngineError.
        """
        for _ in range(3):
            try:
                return parse(await self.server.post(self.path, body))
            except Malformed as error:
                problem = error
        raise TransportError(f"{self.server.url}{self.path}: {problem}")

    async def _refused(self, refusal: Rejected) -> Completion:
        """What a 4xx means: a fact about this prompt (kept), a mistake of the user's (told), or a
        failure (counted).
        """
        code, message = str(refusal.detail.get("code") or ""), refusal.message
        if code == "context_length_exceeded" or (
            refusal.status in (400, 413, 422) and _CONTEXT.search(message)
        ):
            found = _LIMIT.search(message)
            limit = int(found[1].replace(",", "")) if found else self.max_model_len
            return Completion("", "context", limit=limit)
        if code in ("content_filter", "content_policy_violation") or (
            refusal.status == 400 and _POLICY.search(message)
        ):
            return Completion("", "refused")
        if refusal.status == 404:
            raise EngineError(await wrong_model(self.server, self.path, self.model, message))
        raise TransportError(f"{self.server.url}{self.path}: HTTP {refusal.status} {message}")

    def _completion(
        self, choice: Any, labels: tuple[str, ...], prompt_tokens: int, new_tokens: int
    ) -> Completion:
        try:
            message = choice["message"]
            refusal = message.get("refusal")
            text = refusal if refusal else message.get("content") or ""
            finish: Finish | None = (
                "refused" if refusal else _FINISH.get(choice.get("finish_reason") or "stop")
            )
            if finish is None or not isinstance(text, str):
                raise Malformed(
                    f"finish_reason {choice.get('finish_reason')!r}, content {type(text).__name__}"
                )
            if not labels:
                return Completion(text, finish, None, "exact", prompt_tokens, new_tokens)
            content = (choice.get("logprobs") or {}).get("content") or [{}]
            logps, exactness = self.read.parse(content[0].get("top_logprobs"), labels)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise Malformed(f"not a chat completion ({type(error).__name__}: {error})") from error
        return Completion(text, finish, logps, exactness, prompt_tokens, new_tokens)

    def _join(self, group: Group, messages: bytes) -> asyncio.Future[Completion]:
        """Wait for company: a full batch leaves at once, a lonely read when the loop next turns."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        waiting = self._waiting.setdefault(group, [])
        waiting.append((messages, future))
        if len(waiting) >= self.batch:
            self._leave(group)
        elif self._timer is None:
            self._timer = (
                loop.call_later(FLUSH_AFTER_S, self._flush)
                if self._posts
                else loop.call_soon(self._flush)
            )
        return future

    def _flush(self) -> None:
        self._timer = None
        for group in list(self._waiting):
            self._leave(group)

    def _leave(self, group: Group) -> None:
        reads = [read for read in self._waiting.pop(group, ()) if not read[1].done()]
        if reads:
            task = asyncio.get_running_loop().create_task(self._post_batch(group, reads))
            self._posts.add(task)
            task.add_done_callback(self._posts.discard)

    async def _post_batch(
        self, group: Group, reads: list[tuple[bytes, asyncio.Future[Completion]]]
    ) -> None:
        """One POST for all reads. One conversation that is too long makes the whole batch a 400,
        and one with NaN logits makes it a 500: then each is asked by itself.
        """
        try:
            if len(reads) > 1:
                answers = await self._batch_answers(group, [messages for messages, _ in reads])
            else:
                answers = [await self._single(group, reads[0][0], b"")]
        except (Rejected, Malformed):
            await asyncio.gather(*(self._alone(group, *read) for read in reads))
        except BaseException as error:
            for _, future in reads:
                _settle(future, error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), answer in zip(reads, answers, strict=True):
                _settle(future, answer)

    async def _batch_answers(self, group: Group, conversations: list[bytes]) -> list[Completion]:
        body = b"%b[%b]}" % (group.head, b",".join(conversations))
        try:
            answer = await self.server.post(self.path + "/batch", body, final=frozenset({500}))
        except Rejected as refusal:
            if refusal.status in (404, 405, 501):
                # this server has no such endpoint (or no such model, which the single read will
                # tell)
                self.batch = 1
            raise
        choices = _choices(answer, len(conversations))
        shares = _share(_usage(answer)[0], [len(c) for c in conversations])
        return [
            self._completion(c, group.labels, tokens, 1)
            for c, tokens in zip(choices, shares, strict=True)
        ]

    async def _alone(
        self, group: Group, messages: bytes, future: asyncio.Future[Completion]
    ) -> None:
        try:
            _settle(future, await self._single(group, messages, b""))
        except BaseException as error:
            _settle(future, error)
            if not isinstance(error, Exception):
                raise

    async def stop(self) -> None:
        """Give up what is under way and close the pool."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in list(self._posts):
            task.cancel()
        await asyncio.gather(*self._posts, return_exceptions=True)
        for reads in self._waiting.values():
            for _, future in reads:
                future.cancel()
        self._waiting.clear()
        await self.server.close()


async def wrong_model(server: HttpClient, path: str, model: str, message: str = "") -> str:
    """What to tell somebody whose model name the server does not know: the names it does know."""
    try:
        listed = await server.get(path.removesuffix("/chat/completions") + "/models")
        names = ", ".join(str(m.get("id")) for m in listed["data"][:20])
    except (Rejected, EngineError, KeyError, TypeError, AttributeError):
        return f"{server.url}{path}: HTTP 404 {message}; is the address that of an OpenAI-compatible API?"
    return f"{server.url} has no model {model!r}; it has: {names or 'none'}"


def message_bytes(messages: tuple[Message, ...]) -> bytes:
    """The conversation as a JSON array."""
    return orjson.dumps([{"role": m.role, "content": m.content} for m in messages])


def log_probability(value: Any) -> float | None:
    """A number (minus infinity is one: the mass is 0), else None: null, NaN, text, truth values,
    integers beyond floats.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if number < math.inf else None  # NaN is not below anything


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


_READ_MODES: dict[str, str] = {}


def claim(url: str, mode: str) -> None:
    """Note that this process reads labels from `url` in this mode.

    Mixing top-k reads and reads by id on one vLLM server corrupted 63 of 64 top-k rows
    (vllm#51789).
    Raises: EngineError when another mode was claimed before.
    """
    if _READ_MODES.setdefault(url.rstrip("/").removesuffix("/v1"), mode) != mode:
        raise EngineError(
            f"{url} is used by a `vllm` and an `openai` engine at once, whose label reads corrupt each "
            "other on one server: use one of the two for it"
        )


def _choices(answer: dict[str, Any], n: int) -> list[Any]:
    choices = answer.get("choices")
    if choices is None and answer.get("error"):
        raise Malformed(f"an error at HTTP 200: {str(answer['error'])[:300]}")
    if not isinstance(choices, list) or len(choices) != n:
        raise Malformed(
            f"{len(choices) if isinstance(choices, list) else 'no'} choices for {n} conversations"
        )
    if n > 1:
        by_index = {
            c["index"]: c for c in choices if isinstance(c, dict) and type(c.get("index")) is int
        }
        if sorted(by_index) != list(range(n)):
            raise Malformed("the choices' indices are not those of the conversations")
        return [by_index[i] for i in range(n)]
    return choices


def _drawn(answer: dict[str, Any]) -> Drawn:
    choice = _choices(answer, 1)[0]
    try:
        prompt, ids = answer["prompt_token_ids"], choice["token_ids"]
        logps = [log_probability(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        if not all(type(i) is int for i in [*prompt, *ids]):
            raise TypeError("token ids that are no numbers")
    except (KeyError, TypeError) as error:
        raise Malformed(
            f"no token ids ({type(error).__name__}: {error}); vLLM 0.32 gives them"
        ) from error
    numbers = [logp for logp in logps if logp is not None]
    if not ids or not len(ids) == len(logps) == len(numbers):
        raise Malformed(f"{len(ids)} token ids with {len(numbers)} log-probabilities")
    return Drawn(prompt, ids, numbers, choice.get("finish_reason") == "stop")


def _usage(answer: dict[str, Any]) -> tuple[int, int]:
    """Prompt and new tokens; 0 where the server tells no count, or one that no file could hold."""
    usage = answer.get("usage")
    prompt, new = (
        (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if isinstance(usage, dict)
        else (0, 0)
    )
    return _count(prompt), _count(new)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**31 else 0


def _share(total: int, lengths: Sequence[int]) -> list[int]:
    """Split a batch's tokens among its conversations by their length: a batch tells only its sum,
    which stays exact.
    """
    whole, before, shares, given = sum(lengths), 0, [], 0
    for length in lengths:
        before += length
        share = total * before // whole - given
        given += share
        shares.append(share)
    return shares


def _settle(future: asyncio.Future[Completion], outcome: Completion | BaseException) -> None:
    if future.done():
        return
    if isinstance(outcome, Completion):
        future.set_result(outcome)
    elif isinstance(outcome, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(outcome)
