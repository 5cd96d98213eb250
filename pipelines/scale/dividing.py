"""When a shard in work, or one whose worker was lost, is divided among workers that have nothing
to do, and what was asked of it until then.

A worker that is told to stop keeps what is in flight and publishes it. Each of the others restores
what is published, asks the rest of its part of the prompts, and publishes that. When all parts are
done, one worker takes the whole shard: every question has its answer, and it makes the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefab.pipelines.scale.sharding import Part

MOVE_S = 10.0  # that it takes until others go on: stopping, publishing, restoring
DRAIN_S = 30.0  # after which a worker that was told to stop is killed: what was in flight is lost
ASKED = ("asked", "prompt_tokens", "completion_tokens")


@dataclass(slots=True)
class Busy:
    """A worker's part of a shard: when it began to ask (before that: when it got the part), and
    what it has done so far: nothing while it starts engines or restores the shard.
    """

    part: Part
    began: float
    counts: dict[str, int] = field(default_factory=dict)
    stopped: float | None = None  # when it was told to stop, so that other workers go on

    def pace(self, now: float, prompts: int) -> Pace:
        """How far it is, of so many prompts of the whole shard."""
        total = self.part.share_of(prompts)
        return Pace(now - self.began, min(self.counts.get("prompts", 0), total), total)


@dataclass(frozen=True, slots=True)
class Pace:
    """How far a worker is with its part: `done` of `total` prompts."""

    elapsed_s: float
    done: int
    total: int

    @property
    def left(self) -> int:
        """How many prompts are left."""
        return self.total - self.done

    @property
    def per_s(self) -> float:
        """Prompts a second; as if one was done where none is."""
        return max(self.done, 1) / max(self.elapsed_s, 1e-3)

    @property
    def left_s(self) -> float:
        """Seconds to its end at this pace."""
        return self.left / self.per_s


def is_worth_dividing(pace: Pace, usual_per_s: float, workers: int) -> bool:
    """Whether so many workers of the usual speed (prompts a second) would end the rest in less than
    half the time, with what it takes until they begin.
    """
    if pace.elapsed_s < MOVE_S:
        return False
    rest_s = pace.left / (usual_per_s * workers)
    return pace.left_s > 2 * (rest_s + MOVE_S)


def is_worth_sharing(pace: Pace, usual_per_s: float, workers: int) -> bool:
    """Whether so many workers of the usual speed (prompts a second) would end sooner than one of
    them what a worker that was lost has left, with what it takes until they begin.
    """
    left_s = pace.left / usual_per_s
    return left_s > left_s / workers + MOVE_S


@dataclass(slots=True)
class Divided:
    """A shard that was stopped to be divided, or whose worker was lost: the counts of the whole
    until it was stopped (None where its worker was lost), those of the parts that ended, what
    workers that were lost had told, and how many parts have not ended.
    """

    whole: dict[str, Any] | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, int]] = field(default_factory=list)
    open: int = 0

    def asked(self) -> dict[str, int]:
        """What was asked so far."""
        told = [*self.parts, *([self.whole] if self.whole else []), *self.lost]
        return {name: sum(one.get(name, 0) for one in told) for name in ASKED}

    def counts(self) -> list[dict[str, Any]]:
        """The counts of what was done, each prompt once, where the run stops before the end."""
        if not self.parts or not self.whole:
            return [self.whole] if self.whole else self.parts
        first = self.parts[0] | {name: self.parts[0][name] + self.whole[name] for name in ASKED}
        return [first, *self.parts[1:]]
