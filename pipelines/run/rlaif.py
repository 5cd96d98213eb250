"""RLAIF: K samples a prompt, pairs of them judged under principles in both orders, preferences with
probabilities.

With a `revise:` section the drafts are criticised and revised as well (`cai`), so that one set of
samples gives both demonstrations and preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prefab.factory.types import Comparison, Prompt, Sample
from prefab.factory.uses import IdenticalUse
from prefab.judges import panel
from prefab.judges.base import Question
from prefab.pipelines.run import cai
from prefab.pipelines.run.context import Context
from prefab.pipelines.run.escalation import decide, judged


async def pipeline(prompt: Prompt, ctx: Context) -> None:
    """Sample, revise where asked for, and compare the drafts."""
    drafts = await cai.sample(prompt, ctx)
    if ctx.revise is not None:
        await cai.revise(prompt, drafts, ctx.revise, ctx)
    await compare(prompt, drafts, ctx)


async def compare(prompt: Prompt, samples: Sequence[Sample], ctx: Context) -> None:
    """Put pairs of samples to the panel.

    `best_worst` needs all pairs to know which samples those are: all are judged, and the export
    takes the one.
    """
    if ctx.config.pairs == "tournament":
        return await _tournament(prompt, samples, ctx)
    shape: Literal["adjacent", "all"] = "adjacent" if ctx.config.pairs == "adjacent" else "all"
    pairs = [(samples[i], samples[j]) for i, j in panel.pairs(len(samples), shape)]
    await judged(prompt, ask_about(prompt, pairs, ctx), ctx)


async def _tournament(prompt: Prompt, samples: Sequence[Sample], ctx: Context) -> None:
    """Neighbours meet, then the winners, until one is left. Of two that nobody could tell apart the
    first goes on: that settles who meets whom, not who is better. Where an answer is missing, the
    next run goes on from there.
    """
    standing, round = list(samples), 0
    while len(standing) > 1:
        pairs = list(zip(standing[::2], standing[1::2], strict=False))
        questions = ask_about(prompt, pairs, ctx)
        heard, reasons = await judged(prompt, questions, ctx, round)
        found = decide(prompt, questions, heard, ctx, reasons)
        if len(found) < len(questions):
            return
        lost = {a if found[a, b][0].outcome == "b" else b for a, b in found}
        lost |= {b.index for a, b in pairs if a.text == b.text}
        standing, round = [sample for sample in standing if sample.index not in lost], round + 1


def ask_about(
    prompt: Prompt, pairs: Sequence[tuple[Sample, Sample]], ctx: Context
) -> list[Question]:
    """The comparisons to make, each with the principles drawn for it. Equal texts are a tie by
    definition and are never asked.
    """
    selection = ctx.config.panel_settings().selection or ctx.constitution.selection
    questions: list[Question] = []
    for a, b in pairs:
        if a.text == b.text:
            ctx.note(IdenticalUse(ctx.run, prompt.id, a.index, b.index))
            continue
        drawn = panel.draw(
            ctx.constitution.principles,
            selection,
            ctx.config.seed,
            prompt.id,
            (a.index, b.index),
            0,
            prompt.tags,
        )
        questions.append((Comparison(prompt, a, b), drawn))
    return questions
