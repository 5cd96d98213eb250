"""Rewards on text: any callable, several with weights, ensembles, and what makes their scales
comparable.

A reward is `reward(prompts, completions) -> list[float]`, one number an answer; None says that an
answer could not be scored, and leaves it out of the update, counted. It reads text, so that a
reward model has its own tokenizer and template.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

from pydantic import Field

from prefab.factory.errors import ConfigError
from prefab.trainers import distributed
from prefab.trainers.common import Strict, TrainError
from prefab.trainers.offline import reward as reward_model
from prefab.trainers.offline.process import step_scorer
from prefab.trainers.offline.reward import Combine, combine
from prefab.trainers.rl import processes
from prefab.trainers.rl.rollout import Prompt

Reward = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]]
Maker = Callable[["RewardConfig"], Reward]  # of kinds that only the pipelines can make
Scales = dict[
    str, list[tuple[float, float]]
]  # of a source: (mean, deviation) of each member, then of the whole


class StepRewards(float):
    """The reward of an answer as the sum of rewards of its steps. As a number it is the whole.

    Attributes:
        steps: Where a step ends in the answer's text, in characters, and its reward.
    """

    steps: tuple[tuple[int, float], ...]

    def __new__(cls, steps: Sequence[tuple[int, float]], total: float | None = None) -> StepRewards:
        """`total`, where other rewards of the whole answer are in it."""
        made = super().__new__(cls, sum(v for _, v in steps) if total is None else total)
        made.steps = tuple(steps)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """As processes send it to one another."""
        return self.steps, float(self)


class RewardConfig(Strict):
    """One source of reward. Several `paths`, or a folder with several members, are an ensemble.

    `model`: reward models. `file`: a Python file with a function `reward(prompts, completions)`.
    `judge`: a pointwise judge of the pipeline file in `paths` (direct RLAIF). `verifier`: a program
    that checks the answer. `process`: a process reward model, whose reward of a step is
    2 P(right) - 1, over the number of steps; PPO gets it at the step's last token. `oracle`: the
    embedded world's truth, to measure with; a policy trained on it proves nothing.
    """

    name: str = Field(min_length=1)
    kind: Literal["model", "file", "judge", "verifier", "process", "oracle"] = "model"
    paths: list[str] = []
    judge: str = Field(
        "", description="Of judge: its name in the pipeline; left out: the first pointwise one."
    )
    verifier: dict[str, Any] = Field(
        {}, description="Of verifier: check, reference and all else of such a judge."
    )
    weight: float = Field(1.0, allow_inf_nan=False)
    combine: Combine = "mean"
    lam: float = Field(
        1.0, ge=0, description="Of mean_minus_sd: how many deviations between the members."
    )
    batch: int = Field(32, ge=1)


@dataclass(frozen=True, slots=True)
class Source:
    """A reward by name; its members are scored apart and combined."""

    name: str
    members: tuple[Reward, ...]
    weight: float = 1.0
    combine: Combine = "mean"
    lam: float = 1.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Of B answers: the total that is trained on, and by source the raw scores and the members'
    deviation.

    `total` is None where any source could not score the answer.
    """

    texts: Sequence[str]

    total: list[float | None]
    raw: dict[str, list[float | None]]
    disagreement: dict[str, list[float]]


def single(reward: Reward, name: str = "reward") -> tuple[Source, ...]:
    """One plain reward as the only source."""
    return (Source(name, (reward,)),)


