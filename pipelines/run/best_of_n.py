"""Best-of-n: n samples a prompt, each scored once, and the best compared with the worst.

The best answers are demonstrations for SFT (rejection sampling), and best and worst are a pair for
a reward model or DPO. Any judge that scores one answer at a time can score: `pointwise`, `rubric`,
`verifier`, `reward_model`. A prompt costs n samples and n scores a principle, however large n is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypedDict

from prefab.factory.stats import bon_kl
from prefab.factory.store.store import read_frame
from prefab.factory.types import Comparison, Prompt, Sample
from prefab.factory.uses import ComparisonUse, IdenticalUse
from prefab.judges.base import Decoded, Judge, Score
from prefab.pipelines.run import cai
from prefab.pipelines.run.context import Context
from prefab.pipelines.run.judging import Responses, draw_for_answers, judge_all


async def pipeline(prompt: Prompt, ctx: Context) -> None:
    """Sample, score every answer, and record the best and the worst as a comparison."""
    drafts = await cai.sample(prompt, ctx)
    drawn = draw_for_answers(prompt, ctx)
    # neighbours, so that every answer is in a comparison; each is scored once
    questions = [(Comparison(prompt, a, b), drawn) for a, b in pairwise(drafts)]
    heard = await judge_all(ctx.judges, questions, ctx)
    weights = {principle.id: principle.weight for principle in drawn}
    totals = total_scores(
        prompt, drafts, ctx.judges, heard, weights, ctx.config.panel_settings().min_scored
    )
    if len(totals) < 2:
        return
    ranked = sorted(totals, key=lambda index: (-totals[index], index))
    a, b = sorted((ranked[0], ranked[-1]))
    texts = {draft.index: draft.text for draft in drafts}
    if texts[a] == texts[b]:
        return ctx.note(IdenticalUse(ctx.run, prompt.id, a, b))
    for name in list(weights) or [""]:
        ctx.note(ComparisonUse(ctx.run, prompt.id, a, b, name))


def total_scores(
    prompt: Prompt,
    drafts: Sequence[Sample],
    judges: Sequence[Judge[Any]],
    heard: Responses,
    principles: Mapping[str, float],
    min_scored: float,
) -> dict[int, float]:
    """One number for each answer, by its index; answers with too few scores are left out.

    A judge's score of an answer is the weighted mean over `principles` (their weights), or the mean
    of the points earned over the lines of the prompt's own rubric. Where several judges score, each
    one's scores are brought to mean 0 and deviation 1 over the prompt's answers before they are
    added by weight, since judges of different kinds have different scales.

    Args:
        prompt: The prompt that was answered.
        drafts: Its answers.
        judges: Those that scored.
        heard: Their decoded scores.
        principles: Weights by id.
        min_scored: Share of the judges' and principles' weight that must be scored.
    """
    totals = {draft.index: 0.0 for draft in drafts}
    scored = dict.fromkeys(totals, 0.0)
    by_place: dict[tuple[str, int], list[Decoded]] = {}
    for one in heard:
        by_place.setdefault((one.use.judge, one.use.sample), []).append(one)
    for judge in judges:
        found = {
            index: _score_of(prompt, judge, by_place.get((judge.name, index), ()), principles)
            for index in totals
        }
        values = {index: value for index, (value, _) in found.items() if value is not None}
        if not values:
            continue
        mean, deviation = fmean(values.values()), pstdev(values.values())
        for index, value in values.items():
            if len(judges) > 1:
                value = (value - mean) / deviation if deviation else 0.0
            totals[index] += judge.weight * value
            scored[index] += judge.weight * found[index][1]
    least = min_scored * sum(judge.weight for judge in judges)
    return {i: total for i, total in totals.items() if scored[i] and scored[i] >= least}


def _score_of(
    prompt: Prompt,
    judge: Judge[Any],
    answers: Sequence[Decoded],
    principles: Mapping[str, float],
) -> tuple[float | None, float]:
    """(a judge's score of one answer, the share of its questions' weight that was scored)."""
    total = scored = whole = 0.0
    for one in answers:
        read, weight = one.value, principles.get(one.use.principle, 1.0)
        whole += weight
        if not isinstance(read, Score) or read.value is None:
            continue
        scored += weight
        if one.use.rubric:
            total += prompt.rubric[one.use.line][1] * read.value
        else:
            total += weight * (judge.merit(read) or 0.0)
    return (total / scored, scored / whole) if scored else (None, 0.0)


class BestOf(TypedDict):
    """The mean score of the best of `n` answers by one judge, and what choosing it costs in KL."""

    judge: str
    n: int
    kl: float
    score: float
    prompts: int


def curve(folder: Path, run: int, judges: Sequence[Judge[Any]]) -> list[BestOf]:
    """How the score of the best of n answers grows with n, by judge: for n = 1, 2, 4, ... up to the
    samples of a prompt.

    The mean over all choices of n among a prompt's answers, so that it has no bias; prompts with
    fewer scored answers than another are left out. `kl` is the most that choosing the best can move
    from the policy, in nats an answer (`bon_kl`).

    Args:
        folder: The store.
        run: The run's number.
        judges: Those that scored.

    Raises: HeldError where another program holds the store.
    """
    found: list[BestOf] = []
    for judge in judges:
        rows = read_frame(folder, _ANSWERS, {"run": run, "judge": judge.name}).rows()
        scores = [sorted(judge.merit(Score(value)) or 0.0 for value in row) for (row,) in rows]
        most = max(map(len, scores), default=0)
        whole = [row for row in scores if len(row) == most]
        sizes = {*(2**k for k in range(most.bit_length())), most} - {0}
        for n in sorted(sizes):
            mean = fmean(_expected_best(row, n) for row in whole)
            found.append(
                BestOf(judge=judge.name, n=n, kl=bon_kl(n), score=mean, prompts=len(whole))
            )
    return found


_ANSWERS = """
SELECT list(value) FROM (
    SELECT prompt, "index", avg(value) AS value FROM scores
    WHERE run = $run AND judge = $judge AND value IS NOT NULL AND points IS NULL GROUP BY ALL)
GROUP BY prompt ORDER BY prompt"""


def _expected_best(ascending: Sequence[float], n: int) -> float:
    """The mean of the largest of n values over all choices of n: the i-th smallest is it in
    C(i, n - 1) of them (i from 0).
    """
    ways = comb(len(ascending), n)
    return sum(x * comb(i, n - 1) / ways for i, x in enumerate(ascending))
