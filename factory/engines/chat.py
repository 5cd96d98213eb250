"""Chat completions of vLLM and OpenAI-compatible servers: bodies, label reads, answers, typed
refusals.

A label read asks for one unconstrained token and its log-probabilities. Constrained decoding is
never used for it: it renormalises over the labels, and the probability mass that they really had is
lost. A model that thinks gets room for it, and is read at its answer.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson

from prefab.factory.engines import canary
from prefab.factory.engines.canary import Canary
from prefab.factory.engines.family import (
    PROBE,
    PROBE_LABELS,
    PROBE_TOKENS,
    Family,
    Thinking,
    droppable,
    learned,
    without_system,
)
from prefab.factory.engines.http import (
    LIMITED,
    MAX_BYTES,
    Denied,
    HttpClient,
    Malformed,
    Pace,
    Rejected,
)
from prefab.factory.errors import EngineError, RequestRefused, TransportError
from prefab.factory.keys import derived_seed
from prefab.factory.label_text import FoundLabel, label_of_answer
from prefab.factory.thinking import (
    ThinkingSplit,
    closing_tag_alone,
    join_thinking,
    message_text,
    refusal_of,
    split_thinking,
)
from prefab.factory.tool_calls import server_turns, tools_of
from prefab.factory.types import Completion, Exactness, Finish, Message, Request, Sampling

# a label read waits this long for others to share its POST while some are under way, else not at
# all
FLUSH_AFTER_S = 0.002
# An answer with a label that may be longer than this is a text: its label is one of few words, and
# the likeliest tokens of all its tokens would be megabytes
LONGEST_FORM, TOPS_OF_TEXT = 16, 5
LOG_SLACK = 0.01  # above 0: servers round log-probabilities (bf16 logits)
MORE_TOKENS = 16  # that an answer may have beside those asked for: end tokens, a server's own count
MAX_LESSONS = 12  # refusals of one request that the engine learns from
# Bytes of a response: of its frame, of a token's text (some are 256 spaces, and JSON escapes take
# six bytes a letter), of one of its top tokens (its text in letters and in bytes, and a number).
FRAME_BYTES, TOKEN_BYTES, TOP_BYTES = 2**18, 1024, 256
_CONTEXT = re.compile(
    r"context[ _](?:length|window|size)|prompt is too long|max_model_len|too many tokens", re.I
)
_LIMIT = re.compile(r"(?:context[ _](?:length|window|size)\D{0,40}|tokens > )(\d[\d,]*)", re.I)
_POLICY = re.compile(
    r"content[ _-]?(?:filter|policy|management)|responsible ?ai|safety (?:system|policy)", re.I
)
_FINISH: dict[str, Finish] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("complete", "tool_calls", "function_call", "tool_use"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "safety", "sensitive", "refusal", "recitation"), "refused"),
}


T = TypeVar("T")
LabelRead = tuple[dict[str, float] | None, Exactness]


class Read(Protocol):
    """How label log-probabilities are asked for and found in the answer; one way a server (see
    `claim`).
    """

    async def prepare(self, labels: tuple[str, ...], opening: bool = False) -> None:
        """Find out what `fields` and `parse` need about these labels. `opening`: a label of several
        tokens is read by its first one.

        Raises: EngineError for a label that cannot be read.
        """

    def fields(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """The fields of the body that ask for them."""

    def parse(self, entries: Sequence[Any] | None, labels: tuple[str, ...]) -> LabelRead:
        """Log-probabilities by spelling from a token's `top_logprobs`; spellings not there are left
        out.

        Raises: Malformed where a label's number is no log-probability.
        """

    def label_of(self, token: Any, labels: tuple[str, ...]) -> str | None:
        """The spelling of the label that the server's name of a token stands for; None where it is
        no label.
        """

    def knows(self, token: str) -> bool:
        """Whether this is how the server was asked to name a token."""


class TopRead:
    """Reads the labels among the top k tokens. What is missing there lies below the k-th:
    `bounds`.
    """

    def __init__(self, top: int = 20) -> None:
        self.top = top

    async def prepare(self, labels: tuple[str, ...], opening: bool = False) -> None:
        """Nothing to find out: tokens come back as texts."""

    def fields(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """`top` = 0 asks for no log-probabilities at all (for servers that refuse them): `hard`
        labels.
        """
        return {"logprobs": True, "top_logprobs": self.top} if self.top else {}

    def parse(self, entries: Sequence[Any] | None, labels: tuple[str, ...]) -> LabelRead:
        """As `Read.parse`; None and `hard` when the server gives no log-probabilities."""
        if not entries:
            return None, "hard"
        found: dict[str, float] = {}
        for entry in entries:
            token = token_text(entry.get("token"))
            if token not in labels:
                continue
            logp = log_probability(entry.get("logprob"))
            if logp > -math.inf:  # two tokens can have one text: their masses add up
                found[token] = log_add(found[token], logp) if token in found else logp
        check_masses(found)
        return found, "exact" if len(found) == len(labels) else "bounds"

    def label_of(self, token: Any, labels: tuple[str, ...]) -> str | None:
        """As `Read.label_of`."""
        token = token_text(token)
        return token if token in labels else None

    def knows(self, token: str) -> bool:
        """As `Read.knows`: by its text."""
        return True


class Drawn(NamedTuple):
    """A sampled answer as token ids: the prompt's as the server's template wrote it, the answer's
    with its end token, and the log-probability of each of these when it was drawn. `ended`: by an
    end token, not by its length.
    """

    prompt: list[int]
    ids: list[int]
    logps: list[float]
    ended: bool


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What label reads that may share one POST have in common: the body without its messages, also
    as text, and the labels. `forms`: the label may stand in a form, not at the first token.
    `opened`: the chat template opens the thinking. `tokens` are the most that an answer may have,
    and `max_bytes` what a response with one answer can need.
    """

    head: bytes
    labels: tuple[str, ...]
    body: Mapping[str, Any]
    forms: bool = False
    opened: bool = False
    tokens: int = 1 << 30
    max_bytes: int = MAX_BYTES
    pace: Pace = field(default_factory=Pace)
    batch_pace: Pace = field(default_factory=Pace)


