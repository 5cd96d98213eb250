"""transformers in this process: the same label reads and sampling where vLLM does not run, such as
on a Mac. Slow.

Requests that wait are answered together. Each row draws with its own generator, so an answer does
not depend on which others it was batched with (beyond the rounding of the matrix products).
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.console import warn
from prefab.factory.engines.base import folder_specials, resolve_model
from prefab.factory.engines.chat import LabelRead
from prefab.factory.engines.family import SYSTEM_PROBE, Family, without_system
from prefab.factory.engines.model_files import (
    ask_hub,
    check_chat_template,
    check_model_folder,
    loading_options,
    refuse_words,
)
from prefab.factory.engines.vllm import IdRead
from prefab.factory.errors import ConfigError, EngineError, NotInstalledError, RequestRefused
from prefab.factory.extras import missing_package
from prefab.factory.keys import derived_seed, model_identity
from prefab.factory.label_text import label_of_answer
from prefab.factory.spec.control_tokens import SpecialTokens, is_control
from prefab.factory.thinking import split_thinking
from prefab.factory.tool_calls import message_turn, tools_of
from prefab.factory.types import Completion, Engine, Message, Request, Sampling

# transformers makes models on the meta device, process-wide: two loaded at once end without
# weights.
_LOADING = threading.Lock()


class HfConfig(BaseModel):
    """`model` is a folder, an embedded model or a hub name. `batch` requests are answered
    together.
    """

    model_config = ConfigDict(extra="forbid")

    engine: Literal["hf"] = "hf"
    model: str
    revision: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    batch: int = Field(16, ge=1)
    max_in_flight: int = Field(64, ge=1)
    max_model_len: int | None = Field(None, ge=1)


class Job(NamedTuple):
    """One request that waits, as token ids."""

    ids: list[int]
    seed: int
    request: Request
    future: asyncio.Future[Completion]

    @property
    def reads(self) -> bool:
        """Whether the labels are read at the first token."""
        return bool(self.request.labels) and self.request.sampling.max_tokens == 1


class HF(Engine):
    """The engine."""

    Config = HfConfig

    def __init__(self, config: HfConfig, name: str = "hf") -> None:
        self.config, self.name, self.max_in_flight = config, name, config.max_in_flight
        self.path, self.max_model_len = resolve_model(config.model), config.max_model_len
        self.special_tokens = folder_specials(Path(self.path)) if Path(self.path).is_dir() else ()
        self.device = _device(config.device)
        self.dtype = (
            ("float32" if self.device == "cpu" else "auto")
            if config.dtype == "auto"
            else config.dtype
        )
        self.identity = model_identity(self.path, self.dtype, config.revision)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf")
        self._read = IdRead(self._tokenize)
        self._waiting: deque[Job] = deque()
        self._worker: asyncio.Task[None] | None = None
        self.model: Any = None
        self.tokenizer: Any = None

    async def start(self) -> None:
        """Load the model.

        Raises: EngineError when there is no such model, or it has no chat template.
        """
        if self.model is None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def _load(self) -> None:
        try:
            with _LOADING:  # two threads that import it for the first time make each other fail
                from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise NotInstalledError(
                str(missing_package(error.name, f"engines.{self.name} (engine: hf)"))
            ) from error
        revision = {"revision": self.config.revision} if self.config.revision else {}
        try:
            check_model_folder(Path(self.path), self.config.model)
            ask_hub(self.path, self.config.revision)
            options = loading_options(self.config.model)
            with _LOADING:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    self.path, trust_remote_code=options["trust_remote_code"], **revision
                )
                model = AutoModelForCausalLM.from_pretrained(
                    self.path, dtype=self.dtype, **options, **revision
                )
            if isinstance(self.tokenizer.chat_template, str):
                check_chat_template(self.tokenizer.chat_template, self.path)
        except ConfigError as error:
            raise EngineError(f"engines.{self.name}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            words = refuse_words(self.config.model, error)
            raise EngineError(f"engines.{self.name}: {words}") from error
        if not self.tokenizer.chat_template:
            raise EngineError(
                f"engines.{self.name}: the tokenizer of {self.path} has no chat template"
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        self.max_model_len = min(filter(None, (self.config.max_model_len, longest)), default=None)
        if not self.special_tokens:
            self.special_tokens = SpecialTokens(
                token.content
                for token in self.tokenizer.added_tokens_decoder.values()
                if is_control(token.content, token.special)
            )
        self._stops = _stop_ids(model, self.tokenizer)
        self._family = Family(system_role=self._takes_system())
        self.model = model.to(self.device).eval()

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """Find the labels' token ids before anything is asked. Raises: EngineError for a label of
        several tokens.
        """
        await self._read.prepare(labels)

    async def complete(self, key: bytes, request: Request) -> Completion:
        """Answer one request. Raises: EngineError where a label is asked for that is more than one
        token.
        """
        if self.model is None:
            raise EngineError(f"engines.{self.name} was not started")
        hard = False
        try:
            if request.labels:
                await self._read.prepare(request.labels, opening=request.sampling.max_tokens > 1)
        except EngineError:
            if request.sampling.max_tokens == 1:
                raise
            hard, request = True, replace(request, labels=())
        ids = self._chat_ids(request.messages, dict(request.template_kwargs))
        if self.max_model_len and len(ids) >= self.max_model_len:
            return Completion("", "context", limit=self.max_model_len)
        loop = asyncio.get_running_loop()
        job = Job(ids, derived_seed(key), request, loop.create_future())
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        answer = await job.future
        return replace(answer, exactness="hard") if hard else answer

    async def _work(self) -> None:
        """Answer what waits, in batches of one kind (label reads or texts), until nothing waits."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # let those who arrive together be answered together
        while self._waiting:
            reads = self._waiting[0].reads
            jobs = [job for job in self._waiting if job.reads is reads][: self.config.batch]
            for job in jobs:
                self._waiting.remove(job)
            jobs = [job for job in jobs if not job.future.done()]
            try:
                answers = (
                    await loop.run_in_executor(self._thread, self._answer, jobs, reads)
                    if jobs
                    else []
                )
            except Exception as error:  # each asker learns of it; the next batch may be smaller
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(
                            EngineError(f"engines.{self.name}: {type(error).__name__}: {error}")
                        )
                continue
            for job, answer in zip(jobs, answers, strict=True):
                if not job.future.done():
                    job.future.set_result(answer)

    def _answer(self, jobs: Sequence[Job], reads: bool) -> list[Completion]:
        import torch

        with torch.inference_mode():
            return self._read_labels(jobs) if reads else self._generate(jobs)

    def _labels_of(self, logps_V: Any, labels: tuple[str, ...]) -> LabelRead:
        ids = self._read.fields(labels)["logprob_token_ids"]
        entries = [{"token": f"token_id:{i}", "logprob": float(logps_V[i])} for i in ids]
        return self._read.parse(entries, labels)

    def _with_labels(
        self, job: Job, answer: Completion, new: Sequence[int], read: Sequence[LabelRead]
    ) -> Completion:
        """A generated answer with the labels' log-probabilities at the token of the label that it
        names, or that it begins with; `hard`, without them, where there is none or that token is
        another one. `read` has those of each of the tokens `new`.
        """
        labels = job.request.labels
        if not labels:
            return answer
        split = split_thinking(answer.text)
        found, opens = label_of_answer(split.answer, labels) if split.finished else (None, False)
        if found is None:
            return replace(answer, exactness="hard")
        at = answer.text.rindex(split.answer) + found.offset
        token = next(
            k
            for k in range(len(new))
            if len(self.tokenizer.decode(new[: k + 1], skip_special_tokens=True)) > at
        )
        logps, exactness = read[token]
        if opens:
            named = self._read.label_of(f"token_id:{new[token]}", labels) or ""
        else:
            named = max(logps or {}, key=lambda label: (logps or {})[label], default="")
        if named.strip() != found.label:
            return replace(answer, exactness="hard")
        return replace(answer, label_logps=logps, exactness=exactness)

    def _read_labels(self, jobs: Sequence[Job]) -> list[Completion]:
        logits_BV, _ = self._forward(*self._padded(jobs))
        answers = []
        for job, logps_V in zip(jobs, logits_BV.float().log_softmax(-1), strict=True):
            logps, exactness = self._labels_of(logps_V, job.request.labels)
            best = self.tokenizer.decode([int(logps_V.argmax())], skip_special_tokens=True)
            answers.append(Completion(best, "length", logps, exactness, len(job.ids), 1))
        return answers

    def _generate(self, jobs: Sequence[Job]) -> list[Completion]:
        """Generate token by token, all rows together, until the last row has ended."""
        import torch

        draws = [torch.Generator().manual_seed(job.seed) for job in jobs]
        room = [self._room(job) for job in jobs]
        new: list[list[int]] = [[] for _ in jobs]
        read: list[list[LabelRead]] = [[] for _ in jobs]
        done: list[Completion | None] = [None] * len(jobs)
        tokens_BT, mask_BT = self._padded(jobs)
        past = None
        while True:
            logits_BV, past = self._forward(tokens_BT, mask_BT, past)
            for i, job in enumerate(jobs):
                token = choose(
                    logits_BV[i].float().cpu(), job.request.sampling, job.ids, new[i], draws[i]
                )
                new[i].append(token)
                if job.request.labels and not done[i]:
                    logps_V = logits_BV[i].float().log_softmax(-1)
                    read[i].append(self._labels_of(logps_V, job.request.labels))
                done[i] = done[i] or self._finished(job, new[i], room[i])
            if all(done):
                answers = zip(jobs, done, new, read, strict=True)
                return [
                    self._with_labels(job, answer, ids, labels)
                    for job, answer, ids, labels in answers
                    if answer is not None
                ]
            tokens_BT = torch.tensor([[row[-1]] for row in new], device=self.device)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(jobs), 1)], dim=1)

    def _room(self, job: Job) -> int:
        longest = self.max_model_len or len(job.ids) + job.request.sampling.max_tokens
        return min(job.request.sampling.max_tokens, longest - len(job.ids))

    def _finished(self, job: Job, new: list[int], room: int) -> Completion | None:
        """The completion if this row ends here: at a stop token, a stop string, or its length."""
        at_stop = new[-1] in self._stops
        text = (
            self.tokenizer.decode(new, skip_special_tokens=True)
            if at_stop or job.request.sampling.stop or len(new) >= room
            else ""
        )
        cut = min(
            (at for stop in job.request.sampling.stop if (at := text.find(stop)) >= 0), default=-1
        )
        if cut >= 0:
            return Completion(text[:cut], "stop", None, "exact", len(job.ids), len(new))
        if at_stop or len(new) >= room:
            return Completion(
                text, "stop" if at_stop else "length", None, "exact", len(job.ids), len(new)
            )
        return None

    def _padded(self, jobs: Sequence[Job]) -> tuple[Any, Any]:
        """Token ids and mask, padded on the left so that every row's next token is at the end."""
        import torch

        longest, pad = max(len(job.ids) for job in jobs), self.tokenizer.pad_token_id or 0
        tokens = [[pad] * (longest - len(job.ids)) + job.ids for job in jobs]
        mask = [[0] * (longest - len(job.ids)) + [1] * len(job.ids) for job in jobs]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)

    def _forward(self, tokens_BT: Any, mask_BT: Any, past: Any = None) -> tuple[Any, Any]:
        """Logits of the next token, and the cache."""
        places = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        out = self.model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=places,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values

    async def probe(self) -> Mapping[str, Any]:
        """What the model's chat template does otherwise than most."""
        if not self.findings and (notes := self._family.notes()):
            self.findings = self._family.data()
            for line in notes:
                warn(f"engines.{self.name}: {line}")
        return self.findings

    def _takes_system(self) -> bool:
        """Whether the chat template writes a system turn: some refuse it, some leave it out."""
        try:
            return SYSTEM_PROBE[0].content in self._rendered(SYSTEM_PROBE, {})
        except RequestRefused:
            return False

    def _rendered(self, messages: Sequence[Message], kwargs: dict[str, Any]) -> str:
        """The conversation as the chat template writes it. Raises: RequestRefused."""
        import jinja2

        turns = [message_turn(m) for m in messages]
        if tools := tools_of(messages):
            kwargs = {**kwargs, "tools": tools}
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **kwargs
            )
        except jinja2.TemplateError as error:
            raise RequestRefused(
                f"engines.{self.name}: the chat template refuses this conversation: {error}"
            ) from error
        return text

    def _chat_ids(self, messages: tuple[Message, ...], kwargs: dict[str, Any]) -> list[int]:
        known = self._family.system_role
        text = self._rendered(messages if known else without_system(messages), kwargs)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def stop(self) -> None:
        """Release the model. Safe to call twice."""
        if self._worker is not None and not self._worker.done():
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        while self._waiting:
            self._waiting.popleft().future.cancel()
        self.model = None


