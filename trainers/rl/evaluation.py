"""Evaluations during PPO and GRPO: the scale of rewards on the reference's answers before training,
then proxy, gold and KL on the same held-out prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prefab.trainers.common import TrainError
from prefab.trainers.rl import checkpoint, decoding, overoptimization, rewards
from prefab.trainers.rl.config import RlConfig
from prefab.trainers.rl.models import as_reference, policy_sampler, reference_logps
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer, turns_of
from prefab.trainers.rl.state import Run


def rows_of(seed: int, n: int, step: int, batch: int) -> list[int]:
    """Which prompts a step answers: every epoch is a shuffle of all of them, drawn from (seed,
    epoch).
    """
    rows: list[int] = []
    for epoch in range(step * batch // n, ((step + 1) * batch - 1) // n + 1):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}/prompts").shuffle(order)
        rows += order[max(0, step * batch - epoch * n) : (step + 1) * batch - epoch * n]
    return rows


def texts_of(t: Run, answers: Sequence[SampledAnswer]) -> list[str]:
    """The text of each answer, without control tokens."""
    if not answers:  # transformers decodes an empty list to one empty text
        return []
    texts: list[str] = t.tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)
    return texts


def calibrate(t: Run) -> rewards.Scales:
    """The rewards' means and deviations on the reference's own answers, those that ended.

    Raises: TrainError where fewer than two ended, or a reward does not vary.
    """
    rows = rows_of(t.config.seed, len(t.prompts), 0, t.config.reference_samples)
    seed = checkpoint.seed_step(t.config.seed, t.state.step, "calibrate")
    with as_reference(t) as reference:
        answers = policy_sampler(t, reference).sample([t.prompt_ids[i] for i in rows], seed)
    if t.reference is not None:  # it is not sampled from again
        decoding.forget(t.reference)
    texts = texts_of(t, answers)
    ended = [b for b, a in enumerate(answers) if a.ended or t.config.unfinished_score is None]
    if len(ended) < 2:
        raise TrainError(
            f"the reference ended {len(ended)} of {len(answers)} answers within max_new_tokens "
            f"({t.config.max_new_tokens}): raise it, or begin with a model that ends its answers"
        )
    return rewards.calibrate(
        t.sources, [t.prompts[rows[b]] for b in ended], [texts[b] for b in ended]
    )


def evaluated_at(config: RlConfig) -> range:
    """The steps after which gold is to be asked; 0 is before any training."""
    return range(0, config.steps + 1, config.eval_every)


def due(t: Run) -> bool:
    """Whether gold is asked after this step: as planned, and at once again where it was just seen
    to have fallen, so that the alarm's second measurement need not wait (at most as many times more
    as planned).
    """
    planned, seen = evaluated_at(t.config), t.state.evaluations
    return t.state.step in planned or (
        len(seen) < 2 * len(planned)
        and overoptimization.suspected(seen)
        and not overoptimization.alarm(seen, len(planned))
    )


def start(t: Run, gold: Source | None, prompts: Sequence[Prompt], ids: list[list[int]]) -> None:
    """Record proxy, gold and KL before any training: what gains and losses are measured from."""
    if gold and not t.state.evaluations:
        checkpoint.record(t, {"step": 0, **evaluate(t, gold, prompts, ids)})


def evaluate(
    t: Run, gold: Source, prompts: Sequence[Prompt], ids: list[list[int]]
) -> dict[str, Any]:
    """Proxy, gold and KL on the same held-out prompts, sampled with a fixed seed; the best policy
    by gold is kept in `out`/best. Rewards, gold and reference are asked only about answers that the
    last evaluation has not scored.

    Raises: TrainError where gold leaves an answer unscored, or the rewards score none.
    """
    seed = checkpoint.seed_step(t.config.seed, 0, "evaluate")
    former = [s.ids for s in t.state.seen]
    answers = policy_sampler(t, t.policy).sample(ids, seed, former)
    t.state.seen = _scored(t, gold, prompts, answers)
    proxy = [s.proxy for s in t.state.seen if s.proxy is not None]
    if not proxy:
        raise TrainError(
            f"rewards could score none of the {len(answers)} answers that gold is asked of"
        )
    truth = [s.gold for s in t.state.seen]
    kl = fmean(
        sum(a.sampler_logps) - s.reference_logp for a, s in zip(answers, t.state.seen, strict=True)
    )
    t.state.evaluations.append(Evaluation(t.state.step, kl, fmean(proxy), tuple(truth)))
    fired = overoptimization.alarm(t.state.evaluations, len(evaluated_at(t.config)))
    if overoptimization.best(t.state.evaluations).step == t.state.step:
        checkpoint.write_policy(t, Path(t.config.out) / "best")
    if fired and t.config.stop_on_alarm:
        t.state.stopped = str(fired)
    return {
        "eval/proxy": fmean(proxy),
        "eval/gold": fmean(truth),
        "eval/kl": kl,
        "eval/samples": _samples(t, prompts, answers),
        "alarm": str(fired) if fired else "",
    }


KEPT_SAMPLES = 3  # answers of an evaluation that are recorded with it
LONGEST_SAMPLE = 1_500  # characters of a recorded text


def _samples(
    t: Run, prompts: Sequence[Prompt], answers: Sequence[SampledAnswer]
) -> list[dict[str, Any]]:
    """The answers to the first prompts, which are the same at every evaluation, to read how they
    change.
    """
    texts = texts_of(t, answers[:KEPT_SAMPLES])
    return [
        {
            "turns": [
                [turn["role"], str(turn["content"])[:LONGEST_SAMPLE]]
                for turn in turns_of(prompt, t.tokenizer)
            ],
            "text": text[:LONGEST_SAMPLE],
            "proxy": seen.proxy,
            "gold": seen.gold,
        }
        for prompt, text, seen in zip(prompts, texts, t.state.seen, strict=False)
    ]


def _gold_scores(gold: Source, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Raises: TrainError where an answer has no score."""
    found = rewards.score([gold], prompts, texts).total
    told = [float(x) for x in found if x is not None]
    if len(told) < len(found):
        raise TrainError(
            f"gold {gold.name}: {len(found) - len(told)} of {len(found)} answers have no score; "
            "gold must score all"
        )
    return told


def _scored(
    t: Run, gold: Source, prompts: Sequence[Prompt], answers: Sequence[SampledAnswer]
) -> list[CachedEval]:
    """The answers with their scores: those of the last evaluation where the answer is the same."""
    known = {
        b: seen
        for b, (a, seen) in enumerate(zip(answers, t.state.seen, strict=bool(t.state.seen)))
        if a.ids == seen.ids and seen.proxy is not None
    }
    new = [b for b in range(len(answers)) if b not in known]
    asked, texts = [prompts[b] for b in new], texts_of(t, [answers[b] for b in new])
    told = _gold_scores(gold, asked, texts)
    logps = reference_logps(t, [answers[b] for b in new])
    proxy = rewards.score(t.sources, asked, texts, t.state.scales).total
    found = {
        # a plain number: it is written as JSON, which rewards of steps cannot be
        b: CachedEval(answers[b].ids, logp, None if mine is None else float(mine), real)
        for b, logp, mine, real in zip(new, logps, proxy, told, strict=True)
    }
    return [known[b] if b in known else found[b] for b in range(len(answers))]