class _Probe(NamedTuple):
    """The answer to the probe, whether the model thought before it, and whether log-probabilities
    were given.
    """

    answer: Completion
    thought: bool
    logprobs: bool


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
        family: Family | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.server, self.path, self.model, self.read, self.batch = server, path, model, read, batch
        self.extended, self.extra = extended, dict(extra or {})
        self.family = family or Family()
        self.tell: Callable[[str], None] = lambda line: None  # where a notice for people goes
        self._told: set[str] = set()
        self.canary: Canary | None = None
        self._probing = self._gives_logprobs = False
        self.max_model_len = self.in_flight = 0
        self._heads: dict[tuple[Any, ...], Group] = {}
        self._waiting: dict[Group, list[tuple[bytes, asyncio.Future[Completion]]]] = {}
        self._timer: Any = None
        self._posts: set[asyncio.Task[None]] = set()
        server.small_question = self._small_question

    def _small_question(self) -> tuple[str, bytes]:
        """Path and body of a question of one token, which shows whether the server answers."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Say yes."}],
            self.family.max_tokens_field: 1,
        }
        return self.path, orjson.dumps(body | self.extra)

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The answer to one request. Raises: TransportError, RequestRefused, EngineError."""
        self.in_flight += 1
        try:
            answer = await self._adapted(request, lambda: self._complete(key, request))
        except Rejected as refusal:
            return await self._refused(refusal)
        finally:
            self.in_flight -= 1
        if self.canary is not None:
            self.canary.answered()
        return answer

    async def _complete(self, key: bytes, request: Request) -> Completion:
        group = await self._group(request)
        messages = self._messages(request)
        greedy = request.sampling.temperature == 0
        alone = not greedy or group.forms or any(m.more for m in request.messages)
        if request.labels and self.batch > 1 and not alone:
            return await self._join(group, messages)
        seeded = request.sampling.temperature > 0 and "seed" not in self.family.left_out
        seed = b',"seed":%d' % derived_seed(key) if seeded else b""
        return await self._single(group, messages, seed)

    async def _adapted(self, request: Request, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives. Where the server refuses the form of the request, the request is
        written in another form and asked again.

        Raises: Rejected for a refusal that teaches nothing.
        """
        for _ in range(MAX_LESSONS):
            family = self.family
            try:
                return await ask()
            except Rejected as refusal:
                if family is self.family and not await self._learn(refusal, request):
                    raise
        return await ask()

    async def _learn(self, refusal: Rejected, request: Request) -> bool:
        """Whether the refusal taught something about the model."""
        if refusal.status not in (400, 403, 422):
            return False
        body = (await self._group(request)).body
        has_system = any(m.role == "system" for m in request.messages)
        param = str(refusal.detail.get("param") or "")
        found = learned(self.family, refusal.message, param, body, has_system)
        if found is None or found == self.family:
            return False
        self.adopt(found)
        return True

    def adopt(self, family: Family) -> None:
        """Write requests for this family from now on, and tell what is unusual."""
        self.family = family
        self._heads.clear()
        if not self._probing:
            self._tell_notes()

    def _tell_notes(self) -> None:
        for line in self.family.notes():
            self._tell_once(line)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.tell(line)

    async def probe(self) -> Family:
        """Find out with one or two short calls what the model does otherwise than most.

        Raises: TransportError, EngineError.
        """
        self._probing = True
        try:
            await self._probe()
        finally:
            self._probing = False
        self._tell_notes()
        return self.family

    async def canary_logps(self) -> tuple[Mapping[str, float], ...]:
        """Log-probabilities of the labels after each of the canaries' questions; none where this
        model's labels cannot be read at the first token. Raises: TransportError, EngineError.
        """
        if self.family.thinking == "always" or not self.family.logprobs:
            return ()
        told = self.family.thinking == "unless_told"
        asked = canary.questions(self.model, (("enable_thinking", False),) if told else ())
        await self.read.prepare(canary.LABELS)
        try:
            found = await asyncio.gather(*(self._complete(bytes(32), one) for one in asked))
        except Rejected:
            return ()
        return tuple(answer.label_logps or {} for answer in found)

    async def _probe(self) -> None:
        found = await self._probe_once(())
        if found is not None and found.thought:
            opens = closing_tag_alone(found.answer.text)
            found = await self._probe_once((("enable_thinking", False),))
            always: Thinking = "always" if found is None or found.thought else "unless_told"
            self.adopt(replace(self.family, thinking=always, opens_thinking=opens))
        if found is None or found.thought:
            return
        if not found.logprobs and not await self._gives_any():
            self.adopt(replace(self.family, logprobs=False))
        letter = split_thinking(found.answer.text).answer.strip()
        if not found.answer.label_logps and letter not in PROBE_LABELS:
            self.adopt(replace(self.family, begins=letter[:20]))

    async def _gives_any(self) -> bool:
        """Whether another label read gets log-probabilities, where the probe got none."""
        with suppress(EngineError, Rejected):
            read = await self._complete(bytes(32), canary.questions(self.model)[0])
            return read.label_logps is not None
        return False

    async def _probe_once(self, kwargs: tuple[tuple[str, Any], ...]) -> _Probe | None:
        """The answer to the probe; None when it was refused."""
        labels: tuple[str, ...] = PROBE_LABELS
        try:
            await self.read.prepare(labels)
        except EngineError:  # no single tokens for this model
            labels = ()
        most = min(PROBE_TOKENS, max(1, (self.max_model_len or 4096) // 4))
        request = Request(self.model, PROBE, Sampling(most), labels, kwargs)

        def parse(answer: dict[str, Any]) -> _Probe:
            choice = _choices(answer, 1)[0]
            found = self._completion(choice, Group(b"", labels, {}), *_usage(answer))
            details = (answer.get("usage") or {}).get("completion_tokens_details") or {}
            split = split_thinking(found.text)
            hidden = _count(details.get("reasoning_tokens"))
            given = not labels or bool(token_entries(choice.get("logprobs")))
            return _Probe(found, bool(hidden or split.thinking or not split.finished), given)

        async def ask() -> _Probe:
            group = await self._group(request)
            messages = self._messages(request)
            return await self._parsed(
                b"%b%b}" % (group.head, messages), parse, group.max_bytes, None
            )

        try:
            return await self._adapted(request, ask)
        except Rejected as refusal:
            if refusal.status == 404:
                raise await wrong_model(
                    self.server, self.path, self.model, refusal.message
                ) from refusal
            self.tell(f"the probe was refused: HTTP {refusal.status} {refusal.message}")
            return None

    def _messages(self, request: Request) -> bytes:
        """The conversation as a JSON array, and after it the fields of its tools."""
        messages = request.messages
        body = message_bytes(messages if self.family.system_role else without_system(messages))
        if tools := tools_of(messages):
            fields: dict[str, Any] = {"tools": tools}
            if not self.family.tool_parser:
                self._tell_once(
                    "has no parser for tool calls: they are read as the model writes them"
                )
                fields["tool_choice"] = "none"
            body += b"," + orjson.dumps(fields)[1:-1]
        return body

    async def draw(self, key: bytes, request: Request, stops: Sequence[int]) -> Drawn:
        """The answer to one request as token ids (`return_token_ids`, which vLLM has), ended by any
        token of `stops`.

        Raises: TransportError; EngineError for a request that the server refuses.
        """
        self.in_flight += 1
        try:
            group, messages = await self._group(request), self._messages(request)
            more = orjson.dumps(
                {
                    "return_token_ids": True,
                    "logprobs": True,
                    "stop_token_ids": list(stops),
                    "seed": derived_seed(key),
                }
            )
            body = b"%b%b,%b" % (group.head, messages, more[1:])
            # the log-probabilities of all tokens, and the ids of the prompt's
            room = response_bytes(group.tokens, 1) + 16 * len(body)
            return await self._parsed(body, _drawn, room, group.pace)
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
            labels = await self._readable(request)
            body = {"model": self.model, **self._sampling(request), "n": 1, "stream": False}
            forms = bool(request.labels) and request.sampling.max_tokens > 1
            if labels and self.family.logprobs:
                body |= self.read.fields(labels)
                if "top_logprobs" in body:
                    most = self.family.top_logprobs or body["top_logprobs"]
                    if request.sampling.max_tokens > LONGEST_FORM and not self._probing:
                        most = min(most, TOPS_OF_TEXT)
                    body["top_logprobs"] = most
            if kwargs:
                body["chat_template_kwargs"] = dict(request.template_kwargs)
            for name in self.family.left_out:
                if name in body and droppable(name, body[name]):
                    del body[name]
            body |= self.extra
            head = orjson.dumps(body)[:-1] + b',"messages":'
            # another request of this kind may have come first while the labels were prepared
            thinks = self.family.thinks(dict(request.template_kwargs))
            opened = thinks and self.family.opens_thinking
            made = Group(head, labels, body, forms, opened, *_bounds(body))
            group = self._heads.setdefault(kind, made)
        return group

    async def _readable(self, request: Request) -> tuple[str, ...]:
        """The request's labels. In a text whose label no token of this model begins, they are not
        read: `hard`.

        Raises: EngineError for an unreadable label of a request that asks for a label alone.
        """
        of_text = request.sampling.max_tokens > 1
        try:
            if request.labels:
                await self.read.prepare(request.labels, opening=of_text)
        except TransportError:
            raise
        except EngineError as error:
            if not of_text:
                raise
            self._tell_once(f"labels of texts are hard, without a probability: {error}")
            return ()
        return request.labels

    def _sampling(self, request: Request) -> dict[str, Any]:
        """Every field: a server fills what is left out from the model's own generation_config.json.
        Fields that only vLLM and the like know are left out for others (`extended` False) where
        they have their neutral value. A model that thinks gets more tokens.
        """
        s, room = request.sampling, 0
        if self.family.thinks(dict(request.template_kwargs)):
            room = self.server.config.thinking_tokens
            room = min(room, self.max_model_len // 2) if self.max_model_len else room
        plain = {
            self.family.max_tokens_field: s.max_tokens + room,
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
        """The answer to one conversation. Raises: Rejected, TransportError, EngineError."""
        return await self._parsed(
            b"%b%b%b}" % (group.head, messages, seed),
            lambda answer: self._completion(_choices(answer, 1)[0], group, *_usage(answer)),
            group.max_bytes,
            group.pace,
        )

    async def _parsed(
        self,
        body: bytes,
        parse: Callable[[dict[str, Any]], T],
        max_bytes: int,
        pace: Pace | None,
    ) -> T:
        """What `parse` finds in the answer to `body`; asked up to three times while the answers are
        malformed. The last answer's text may end in half of a surrogate pair, and in nothing else.

        Raises: Rejected, TransportError, EngineError.
        """
        for tries_left in (2, 1, 0):
            try:
                found = parse(
                    await self.server.post(self.path, body, max_bytes=max_bytes, pace=pace)
                )
            except Malformed as error:
                problem = error
            else:
                halves = _half_letters(found.text) if isinstance(found, Completion) else 0
                if not halves or (halves == 1 and not tries_left):
                    return found
                problem = Malformed("the text holds half of a surrogate pair")
        raise TransportError(f"{self.server.url}{self.path}: {problem}")

    async def _refused(self, refusal: Rejected) -> Completion:
        """What a 4xx means: a completion that says why there is no answer, or an error.

        Raises: EngineError for a wrong model name; RequestRefused for any other refusal.
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
            raise await wrong_model(self.server, self.path, self.model, message)
        raise RequestRefused(f"{self.server.url}{self.path}: HTTP {refusal.status} {message}")

    def _completion(
        self, choice: Any, group: Group, prompt_tokens: int, new_tokens: int
    ) -> Completion:
        try:
            message = choice["message"]
            refusal = refusal_of(message)
            text = refusal if refusal else message_text(message)
            ended = choice.get("finish_reason") or "stop"
            finish: Finish | None = "refused" if refusal else _FINISH.get(ended.lower())
            if finish is None or not isinstance(text, str):
                raise Malformed(
                    f"finish_reason {choice.get('finish_reason')!r}, content {type(text).__name__}"
                )
            if group.opened and finish == "length" and split_thinking(text) == ("", text, True):
                text = join_thinking(text, "")  # it was cut off before the closing tag
            if not group.labels:
                unread: Exactness = "hard" if group.forms else "exact"
                return Completion(
                    text, finish, None, unread, prompt_tokens, new_tokens, 0, self.server.url
                )
            content = token_entries(choice.get("logprobs")) or [{}]
            self._log_probabilities(bool(content[0]), finish)
            if len(content) > group.tokens + MORE_TOKENS:
                raise Malformed(f"{len(content)} tokens, where {group.tokens} were asked for")
            logps, exactness = self._label_read(text, content, group)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise Malformed(f"not a chat completion ({type(error).__name__}: {error})") from error
        return Completion(
            text, finish, logps, exactness, prompt_tokens, new_tokens, 0, self.server.url
        )

    def _log_probabilities(self, given: bool, finish: Finish) -> None:
        """Raises: Malformed where an answer has no log-probabilities and others had."""
        if not given and self._gives_logprobs and finish != "refused":
            raise Malformed("no log-probabilities, which other answers of this server had")
        self._gives_logprobs = self._gives_logprobs or given

    def _label_read(self, text: str, content: list[Any], group: Group) -> LabelRead:
        """The labels at the first token; where the model thought before, or the label may stand in
        a form, at the token of the label that the answer names. Without log-probabilities, `hard`,
        where that token is not known.
        """
        if not self.family.logprobs:
            return None, "hard"
        split = split_thinking(text)
        first = not split.thinking and split.finished and not group.forms
        if first and self._begins(split.answer, content[0].get("token"), group.labels):
            return self.read.parse(content[0].get("top_logprobs"), group.labels)
        found, opens = label_of_answer(split.answer, group.labels)
        if found is not None and opens:
            return self._opening_read(found, split, content, group.labels)
        at = None if found is None else self._token_of(found, split.answer, content, group.labels)
        if found is None or at is None:
            return None, "hard"
        logps, exactness = self.read.parse(content[at].get("top_logprobs"), group.labels)
        best = max(logps or {}, key=lambda label: (logps or {})[label], default="")
        return (logps, exactness) if best.strip() == found.label else (None, "hard")

    def _opening_read(
        self,
        found: FoundLabel,
        split: ThinkingSplit,
        content: list[Any],
        labels: tuple[str, ...],
    ) -> LabelRead:
        """The labels at the first word of an answer that goes on after it. After thinking the token
        is known only where each label that the thinking names is one token.
        """
        places = [
            (i, spelling.strip())
            for i in range(len(content))
            if (spelling := self.read.label_of(content[i].get("token"), labels))
        ]
        before = 0
        if split.thinking:
            words = _named(split.thinking, labels)
            if len(places) != words + _named(split.answer, labels):
                return None, "hard"
            before = words
        elif places and places[0][0] > found.offset:
            return None, "hard"  # more tokens before it than letters
        if before >= len(places) or places[before][1] != found.label:
            return None, "hard"
        return self.read.parse(content[places[before][0]].get("top_logprobs"), labels)

    def _begins(self, answer: str, token: Any, labels: tuple[str, ...]) -> bool:
        """Whether the first token that the server lists is the answer's, where the answer is a
        label: some list the tokens of thinking that they keep to themselves.
        """
        if not isinstance(token, str) or not self.read.knows(token):
            return True  # the reading tells
        answer = answer.strip()
        own = token.strip() == answer or self.read.label_of(token, labels) is not None
        return own or all(answer != label.strip() for label in labels)

    def _token_of(
        self, found: FoundLabel, answer: str, content: list[Any], labels: tuple[str, ...]
    ) -> int | None:
        """The place of a label's token. Tokens may be named by their ids, so it is counted from the
        end: past the tokens of the labels that stand after it in the answer. None where there are
        more tokens after it than letters.
        """
        rest = answer[found.offset + len(found.label) :]
        later = _named(rest, labels)
        places = [
            i
            for i in range(len(content) - 1, -1, -1)
            if self.read.label_of(content[i].get("token"), labels) is not None
        ]
        if later >= len(places) or len(content) - 1 - places[later] > len(rest) + 3:
            return None
        return places[later]

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
            if len(reads) == 1:
                return await self._alone(group, *reads[0])
            answers = await self._batch_answers(group, [messages for messages, _ in reads])
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
            answer = await self.server.post(
                self.path + "/batch",
                body,
                final=frozenset({500, LIMITED}),
                max_bytes=group.max_bytes * len(conversations),
                pace=group.batch_pace,
            )
        except Rejected as refusal:
            if refusal.status in (404, 405, 501):
                # this server has no such endpoint (or no such model, which the single read will
                # tell)
                self.batch = 1
            if refusal.status == LIMITED:  # a batch may be larger than the limit
                self.batch = max(1, self.batch // 2)
            raise
        choices = _choices(answer, len(conversations))
        shares = _share(_usage(answer)[0], [len(c) for c in conversations])
        return [
            self._completion(c, group, tokens, 1) for c, tokens in zip(choices, shares, strict=True)
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


async def wrong_model(server: HttpClient, path: str, model: str, message: str = "") -> Denied:
    """What a 404 means: a model that the server does not have, with the names of those it has, or
    something about this question alone.
    """
    try:
        listed = await server.get(path.removesuffix("/chat/completions") + "/models")
        names = [str(m.get("id")) for m in listed["data"]]
    except (Rejected, EngineError, KeyError, TypeError, AttributeError):
        return Denied(
            404,
            f"{server.url}{path}: HTTP 404 {message}; is the address that of an OpenAI-compatible API?",
        )
    if model in names:
        return Denied(404, f"{server.url}{path}: HTTP 404 {message}")
    has = ", ".join(names[:20]) or "none"
    return Denied(404, f"{server.url} has no model {model!r}; it has: {has}", general=True)


def _half_letters(text: str) -> int:
    """What half of a surrogate pair does in a text. 0: there is none; 1: it ends the text, which a
    server cut there; 2: it stands elsewhere, so the text is damaged.
    """
    if text.isascii():
        return 0
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return 1 if error.start == len(text) - 1 else 2
    return 0


def _named(text: str, labels: tuple[str, ...]) -> int:
    """How many words of a text are labels."""
    names = "|".join(re.escape(name) for name in {label.strip() for label in labels})
    return len(re.findall(rf"(?<!\w)(?:{names})(?!\w)", text))


def _bounds(body: Mapping[str, Any]) -> tuple[int, int]:
    """The most tokens of an answer to `body`, and the most bytes that a response can need."""
    tokens = body.get("max_tokens", body.get("max_completion_tokens"))
    if type(tokens) is not int:
        return 1 << 30, MAX_BYTES
    tops = len(body.get("logprob_token_ids", ())) + int(body.get("top_logprobs", 0))
    return tokens, response_bytes(tokens, tops)


def response_bytes(tokens: int, tops: int) -> int:
    """The most bytes that a response of so many tokens, each with so many top tokens, can need."""
    return FRAME_BYTES + tokens * (TOKEN_BYTES + TOP_BYTES * (1 + tops))


def message_bytes(messages: tuple[Message, ...]) -> bytes:
    """The conversation as a JSON array."""
    if any(m.more for m in messages):
        return orjson.dumps(server_turns(messages))
    return orjson.dumps([{"role": m.role, "content": m.content} for m in messages])


def token_text(token: Any) -> Any:
    """A token's text, where the server names it as its vocabulary does: a space before it is `Ġ`
    (byte-level BPE) or `▁` (SentencePiece).
    """
    return f" {token[1:]}" if isinstance(token, str) and token[:1] in ("Ġ", "▁") else token


def token_entries(logprobs: Any) -> list[Any]:
    """The log-probabilities by token, `[{token, logprob, top_logprobs}, ...]`. Some servers give
    those of chats in the older form of completions: `tokens`, `token_logprobs` and `top_logprobs`
    side by side.
    """
    if not logprobs:
        return []
    if found := logprobs.get("content"):
        return list(found)
    tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return []
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [
                {"token": name, "logprob": logp}
                for name, logp in (top if top else {token: value}).items()
            ],
        }
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def log_probability(value: Any) -> float:
    """A number up to 0, or a little more where the server rounds. Minus infinity is one: the mass
    is 0.

    Raises: Malformed for anything else: null, NaN, text, truth values, integers beyond floats.
    """
    if type(value) is float or type(value) is int:
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
        if number <= LOG_SLACK:  # NaN is not
            return number
    raise Malformed(f"{str(value)[:40]!r} is no log-probability")


def check_masses(logps: Mapping[str, float]) -> None:
    """Raises: Malformed where these labels have more than the whole probability together."""
    if sum(map(math.exp, logps.values())) > 1.0 + LOG_SLACK:
        raise Malformed("the labels' probabilities are more than 1 together")


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
        numbers = [log_probability(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        if not all(type(i) is int for i in [*prompt, *ids]):
            raise TypeError("token ids that are no numbers")
    except (KeyError, TypeError) as error:
        raise Malformed(
            f"no token ids ({type(error).__name__}: {error}); vLLM 0.32 gives them"
        ) from error
    if not ids or len(ids) != len(numbers):
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
