"""What one run's recipes share: how they ask, what they have counted, and when they must stop.

A recipe is a plain async function for one prompt. It asks through the context in lists, which costs
the ledger one look-up and one write a list; running it again is how a crashed run resumes.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefab.factory.errors import (
    BudgetError,
    EngineError,
    PrefabError,
    RequestRefused,
    reason_of,
)
from prefab.factory.ledger.ledger import LedgerStats
from prefab.factory.spec.control_tokens import neutral_messages, neutralise
from prefab.factory.spec.templates import Template
from prefab.factory.types import (
    Completion,
    Constitution,
    Engine,
    Message,
    Principle,
    Prompt,
    Request,
    Sampling,
)
from prefab.factory.uses import IdenticalUse, Use
from prefab.judges.base import Judge
from prefab.judges.kinds.critique import CritiqueConfig
from prefab.pipelines.config.loader import ResolvedPipeline
from prefab.pipelines.config.schema import PipelineConfig, ReviseConfig
from prefab.pipelines.store.labels import people
from prefab.pipelines.store.verdicts import Rules

# during a run, shares of a handful of answers say nothing; at its end they count whatever their
# number
BUDGET_FROM = 200
MAX_REASONS = 20  # of failures that are told apart
OTHER_REASONS = "other reasons"
NOTHING_FROM = 20  # so many failures and not one answer: there is no server
# in a plan; invisible separators: no text of a person's has exactly this
PLACEHOLDER = "\u2063not answered yet\u2063"
Response = Completion | Exception
Ask = tuple[Request, Use]

_LABEL = {"a": "A", "b": "B", "tie": "T"}


class Stopped(PrefabError):
    """The run was told to stop; what was answered is kept, and the same command goes on from
    there.
    """


class Asker(Protocol):
    """Where answers come from: the ledger in a run, a look-up alone in a plan."""

    stats: LedgerStats

    async def ask_many(self, asks: Sequence[Ask], engine: Engine) -> Sequence[Response]:
        """The answers in the order of the asks; a `TransportError` stands where none came."""

    def note(self, use: Use, call: bytes = b"") -> None:
        """Record something that was decided without asking, or a use of a recorded call."""

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Record prompts, before they are asked."""

    def drop_queued(self, error: Exception) -> None:
        """Fail what is not in flight yet with this error."""


@dataclass(slots=True)
class Failures:
    """How many calls failed for one reason, with the message of the first."""

    n: int
    example: str


@dataclass(slots=True)
class Counts:
    """What a run has seen so far. `unscored` counts answers that could not be read, by role and
    reason.
    """

    prompts: int = 0
    answers: int = 0
    failed: int = 0
    refused: int = 0  # of the failed: refused by the server for good
    tokens: int = 0
    truncated: int = 0
    identical: int = 0
    unscored: Counter[tuple[str, str]] = field(default_factory=Counter)
    escalation: Counter[str] = field(
        default_factory=Counter
    )  # comparisons by why, and the stronger judges' calls
    failures: dict[str, Failures] = field(default_factory=dict)  # by reason
    awaited: int = 0  # labels that people have not given yet
    begun: Counter[str] = field(default_factory=Counter)  # answers of the prompts at work
    of_finished: int = 0  # answers of those that are done

    def fail(self, error: Exception) -> None:
        """Count a call that got no answer, with those of the same reason."""
        self.failed += 1
        self.refused += isinstance(error, RequestRefused)
        reason = reason_of(error)
        if reason in self.failures:
            self.failures[reason].n += 1
        elif len(self.failures) < MAX_REASONS:
            self.failures[reason] = Failures(1, str(error))
        else:
            self.failures.setdefault(OTHER_REASONS, Failures(0, str(error))).n += 1

    def finish(self, prompt: str) -> None:
        """One prompt is done."""
        self.prompts += 1
        self.of_finished += self.begun.pop(prompt, 0)

    def share(self, total: int | None) -> float | None:
        """The share of a run's answers that is there, by what a finished prompt needed; None before
        one is finished.
        """
        if not total or not self.of_finished:
            return None
        expected = self.of_finished / self.prompts * total
        return min(self.prompts / total if self.prompts == total else 0.99, self.answers / expected)

    @property
    def n_unscored(self) -> int:
        """All unscored answers together."""
        return sum(self.unscored.values())