def choose(logits_V: Any, s: Sampling, prompt: Sequence[int], new: Sequence[int], draw: Any) -> int:
    """The next token: penalties, temperature, min-p, top-k and top-p as vLLM orders them; the best
    at temperature 0.
    """
    import torch

    logits_V = _penalised(logits_V, s, prompt, new)
    if s.temperature <= 0:
        return int(logits_V.argmax())
    logits_V = logits_V / s.temperature
    if s.min_p > 0:
        probabilities_V = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(
            probabilities_V < s.min_p * probabilities_V.max(), -torch.inf
        )
    if s.top_k > 0:
        lowest = logits_V.topk(min(s.top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest, -torch.inf)
    if s.top_p < 1:
        sorted_V, order_V = logits_V.softmax(-1).sort(descending=True)
        beyond_V = (
            sorted_V.cumsum(-1) - sorted_V >= s.top_p
        )  # the token that crosses top_p is still in
        logits_V = logits_V.masked_fill(
            torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), -torch.inf
        )
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=draw))


def _penalised(logits_V: Any, s: Sampling, prompt: Sequence[int], new: Sequence[int]) -> Any:
    """Repetition counts the prompt too; frequency and presence only what was generated, as on
    vLLM.
    """
    import torch

    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *new}))
        at, factor = logits_V[seen], s.repetition_penalty
        logits_V = logits_V.index_put((seen,), torch.where(at > 0, at / factor, at * factor))
    if (s.frequency_penalty or s.presence_penalty) and new:
        counts_V = torch.bincount(torch.tensor(new), minlength=logits_V.numel())
        logits_V = logits_V - s.frequency_penalty * counts_V - s.presence_penalty * (counts_V > 0)
    return logits_V


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    ids = set(found) if isinstance(found, list) else {found}
    return (ids | {tokenizer.eos_token_id}) - {None}


def _device(wanted: str) -> str:
    """cuda, mps (a Mac) or cpu. torch (seconds of import) is only asked where `auto` could mean
    something else.
    """
    if wanted != "auto":
        return wanted
    if not (
        Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or sys.platform == "darwin"
    ):
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
