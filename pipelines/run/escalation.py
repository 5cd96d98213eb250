"""A panel's word on a prompt's comparisons: every judge asked, or the cheap ones first and a
stronger one in doubt.

What was decided is recorded before the stronger judge is asked, so that the store knows whose
verdicts to wait for. A run and the store read the same answers by the same functions (`verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefab.factory import decision
from prefab.factory.keys import rubric_id
from prefab.factory.ledger.records import RunRecord
from prefab.factory.types import Preference, Prompt
from prefab.factory.uses import EscalationUse
from prefab.judges import escalation
from prefab.judges.base import Judge, Pair, Question
from prefab.pipelines.config.schema import EscalateConfig
from prefab.pipelines.run.context import PLACEHOLDER, Context
from prefab.pipelines.run.judging import Responses, judge_all, n_calls, note_pairs
from prefab.pipelines.store import derive, verdicts

GUESS = "guess"  # in a plan: the reason of an escalation that hangs on answers still to come
Said = tuple[Preference, list[decision.Reading]]
Answers = tuple[
    Responses, dict[Pair, str] | None
]  # what was answered, and why each comparison was escalated (or not)


async def judged(
    prompt: Prompt, questions: Sequence[Question], ctx: Context, round: int = 0
) -> Answers:
    """Ask the panel about one round of comparisons."""
    note_pairs(prompt, questions, ctx)
    if not questions:
        return [], None
    settings = ctx.config.panel_settings().escalate
    if settings is None:
        return await judge_all(ctx.judges, questions, ctx), None
    strong = [config for config in ctx.judges if config.name in settings.to]
    cheap = [config for config in ctx.judges if config.name not in settings.to]
    heard = await judge_all(cheap, questions, ctx)
    reasons = _reasons(prompt, questions, heard, round, strong, settings, ctx)
    if reasons is None:
        return heard, None
    for pair, reason in reasons.items():
        ctx.note(EscalationUse(ctx.run, prompt.id, *pair, reason))
    doubted = [question for question in questions if verdicts.escalated(reasons[_pair(question)])]
    _count(reasons, strong, questions, doubted, ctx)
    return heard + await judge_all(strong, doubted, ctx), reasons


def _reasons(
    prompt: Prompt,
    questions: Sequence[Question],
    heard: Responses,
    round: int,
    strong: Sequence[Judge[Any]],
    settings: EscalateConfig,
    ctx: Context,
) -> dict[Pair, str] | None:
    """Why each comparison is escalated (or empty, or `budget`). None where a cheap judge's answer
    is missing: the quota goes to the least certain of a prompt's comparisons, so none is chosen
    before all are known. Where no principle applies that the stronger judge could be asked under,
    the others' word stands.
    """
    if any(PLACEHOLDER in one.text for one in heard):
        return {_pair(question): GUESS for question in questions}
    settled = {_pair(question): "" for question in questions}
    found = decide(prompt, questions, heard, ctx, settled)
    if found.keys() != settled.keys():
        return None
    when = escalation.When(settings.when.margin, settings.when.disagreement)
    tie_margin = ctx.config.panel_settings().tie_margin
    doubts = {
        pair: (escalation.doubt(one, readings, when, tie_margin), escalation.certainty(readings))
        for pair, (one, readings) in found.items()
    }
    mute = {_pair(q) for q in questions if not any(n_calls(config, [q], ctx) for config in strong)}
    doubts |= {pair: ("", doubts[pair][1]) for pair in mute}
    allowed = escalation.quota(len(doubts), settings.max_share, ctx.config.seed, prompt.id, round)
    return escalation.choose(doubts, allowed)


def decide(
    prompt: Prompt,
    questions: Sequence[Question],
    heard: Responses,
    ctx: Context,
    reasons: Mapping[Pair, str] | None = None,
) -> dict[Pair, Said]:
    """What the store will show of these comparisons, from the answers at hand; what it would wait
    for is left out.
    """
    rules, gathered, found = _rules(ctx), verdicts.gather(heard), dict[Pair, Said]()
    for question in questions:
        pair = _pair(question)
        under = {principle.id for principle in question[1]}
        gathered.principles[pair] = gathered.principles.get(pair, set()) | under
        if reasons is not None:
            gathered.decisions[pair] = reasons[pair]
    rubrics = {rubric_id(prompt.rubric): prompt.rubric} if prompt.rubric else {}
    for pair in map(_pair, questions):
        judges = verdicts.counted(pair, gathered, rules)
        places = verdicts.expected(prompt.id, pair, gathered, rules, judges or ())
        read = verdicts.verdicts(prompt.id, pair, gathered, rules, rubrics)
        settled = verdicts.preference(prompt.id, pair, read, places, rules)
        if settled is not None:
            found[pair] = settled
    return found


def _rules(ctx: Context) -> verdicts.Rules:
    """How the store will read this run's answers."""
    if ctx.rules is None:
        record = RunRecord(
            ctx.run, ctx.config.name, 0, ctx.config.model_dump(mode="json"), {}, 0, 0.0
        )
        ctx.rules = derive.rules(record, ctx.constitution)
    return ctx.rules


def _pair(question: Question) -> Pair:
    return question[0].a.index, question[0].b.index


def _count(
    reasons: Mapping[Pair, str],
    strong: Sequence[Judge[Any]],
    questions: Sequence[Question],
    doubted: Sequence[Question],
    ctx: Context,
) -> None:
    """For the run's report: why, and what asking the stronger judge everything would have cost."""
    told = ctx.counts.escalation
    for why in reasons.values():
        told[why or "settled"] += 1
    told["calls"] += sum(n_calls(config, doubted, ctx) for config in strong)
    told["calls_if_all"] += sum(n_calls(config, questions, ctx) for config in strong)