@dataclass(slots=True)
class Context:
    """The resolved configuration, made usable: engines by name, templates, principles, and the
    ledger to ask.
    """

    config: PipelineConfig
    constitution: Constitution
    run: int
    asker: Asker
    engines: Mapping[str, Engine]
    templates: Mapping[str, Template]
    critic: CritiqueConfig
    reviser: CritiqueConfig
    revise: ReviseConfig | None
    judges: Sequence[Judge[Any]]
    people: Mapping[str, Any]  # by judge of kind human, what people said (`human.answers`)
    counts: Counts = field(default_factory=Counts)
    stopping: bool = False
    hurry: bool = False
    stopped_by: int = signal.SIGINT  # the signal that told it to stop
    last_failure: str = ""
    rules: Rules | None = None  # how the store will read the answers, once somebody wants to know
    _examples: dict[tuple[str, str, tuple[str, ...]], list[dict[str, Any]]] = field(
        default_factory=dict
    )

    @classmethod
    def of(
        cls, loaded: ResolvedPipeline, run: int, asker: Asker, engines: Mapping[str, Engine]
    ) -> Context:
        """The context of run number `run` of a resolved pipeline."""
        return cls(
            loaded.config,
            loaded.constitution,
            run,
            asker,
            engines,
            loaded.templates,
            loaded.critic,
            loaded.reviser,
            loaded.revise if loaded.revises else None,
            loaded.judges,
            people(loaded),
        )

    async def ask(self, asks: Sequence[Ask], engine: str) -> Sequence[Response]:
        """The answers to all asks, in order; failures are in their places as exceptions.

        Raises: Stopped after Ctrl-C, BudgetError when the run has passed its budget.
        """
        if not asks:
            return ()
        self.check()
        answers = await self.asker.ask_many(asks, self.engines[engine])
        counts = self.counts
        counts.answers += len(answers)
        counts.begun[asks[0][1].prompt] += len(answers)
        for answer in answers:
            if isinstance(answer, Exception):
                counts.fail(answer)
                self.last_failure = str(answer)
            else:
                counts.tokens += answer.prompt_tokens + answer.completion_tokens
        return answers

    def stop(self) -> None:
        """Ask nothing more: what waits for a place fails with Stopped.
        What is in flight is kept.
        """
        self.stopping = True
        self.asker.drop_queued(Stopped("stopped"))

    def check(self) -> None:
        """Raises when nothing more may be asked: told to stop, or a budget is passed."""
        if self.stopping:
            raise Stopped("stopped")
        counts, budget = self.counts, self.config.budget
        if counts.failed >= NOTHING_FROM:
            self.check_answered()
        if counts.answers >= BUDGET_FROM:
            self.check_shares()
        for name, n, limit in (
            ("calls", self.asked(), budget.calls),
            ("tokens", self.tokens(), budget.tokens),
        ):
            if limit is not None and n >= limit:
                raise BudgetError(
                    f"{n:,} {name} were used: the cap budget.{name} of {limit:,} is reached"
                )

    def check_shares(self) -> None:
        """Raises: BudgetError when more answers are unscored, or failed, than their share of all
        answers so far allows.
        """
        counts, budget = self.counts, self.config.budget
        for name, n, limit in (
            ("unscored", counts.n_unscored, budget.unscored),
            ("failed", counts.failed, budget.failed),
        ):
            if limit is not None and n > limit * counts.answers:
                raise BudgetError(
                    f"{n:,} of {counts.answers:,} answers {_WHAT[name]}: more than the "
                    f"budget.{name} of {limit:.1%} allows{self._reasons(name)}"
                )

    def check_answered(self) -> None:
        """Raises: EngineError when not one question was answered: that is no accident, nobody is
        there.
        """
        if self.counts.failed and self.counts.failed == self.counts.answers:
            raise EngineError(
                f"none of {self.counts.failed:,} calls was answered: {self.last_failure}"
            )

    def asked(self) -> int:
        """How many calls were really made, not found in the ledger."""
        return self.asker.stats.asked

    def tokens(self) -> int:
        """Tokens of the calls really made."""
        return self.asker.stats.prompt_tokens + self.asker.stats.completion_tokens

    def _reasons(self, name: str) -> str:
        if name != "unscored":
            return ""
        most = self.counts.unscored.most_common(4)
        return " (" + ", ".join(f"{role} {reason}: {n:,}" for (role, reason), n in most) + ")"

    def note(self, use: Use, call: bytes = b"") -> None:
        """Record what is decided without asking, or a use of a recorded call."""
        self.counts.identical += isinstance(use, IdenticalUse)
        self.asker.note(use, call)

    def unscored(self, role: str, reason: str | None) -> None:
        """Count an answer that could not be read; None counts nothing."""
        if reason is not None:
            self.counts.unscored[role, reason] += 1

    def specials(self, engine: str) -> tuple[str, ...]:
        """Control tokens of the tokenizer that this engine serves, which no text may become."""
        return self.engines[engine].special_tokens

    def examples(
        self, specials: tuple[str, ...], template: str, principle: Principle
    ) -> list[dict[str, Any]]:
        """The constitution's few-shot examples for a template under a principle, ready for the
        template to print: no control token, `specials` among them, is left whole.
        """
        kind = template.removesuffix(".jinja")
        rows = self.constitution.examples.get(kind)
        if not rows:
            return []
        found = self._examples.get((kind, principle.id, specials))
        if found is None:
            by_id = {p.id: p for p in self.constitution.principles}
            found = self._examples[kind, principle.id, specials] = [
                _shown(
                    _example(row, kind, by_id.get(row.get("principle", ""), principle)), specials
                )
                for row in rows
                if row.get("principle") in (None, principle.id)
            ]
        return found


