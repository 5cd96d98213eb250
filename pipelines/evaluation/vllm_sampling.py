"""Answers of checkpoints from vLLM servers of their own, as the token ids that all figures are then
made of.

The text that a server returns would not do: its tokens, made anew, can be others than those drawn,
and KL would be that of an answer which nobody gave. The prompt's ids come back too, so a chat
template or a tokenizer of the server's that is another than the folder's is told, and not averaged
in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefab.factory.console import Progress
from prefab.factory.engines.base import make
from prefab.factory.engines.lifecycle import started_engines
from prefab.factory.errors import ConfigError
from prefab.factory.keys import request_key
from prefab.factory.types import Message, Request, Sampling
from prefab.pipelines.evaluation import policy_metrics
from prefab.trainers.chat import Turns
from prefab.trainers.common import load_tokenizer, loading, model_folder
from prefab.trainers.rl import rollout

SAMPLER = "vllm"  # what the engine is called in messages: the configuration's section


@dataclass(frozen=True, slots=True)
class Asked:
    """One draw: the conversation as the folder's own tokenizer writes it, and the request for an
    answer to it.
    """

    prompt: list[int]
    request: Request


def draw_all(
    config: Any, questions: Sequence[Sequence[Turns]], quiet: bool = False
) -> dict[str, list[list[rollout.SampledAnswer]]]:
    """Each policy's answers to each list of conversations, by name; one server at a time.

    Raises: ConfigError for any policy that cannot be served or compared, before the first server
    starts; EngineError.
    """
    reference = shape(
        config.reference or config.policies[config.baseline or next(iter(config.policies))],
        "reference",
    )
    for name, folder in config.policies.items():
        policy_metrics.same_vocabulary(
            name, shape(folder, f"policies.{name}").vocab_size, reference.vocab_size
        )
    return {
        name: draw(name, folder, questions, config, quiet)
        for name, folder in config.policies.items()
    }


def shape(folder: str, field: str) -> Any:
    """The configuration of a model, without its weights. Raises: ConfigError where there is none,
    or an adapter alone.
    """
    from transformers import AutoConfig

    place = Path(model_folder(folder, field))
    if place.is_dir() and not (place / "config.json").exists():
        raise ConfigError(
            f"{field}: {folder} is an adapter alone, which is not served here. Train with merge_lora: true, "
            "or write sampler: transformers"
        )
    with loading(folder):
        return AutoConfig.from_pretrained(str(place)).get_text_config()


def draw(
    name: str,
    folder: str,
    questions: Sequence[Sequence[Turns]],
    config: Any,
    quiet: bool = False,
    engine: Any = None,
) -> list[list[rollout.SampledAnswer]]:
    """`config.samples` answers at temperature 1 to each conversation, for each list of them, in
    order: what `policy_metrics.draw` gives, drawn by vLLM. A draw's seed is of (weights,
    config.seed, conversation, sample).

    `engine` stands in for the server that would be started. Raises: ConfigError, EngineError.
    """
    tokenizer, longest = (
        load_tokenizer(folder),
        getattr(shape(folder, f"policies.{name}"), "max_position_embeddings", None),
    )
    turns = [rollout.turns_of(prompt, tokenizer) for some in questions for prompt in some]
    rows = rollout.encode(
        tokenizer, turns, longest and longest - config.max_new_tokens, config.template_kwargs
    )
    # float32, since KL comes from a float32 forward: another precision is another policy
    engine = engine or make(
        {"dtype": "float32", **config.vllm, "engine": "vllm", "model": folder}, SAMPLER
    )
    asked = [
        Asked(row, _request(engine.identity, prompt, sample, config))
        for prompt, row in zip(turns, rows, strict=True)
        for sample in range(config.samples)
    ]
    found = iter(
        asyncio.run(_draw(name, engine, asked, ends(model_folder(folder), tokenizer), quiet))
    )
    return [[next(found) for _ in range(len(some) * config.samples)] for some in questions]


def ends(folder: str, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as `rollout.end_ids` finds them on a loaded model."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # it has none of its own
        generation = GenerationConfig.from_model_config(shape(folder, "model"))
    return rollout.end_ids(SimpleNamespace(generation_config=generation), tokenizer)


def _request(identity: str, turns: Turns, sample: int, config: Any) -> Request:
    return Request(
        identity,
        tuple(Message(turn["role"], turn["content"]) for turn in turns),
        Sampling(config.max_new_tokens, 1.0, seed=config.seed),
        (),
        tuple(sorted(config.template_kwargs.items())),
        (sample,),
    )


async def _draw(
    name: str, engine: Any, asked: Sequence[Asked], stops: Sequence[int], quiet: bool
) -> list[rollout.SampledAnswer]:
    found: list[Any] = [None] * len(asked)

    async def draw(item: tuple[int, Asked]) -> None:
        i, a = item
        drawn = await engine.draw(request_key(a.request), a.request, stops)
        if drawn.prompt != a.prompt:
            raise ConfigError(_other(name, a.prompt, drawn.prompt))
        found[i] = rollout.SampledAnswer(a.prompt, drawn.ids, drawn.logps, drawn.ended)

    async with started_engines({SAMPLER: engine}, quiet):
        with Progress(f"answering: {name}", len(asked), quiet, "answers") as progress:
            await progress.over(enumerate(asked), draw, engine.max_in_flight)
    return found


def _other(name: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    return (
        f"policies.{name}: the server reads a prompt as other tokens than the folder's tokenizer writes: {len(theirs)} "
        f"against {len(ours)}, and another one at {at}. Its chat template, its tokenizer or what it makes of "
        "template_kwargs is another; serve this very folder, or write sampler: transformers"
    )
