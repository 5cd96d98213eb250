"""Putting comparisons to the judges of a panel: each kind asks its own questions about the same
pairs.

What shares a pair, or an answer, stands together, for the server's prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from prefab.factory.ledger.records import rubric_id
from prefab.factory.types import Comparison, Completion, Principle, Prompt, Sample, Use
from prefab.judges import panel, registry
from prefab.judges.kinds import human, listwise, pairwise
from prefab.judges.kinds import rubric as rubrics
from prefab.pipelines.run.context import Ask, Context

Question = tuple[Comparison, list[Principle]]
Responses = list[tuple[Use, Completion]]  # what was answered, and for what
NO_ORDER = "-"
NO_PRINCIPLE = Principle("", "", "", "", "", "")


async def judge_all(
    judges: Sequence[Any], questions: Sequence[Question], ctx: Context
) -> Responses:
    """Every question to each of these judges."""
    if len(judges) == 1:
        return await judge(judges[0], questions, ctx)
    found = await asyncio.gather(*(judge(config, questions, ctx) for config in judges))
    return [one for some in found for one in some]


async def judge(config: Any, questions: Sequence[Question], ctx: Context) -> Responses:
    """All readings of one judge for one prompt's questions."""
    if not questions:
        return []
    shows = registry.shows(config)
    if shows == "pair":
        return await _pairs(config, questions, ctx)
    if shows == "all":
        return await _rankings(config, questions, ctx)
    if shows == "apart":
        return await _people(config, questions, ctx)
    return await _scores(config, questions, ctx)


def n_calls(config: Any, questions: Sequence[Question], ctx: Context) -> int:
    """How many calls these questions are to one judge; labels, to people."""
    if not questions:
        return 0
    if registry.shows(config) == "apart":
        return sum(len(principles) for _, principles in questions)
    if registry.shows(config) == "pair":
        return sum(1 for _ in _readings(config, questions, ctx)) * (2 if config.reasoning else 1)
    if registry.shows(config) == "all":
        return len(_by_principle(questions)) * config.permutations * config.repeats
    return len(_score_places(config, questions))


async def _pairs(
    config: pairwise.PairwiseConfig, questions: Sequence[Question], ctx: Context
) -> Responses:
    model, specials = ctx.engines[config.engine].identity, ctx.specials(config.engine)
    template = ctx.templates[config.name]
    heard = await _reasoning(config, questions, ctx) if config.reasoning else []
    reasons = {use_key(use): pairwise.parse_reasoning(answer) for use, answer in heard}
    asks: list[Ask] = []
    name = config.scored_template if config.reasoning else config.template
    for comparison, principle, order, repeat in _readings(config, questions, ctx):
        use = _use("judge", comparison, principle, order, repeat, config, ctx)
        said, reason = (
            reasons.get(use_key(use), (None, "transport")) if config.reasoning else (None, None)
        )
        if reason is not None:
            continue
        request = pairwise.request(
            config,
            template,
            comparison,
            principle,
            model,
            order,
            repeat,
            specials,
            ctx.examples(name, principle, principle.compare),
            said,
        )
        asks.append((request, use))
    judged = await _ask(asks, config, ctx)
    for use, answer in judged:
        ctx.unscored("judge", pairwise.parse(answer, use.order, config).reason)
    return heard + judged


async def _reasoning(
    config: pairwise.PairwiseConfig, questions: Sequence[Question], ctx: Context
) -> Responses:
    """The first pass of judges that reason. Reasoning that broke off is not scored."""
    model, specials = ctx.engines[config.engine].identity, ctx.specials(config.engine)
    template, asks = ctx.templates[config.name + " reasoning"], []
    for comparison, principle, order, repeat in _readings(config, questions, ctx):
        request = pairwise.reasoning_request(
            config,
            template,
            comparison,
            principle,
            model,
            order,
            repeat,
            specials,
            ctx.examples(config.reasoning_template, principle, principle.compare),
            ctx.config.seed,
        )
        asks.append((request, _use("reason", comparison, principle, order, repeat, config, ctx)))
    heard = await _ask(asks, config, ctx)
    for _, answer in heard:
        ctx.unscored("reason", pairwise.parse_reasoning(answer)[1])
    return heard


async def _scores(config: Any, questions: Sequence[Question], ctx: Context) -> Responses:
    """One question for each answer (and principle, and line of a rubric), however many comparisons
    it stands in.
    """
    prompt = questions[0][0].prompt
    engine, model = registry.engine_of(config), ctx.engines[registry.engine_of(config)].identity
    specials, template, module = (
        ctx.specials(engine),
        ctx.templates.get(config.name),
        registry.module(config.kind),
    )
    own = rubric_id(prompt.rubric) if config.kind == "rubric" and prompt.rubric else ""
    asks: list[Ask] = []
    for sample, principle, line, repeat in _score_places(config, questions):
        use = Use(
            ctx.run,
            prompt.id,
            "score",
            sample.index,
            -1,
            line,
            principle.id,
            config.name,
            own,
            repeat,
        )
        if registry.is_program(config):
            request = module.request(config, prompt, sample)
        elif config.kind == "rubric":
            # the constitution's examples speak of its principles' faults, not of a prompt's own
            # lines
            criterion = prompt.rubric[line][0] if own else principle.criterion
            examples = () if own else ctx.examples(config.template, principle, criterion)
            request = rubrics.request(
                config, template, prompt, sample, criterion, model, repeat, specials, examples
            )
        else:
            examples = ctx.examples(config.template, principle, principle.criterion)
            request = module.request(
                config, template, prompt, sample, principle, model, repeat, specials, examples
            )
        asks.append((request, use))
    heard = await _ask(asks, config, ctx)
    for _, answer in heard:
        ctx.unscored("score", module.parse(answer, config).reason)
    return heard


