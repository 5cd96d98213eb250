"""Constitutional AI: sample, then rounds of critique and revision. Every draft and every revision
is kept.

`select: draw` draws one principle a round for each draft, as in the paper (Bai et al. 2022).
`select: sweep` asks a critique under every principle, then a revision for each fault named, one
after another on the revised text: with many principles a draw seldom meets the fault.

A revision's index is that of its place (draft, step), not of its turn: which other revisions there
are moves none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from prefab.factory.thinking import policy_answer
from prefab.factory.types import Completion, Principle, Prompt, Request, Sample
from prefab.factory.uses import CritiqueUse, DraftUse, RevisionUse
from prefab.judges import panel
from prefab.judges.base import RequestContext
from prefab.judges.kinds import critique
from prefab.pipelines.config.schema import ReviseConfig
from prefab.pipelines.run.context import Context, policy_messages, policy_sampling

Fault = tuple[Principle, str]


async def pipeline(prompt: Prompt, ctx: Context) -> None:
    """Sample drafts, then critique and revise them."""
    drafts = await sample(prompt, ctx)
    if ctx.revise is not None:
        await revise(prompt, drafts, ctx.revise, ctx)


async def sample(prompt: Prompt, ctx: Context) -> list[Sample]:
    """The policy's answers to one prompt. Cut-off answers are kept; what came to nothing is counted
    and left out.
    """
    policy = ctx.config.policy
    sampling = policy_sampling(ctx)
    model = ctx.engines[policy.engine].identity
    messages, kwargs = policy_messages(ctx, prompt), tuple(sorted(policy.template_kwargs.items()))
    asks = [
        (
            Request(
                model, messages, sampling, (), kwargs, (k,) if policy.temperature > 0 or k else ()
            ),
            DraftUse(ctx.run, prompt.id, k),
        )
        for k in range(policy.samples)
    ]
    drafts = []
    for k, answer in enumerate(await ctx.ask(asks, policy.engine)):
        if isinstance(answer, Exception):
            continue
        text, _, reason = policy_answer(answer)
        ctx.counts.truncated += answer.finish == "length"
        if text is None:
            ctx.unscored("sample", reason)
            continue
        drafts.append(Sample(prompt.id, k, text, answer.finish))
    return drafts


async def revise(
    prompt: Prompt, drafts: Sequence[Sample], config: ReviseConfig, ctx: Context
) -> list[Sample]:
    """All revisions of these drafts, by the `revise` section's rounds and selection."""
    principles = panel.applicable(ctx.constitution.principles, prompt.tags)
    width = len(principles) if config.select == "sweep" else 1
    n_drafts = ctx.config.policy.samples
    current = {draft.index: draft for draft in drafts}
    revisions: list[Sample] = []
    for round in range(config.rounds):
        drawn = {
            k: principles if config.select == "sweep" else _draw(prompt, k, round, ctx)
            for k in current
        }
        faults = await _critiques(prompt, current, drawn, round, config.min_p_fault, ctx)
        if not any(faults.values()) and ctx.critic.temperature == 0:
            break  # the same questions again would get the same answers
        for step in range(max(map(len, faults.values()), default=0)):
            due = {k: named[step] for k, named in faults.items() if step < len(named)}
            indices = {
                k: n_drafts
                + (k * config.rounds + round) * width
                + (principles.index(principle) if width > 1 else 0)
                for k, (principle, _) in due.items()
            }
            made = await _revisions(prompt, current, due, indices, round, ctx)
            current.update(made)
            revisions += made.values()
    return revisions


def _draw(prompt: Prompt, k: int, round: int, ctx: Context) -> list[Principle]:
    """The one principle that is drawn for a draft in a round."""
    weighted = ctx.constitution.selection == "weighted"
    return panel.draw(
        ctx.constitution.principles,
        "weighted" if weighted else "sample_one",
        ctx.config.seed,
        prompt.id,
        (k,),
        round,
        prompt.tags,
    )


def _context(config: critique.CritiqueConfig, ctx: Context) -> RequestContext:
    """What a critic's requests need beside the answer."""
    engine = str(config.engine)
    specials = ctx.specials(engine)
    return RequestContext(
        ctx.run,
        ctx.engines[engine].identity,
        ctx.templates,
        specials,
        partial(ctx.examples, specials),
        ctx.config.seed,
    )


async def _critiques(
    prompt: Prompt,
    current: dict[int, Sample],
    drawn: dict[int, list[Principle]],
    round: int,
    least: float,
    ctx: Context,
) -> dict[int, list[Fault]]:
    """For each draft the faults that the critic names in its current text, in the principles'
    order. A fault whose probability is less than `least` is left out.
    """
    critic, context, engine = (
        critique.Critic(ctx.critic),
        _context(ctx.critic, ctx),
        str(ctx.critic.engine),
    )
    asks, places = [], []
    for k, text in current.items():
        for principle in drawn[k]:
            at = replace(text, index=k)
            request = critic.critique_request(prompt, at, principle, context, round)
            asks.append((request, CritiqueUse(ctx.run, prompt.id, text.index, principle.id, round)))
            places.append((k, principle))
    faults: dict[int, list[Fault]] = {k: [] for k in current}
    for (k, principle), answer in zip(places, await ctx.ask(asks, engine), strict=True):
        if isinstance(answer, Completion):
            read = critique.parse_critique(
                answer,
                prompt.id,
                current[k].index,
                principle.id,
                ctx.templates["critique"].labels,
                ctx.critic.min_label_mass,
            )
            ctx.unscored("critique", read.reason)
            if read.fault and (read.p_fault is None or read.p_fault >= least):
                faults[k].append((principle, read.text))
    return faults


async def _revisions(
    prompt: Prompt,
    current: dict[int, Sample],
    due: dict[int, Fault],
    indices: dict[int, int],
    round: int,
    ctx: Context,
) -> dict[int, Sample]:
    """The revision of each draft that is due, by `indices` the index of each; a draft whose
    revision cannot be read keeps its text.
    """
    reviser, engine = critique.Critic(ctx.reviser), str(ctx.reviser.engine)
    context = _context(ctx.reviser, ctx)
    asks, made = [], []
    for k, (principle, named) in due.items():
        at = replace(current[k], index=k)
        request = reviser.revise_request(prompt, at, principle, named, context, round)
        index, parent = indices[k], current[k].index
        made.append(Sample(prompt.id, index, "", "stop", parent, round, principle.id))
        use = RevisionUse(ctx.run, prompt.id, index, parent, principle.id, round)
        asks.append((request, use))
    revisions = {}
    for k, revision, answer in zip(due, made, await ctx.ask(asks, engine), strict=True):
        if isinstance(answer, Completion):
            read = critique.parse_revision(answer)
            ctx.unscored("revise", read.reason)
            if read.text is not None:
                revisions[k] = replace(revision, text=read.text)
    return revisions
