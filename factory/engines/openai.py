"""Any OpenAI-compatible API. Labels are read among the top 20 tokens: `bounds` where one is
missing, `hard` where the API gives no log-probabilities. The API key comes from the environment
variable that the configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from prefab.factory.console import warn
from prefab.factory.engines.canary import Canary, Fingerprint, first_checks, other_model
from prefab.factory.engines.chat import Chat, TopRead, claim
from prefab.factory.engines.family import Family, MaxTokensField
from prefab.factory.engines.http import HttpClient, HttpConfig, api_key
from prefab.factory.engines.replicas import Replicas
from prefab.factory.errors import EngineError
from prefab.factory.keys import canonical, model_identity
from prefab.factory.spec.control_tokens import KNOWN_SPECIALS
from prefab.factory.types import Completion, Engine, Request, ServerReport


class OpenAIConfig(HttpConfig):
    """`base_url` ends where `/chat/completions` begins (mostly in `/v1`). `revision` is yours:
    change it when the provider changed the model behind the name, and everything is asked again.
    `extended` sends vLLM's own sampling fields (top_k, min_p, repetition_penalty) also when they
    say nothing. After `canary_every` answers (0: never) and after each outage, the server is
    checked to be serving the same model still, where it gives log-probabilities.
    """

    engine: Literal["openai"] = "openai"
    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    revision: str = ""
    top_logprobs: int = Field(
        20, ge=0, le=20
    )  # OpenAI and vLLM answer 400 above 20; 0 asks for none
    batch: int = Field(1, ge=1, le=256)
    extended: bool = False
    max_tokens_field: MaxTokensField = "max_tokens"
    max_model_len: int | None = None
    canary_every: int = Field(2000, ge=0)
    extra_body: dict[str, Any] = {}


def api_identity(model: str, revision: str, extra_body: Mapping[str, Any]) -> str:
    """Which model an API serves. The engine `batch` has the same, so that both share answers."""
    extra = canonical(extra_body).decode() if extra_body else ""
    return model_identity(model, revision=revision + extra)


class OpenAI(Engine):
    """An engine behind an OpenAI-compatible API."""

    Config = OpenAIConfig

    def __init__(self, config: OpenAIConfig, name: str = "openai") -> None:
        self.config, self.name, self.max_in_flight = config, name, config.max_in_flight
        self.identity = api_identity(config.model, config.revision, config.extra_body)
        self.special_tokens, self.max_model_len = KNOWN_SPECIALS, config.max_model_len
        server = HttpClient(config.base_url, config, config.api_key_env)
        self._chat = Chat(
            server,
            "/chat/completions",
            config.model,
            TopRead(config.top_logprobs),
            batch=config.batch,
            extended=config.extended,
            family=Family(
                max_tokens_field=config.max_tokens_field, logprobs=config.top_logprobs > 0
            ),
            extra=config.extra_body,
        )
        server.tell = self._tell
        self._replicas = Replicas([server], config, self._tell)
        self._chat.tell = lambda line: self._tell(f"{config.model} {line}")
        self._chat.canary = Canary(
            self._fingerprint,
            config.canary_every,
            lambda: server.health.comebacks,
            self._other_model,
            twice=True,
        )
        self._said: set[str] = set()
        self._muted = False

    async def _fingerprint(self) -> Fingerprint:
        """What the server shows of its model. Raises: TransportError, EngineError."""
        return Fingerprint(logps=await self._chat.canary_logps())

    def _other_model(self, wrong: str, since: float) -> str:
        """Set aside what the server answered as another model, and give the words for it."""
        url = self._chat.server.url
        return other_model(self.name, url, wrong, since, self.quarantine(url, since))

    def mute(self) -> None:
        """Print no notices."""
        self._muted = True

    def _tell(self, line: str) -> None:
        if not self._muted and line not in self._said:
            self._said.add(line)
            warn(f"engines.{self.name}: {line}")

    @property
    def servers(self) -> Sequence[ServerReport]:
        """What the server did."""
        return [r.report() for r in self._replicas.all]

    async def probe(self) -> Mapping[str, Any]:
        """What the model does otherwise than most. Raises: TransportError, EngineError."""
        if not self.findings:
            family = await self._chat.probe()
            if self._chat.canary is not None:
                if self.known_fingerprint:
                    self._chat.canary.noise = float(self.known_fingerprint["noise"])
                checks = {self._chat.server.url: self._chat.canary}
                self.fingerprint = await first_checks(self.name, checks, self.known_fingerprint)
            self.findings = family.data()
        return self.findings

    async def verify(self) -> None:
        """Check the server a last time. Raises: EngineError."""
        if self._chat.canary is not None:
            await self._chat.canary.finish()

    async def start(self) -> None:
        """Check what can be checked without a paid call.

        Raises: EngineError when the key's variable is not set, or the label reads would corrupt
        another engine's.
        """
        key = self.config.api_key_env
        url = self.config.base_url
        local = any(host in url for host in ("://127.", "://localhost", "://[::1]"))
        if key and not api_key(key) and not local:
            raise EngineError(
                f"engines.{self.name}: set environment variable {key} to the key of {url}"
            )
        claim(url, "top")

    async def complete(self, key: bytes, request: Request) -> Completion:
        """Answer one request. Raises: TransportError, EngineError."""
        return await self._replicas.ask(
            request.messages, lambda at: self._chat.complete(key, request)
        )

    async def stop(self) -> None:
        """Close the pool."""
        await self._chat.stop()
