"""Put comparisons to the judges of a panel: each judge makes its own requests about the same pairs.

What shares a pair, or an answer, stands together, for the server's prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from prefab.factory.types import Completion, Principle, Prompt, Verdict
from prefab.factory.uses import ComparisonUse
from prefab.judges import panel
from prefab.judges.base import Decoded, Judge, Question, RequestContext
from prefab.pipelines.run.context import Context

Responses = list[Decoded]


def draw_for_answers(prompt: Prompt, ctx: Context) -> list[Principle]:
    """The principles that all answers to a prompt are scored under: one draw, so that their scores
    can be compared.
    """
    settings = ctx.config.panel_settings()
    return panel.draw(
        ctx.constitution.principles,
        settings.selection or ctx.constitution.selection,
        ctx.config.seed,
        prompt.id,
        (0,),
        0,
        prompt.tags,
    )


async def judge_all(
    judges: Sequence[Judge[Any]], questions: Sequence[Question], ctx: Context
) -> Responses:
    """Every question to each of these judges."""
    if len(judges) == 1:
        return await judge(judges[0], questions, ctx)
    found = await asyncio.gather(*(judge(one, questions, ctx) for one in judges))
    return [one for some in found for one in some]


async def judge(
    judge: Judge[Any],
    questions: Sequence[Question],
    ctx: Context,
    repeats: Sequence[int] | None = None,
) -> Responses:
    """One judge's answers to one prompt's questions, each decoded once. Those that could not be
    read are counted; questions that got no answer are left out.
    """
    if not questions:
        return []
    context, found = request_context(judge, ctx, repeats), Responses()
    for role in judge.passes:
        asks = judge.requests(role, questions, context, found)
        answers = await ctx.ask(asks, judge.engine)
        for (_, use), answer in zip(asks, answers, strict=True):
            if isinstance(answer, Completion):
                decoded = Decoded(use, judge.decode(use, answer), text=answer.text)
                ctx.unscored(role, decoded.value.reason if decoded.value else None)
                found.append(decoded)
    if judge.shows == "people":  # those who said nothing, are split, skipped, or took it back
        said = sum(decoded.value is not None for decoded in found)
        ctx.counts.awaited += judge.n_calls(questions, context) - said
    return found


def n_calls(judge: Judge[Any], questions: Sequence[Question], ctx: Context) -> int:
    """How many calls these questions are to one judge; labels, to people."""
    return judge.n_calls(questions, request_context(judge, ctx)) if questions else 0


def request_context(
    judge: Judge[Any], ctx: Context, repeats: Sequence[int] | None = None
) -> RequestContext:
    """What the judge's requests need beside the questions."""
    engine = ctx.engines.get(judge.engine)
    specials = ctx.specials(judge.engine) if engine else ()
    return RequestContext(
        ctx.run,
        engine.identity if engine else "",
        ctx.templates,
        specials,
        partial(ctx.examples, specials),
        ctx.config.seed,
        ctx.config.panel_settings().orders,
        repeats,
        ctx.people.get(judge.name, {}),
    )


def verdicts_by_order(
    judge: Judge[Any], found: Responses, question: Question, principle: Principle
) -> tuple[Verdict, Verdict]:
    """What decoded answers say of one comparison under one principle, in both orders."""
    pair = question[0].a.index, question[0].b.index
    lines = judge.lines(principle.id, None)
    here = [d for d in found if not judge.ordered or d.use.pair == pair]
    return judge.verdicts_by_order(here, pair, lines)


def note_pairs(prompt: Prompt, questions: Sequence[Question], ctx: Context) -> None:
    """Record which comparisons are made under which principles, where no judge's use tells."""
    if all(judge.ordered for judge in ctx.judges):
        return
    for comparison, principles in questions:
        for name in [principle.id for principle in principles] or [""]:
            a, b = comparison.a.index, comparison.b.index
            ctx.note(ComparisonUse(ctx.run, prompt.id, a, b, name))