def asked_once(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The rewards, so that the main process asks each and all get its values."""

    def once(reward: Reward) -> Reward:
        return lambda prompts, completions: processes.on_main(
            lambda: list(reward(prompts, completions))
        )

    if distributed.world_size() == 1:
        return tuple(sources)
    return tuple(replace(s, members=tuple(map(once, s.members))) for s in sources)


def score(
    sources: Sequence[Source],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    scales: Scales | None = None,
) -> Scores:
    """Every source on every answer; with `scales` each member, then each source, is brought to mean
    0 and deviation 1.

    Raises: TrainError for a reward that raises, or gives the wrong number of values, or one that is
    no number.
    """
    found = Scores(completions, [0.0] * len(completions), {}, {})
    steps: dict[int, list[tuple[int, float]]] = {}
    for source in sources if completions else ():
        rows = [call(source, member, prompts, completions) for member in source.members]
        scale = (scales or {}).get(source.name) or [(0.0, 1.0)] * (len(rows) + 1)
        scaled = [_scaled(row, one) for row, one in zip(rows, scale, strict=False)]
        if len(rows) == 1:
            _add_steps(steps, rows[0], source.weight / scale[0][1] / scale[-1][1])
        columns = list(zip(*scaled, strict=True))
        found.raw[source.name] = [combine(column, "mean") for column in zip(*rows, strict=True)]
        found.disagreement[source.name] = _deviations(columns)
        whole = _scaled([combine(c, source.combine, source.lam) for c in columns], scale[-1])
        found.total[:] = [
            None if old is None or new is None else old + source.weight * new
            for old, new in zip(found.total, whole, strict=True)
        ]
    for b, of_answer in steps.items():
        total = found.total[b]
        found.total[b] = None if total is None else StepRewards(of_answer, total)
    return found


def _add_steps(
    steps: dict[int, list[tuple[int, float]]], values: Sequence[float | None], unit: float
) -> None:
    """Add the rewards of the answers' steps, times `unit`, by the answer's place."""
    for b, value in enumerate(values):
        if isinstance(value, StepRewards):
            steps.setdefault(b, []).extend((end, unit * v) for end, v in value.steps)


def _deviations(columns: Sequence[Sequence[float | None]]) -> list[float]:
    """How far an ensemble's members differ, of each answer that all of them scored."""
    complete = [[x for x in column if x is not None] for column in columns if None not in column]
    # pstdev of one value is 0 too, and takes a hundred times as long
    return [pstdev(known) if len(known) > 1 else 0.0 for known in complete]


def _scaled(values: Sequence[float | None], scale: tuple[float, float]) -> list[float | None]:
    """Values less the mean, over the deviation."""
    mean, deviation = scale
    return [None if x is None else (x - mean) / deviation for x in values]


def score_ended(
    sources: Sequence[Source],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    ended: Sequence[bool],
    unfinished_score: float | None,
    scales: Scales,
) -> tuple[list[float | None], Scores]:
    """(the total of every answer, the scores of the answers that were read).

    Answers that did not end get `unfinished_score` and are not read; with None all are read.
    """
    read = [b for b, end in enumerate(ended) if end or unfinished_score is None]
    found = score(sources, [prompts[b] for b in read], [completions[b] for b in read], scales)
    totals: list[float | None] = [unfinished_score] * len(completions)
    for b, total in zip(read, found.total, strict=True):
        totals[b] = total
    return totals, found


def check_all_vary(found: Scores) -> None:
    """Raises: TrainError where a reward gives the same score to different texts."""
    if len(set(found.texts)) > 1:
        for name, raw in found.raw.items():
            check_varies(name, [x for x in raw if x is not None])


def calibrate(
    sources: Sequence[Source], prompts: Sequence[Prompt], completions: Sequence[str]
) -> Scales:
    """Means and deviations over the reference's own answers: what it writes will score 0 on
    average, with deviation 1.

    Raises: TrainError for a reward that is the same for all of them, or scores fewer than two.
    """
    scales: Scales = {}
    for source in sources:
        rows = [call(source, member, prompts, completions) for member in source.members]
        members = [_scale(source.name, row) for row in rows]
        scaled = [_scaled(row, scale) for row, scale in zip(rows, members, strict=True)]
        whole = [
            combine(column, source.combine, source.lam) for column in zip(*scaled, strict=True)
        ]
        scales[source.name] = [*members, _scale(source.name, whole)]
    return scales


def _scale(name: str, values: Sequence[float | None]) -> tuple[float, float]:
    known = [x for x in values if x is not None]
    check_varies(name, known)
    return fmean(known), pstdev(known)


def check_varies(name: str, scores: Sequence[float]) -> None:
    """Raises: TrainError where a reward says the same of every answer."""
    if len(scores) < 2:
        raise TrainError(
            f"reward {name}: scored {len(scores)} answers; at least 2 are needed to know its scale"
        )
    if pstdev(scores) <= 1e-9 * max(1.0, abs(fmean(scores))):
        raise TrainError(
            f"reward {name}: the same value ({scores[0]:g}) for all {len(scores)} answers; there is nothing "
            "to learn from it. Where success is rare, draw more answers first (reference_samples)"
        )


def call(
    source: Source, reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str]
) -> list[float | None]:
    """What a reward says, checked: one finite number or None an answer.

    Raises: TrainError that names the reward, and the answer where it is one answer's fault.
    """
    try:
        values = list(reward(prompts, completions))
    except TrainError:
        raise
    except Exception as error:
        raise TrainError(
            f"reward {source.name}: raised {type(error).__name__}: {error} (on {len(completions)} answers, "
            f"the first {completions[0][:60]!r})"
        ) from error
    if len(values) != len(completions):
        raise TrainError(
            f"reward {source.name}: gave {len(values)} values for {len(completions)} answers; it must give one "
            "number for each"
        )
    return [
        _number(source.name, value, text) for value, text in zip(values, completions, strict=True)
    ]


