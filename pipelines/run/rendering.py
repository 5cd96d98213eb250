"""Show what a model is asked: requests of a pipeline, as the chat template writes them.

The recipe runs against a ledger that only looks answers up (`dry_run`), and the requests of one
template are collected. Nothing is asked.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from prefab.factory.engines.model_files import loading_options
from prefab.factory.errors import ConfigError
from prefab.factory.keys import request_key
from prefab.factory.ledger import db
from prefab.factory.spec.control_tokens import KNOWN_SPECIALS
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.types import Engine, Message, Prompt, Request
from prefab.factory.uses import Use
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    make_engines,
    make_programs,
    resolve_pipeline,
)
from prefab.pipelines.config.registries import RECIPES
from prefab.pipelines.run.context import PLACEHOLDER, Ask, Context, Counts, Response
from prefab.pipelines.run.dry_run import CHARS_PER_TOKEN, ChangeReasons, DryRunLedger

READ = 1_000  # prompts of the source to choose from
STAGES = {"sample": "policy", "critique": "critique", "revise": "revise"}


@dataclass(slots=True)
class RenderedCall:
    """One request.

    Attributes:
        template: The template's file; empty for the policy, which is asked the prompt itself.
        messages: Role and text of each.
        text: The whole text that the model reads, as its chat template writes it; None where the
            tokenizer is not on this machine.
        control_tokens: Spellings of control tokens that `text` contains, in order.
        tokens: Length of `text` in tokens; where `text` is None, an estimate.
        labels: The labels whose probabilities are read; empty for free text.
        answered: The store has the answer.
        waits: It shows answers that do not exist yet, as placeholders.
    """

    stage: str
    template: str
    prompt: str
    principle: str
    judge: str
    model: str
    messages: list[tuple[str, str]]
    text: str | None
    control_tokens: list[str]
    tokens: int
    labels: list[str]
    max_tokens: int
    temperature: float
    answered: bool
    waits: bool
    call: str

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class _Collector:
    """The dry run's ledger, which notes the requests of one stage and judge."""

    def __init__(self, inner: DryRunLedger, wanted: set[tuple[str, str]]) -> None:
        self.inner, self.wanted, self.stats = inner, wanted, inner.stats
        self.found: list[tuple[Request, Use, Engine]] = []

    async def ask_many(self, asks: Sequence[Ask], engine: Engine) -> Sequence[Response]:
        """As the dry run."""
        self.found += [
            (request, use, engine)
            for request, use in asks
            if (_stage(use), use.judge) in self.wanted
        ]
        return await self.inner.ask_many(asks, engine)

    def note(self, use: Use, call: bytes = b"") -> None:
        """As the dry run."""
        self.inner.note(use, call)

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Nothing is recorded."""

    def drop_queued(self, error: Exception) -> None:
        """Nothing waits."""


def _stage(use: Use) -> str:
    return "reasoning" if use.role == "reason" else STAGES.get(use.role, "judge")


def render_calls(
    template: str,
    pipeline: str | Path | dict[str, Any],
    sample: int = 1,
    sets: Sequence[str] = (),
    seed: int = 0,
) -> list[RenderedCall]:
    """Requests that a pipeline makes with one template, one a prompt. Asks nothing.

    Args:
        template: A template's file name (`pairwise`, `critique.jinja`), a stage (`policy`,
            `critique`, `revise`), or a judge's name.
        pipeline: A pipeline file, the name of a preset, or a dictionary with the same content.
        sample: How many, chosen at random from the first 1,000 prompts.
        sets: Overrides of the pipeline's fields.
        seed: Of the choice.

    Raises:
        ConfigError: The pipeline has a mistake, or uses no such template.
    """
    loaded = resolve_pipeline(pipeline, sets)
    wanted = _wanted(loaded, template)
    file = Path(loaded.config.store) / db.FILE
    con = db.connect(file, readonly=True) if file.exists() else None
    try:
        ledger = _Collector(DryRunLedger(con, None, ChangeReasons(())), set(wanted))
        engines = {**make_programs(loaded), **make_engines(loaded)}
        found = asyncio.run(_collect(loaded, ledger, engines, sample, seed))
        keys = [request_key(request) for request, _, _ in found]
        answered = db.lookup(con, keys) if con else {}
    finally:
        if con:
            con.close()
    if not found:
        raise ConfigError(
            f"{template}: nothing is asked with it under the first {READ:,} prompts: the principles "
            "that use it may apply to none of them"
        )
    return [
        _rendered(request, use, engine, wanted[_stage(use), use.judge], key in answered)
        for (request, use, engine), key in zip(found, keys, strict=True)
    ]


def _wanted(loaded: ResolvedPipeline, name: str) -> dict[tuple[str, str], str]:
    """The stages and judges that a name stands for, with the template's file of each."""
    files = {role: template.name for role, template in loaded.templates.items()}
    uses = {("policy", ""): ""}
    if loaded.revises:
        uses |= {(stage, ""): files[stage] for stage in ("critique", "revise")}
    for judge in loaded.judges if loaded.compares else ():
        for role in judge.templates():
            stage = "judge" if role == judge.name else "reasoning"
            uses[stage, judge.name] = files[role]
    stem = name.removesuffix(".jinja")
    found = {
        place: file
        for place, file in uses.items()
        if stem in (file.removesuffix(".jinja"), place[1], place[0]) and stem
    }
    if not found:
        known = sorted({word for place, file in uses.items() for word in (*place, file) if word})
        raise ConfigError(
            f"{name}: this pipeline asks nothing with it; {did_you_mean(name, known)}"
        )
    return found


