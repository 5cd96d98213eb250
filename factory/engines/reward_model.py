"""Reward models as engines: a sequence-classification model with a single label answers a
conversation with one number, written as text.

`RewardModelHf` runs transformers in this process; `RewardModelVllm` uses vLLM's pooling runner. The
conversation goes through the model's own chat template once, without a generation prompt, as TRL
trains reward models.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefab.factory.console import warn
from prefab.factory.engines.base import folder_specials, max_length, resolve_model
from prefab.factory.engines.hf import HF, HfConfig
from prefab.factory.engines.http import HttpClient, Rejected
from prefab.factory.engines.model_files import (
    ask_hub,
    check_model_folder,
    loading_options,
    refuse_words,
)
from prefab.factory.engines.replicas import Replicas
from prefab.factory.engines.vllm import VLLM, VllmConfig
from prefab.factory.engines.vllm_process import VllmProcess, free_port
from prefab.factory.errors import ConfigError, EngineError, NotInstalledError, TransportError
from prefab.factory.extras import missing_package
from prefab.factory.tool_calls import message_turn, tools_of
from prefab.factory.types import Completion, Engine, Request


class RewardEngineConfig(BaseModel):
    """`model` is a folder or a hub name; `url` a vLLM pooling server that runs.

    `dtype` auto is float32 on a CPU and the model's own on a GPU. `args` go to vLLM as they are.
    `api_key_env` names the environment variable with the key of the server at `url`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    backend: Literal["transformers", "vllm"] = "transformers"
    url: str | None = None
    api_key_env: str | None = None
    revision: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    batch: int = Field(16, ge=1)
    max_in_flight: int = Field(64, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    start_timeout_s: float = Field(1200.0, gt=0)
    kv_cache_gib: float = Field(1.0, gt=0, allow_inf_nan=False)
    args: list[str] = []

    @model_validator(mode="after")
    def _url_is_a_server(self) -> RewardEngineConfig:
        if self.url is not None and self.backend != "vllm":
            raise ValueError("`url` names a vLLM server: set backend: vllm")
        return self


def reward_engine(config: RewardEngineConfig) -> RewardModelHf | RewardModelVllm:
    """The engine for this configuration, not yet started."""
    return RewardModelVllm(config) if config.backend == "vllm" else RewardModelHf(config)


def reward_identity(config: RewardEngineConfig) -> str:
    """The model's identity: that of its folder (as an engine's of the same folder), whichever
    backend it has.
    """
    return _identity(config.model, config.backend, config.dtype, config.device, config.revision)


@lru_cache(maxsize=64)
def _identity(name: str, backend: str, dtype: str, device: str, revision: str) -> str:
    if backend == "vllm":
        return VLLM(VllmConfig(model=name, dtype=dtype, revision=revision)).identity
    return _hf_engine(name, dtype, device, revision).identity


def _hf_engine(name: str, dtype: str, device: str, revision: str) -> HF:
    """The engine for the same folder: it knows identity, device and dtype before anything is
    loaded.
    """
    settings = {"model": name, "dtype": dtype, "device": device, "revision": revision}
    return HF(HfConfig.model_validate(settings))


@lru_cache(maxsize=64)
def reward_specials(name: str) -> tuple[str, ...]:
    """The control tokens of the model `name`'s tokenizer; none for a model that is no folder."""
    folder = Path(resolve_model(name))
    return folder_specials(folder) if folder.is_dir() else ()


def folder_problem(folder: Path) -> str | None:
    """Why this folder cannot be served as a reward model, from its files alone; None when nothing
    is wrong.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no config.json that can be read ({error})"
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return (
            f"its architecture is {', '.join(kinds) or 'not said'}: a reward model is a ...ForSequenceClassification "
            "(anything else would get an untrained head)"
        )
    labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    if labels != 1:
        return f"it has {labels} labels; a reward model has one (num_labels=1 when it is trained)"
    if _pad_id(config) is None:
        return "it has no pad token: set pad_token_id in its config.json (and pad_token of its tokenizer)"
    return (
        None
        if _has_template(folder)
        else "its tokenizer has no chat template: save the one it was trained with"
    )


def _pad_id(config: dict[str, Any]) -> int | None:
    found = config.get("pad_token_id")
    return found if found is not None else (config.get("text_config") or {}).get("pad_token_id")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    try:
        return bool(
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get(
                "chat_template"
            )
        )
    except (OSError, ValueError):
        return False


class _Job(NamedTuple):
    ids: list[int]
    future: asyncio.Future[Completion]


class RewardModelHf(Engine):
    """The engine in this process. Answers that wait are scored together, alike
    in length.

    Padding is on the right and masked; a reward does not depend on its batch beyond the rounding of
    matrix products.
    """

    def __init__(self, config: RewardEngineConfig) -> None:
        self.config, self.max_in_flight = config, config.max_in_flight
        self.base = _hf_engine(config.model, config.dtype, config.device, config.revision)
        self.identity, self.special_tokens = self.base.identity, self.base.special_tokens
        self.max_model_len = config.max_model_len
        self.model: Any = None
        self.tokenizer: Any = None
        self._waiting: list[_Job] = []
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model.

        Raises: EngineError when there is none, or it is no reward model; says why.
        """
        if self.model is None:
            await asyncio.to_thread(self._load)

    def _load(self) -> None:
        path, name = self.base.path, self.config.name
        problem = folder_problem(Path(path)) if Path(path).is_dir() else None
        if problem:
            raise EngineError(f"{name}: {path}: {problem}")
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise NotInstalledError(
                str(missing_package(error.name, f"{name} (a reward model)"))
            ) from error
        revision = {"revision": self.config.revision} if self.config.revision else {}
        try:
            check_model_folder(Path(path), self.base.config.model)
            ask_hub(path, self.config.revision)
            options = loading_options(self.base.config.model)
            self.tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=options["trust_remote_code"], **revision
            )
            model, told = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=self.base.dtype, output_loading_info=True, **options, **revision
            )
        except ConfigError as error:
            raise EngineError(f"{name}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"{name}: {refuse_words(path, error)}") from error
        missing = sorted(told["missing_keys"])
        if missing:
            raise EngineError(f"{name}: {path} lacks weights ({missing[0]}): they would be random")
        if (
            model.config.num_labels != 1
            or model.config.get_text_config().pad_token_id is None
            or not self.tokenizer.chat_template
        ):
            raise EngineError(f"{name}: {path} needs one label, a pad token and a chat template")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = min(filter(None, (self.config.max_model_len, longest)), default=None)
        self.model = model.to(self.base.device).eval()

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The reward as a number in text. Raises: EngineError when not started, or scoring
        failed.
        """
        if self.model is None:
            raise EngineError(f"{self.config.name} was not started")
        ids = self.ids_of(request)
        if self.max_model_len and len(ids) > self.max_model_len:
            return Completion("", "context", limit=self.max_model_len)
        loop = asyncio.get_running_loop()
        job = _Job(ids, loop.create_future())
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await job.future

    def ids_of(self, request: Request) -> list[int]:
        """The conversation as token ids: the template writes every control token there is, so none
        is added.
        """
        turns = [message_turn(m) for m in request.messages]
        text = self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            **dict(request.template_kwargs),
            **({"tools": tools} if (tools := tools_of(request.messages)) else {}),
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _work(self) -> None:
        """Score all that wait, sorted by length, a batch at a time, until nothing waits."""
        await asyncio.sleep(0)  # let those who arrive together be scored together
        while self._waiting:
            jobs, self._waiting = sorted(self._waiting, key=lambda job: len(job.ids)), []
            for i in range(0, len(jobs), self.config.batch):
                some = [job for job in jobs[i : i + self.config.batch] if not job.future.done()]
                try:
                    rewards = (
                        await asyncio.to_thread(self.rewards, [job.ids for job in some])
                        if some
                        else []
                    )
                except Exception as error:  # each asker learns of it
                    for job in some:
                        if not job.future.done():
                            job.future.set_exception(
                                EngineError(f"{self.config.name}: {type(error).__name__}: {error}")
                            )
                    continue
                for job, reward in zip(some, rewards, strict=True):
                    if not job.future.done():
                        job.future.set_result(
                            Completion(repr(reward), "stop", prompt_tokens=len(job.ids))
                        )

    def rewards(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of conversations given as token ids, in one forward pass."""
        import torch

        longest, pad = max(map(len, ids)), self.model.config.get_text_config().pad_token_id
        tokens = torch.tensor(
            [[*row, *[pad] * (longest - len(row))] for row in ids], device=self.base.device
        )
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.base.device
        )
        with torch.inference_mode():
            logits_B1 = self.model(input_ids=tokens, attention_mask=mask).logits
        return [float(reward) for reward in logits_B1[:, 0].float().tolist()]

    async def stop(self) -> None:
        """Release the model. Safe to call twice."""
        if self._worker is not None and not self._worker.done():
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            job.future.cancel()
        self.model = None


