"""RLAIF: K samples a prompt, pairs of them judged under principles in both orders, preferences with probabilities.

With a `revise:` section the drafts are criticised and revised as well (`cai`), so that one set of samples gives both
demonstrations and preferences.
"""
from __future__ import annotations

import asyncio
from collections.abc import Sequence

from factory.types import Comparison, Completion, Principle, Prompt, Sample, Use
from judges import pairwise, panel
from pipelines import cai
from pipelines.context import Ask, Context

Question = tuple[Comparison, list[Principle]]


async def pipeline(prompt: Prompt, ctx: Context) -> None:
    """Sample, revise where asked for, and compare the drafts."""
    drafts = await cai.sample(prompt, ctx)
    if ctx.revise is not None:
        await cai.revise(prompt, drafts, ctx)
    await compare(prompt, drafts, ctx)


async def compare(prompt: Prompt, samples: Sequence[Sample], ctx: Context) -> None:
    """Put pairs of samples to every judge. Equal texts are a tie by definition and are never asked.

    `best_worst` needs all pairs to know which samples those are: all are judged, and the export takes the one.
    """
    selection = ctx.config.panel.selection or ctx.constitution.selection
    shape = "adjacent" if ctx.config.pairs == "adjacent" else "all"
    questions: list[Question] = []
    for i, j in panel.pairs(len(samples), shape):
        a, b = samples[i], samples[j]
        if a.text == b.text:
            ctx.note(Use(ctx.run, prompt.id, "identical", a.index, b.index))
            continue
        drawn = panel.draw(ctx.constitution.principles, selection, ctx.config.seed, prompt.id,
                           (a.index, b.index), 0, prompt.tags)
        questions.append((Comparison(prompt, a, b), drawn))
    if len(ctx.judges) == 1:
        await judge(ctx.judges[0], questions, ctx)
    else:
        await asyncio.gather(*(judge(config, questions, ctx) for config in ctx.judges))


async def judge(config: pairwise.Config, questions: Sequence[Question], ctx: Context) -> None:
    """All readings of one judge for one prompt: what shares a pair stands together, for the server's prefix cache."""
    model, specials = ctx.engines[config.engine].identity, ctx.specials(config.engine)
    template = ctx.templates[config.name]
    reasons = await _reasoning(config, questions, ctx) if config.reasoning else None
    asks: list[Ask] = []
    name = config.scored_template if config.reasoning else config.template
    for comparison, principle, order, repeat in _readings(config, questions, ctx):
        use = _use("judge", comparison, principle, order, repeat, config, ctx)
        reason = None if reasons is None else reasons.get(use_key(use))
        if reasons is not None and reason is None:
            continue
        request = pairwise.request(
            config, template, comparison, principle, model, order, repeat, specials,
            ctx.examples(name, principle, principle.compare), reason)
        asks.append((request, use))
    for (_, use), answer in zip(asks, await ctx.ask(asks, config.engine), strict=True):
        if isinstance(answer, Completion):
            ctx.unscored("judge", pairwise.parse(answer, use.order, config).reason)


async def _reasoning(config: pairwise.Config, questions: Sequence[Question], ctx: Context) -> dict[tuple, str]:
    """The first pass of judges that reason: by reading, what was said. Reasoning that broke off is not scored."""
    model, specials = ctx.engines[config.engine].identity, ctx.specials(config.engine)
    template, asks = ctx.templates[config.name + " reasoning"], []
    for comparison, principle, order, repeat in _readings(config, questions, ctx):
        request = pairwise.reasoning_request(
            config, template, comparison, principle, model, order, repeat, specials,
            ctx.examples(config.reasoning_template, principle, principle.compare), ctx.config.seed)
        asks.append((request, _use("reason", comparison, principle, order, repeat, config, ctx)))
    found = {}
    for (_, use), answer in zip(asks, await ctx.ask(asks, config.engine), strict=True):
        if isinstance(answer, Completion):
            text, reason = pairwise.parse_reasoning(answer)
            ctx.unscored("reason", reason)
            if reason is None:
                found[use_key(use)] = text
    return found


def _readings(config: pairwise.Config, questions: Sequence[Question], ctx: Context):
    for comparison, principles in questions:
        a, b = comparison.a.index, comparison.b.index
        orders = panel.orders(ctx.config.panel.orders, ctx.config.seed, comparison.prompt.id, a, b)
        for order in orders:
            for principle in principles:
                for repeat in range(config.repeats):
                    yield comparison, principle, order, repeat


def _use(role: str, comparison: Comparison, principle: Principle, order: str, repeat: int, config: pairwise.Config,
         ctx: Context) -> Use:
    return Use(ctx.run, comparison.prompt.id, role, comparison.a.index, comparison.b.index, 0, principle.id,
               config.name, order, repeat)


def use_key(use: Use) -> tuple:
    """Which reading of a judge this is."""
    return use.sample, use.other, use.principle, use.order, use.repeat