async def _collect(
    loaded: ResolvedPipeline,
    ledger: _Collector,
    engines: Mapping[str, Engine],
    sample: int,
    seed: int,
) -> list[tuple[Request, Use, Engine]]:
    """One request of each of `sample` prompts that have any."""
    free = loaded.config.budget.model_copy(
        update={"unscored": None, "failed": None, "calls": None, "tokens": None}
    )
    ctx = Context.of(loaded, 0, ledger, engines)
    ctx.config = loaded.config.model_copy(update={"budget": free})
    ctx.counts = Counts(answers=1)  # recorded refusals alone do not stop it

    def place(text: str) -> bytes:
        return blake2b(f"{seed}\0{text}".encode()).digest()

    prompts = sorted(islice(loaded.prompts, READ), key=lambda prompt: place(prompt.id))
    found = []
    for prompt in prompts:
        ledger.found.clear()
        ledger.inner.begin(prompt.id)
        await (loaded.recipe or RECIPES[loaded.config.recipe])(prompt, ctx)
        if ledger.found:
            found.append(min(ledger.found, key=lambda one: place(str(one[1]))))
        if len(found) == sample:
            break
    return found


def _rendered(
    request: Request, use: Use, engine: Engine, template: str, answered: bool
) -> RenderedCall:
    waits = any(PLACEHOLDER in message.content for message in request.messages)
    shown = replace(request, messages=tuple(map(_readable, request.messages)))
    messages = [(message.role, message.content) for message in shown.messages]
    text, tokens = _chat_text(engine, shown)
    specials = (*engine.special_tokens, *KNOWN_SPECIALS)
    marked = [part for part, control in split_control(text or "", specials) if control]
    return RenderedCall(
        _stage(use),
        template,
        use.prompt,
        use.principle,
        use.judge,
        request.model,
        messages,
        text,
        marked,
        tokens,
        list(request.labels),
        request.sampling.max_tokens,
        request.sampling.temperature,
        answered,
        waits,
        request_key(request).hex(),
    )


_MARK = re.compile(rf"{PLACEHOLDER}[0-9a-f]*")


def _readable(message: Message) -> Message:
    """The message with words in the place of texts that do not exist yet."""
    return replace(message, content=_MARK.sub("(not written yet)", message.content))


_TOKENIZERS: dict[str, Any] = {}


def _chat_text(engine: Engine, request: Request) -> tuple[str | None, int]:
    """The request as the model's chat template writes it, and its length in tokens."""
    folder = Path(str(getattr(getattr(engine, "engine", engine), "path", "")))
    tokenizer = _tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None
    if tokenizer is None:
        characters = sum(len(message.content) for message in request.messages)
        return None, round(characters / CHARS_PER_TOKEN)
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    options = {"add_generation_prompt": True, **dict(request.template_kwargs)}
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return text, len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder; None without the library `transformers`."""
    name = str(folder)
    if name not in _TOKENIZERS:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            return None
        _TOKENIZERS[name] = AutoTokenizer.from_pretrained(name, **loading_options(name))
    return _TOKENIZERS[name]


def split_control(text: str, specials: Iterable[str]) -> list[tuple[str, bool]]:
    """A text in pieces: each control token by itself (True), and what lies between (False)."""
    spellings = sorted({token for token in specials if token}, key=len, reverse=True)
    if not spellings:
        return [(text, False)]
    parts = re.split(f"({'|'.join(map(re.escape, spellings))})", text)
    return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]