class RewardModelVllm(Engine):
    """The engine on vLLM's pooling runner: a server of ours, or one at
    `url`.
    """

    def __init__(self, config: RewardEngineConfig) -> None:
        self.config, self.identity, self.max_in_flight = (
            config,
            reward_identity(config),
            config.max_in_flight,
        )
        self.path = resolve_model(config.model)
        self.special_tokens = reward_specials(config.model)
        self.max_model_len = config.max_model_len
        self.process: VllmProcess | None = None
        self.server: HttpClient | None = None
        self._name = config.model

    async def start(self) -> None:
        """Start the server or greet the one that runs.

        Raises: EngineError with the reason: no reward model, no server, the last error of the
        server's log.
        """
        if self.server is not None:
            return
        problem = folder_problem(Path(self.path)) if Path(self.path).is_dir() else None
        if problem:
            raise EngineError(f"{self.config.name}: {self.path}: {problem}")
        c = self.config
        settings = VllmConfig(
            model=c.model,
            revision=c.revision,
            dtype=c.dtype,
            max_model_len=c.max_model_len,
            kv_cache_gib=c.kv_cache_gib,
            start_timeout_s=c.start_timeout_s,
            max_in_flight=c.max_in_flight,
            args=["--runner", "pooling", *c.args],
        )
        url = c.url
        try:
            if url is None:
                port = free_port()
                self.process = VllmProcess(settings, self.path, port, c.name, None, self.log_folder)
                await self.process.start()
                url = f"http://127.0.0.1:{port}"
            self.server = HttpClient(
                url.rstrip("/").removesuffix("/v1"),
                settings,
                c.api_key_env,
                self.process.key if self.process else "",
            )
            await self._greet(self.server)
            self._replicas = Replicas([self.server], settings, warn)
        except BaseException:
            await self.stop()
            raise

    async def _greet(self, server: HttpClient) -> None:
        try:
            listed = (await server.get("/v1/models"))["data"]
        except (Rejected, TransportError, KeyError) as error:
            raise EngineError(
                f"{self.config.name}: no vLLM server at {server.url}: {error}"
            ) from error
        entry = next((e for e in listed if self.config.model in (e.get("id"), e.get("root"))), None)
        if entry is None:
            there = ", ".join(str(e.get("id")) for e in listed) or "none"
            raise EngineError(
                f"{self.config.name}: {server.url} has no model {self.config.model!r}; it has: {there}"
            )
        if self.process is not None:
            server.why_down = self.process.why_dead
        self._name = str(entry["id"])
        known = (self.config.max_model_len, entry.get("max_model_len"), max_length(Path(self.path)))
        self.max_model_len = min(filter(None, known), default=None)

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The reward as a number in text. Raises: EngineError, TransportError."""
        server = self.server
        if server is None:
            raise EngineError(f"{self.config.name} was not started")
        body = {
            "model": self._name,
            "messages": [message_turn(m) for m in request.messages],
            "add_generation_prompt": False,
            "use_activation": False,  # the default is a sigmoid of the reward
            "chat_template_kwargs": dict(request.template_kwargs),
        }
        try:
            answer = await self._replicas.ask(
                request.messages, lambda at: server.post("/classify", orjson.dumps(body))
            )
        except Rejected as refusal:
            if refusal.status == 400 and "context length" in refusal.message:
                return Completion("", "context", limit=self.max_model_len or 0)
            raise EngineError(
                f"{server.url}/classify: HTTP {refusal.status} {refusal.message}"
            ) from refusal
        return _served(answer, server.url)

    async def stop(self) -> None:
        """Close the pool and end the server if it is ours. Safe to call twice."""
        server, self.server = self.server, None
        if server is not None:
            await server.close()
        process, self.process = self.process, None
        if process is not None:
            await process.stop()


def _served(answer: dict[str, Any], url: str) -> Completion:
    try:
        rewards = answer["data"][0]["probs"]
        tokens = int((answer.get("usage") or {}).get("prompt_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise TransportError(
            f"{url}/classify: no classification came back ({type(error).__name__})"
        ) from error
    if not isinstance(rewards, list) or len(rewards) != 1:
        raise EngineError(
            f"{url} gives {len(rewards) if isinstance(rewards, list) else 'no'} numbers an answer: a reward "
            "model gives one"
        )
    value = rewards[0]
    return Completion(
        repr(float(value)) if isinstance(value, (int, float)) else "nan",
        "stop",
        prompt_tokens=tokens,
    )