def _score_places(
    config: Any, questions: Sequence[Question]
) -> list[tuple[Sample, Principle, int, int]]:
    """Sample, principle, line of the prompt's own rubric and repeat: each once, a sample's
    questions together.
    """
    prompt = questions[0][0].prompt if questions else None
    own = prompt is not None and config.kind == "rubric" and bool(prompt.rubric)
    free = own or registry.is_program(config)
    wanted: dict[int, tuple[Sample, dict[str, Principle]]] = {}
    for comparison, principles in questions:
        for sample in (comparison.a, comparison.b):
            _, under = wanted.setdefault(sample.index, (sample, {}))
            under.update(
                {principle.id: principle for principle in ([NO_PRINCIPLE] if free else principles)}
            )
    lines = range(len(prompt.rubric) if own else 1)
    return [
        (sample, principle, line, repeat)
        for sample, under in (wanted[i] for i in sorted(wanted))
        for principle, line, repeat in product(
            under.values(), lines, range(registry.repeats(config))
        )
    ]


async def _rankings(
    config: listwise.ListwiseConfig, questions: Sequence[Question], ctx: Context
) -> Responses:
    """All answers that are compared under a principle, ordered at once, in several permutations of
    showing them.
    """
    prompt = questions[0][0].prompt
    model, specials = ctx.engines[config.engine].identity, ctx.specials(config.engine)
    template, asks = ctx.templates[config.name], []
    for principle, samples in _by_principle(questions):
        shown = listwise.permutations(len(samples), config.permutations, prompt.id, ctx.config.seed)
        for (number, permutation), repeat in product(enumerate(shown), range(config.repeats)):
            request = listwise.request(
                config,
                template,
                prompt,
                samples,
                permutation,
                principle,
                model,
                repeat,
                specials,
                ctx.examples(config.template, principle, principle.compare),
            )
            order = ",".join(str(samples[i].index) for i in permutation)
            asks.append(
                (
                    request,
                    Use(
                        ctx.run,
                        prompt.id,
                        "rank",
                        -1,
                        -1,
                        number,
                        principle.id,
                        config.name,
                        order,
                        repeat,
                    ),
                )
            )
    heard = await _ask(asks, config, ctx)
    for use, answer in heard:
        ctx.unscored("rank", listwise.parse(answer, tuple(map(int, use.order.split(",")))).reason)
    return heard


async def _people(
    config: human.HumanConfig, questions: Sequence[Question], ctx: Context
) -> Responses:
    """What people have said of these comparisons; the others wait for them, and are counted."""
    known, asks = ctx.people.get(config.name, {}), []
    for comparison, principles in questions:
        for principle in principles:
            prompt, a, b = comparison.prompt.id, comparison.a.text, comparison.b.text
            request = human.request(known, prompt, a, b, principle.id)
            if request is None:
                ctx.counts.awaited += 1
            else:
                asks.append(
                    (request, _use("judge", comparison, principle, NO_ORDER, 0, config, ctx))
                )
    heard = await _ask(asks, config, ctx)
    ctx.counts.awaited += sum(
        not answer.text for _, answer in heard
    )  # split, skipped, or taken back
    return heard


def _by_principle(questions: Sequence[Question]) -> list[tuple[Principle, list[Sample]]]:
    """The samples that are compared under each principle, by their index."""
    found: dict[str, tuple[Principle, dict[int, Sample]]] = {}
    for comparison, principles in questions:
        for principle in principles:
            _, samples = found.setdefault(principle.id, (principle, {}))
            samples.update({sample.index: sample for sample in (comparison.a, comparison.b)})
    return [
        (principle, [samples[i] for i in sorted(samples)]) for principle, samples in found.values()
    ]


async def _ask(asks: Sequence[Ask], config: Any, ctx: Context) -> Responses:
    """The questions that were answered, with their answers."""
    answers = await ctx.ask(asks, registry.engine_of(config))
    return [
        (use, answer)
        for (_, use), answer in zip(asks, answers, strict=True)
        if isinstance(answer, Completion)
    ]


def _readings(
    config: pairwise.PairwiseConfig, questions: Sequence[Question], ctx: Context
) -> Iterable[tuple[Comparison, Principle, str, int]]:
    for comparison, principles in questions:
        a, b = comparison.a.index, comparison.b.index
        orders = panel.orders(ctx.config.panel.orders, ctx.config.seed, comparison.prompt.id, a, b)
        yield from (
            (comparison, principle, order, repeat)
            for order in orders
            for principle in principles
            for repeat in range(config.repeats)
        )


def _use(
    role: str,
    comparison: Comparison,
    principle: Principle,
    order: str,
    repeat: int,
    config: pairwise.PairwiseConfig,
    ctx: Context,
) -> Use:
    return Use(
        ctx.run,
        comparison.prompt.id,
        role,
        comparison.a.index,
        comparison.b.index,
        0,
        principle.id,
        config.name,
        order,
        repeat,
    )


def use_key(use: Use) -> tuple:
    """Which reading of a judge this is."""
    return use.sample, use.other, use.principle, use.order, use.repeat


def note_pairs(prompt: Prompt, questions: Sequence[Question], ctx: Context) -> None:
    """Record which comparisons are made under which principles, where no judge's use tells."""
    if all(registry.shows(config) == "pair" for config in ctx.judges):
        return
    for comparison, principles in questions:
        for name in [principle.id for principle in principles] or [""]:
            ctx.note(
                Use(ctx.run, prompt.id, "pair", comparison.a.index, comparison.b.index, 0, name)
            )