def _number(name: str, value: Any, text: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TrainError(
            f"reward {name}: gave {value!r} for the answer {text[:60]!r}; it must be a number, or None "
            "where it cannot score"
        ) from None
    if not isfinite(number):
        raise TrainError(
            f"reward {name}: gave {number} for the answer {text[:60]!r}. Give None where it cannot score"
        )
    if isinstance(value, StepRewards):
        if not all(isfinite(v) and 0 < end <= len(text) for end, v in value.steps):
            raise TrainError(
                f"reward {name}: a step of the answer {text[:60]!r} has no finite reward, or ends "
                "outside of the answer"
            )
        return value
    return number


def build(configs: Sequence[RewardConfig], makers: Mapping[str, Maker] = {}) -> tuple[Source, ...]:
    """The sources that a configuration names. `makers` by kind: judges and verifiers come from
    `prefab.pipelines.training.judge_reward`.

    Raises: ConfigError for two of one name, a file that is not there or has no `reward`, a model
    that is none.
    """
    names = [c.name for c in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"rewards: two are named {twice[0]}; each needs its own name")
    return tuple(
        Source(c.name, tuple(_members(c, makers)), c.weight, c.combine, c.lam) for c in configs
    )


def elsewhere(config: RewardConfig) -> Source:
    """The source of a process that does not ask it: the main process does (`rl.processes`)."""

    def unasked(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        raise TrainError(f"reward {config.name}: is asked by the main process alone")

    several = config.kind in ("model", "file", "process")
    n = sum(len(members_of(p)) if config.kind == "model" else 1 for p in config.paths)
    members = (unasked,) * (n if several else 1)
    return Source(config.name, members, config.weight, config.combine, config.lam)


def _members(config: RewardConfig, makers: Mapping[str, Maker]) -> list[Reward]:
    if config.kind == "oracle":
        return [oracle]
    if config.kind in ("judge", "verifier"):
        if config.kind not in makers:
            raise ConfigError(
                f"rewards: {config.name}: a {config.kind} is made by prefab.pipelines.training.judge_reward.opened; give what "
                "it yields as sources"
            )
        return [makers[config.kind](config)]
    if not config.paths:
        raise ConfigError(f"rewards: {config.name}: name at least one {config.kind} in paths")
    if config.kind == "file":
        return [from_file(path) for path in config.paths]
    if config.kind == "process":
        return [from_process_model(path, config.batch) for path in config.paths]
    return [
        from_model(member, config.batch) for path in config.paths for member in members_of(path)
    ]


def oracle(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The embedded world's gold score: helpful (0 or 1) minus the weighted share of principles
    broken.
    """
    from prefab.factory.microworld.oracle import assess
    from prefab.factory.types import Message

    return [
        assess([Message(t["role"], t["content"]) for t in turns(prompt)], text).score
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a conversation."""
    return (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [dict(turn) for turn in prompt]
    )


def from_file(path: str) -> Reward:
    """The function `reward` of a Python file, which is run.

    Raises: ConfigError where there is none.
    """
    if not Path(path).is_file():
        raise ConfigError(f"rewards: no such file: {path}")
    try:
        found = runpy.run_path(path).get("reward")
    except Exception as error:
        raise ConfigError(
            f"rewards: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"rewards: {path} has no function reward(prompts, completions)")
    reward: Reward = found
    return reward


def from_model(folder: str, batch: int = 32) -> Reward:
    """A reward model on text, read through its own tokenizer and chat template, on the scale that
    its training saved.

    Raises: ConfigError where it is no reward model, or its tokenizer has no template.
    """
    scored = reward_model.scorer(folder, batch)

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        talks = [
            [*turns(prompt), {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        values: list[float] = scored(talks).tolist()
        return values

    return reward


def from_process_model(folder: str, batch: int = 32) -> Reward:
    """A process reward model as a reward: of each step 2 P(right) - 1, over the number of the
    answer's steps, so that more steps are no better. None for an answer without a step.

    Raises: ConfigError where it is no process reward model.
    """
    scored = step_scorer(folder, batch)

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        found = scored([turns(prompt) for prompt in prompts], completions)
        return [
            StepRewards([(end, (2 * p - 1) / len(steps)) for end, p in steps]) if steps else None
            for steps in found
        ]

    return reward


def members_of(folder: str) -> list[str]:
    """The models of an ensemble that `prefab train reward` wrote; of a single model, the folder
    itself.
    """
    file = Path(folder) / reward_model.FILE
    names = json.loads(file.read_text()).get("members", []) if file.exists() else []
    return [str(Path(folder) / name) for name in names] or [folder]
