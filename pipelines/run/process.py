"""Process labels: each step of an answer (a line, or a paragraph) is judged by itself.

Each judge gives every step a score, which the store keeps as the probability that the step is right
(the table `steps`). A process reward model is trained on them (`prefab train process`), and PPO can
be rewarded at the end of each step. Any judge that scores one answer at a time can judge steps. It
is shown the answer up to the end of the step; with `steps: {shows: step}` the step alone, which is
what a program that checks lines needs.
Source: Lightman et al. 2023; labels by a model instead of people: Wang et al. 2024 (Math-Shepherd).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from prefab.factory.steps import step_spans, step_text
from prefab.factory.types import Comparison, Completion, Principle, Prompt, Sample
from prefab.factory.uses import StepUse
from prefab.judges.base import Ask, Judge
from prefab.pipelines.run import cai
from prefab.pipelines.run.context import Context
from prefab.pipelines.run.judging import draw_for_answers, request_context


async def pipeline(prompt: Prompt, ctx: Context) -> None:
    """Sample, and put each step of each answer to every judge."""
    drafts = await cai.sample(prompt, ctx)
    drawn = draw_for_answers(prompt, ctx)
    await asyncio.gather(*(_judge(judge, prompt, drafts, drawn, ctx) for judge in ctx.judges))


async def _judge(
    judge: Judge[Any],
    prompt: Prompt,
    drafts: list[Sample],
    principles: list[Principle],
    ctx: Context,
) -> None:
    """All steps of these answers to one judge. What could not be read is counted."""
    steps, context = ctx.config.steps_settings(), request_context(judge, ctx)
    role, asks = judge.passes[0], list[Ask]()
    for draft in drafts:
        for number, span in enumerate(step_spans(draft.text, steps.by)):
            shown = replace(draft, text=step_text(draft.text, span, steps.shows))
            question = (Comparison(prompt, shown, shown), principles)
            for request, use in judge.requests(role, [question], context, ()):
                at = (ctx.run, prompt.id, draft.index, number)
                step = StepUse(*at, use.principle, judge.name, getattr(use, "repeat", 0))
                asks.append((request, step))
    answers = await ctx.ask(asks, judge.engine)
    for (_, use), answer in zip(asks, answers, strict=True):
        if isinstance(answer, Completion):
            value = judge.decode(use, answer)
            ctx.unscored(role, value.reason if value else None)
