"""Judges and verifiers as rewards of PPO and GRPO: direct RLAIF (Lee et al. 2023), and programs
that check an answer.

A judge is a pointwise one of a pipeline file: the expected score over its labels, scaled to -1..1,
a mean over the constitution's principles as the panel selects them. Questions go through the
pipeline's engine and a ledger of their own, STORE/reward, behind which stands the run's: identical
questions are asked once, after a kill too, and no statistic or export meets an answer of training.
What is unscored is None, which leaves the answer out of the update.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from prefab.factory import keys
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.types import Comparison, Engine, Message, Prompt, Sample
from prefab.judges import base as judges
from prefab.judges import panel
from prefab.judges.base import NO_PRINCIPLE, Judge, RequestContext
from prefab.judges.kinds import verifier
from prefab.pipelines.config.loader import ResolvedPipeline, resolve_pipeline
from prefab.pipelines.run import judging
from prefab.pipelines.run.asking import AskingSession, asking_session, engine_for
from prefab.trainers.distributed import is_main
from prefab.trainers.rl import rewards, rollout
from prefab.trainers.rl.rewards import Reward, RewardConfig, Source

Engines = Mapping[str, Engine]
T = TypeVar("T")
Score = Callable[[Prompt, str], Coroutine[Any, Any, float | None]]

NO_ANSWER = "no_answer"


@dataclass(frozen=True, slots=True)
class PrincipleScore:
    """What a judge says of an answer under one principle.

    Attributes:
        principle: Its id.
        weight: Its weight in the mean.
        score: From -1 to 1; None where it could not be read.
        value: The expected grade on the judge's own scale.
        probabilities: Of each grade, from the lowest.
        mass: The probability of all grades together.
        reason: Why there is no score; NO_ANSWER where the engine gave none.
        exactness: Whether the probabilities are exact, bounds, or a bare answer (hard).
    """

    principle: str
    weight: float
    score: float | None
    value: float | None
    probabilities: tuple[float, ...]
    mass: float | None
    reason: str | None
    exactness: str


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """The score of an answer: from -1 to 1, or None where too little could be read."""

    score: float | None
    principles: list[PrincipleScore]


@contextmanager
def opened(
    config: Any,
    quiet: bool = True,
    engines: Engines | None = None,
) -> Iterator[tuple[tuple[Source, ...], Source | None]]:
    """(the rewards, gold) of a PPO or GRPO configuration; engines that judges need run until the
    end of the block.

    `engines` by name stand in for those that a pipeline would start. Raises: ConfigError,
    EngineError.
    """
    if not is_main():  # the main process asks, and tells the others
        gold = rewards.elsewhere(config.gold) if config.gold else None
        yield tuple(map(rewards.elsewhere, config.rewards)), gold
        return
    with ExitStack() as stack:
        made: list[Background] = []

        def background() -> Background:
            if not made:
                made.append(stack.enter_context(Background()))
            return made[0]

        makers = {
            "judge": lambda c: stack.enter_context(of_judge(c, background(), quiet, engines)),
            "verifier": lambda c: stack.enter_context(of_verifier(c, background())),
        }
        gold = rewards.build([config.gold], makers)[0] if config.gold else None
        yield rewards.build(config.rewards, makers), gold


class Background:
    """An event loop on a thread of its own: servers are looked after while the policy trains."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rewards", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop; its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def reward_of(score: Score, background: Background) -> Reward:
    """A function of one prompt and text as a reward on many, all asked at once."""

    def reward(prompts: Sequence[rollout.Prompt], completions: Sequence[str]) -> list[float | None]:
        async def every() -> list[float | None]:
            return await asyncio.gather(
                *(
                    score(asked(prompt), text)
                    for prompt, text in zip(prompts, completions, strict=True)
                )
            )

        return background(every())

    return reward


def asked(prompt: rollout.Prompt) -> Prompt:
    """A trainer's prompt as one of a pipeline; its id is that of its text."""
    messages = tuple(Message(turn["role"], turn["content"]) for turn in rewards.turns(prompt))
    return Prompt(keys.prompt_id(messages), messages)


@contextmanager
def of_judge(
    config: RewardConfig, background: Background, quiet: bool = True, engines: Engines | None = None
) -> Iterator[Reward]:
    """A pointwise judge of a pipeline file as a reward on -1 (worst) to 1.

    Raises: ConfigError where there is none, EngineError when its engine cannot start.
    """
    if len(config.paths) != 1:
        raise ConfigError(f"rewards: {config.name}: name the pipeline file of the judge in paths")
    loaded = resolve_pipeline(Path(config.paths[0]))
    judge = find(loaded, config.judge, f"rewards: {config.name}: {config.paths[0]}")
    folder = Path(loaded.config.store)
    asking = asking_session(
        loaded,
        judge,
        engine_for(loaded, judge, engines),
        folder / "reward",
        f"reward-{judge.name}",
        {"recipe": "reward"},
        behind=folder,
        quiet=quiet,
    )
    session = background(asking.__aenter__())
    try:
        yield reward_of(scorer(loaded, session), background)
    finally:
        background(asking.__aexit__(None, None, None))


