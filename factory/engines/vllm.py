"""vLLM: starts, watches and stops its own server, uses one that `prefab serve --keep` left running,
or talks to others (`url`, or replicas in `urls`).

Labels are read by token id (`logprob_token_ids`), so each label's probability is exact however
unlikely it is.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import orjson
from pydantic import Field, model_validator

from prefab.factory.console import warn
from prefab.factory.engines import canary, kept_server
from prefab.factory.engines.base import folder_specials, max_length, resolve_model
from prefab.factory.engines.canary import Canary, Fingerprint, difference, first_checks, other_model
from prefab.factory.engines.chat import (
    Chat,
    Drawn,
    LabelRead,
    check_masses,
    claim,
    log_add,
    log_probability,
    wrong_model,
)
from prefab.factory.engines.deadly_questions import DeadlyQuestions
from prefab.factory.engines.family import SYSTEM_PROBE, Family
from prefab.factory.engines.http import HttpClient, HttpConfig, Rejected, ServerDown, api_key
from prefab.factory.engines.replicas import Replicas
from prefab.factory.engines.vllm_process import VllmProcess, default_dtype, free_port
from prefab.factory.errors import EngineError, TransportError
from prefab.factory.keys import model_identity
from prefab.factory.numbers import counted
from prefab.factory.redaction import redact_bytes
from prefab.factory.spec.control_tokens import KNOWN_SPECIALS, SpecialTokens
from prefab.factory.tool_calls import message_turn
from prefab.factory.types import Completion, Engine, Message, Request, ServerReport

T = TypeVar("T")
MAX_LABEL_IDS = 128  # vLLM 0.32 answers 400 above
MISSING_S = 15.0  # between two tries of a server that did not answer at the start
# of our own server, when it dies: so many, as many again for each question of which it died, and
# one more for so many answers
MOST_RESTARTS, ANSWERS_PER_RESTART = 3, 10_000


class VllmConfig(HttpConfig):
    """Names a model to serve, or the `url` of a server. `dtype` auto is float32 on a CPU (without
    avx512_bf16, bf16 matmul is 100 times slower there) and the model's own on a GPU; of a server
    that runs it says what you started it with, and is part of the model's identity. `batch` label
    reads share a POST. After `canary_every` answers (0: never), and after each outage, a server is
    checked to be serving the same model still. `args` go to vLLM as they are.
    """

    engine: Literal["vllm"] = "vllm"
    model: str | None = None
    url: str | None = None
    urls: list[str] = []
    revision: str = ""
    adapter: str = ""
    dtype: str = "auto"
    quantization: str = ""
    batch: int = Field(32, ge=1, le=256)
    canary_every: int = Field(2000, ge=0)
    api_key_env: str | None = None
    max_model_len: int | None = Field(None, ge=1)
    kv_cache_gib: float = Field(
        1.0, gt=0, allow_inf_nan=False
    )  # CPU only; 1 GiB holds 200,000 tokens of a 5M model
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    tensor_parallel: int = Field(1, ge=1)
    threads: str | None = (
        None  # VLLM_CPU_OMP_THREADS_BIND, e.g. "0-1"; left out: one core is left to the rest
    )
    port: int | None = None
    start_timeout_s: float = Field(1200.0, gt=0)
    log_file: Path | None = None
    args: list[str] = []
    env: dict[str, str] = {}

    @model_validator(mode="after")
    def _somewhere(self) -> VllmConfig:
        if self.url and self.urls:
            raise ValueError("give `url` or `urls`, not both")
        if not (self.model or self.url or self.urls):
            raise ValueError("name a `model` to serve, or the `url` of a server that runs")
        return self


class IdRead:
    """Reads labels by their token ids. One spelling can have several ids, one id only ever counts
    once.
    """

    def __init__(self, tokenize: Callable[[str], Any]) -> None:
        self._tokenize = tokenize
        self._owner: dict[tuple[str, ...], dict[str, str]] = {}
        self._lock = asyncio.Lock()

    async def prepare(self, labels: tuple[str, ...], opening: bool = False) -> None:
        """Find the ids of `labels`, once. With `opening`, a spelling of several tokens is read by
        its first one, where no other label begins with it.

        Raises: EngineError when a label is a single token in none of its spellings, or there are
        too many.
        """
        async with self._lock:
            if labels in self._owner:
                return
            owner: dict[str, str] = {}
            found = await asyncio.gather(*map(self._ids, labels))
            ids_of = {spelling: ids for spelling, (ids, _) in zip(labels, found, strict=True)}
            if opening:
                starts = dict(zip(labels, (starts for _, starts in found), strict=True))
                ids_of = {name: ids or _own(name, starts, ids_of) for name, ids in ids_of.items()}
            for spelling, ids in ids_of.items():
                for token_id in ids:
                    owner.setdefault(f"token_id:{token_id}", spelling)
            readable = {spelling.strip() for spelling, ids in ids_of.items() if ids}
            lost = sorted({s.strip() for s in labels} - readable)
            if lost:
                raise EngineError(
                    f"label {lost[0]!r} is more than one token for this model: choose labels that are "
                    "one (letters, or digits from 1 to 9)"
                )
            if len(owner) > MAX_LABEL_IDS:
                raise EngineError(
                    f"{len(labels)} labels are {len(owner)} tokens; vLLM reads at most {MAX_LABEL_IDS}"
                )
            self._owner[labels] = owner

    async def _ids(self, spelling: str) -> tuple[list[int], list[int]]:
        """Its token by itself and after a line break, where it is one token: sentencepiece models
        put a space before a text's first word. And the tokens that it begins with.
        """
        alone, line_break, after = await asyncio.gather(
            *map(self._tokenize, (spelling, "\n", "\n" + spelling))
        )
        found = alone if len(alone) == 1 else []
        rest = after[len(line_break) :] if after[: len(line_break)] == line_break else []
        if len(rest) == 1 and rest[0] not in found:
            found = [*found, rest[0]]
        return found, [*dict.fromkeys([*alone[:1], *rest[:1]])]

    def fields(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """The label read, with tokens answered as ids: two tokens can have one text."""
        ids = [int(token.partition(":")[2]) for token in self._owner[labels]]
        return {"logprobs": True, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}

    def parse(self, entries: Any, labels: tuple[str, ...]) -> LabelRead:
        """Log-probabilities by spelling. A label with an id that is missing is left out whole: its
        other spellings alone would make it smaller than it is, and another one the winner.

        Raises: Malformed where a label's number is no log-probability.
        """
        owner, unread = self._owner[labels], dict(self._owner[labels])
        found: dict[str, float] = {}
        for entry in entries or ():
            token = entry.get("token")
            spelling = owner.get(token)
            if spelling is not None and unread.pop(token, None) is not None:
                logp = log_probability(entry.get("logprob"))
                found[spelling] = log_add(found[spelling], logp) if spelling in found else logp
        check_masses(found)
        lost = {spelling.strip() for spelling in unread.values()}
        return {
            spelling: logp for spelling, logp in found.items() if spelling.strip() not in lost
        }, "exact"

    def label_of(self, token: Any, labels: tuple[str, ...]) -> str | None:
        """As `Read.label_of`."""
        return self._owner[labels].get(token)

    def knows(self, token: str) -> bool:
        """As `Read.knows`: by its id."""
        return token.startswith("token_id:")


class NoServer(EngineError):
    """Nothing answers at a server's address."""


