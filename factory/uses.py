"""What a call was asked for, one class a role, and the columns of the ledger's table `uses`.

A use is committed with or before the first use of its call, so that the preference store can be
derived from the ledger alone. `row_of` and `use_of` are the one place that knows what a column
means for each role. All uses of one comparison belong in one `Ledger.ask_many`, which writes them
in one transaction: a comparison is never seen with half of its questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

NO_ESCALATION = ("", "budget")  # reasons of an `EscalationUse` that ask no stronger judge


@dataclass(frozen=True, slots=True)
class DraftUse:
    """The text of the policy's answer number `sample`."""

    run: int
    prompt: str
    sample: int
    role: ClassVar[str] = "sample"
    principle: ClassVar[str] = ""
    judge: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class CritiqueUse:
    """A critique of answer number `sample` under a principle."""

    run: int
    prompt: str
    sample: int
    principle: str
    round: int = 0
    role: ClassVar[str] = "critique"
    judge: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class RevisionUse:
    """The text of the new answer number `sample`, which revises answer number `parent`."""

    run: int
    prompt: str
    sample: int
    parent: int
    principle: str
    round: int = 0
    role: ClassVar[str] = "revise"
    judge: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class PairUse:
    """What a judge says of answers a and b in one order: `ab`, `ba`, or `-` where there is none.

    `role` is `judge`, or `reason` for the reasoning before a label is read.
    """

    run: int
    prompt: str
    role: str
    a: int
    b: int
    principle: str
    judge: str
    order: str
    repeat: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        """The indices of samples a and b."""
        return self.a, self.b


@dataclass(frozen=True, slots=True)
class ScoreUse:
    """What a judge says of one answer. `rubric` names the prompt's own rubric where the judge reads
    it (empty: it is asked under a principle), and `line` is the rubric's line that is asked about.
    """

    run: int
    prompt: str
    sample: int
    principle: str
    judge: str
    line: int = 0
    rubric: str = ""
    repeat: int = 0
    role: ClassVar[str] = "score"


@dataclass(frozen=True, slots=True)
class StepUse:
    """What a judge says of one step of an answer, by the step's number from 0."""

    run: int
    prompt: str
    sample: int
    step: int
    principle: str
    judge: str
    repeat: int = 0
    role: ClassVar[str] = "step"


@dataclass(frozen=True, slots=True)
class RankUse:
    """A judge's order of all answers. `shown` has the samples' indices as they were shown, in the
    permutation of this number.
    """

    run: int
    prompt: str
    principle: str
    judge: str
    permutation: int
    shown: tuple[int, ...]
    repeat: int = 0
    role: ClassVar[str] = "rank"


@dataclass(frozen=True, slots=True)
class IdenticalUse:
    """Answers a and b have equal texts: a tie by definition, which nobody is asked about."""

    run: int
    prompt: str
    a: int
    b: int
    role: ClassVar[str] = "identical"
    principle: ClassVar[str] = ""
    judge: ClassVar[str] = ""

    @property
    def pair(self) -> tuple[int, int]:
        """The indices of samples a and b."""
        return self.a, self.b


@dataclass(frozen=True, slots=True)
class ComparisonUse:
    """Answers a and b are compared under a principle; asks nothing itself."""

    run: int
    prompt: str
    a: int
    b: int
    principle: str
    role: ClassVar[str] = "pair"
    judge: ClassVar[str] = ""

    @property
    def pair(self) -> tuple[int, int]:
        """The indices of samples a and b."""
        return self.a, self.b


@dataclass(frozen=True, slots=True)
class EscalationUse:
    """Whether a stronger judge is asked about answers a and b, and why; asks nothing itself."""

    run: int
    prompt: str
    a: int
    b: int
    reason: str
    principle: ClassVar[str] = ""
    judge: ClassVar[str] = ""

    @property
    def pair(self) -> tuple[int, int]:
        """The indices of samples a and b."""
        return self.a, self.b

    @property
    def role(self) -> Literal["escalate", "settle"]:
        """`escalate` where the stronger judge is asked, else `settle`."""
        return "settle" if self.reason in NO_ESCALATION else "escalate"


Use = (
    DraftUse
    | CritiqueUse
    | RevisionUse
    | PairUse
    | ScoreUse
    | StepUse
    | RankUse
    | IdenticalUse
    | ComparisonUse
    | EscalationUse
)


class UseColumns(NamedTuple):
    """The columns of the ledger's table `uses` after run and prompt, in their order."""

    role: str
    sample: int = 0
    other: int = -1
    round: int = 0
    principle: str = ""
    judge: str = ""
    order: str = ""
    repeat: int = 0


def columns_of(use: Use) -> UseColumns:
    """The ledger's columns for a use."""
    role, judge = use.role, use.judge
    match use:
        case PairUse():  # first: most uses are of this kind
            return UseColumns(role, use.a, use.b, 0, use.principle, judge, use.order, use.repeat)
        case DraftUse():
            return UseColumns(role, use.sample)
        case CritiqueUse():
            return UseColumns(role, use.sample, -1, use.round, use.principle)
        case RevisionUse():
            return UseColumns(role, use.sample, use.parent, use.round, use.principle)
        case ScoreUse():
            about, rubric = (use.sample, -1, use.line, use.principle), use.rubric
            return UseColumns(role, *about, judge, rubric, use.repeat)
        case StepUse():
            at = (use.sample, use.step, 0, use.principle)
            return UseColumns(role, *at, judge, repeat=use.repeat)
        case RankUse():
            shown = ",".join(map(str, use.shown))
            return UseColumns(
                role, -1, -1, use.permutation, use.principle, judge, shown, use.repeat
            )
        case EscalationUse():
            return UseColumns(role, *use.pair, order=use.reason)
        case IdenticalUse() | ComparisonUse():
            return UseColumns(role, *use.pair, 0, use.principle)


def use_of(run: int, prompt: str, c: UseColumns) -> Use:
    """The use that these columns of the ledger say; undoes `columns_of`."""
    match c.role:
        case "sample":
            return DraftUse(run, prompt, c.sample)
        case "critique":
            return CritiqueUse(run, prompt, c.sample, c.principle, c.round)
        case "revise":
            return RevisionUse(run, prompt, c.sample, c.other, c.principle, c.round)
        case "score":
            place = (c.sample, c.principle, c.judge, c.round, c.order, c.repeat)
            return ScoreUse(run, prompt, *place)
        case "step":
            return StepUse(run, prompt, c.sample, c.other, c.principle, c.judge, c.repeat)
        case "rank":
            shown = tuple(map(int, c.order.split(",")))
            return RankUse(run, prompt, c.principle, c.judge, c.round, shown, c.repeat)
        case "identical":
            return IdenticalUse(run, prompt, c.sample, c.other)
        case "pair":
            return ComparisonUse(run, prompt, c.sample, c.other, c.principle)
        case "escalate" | "settle":
            return EscalationUse(run, prompt, c.sample, c.other, c.order)
    pair = (c.sample, c.other)
    return PairUse(run, prompt, c.role, *pair, c.principle, c.judge, c.order, c.repeat)