def find(loaded: ResolvedPipeline, name: str, where: str) -> Judge[Any]:
    """The pointwise judge of this name; of no name, the pipeline's first one. Raises: ConfigError,
    which begins with `where`.
    """
    found = [judge for judge in loaded.judges if judge.rewards and name in ("", judge.name)]
    if not found:
        names = [judge.name for judge in loaded.judges if judge.rewards]
        missing = (
            f'no pointwise judge is named "{name}"; {did_you_mean(name, names)}'
            if names
            else (
                "none of its judges is pointwise, and only such a judge scores single answers. Name a pipeline file with "
                "panel: {judges: [{name: points, kind: pointwise}]}"
            )
        )
        raise ConfigError(f"{where}: {missing}")
    return found[0]


def scorer(loaded: ResolvedPipeline, session: AskingSession) -> Score:
    """The judge's score of an answer alone."""
    score_answer = answer_scorer(loaded, session)

    async def score(prompt: Prompt, text: str) -> float | None:
        return (await score_answer(prompt, text)).score

    return score


def answer_scorer(
    loaded: ResolvedPipeline, session: AskingSession
) -> Callable[[Prompt, str], Coroutine[Any, Any, AnswerScore]]:
    """The judge's score of an answer: the weighted mean over principles, None where less than the
    panel's `min_scored` of their weight is scored.
    """
    judge, ctx = session.judge, session.ctx
    principles, rule = loaded.constitution.principles, ctx.config.panel_settings()
    selection = rule.selection or loaded.constitution.selection
    tagged = any(p.applies_when for p in principles)  # only the pipeline's own prompts have tags
    tags = {keys.prompt_id(p.messages): p.tags for p in loaded.prompts} if tagged else {}
    recorded: set[str] = set()

    async def score(prompt: Prompt, text: str) -> AnswerScore:
        if prompt.id not in recorded:
            recorded.add(prompt.id)
            session.ledger.add_prompts([prompt])
        drawn = panel.draw(
            principles, selection, loaded.config.seed, prompt.id, (0,), 0, tags.get(prompt.id, ())
        )
        # numbered by its text: the same answer is the same use
        sample = Sample(prompt.id, int(keys.digest(text)[:7], 16), text)
        weights = {p.id: p.weight if len(drawn) > 1 else 1.0 for p in drawn}
        asks = [(Comparison(prompt, sample, sample), drawn)]
        responses = await judging.judge(judge, asks, ctx)
        found = [
            _principle_score(judge, one.use.principle, weights[one.use.principle], one.value)
            for one in responses
            if isinstance(one.value, judges.Score)
        ]
        there = {of.principle for of in found}
        found += [
            PrincipleScore(p.id, weights[p.id], None, None, (), None, NO_ANSWER, "hard")
            for p in drawn
            if p.id not in there
        ]
        scored = [(of.weight, of.score) for of in found if of.score is not None]
        weight, whole = sum(w for w, _ in scored), sum(weights.values()) * judge.repeats
        if not weight or weight < rule.min_scored * whole:
            return AnswerScore(None, found)
        return AnswerScore(sum(w * value for w, value in scored) / weight, found)

    return score


def _principle_score(
    judge: Judge[Any], principle: str, weight: float, of: judges.Score
) -> PrincipleScore:
    said = (of.value, of.probabilities, of.mass, of.reason, of.exactness)
    return PrincipleScore(principle, weight, judge.reward(of), *said)


@contextmanager
def of_verifier(config: RewardConfig, background: Background) -> Iterator[Reward]:
    """A program as a reward from 0 to 1; None where it cannot decide. Raises: ConfigError for
    settings that are wrong.
    """
    try:
        settings = verifier.VerifierConfig.model_validate(
            {"name": config.name, "kind": "verifier", **config.verifier}
        )
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    f"rewards: {config.name}",
                    0,
                    0,
                    ".".join(map(str, ("verifier", *e["loc"]))),
                    e["msg"],
                )
                for e in error.errors()
            ]
        ) from error
    judge, context = verifier.VerifierJudge(settings), RequestContext()
    engine = judge.own_engine()
    background(engine.start())

    async def score(prompt: Prompt, text: str) -> float | None:
        sample = Sample(prompt.id, 0, text)
        request = judge.request(prompt, sample, NO_PRINCIPLE, 0, 0, context)
        return judge.decode(None, await engine.complete(b"", request)).value

    try:
        yield reward_of(score, background)
    finally:
        background(engine.stop())