def _own(
    spelling: str, starts: Mapping[str, Sequence[int]], whole: Mapping[str, Sequence[int]]
) -> list[int]:
    """The tokens that this spelling begins with, and no spelling of another label."""
    others = [name for name in starts if name.strip() != spelling.strip()]
    taken = {token for name in others for token in (*starts[name], *whole[name])}
    return [token for token in starts[spelling] if token not in taken]


class VLLM(Engine):
    """The engine. `progress` gets a line every few seconds while a server
    loads.
    """

    Config = VllmConfig

    def __init__(
        self, config: VllmConfig, name: str = "vllm", progress: Callable[[str], None] | None = None
    ) -> None:
        self.config, self.name, self.max_in_flight, self.progress = (
            config,
            name,
            config.max_in_flight,
            progress,
        )
        self.path = resolve_model(config.model) if config.model else None
        self.special_tokens: tuple[str, ...] = ()
        self.max_model_len = config.max_model_len
        if self.path and Path(self.path).is_dir():
            self.special_tokens = folder_specials(Path(self.path))
            self.max_model_len = config.max_model_len or max_length(Path(self.path))
        self._urls = [
            u.rstrip("/").removesuffix("/v1")
            for u in config.urls or ([config.url] if config.url else [])
        ]
        self.owns_server = not self._urls
        self.process: VllmProcess | None = None
        self.kept: kept_server.KeptServer | None = None
        self._chats: list[Chat] = []
        self._said: set[str] = set()
        self._replicas: Replicas | None = None
        self._missing: dict[str, str] = {}  # servers that are not asked, and why
        self._restarts, self._not_started = 0, ""
        self._deadly: DeadlyQuestions | None = None  # of our own server
        self._tasks: set[asyncio.Task[None]] = set()  # that wait for a server

    @cached_property
    def identity(self) -> str:  # type: ignore[override]  # learned when first needed
        """Which model this is: a folder's digest where there is a folder, else its declared name
        and revision.

        Raises: EngineError when only a server knows and it does not answer.
        """
        place = self.path
        if not self.owns_server and not (place and Path(place).is_dir()):
            place = self._served_place()
        return model_identity(place or "", self._dtype(), self.config.revision, self.config.adapter)

    def mute(self) -> None:
        """Print no progress while the server starts."""
        self.progress = lambda line: None

    def _dtype(self) -> str:
        dtype = default_dtype() if self.config.dtype == "auto" else self.config.dtype
        return f"{dtype} {self.config.quantization}".strip()

    def _served_place(self) -> str:
        """The folder that a server on this machine says it serves, else the model's name; of the
        first server that answers. Raises: EngineError when none does.
        """
        problem: EngineError | None = None
        for url in self._urls:
            try:
                listed = _get(url + "/v1/models", self.config.api_key_env)
            except EngineError as error:
                problem = problem or error
                continue
            entry = self._entry(url, listed)
            return _folder_here(url, entry) or self.config.model or str(entry["id"])
        raise problem or EngineError(f"engines.{self.name} has no server")

    def _entry(self, url: str, listed: Mapping[str, Any]) -> Mapping[str, Any]:
        entries: list[Mapping[str, Any]] = listed.get("data") or []
        wanted = (self.config.model, self.path)
        entry = next((e for e in entries if e.get("id") in wanted or e.get("root") in wanted), None)
        if entry is None and (self.config.model is None and len(entries) == 1):
            entry = entries[0]
        if entry is None:
            has = ", ".join(str(e.get("id")) for e in entries) or "none"
            raise EngineError(
                f"engines.{self.name}: {url} has no model {self.config.model!r}; it has: {has}"
            )
        return entry

    async def start(self) -> None:
        """Start the server, or greet those that run; then learn the context length and the control
        tokens.

        Raises: EngineError with the reason from the server's log, or the names of the models it
        has.
        """
        if self._chats:
            return
        try:
            if self.owns_server:
                await self._start_server()
            missing = await self._greet_all()
            self._replicas = Replicas([c.server for c in self._chats], self.config, self._tell)
            for url in missing:
                self._in_background(self._await_missing(url))
            if not self.special_tokens:
                self.special_tokens = await self._probe_specials()
        except BaseException:
            await self.stop()
            raise

    async def _start_server(self) -> None:
        """Use the server that is kept for this model and these settings, else start one."""
        if self.config.port is None and self.config.log_file is None:
            self.kept = kept_server.find(self.identity, self.config)
        if self.kept is not None:
            self._tell(f"uses the kept server at {self.kept.url}")
            self._urls = [self.kept.url]
            return
        if other := kept_server.why_not_used(self.config.model, self.identity, self.config):
            self._tell(other)
        port = self.config.port or free_port()
        self.process = VllmProcess(
            self.config, str(self.path), port, self.name, self.progress, self.log_folder
        )
        await self.process.start()
        self._urls = [f"http://127.0.0.1:{port}"]
        self._deadly = DeadlyQuestions(self._confirm, self._tell)

    async def _greet_all(self) -> list[str]:
        """Greet all servers at once; the addresses of those that do not answer, where others do.

        Raises: EngineError when none answers, or one has no such model.
        """
        for patient in (len(self._urls) == 1, True):
            greeted = await asyncio.gather(
                *(self._greet(url, patient) for url in self._urls), return_exceptions=True
            )
            if patient or not all(isinstance(outcome, NoServer) for outcome in greeted):
                break
        self._chats = [chat for chat in greeted if isinstance(chat, Chat)]
        for outcome in greeted:
            if isinstance(outcome, BaseException) and not (
                self._chats and isinstance(outcome, NoServer)
            ):
                raise outcome
        pairs = zip(self._urls, greeted, strict=True)
        return [url for url, outcome in pairs if isinstance(outcome, NoServer)]

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _await_missing(self, url: str) -> None:
        """Ask a server that did not answer at the start as well, once it does, if it serves the
        same model as the others.
        """
        self._tell(f"{url} does not answer; the others go on, and it is tried again")
        self._missing[url] = "did not answer"
        while True:
            await asyncio.sleep(MISSING_S)
            chat = None
            try:
                chat = await self._greet(url, patient=False)
                wrong = await self._unlike_others(chat)
            except (NoServer, TransportError):
                wrong = None
            except EngineError as error:
                wrong = str(error)
            if chat is None or wrong is None or wrong:
                if chat is not None:
                    await chat.stop()
                if wrong is None:
                    continue
                self._missing[url] = wrong
                return self._tell(f"{url} is not asked: {wrong}")
            del self._missing[url]
            self._chats.append(chat)
            if self._replicas is not None:
                self._replicas.add(chat.server)
            return self._tell(f"{url} answers now and gets questions as the others do")

    async def _unlike_others(self, chat: Chat) -> str:
        """In what a server's model differs from the others'; "" where it does not.

        Raises: TransportError when that cannot be found out now; EngineError.
        """
        other = self._chats[0]
        chat.family = other.family
        if chat.canary is None or other.canary is None or not chat.canary.every:
            return ""
        await chat.canary.check()
        known = other.canary.first or await self._fingerprint(other)
        wrong = difference(known, chat.canary.first or known)
        return f"it serves another model than the others: {wrong}" if wrong else ""

    def _why_dead(self) -> str | None:
        """Why our server died for good; None while it runs, or is started again. One that died
        while it served is started again, `_most_restarts` times at most.
        """
        died = self._not_started or (self.process.why_dead() if self.process else None)
        if died is None or self._tasks:
            return None
        if self._restarts >= self._most_restarts():
            return f"{died}\nit was started again {counted(self._restarts, 'time')}, and ended each time"
        self._restarts += 1
        if self._deadly is not None and not self._not_started:
            self._deadly.died(died)
        self._in_background(self._restart(died))
        return None

    def _most_restarts(self) -> int:
        answers = self._replicas.all[0].calls if self._replicas else 0
        found = self._deadly.found + self._deadly.searching if self._deadly else 0
        return MOST_RESTARTS * (1 + found) + answers // ANSWERS_PER_RESTART

    async def _confirm(self) -> None:
        """Ask our server a small question. Raises: ServerDown where it does not answer."""
        server = self._chats[0].server
        server.health.admit(server.url)
        if await server.reachable():
            return server.health.succeeded()
        server.health.failed("it does not answer a small question")
        server.health.fall()
        raise ServerDown(server.health.words(server.url))

    async def _restart(self, died: str) -> None:
        """Start our server again, at the same port with the same key; its questions wait."""
        before, health = self.process, self._chats[0].server.health
        if before is None:
            return
        number = f"{self._restarts} of {self._most_restarts()}"
        self._tell(
            f"{died.splitlines()[0]}; it is started again ({number}); its log: {before.log_file}"
        )
        health.answered = True  # it is waited for
        self._chats[0].server.starts += 1
        if not health.down:
            health.failed("it died")
            health.fall()
        await before.stop()
        self.process = VllmProcess(
            self.config, str(self.path), before.port, self.name, self.progress, self.log_folder
        )
        self.process.key = before.key
        self.process.log_file = before.first_log.with_suffix(f".{self._restarts}.log")
        self.process.first_log = before.first_log
        try:
            await self.process.start()
        except EngineError as error:
            await self.process.stop()
            self._not_started = str(error)
            return
        self._not_started, health.retry_at = "", 0.0

    async def _greet(self, url: str, patient: bool) -> Chat:
        """The client of one server. `patient`: a server that does not answer is asked again.

        Raises: NoServer when it does not answer; EngineError when it has no such model.
        """
        claim(url, "ids")
        local = self.process or self.kept
        server = HttpClient(url, self.config, self.config.api_key_env, local.key if local else "")
        server.health_path, server.alone = "/health", patient
        try:
            listed = await server.get("/v1/models")
        except (Rejected, TransportError) as error:
            await server.close()
            raise NoServer(f"engines.{self.name}: no vLLM server at {url}: {error}") from error
        if local is not None:
            server.why_down = self._why_dead if self.process else local.why_dead
        try:
            entry = self._entry(url, listed)
        except EngineError:
            await server.close()
            raise
        model = "adapter" if self.config.adapter and self.owns_server else str(entry["id"])
        chat = Chat(
            server,
            "/v1/chat/completions",
            model,
            IdRead(lambda text: self._tokens(chat, text)),
            batch=self.config.batch,
            family=Family(tool_parser=any("tool-call-parser" in arg for arg in self.config.args)),
        )
        chat.max_model_len = int(entry.get("max_model_len") or 0)
        server.tell = self._tell
        chat.tell = lambda line: self._tell(f"{model} {line}")
        self.max_model_len = min(
            filter(None, (self.max_model_len, chat.max_model_len)), default=None
        )
        folder = _folder_here(url, entry)
        if self.path is None and not self.special_tokens and folder:
            self.special_tokens = folder_specials(Path(folder))
        chat.canary = Canary(
            lambda: self._fingerprint(chat),
            self.config.canary_every,
            lambda: server.health.comebacks,
            lambda wrong, since: self._other_model(url, wrong, since),
        )
        return chat

    async def _fingerprint(self, chat: Chat) -> Fingerprint:
        """What a server shows of its model. Raises: TransportError, EngineError."""
        try:
            entry = self._entry(chat.server.url, await chat.server.get("/v1/models"))
        except Rejected as error:
            raise TransportError(f"{chat.server.url}/v1/models: {error}") from error
        served = {name: entry.get(name) for name in ("id", "root", "max_model_len")}
        tokens, logps = await asyncio.gather(self._tokens(chat, canary.TEXT), chat.canary_logps())
        return Fingerprint(served, tuple(tokens), logps)

    def _other_model(self, url: str, wrong: str, since: float) -> str:
        """Set aside what a server answered as another model, and give the words for it."""
        return other_model(self.name, url, wrong, since, self.quarantine(url, since))

    def _tell(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            (self.progress or warn)(f"engines.{self.name}: {line}")

    @property
    def servers(self) -> Sequence[ServerReport]:
        """What each server did since the start."""
        asked = [r.report() for r in self._replicas.all] if self._replicas else []
        return [*asked, *(ServerReport(url, 0, 0, 0, why) for url, why in self._missing.items())]

    async def probe(self) -> Mapping[str, Any]:
        """What the model does otherwise than most, asked of one replica and taken over by all.

        Raises: TransportError, EngineError.
        """
        if not self.findings:
            chat = self._chats[0]
            family = await chat.probe()
            if family.system_role and await self._drops_system(chat):
                chat.adopt(replace(family, system_role=False))
            family = chat.family
            for other in self._chats[1:]:
                other.family = family
            checks = {c.server.url: c.canary for c in self._chats if c.canary is not None}
            self.fingerprint = await first_checks(self.name, checks, self.known_fingerprint)
            self.findings = family.data()
        return self.findings

    async def _drops_system(self, chat: Chat) -> bool:
        """Whether the chat template leaves a system turn out without a word: the tokens with it are
        those without it. False where the server does not tell.
        """
        system, user = SYSTEM_PROBE
        longer = replace(user, content=f"{user.content}, {system.content}")
        talks = ((user,), (system, user), (longer,))

        async def tokens(messages: Sequence[Message]) -> list[int]:
            turns = [message_turn(message) for message in messages]
            body = orjson.dumps({"model": chat.model, "messages": turns})
            answer = await chat.server.post("/tokenize", body, final=frozenset({500}))
            return list(answer["tokens"])

        try:
            plain, with_system, other = [await tokens(messages) for messages in talks]
        except (Rejected, EngineError, KeyError, TypeError):
            return False
        return with_system == plain != other

    async def verify(self) -> None:
        """Check each server a last time. Raises: EngineError."""
        checks = [chat.canary for chat in self._chats if chat.canary is not None]
        await asyncio.gather(*(check.finish() for check in checks))

    async def complete(self, key: bytes, request: Request) -> Completion:
        """Answer one request; when its replica is down, another one does. Raises: TransportError,
        EngineError.
        """
        return await self._from_any(request, lambda chat: chat.complete(key, request))

    async def draw(self, key: bytes, request: Request, stops: Sequence[int]) -> Drawn:
        """An answer as the token ids drawn (see `Chat.draw`). Raises: TransportError,
        EngineError.
        """
        return await self._from_any(request, lambda chat: chat.draw(key, request, stops))

    async def _from_any(self, request: Request, ask: Callable[[Chat], Awaitable[T]]) -> T:
        replicas, deadly = self._replicas, self._deadly
        if replicas is None:
            raise EngineError(f"engines.{self.name} was not started")
        kind = (bool(request.labels), request.sampling.max_tokens)
        if deadly is None:
            return await replicas.ask(request.messages, lambda at: ask(self._chats[at]), kind)
        with deadly.question() as one:
            return await replicas.ask(
                request.messages, lambda at: deadly.ask(one, lambda: ask(self._chats[at])), kind
            )

    async def _tokens(self, chat: Chat, text: str) -> list[int]:
        """The token ids of a text, no special tokens added."""
        body = {"model": chat.model, "prompt": text, "add_special_tokens": False}
        try:
            return list((await chat.server.post("/tokenize", orjson.dumps(body)))["tokens"])
        except Rejected as error:
            if error.status == 404:
                raise await wrong_model(
                    chat.server, chat.path, chat.model, error.message
                ) from error
            raise EngineError(
                f"{chat.server.url}/tokenize: HTTP {error.status} {error.message}"
            ) from error

    async def _probe_specials(self) -> tuple[str, ...]:
        """Which of the known families' control tokens this server's tokenizer has as one token."""
        ids = await asyncio.gather(
            *(self._tokens(self._chats[0], spelling) for spelling in KNOWN_SPECIALS)
        )
        pairs = zip(KNOWN_SPECIALS, ids, strict=True)
        return SpecialTokens(token for token, found in pairs if len(found) == 1)

    async def check_specials(self) -> list[str]:
        """The control tokens that a neutralised text would still contain, asked of the served
        tokenizer: none.

        A chat server tokenises users' text with control tokens live; `neutralise` is what
        stands between.
        """
        from prefab.factory.spec.control_tokens import neutralise

        chat = self._chats[0]
        control = [await self._tokens(chat, spelling) for spelling in self.special_tokens]
        ids = {found[0] for found in control if len(found) == 1}
        leaks = []
        for spelling in self.special_tokens:
            text = neutralise(f"x {spelling}y{spelling}\n{spelling}", self.special_tokens)
            if ids & set(await self._tokens(chat, text)):
                leaks.append(spelling)
        return leaks

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """Find the labels' token ids before anything is asked. Raises: EngineError for a label of
        several tokens.
        """
        for chat in self._chats:
            await chat.read.prepare(labels)

    async def stop(self) -> None:
        """Close the pools and end the server if it is ours. Safe to call twice."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        chats, self._chats = self._chats, []
        for chat in chats:
            await chat.stop()
        process, self.process, self.kept, self._deadly = self.process, None, None, None
        if self.owns_server:
            self._urls = []
        if process is not None:
            await process.stop()


def _folder_here(url: str, entry: Mapping[str, Any]) -> str:
    """The folder that a server says it serves, where the server is on this machine; else "".

    What another machine calls a folder is a name: that folder here may hold another model.
    """
    host, root = urlsplit(url).hostname or "", str(entry.get("root") or "")
    here = host in ("localhost", "::1") or host.startswith("127.")
    return root if here and root and Path(root).is_dir() else ""


def _get(url: str, api_key_env: str | None) -> Mapping[str, Any]:
    key = api_key(api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return dict(json.loads(redact_bytes(answer.read())))
    except (OSError, ValueError) as error:
        raise EngineError(f"no vLLM server at {url}: {error}") from error