_WHAT = {"unscored": "are unscored", "failed": "failed"}
_FIELD = {"critique": "critique", "revise": "revise"}


def _example(row: Mapping[str, Any], kind: str, principle: Principle) -> dict[str, Any]:
    """A row as the templates name it: with the principle's own question, and the label that a judge
    would give.
    """
    label = _LABEL.get(row.get("prefer", ""), "")
    name = "compare"
    if "score" in row or "fault" in row:
        label = str(row["score"]) if "score" in row else "Yes" if row["fault"] else "No"
        name = "criterion"
    return {**row, "question": getattr(principle, _FIELD.get(kind, name)), "label": label}


def _shown(example: Mapping[str, Any], specials: tuple[str, ...]) -> dict[str, Any]:
    """An example without control tokens in its texts."""
    return {
        name: neutralise(value, specials) if isinstance(value, str) else value
        for name, value in example.items()
    }


def policy_sampling(ctx: Context) -> Sampling:
    """How the policy is sampled; the run's seed counts only at temperature above 0."""
    policy = ctx.config.policy
    seed = ctx.config.seed if policy.temperature > 0 else None
    return Sampling(
        policy.max_tokens,
        policy.temperature,
        policy.top_p,
        policy.top_k,
        policy.min_p,
        stop=tuple(policy.stop),
        seed=seed,
    )


def policy_messages(ctx: Context, prompt: Prompt) -> tuple[Message, ...]:
    """What the policy is asked: the prompt, in which no control token that came from outside is
    left whole.
    """
    specials = ctx.specials(ctx.config.policy.engine)
    return neutral_messages(prompt.messages, specials)
