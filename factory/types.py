"""The types that all of Prefab shares: frozen dataclasses, and the `Engine` protocol.

Texts are `str`, ids are content digests (hex) unless a person chose them, probabilities are in [0,
1], log-probabilities are natural logarithms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel

Order = Literal["ab", "ba"]
Winner = Literal["a", "b", "tie"]
Exactness = Literal["exact", "bounds", "hard"]
PrincipleSelection = Literal["sample_one", "all", "weighted", "lexicographic"]
Finish = Literal["stop", "length", "context", "refused"]
# `program`: a verifier's own program could not decide (broken tests, no reference), whatever the
# answer was. `too_long`: more than LONGEST_TEXT characters.
UnscoredReason = Literal[
    "parse",
    "refused",
    "truncated",
    "low_label_mass",
    "transport",
    "context",
    "no_logprobs",
    "program",
    "too_long",
]
# Characters of an answer. No model writes that much; a broken server does, and an answer of 200 MB
# would need gigabytes in each step after it.
LONGEST_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is system, user, assistant or tool.

    `more` is canonical JSON of what a turn has beside its text, empty where that is nothing:
    `tool_calls` of an assistant, `tool_call_id` and `name` of a tool's result, and in the first
    turn the `tools` that may be called. See `tool_calls`.
    """

    role: str
    content: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy is asked. `group` names what must stay on one side of a split; `split` is
    train, val or test.

    `rubric` holds the prompt's own criteria with the points that each earns; negative points make a
    pitfall.
    """

    id: str
    messages: tuple[Message, ...]
    tags: tuple[str, ...] = ()
    group: str | None = None
    split: str | None = None
    rubric: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Principle:
    """One rule of a constitution. `applies_when` lists prompt tags, any of which makes it apply;
    empty means always.
    """

    id: str
    title: str
    compare: str
    critique: str
    revise: str
    criterion: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    applies_when: tuple[str, ...] = ()
    formerly: tuple[str, ...] = ()
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Constitution:
    """A named list of principles, with few-shot examples and tests. `source` is a text that stands
    alone, kept with each run: the file's own, or, where it extends others, all of them resolved.
    `files` then has the files themselves, (name, text); `origin` says where imported texts come
    from (source, commit).
    """

    id: str
    title: str
    licence: str
    selection: PrincipleSelection
    principles: tuple[Principle, ...]
    examples: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    tests: tuple[Mapping[str, Any], ...] = ()
    source: str = ""
    files: tuple[tuple[str, str], ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. Every field is always sent: a server otherwise fills in the model's own
    defaults.

    `seed` is the run's seed, present only at temperature above 0.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a model: everything that decides the answer, and nothing else. See
    `keys.request_key`.

    `labels` are the spellings whose log-probabilities are read: at the first generated token, or
    where more tokens are asked for, at that of the label which the answer names or begins with
    (empty: none). `repeat` is (sample, round, ...) wherever the temperature is above 0, or an
    explicit repeat of a judge.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    labels: tuple[str, ...] = ()
    template_kwargs: tuple[tuple[str, Any], ...] = ()
    repeat: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back. `label_logps` maps each readable spelling to its log-probability at the
    label's token.

    `finish` is stop, length, context (the prompt was longer than `limit` tokens) or refused (by the
    server's policy). `replica` names the server that gave the answer; it is recorded, and not
    looked up again.
    """

    text: str
    finish: Finish
    label_logps: Mapping[str, float] | None = None
    exactness: Exactness = "exact"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    limit: int = 0
    replica: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer of the policy to a prompt. `parent` is the index of the sample it revises, -1 for a
    first draft.
    """

    prompt: str
    index: int
    text: str
    finish: str = "stop"
    parent: int = -1
    round: int = 0
    principle: str = ""


@dataclass(frozen=True, slots=True)
class Critique:
    """What a critic said of one sample under one principle. `fault` is None when the critique could
    not be read. `p_fault` is the probability of a fault at the critique's first word, None where
    the engine gave none (`hard`); `mass` is that of both labels together.
    """

    prompt: str
    sample: int
    principle: str
    text: str
    fault: bool | None
    reason: UnscoredReason | None = None
    p_fault: float | None = None
    mass: float | None = None
    exactness: Exactness = "hard"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two samples of one prompt, put to judges."""

    prompt: Prompt
    a: Sample
    b: Sample

    def swap(self) -> Comparison:
        """The same two answers in the other order."""
        return Comparison(self.prompt, self.b, self.a)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgment in one order, un-swapped: `p_a` is the probability of sample a, whichever
    answer was shown first.

    Either scored (`p_a` and `winner` set, `reason` None) or unscored (`reason` set, both others
    None); never in between. `mass` is the probability that all labels had together; `tie_mass` that
    of the tie label.
    """

    p_a: float | None
    winner: Winner | None
    reason: UnscoredReason | None = None
    mass: float | None = None
    tie_mass: float = 0.0
    exactness: Exactness = "exact"

    def swap(self) -> Verdict:
        """The same judgment with the two sides exchanged."""
        p = None if self.p_a is None else 1.0 - self.p_a
        flipped: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
        winner = None if self.winner is None else flipped[self.winner]
        return Verdict(p, winner, self.reason, self.mass, self.tie_mass, self.exactness)


@dataclass(frozen=True, slots=True)
class Preference:
    """The combined result of a comparison's readings.

    `outcome` is a, b, tie or unscored. `p_a` and `p_chosen` are None when unscored. `spread` is the
    standard deviation of the readings' probabilities; `n_scored` of `n_readings` were scored.
    """

    prompt: str
    a: int
    b: int
    outcome: Literal["a", "b", "tie", "unscored"]
    p_a: float | None
    p_chosen: float | None
    spread: float | None
    n_scored: int
    n_readings: int
    exactness: Exactness = "exact"


@dataclass(frozen=True, slots=True)
class ServerReport:
    """One server of an engine: the questions that it answered, its failures, the questions that
    were asked of another server too because this one took long, and its state in words.
    """

    url: str
    calls: int
    failures: int
    hedged: int
    state: str
    retries: int = 0  # tries beyond the first, waits for a rate limit among them


class Engine(ABC):
    """Answers requests. A subclass gives `identity`, `max_in_flight` and `complete`.

    An engine that is named in a pipeline file also has `Config`, its pydantic configuration, and is
    entered in `factory.engines.base.ENGINES` or in another package's entry points `prefab.engines`.
    All other members have defaults, for an engine that has nothing to start.
    """

    Config: ClassVar[type[BaseModel]]
    identity: str  # which model this is (part of every key), not where it is
    max_in_flight: int
    max_model_len: int | None = None  # tokens; known at the latest after `start`
    special_tokens: tuple[str, ...] = ()  # spellings of control tokens; texts must not contain them
    in_batches: bool = False  # whether answers come hours later, many together
    owns_server: bool = False  # whether `start` starts a server
    log_folder: Path | None = None  # where the server's log goes; None: a temporary file
    starting_s: float = 0.0  # time that a start at the first question took
    findings: Mapping[str, Any] = {}  # of `probe`; empty before
    # what shows which model answers (see `engines.canary`): taken by `probe`, and by an earlier run
    fingerprint: Mapping[str, Any] = {}
    known_fingerprint: Mapping[str, Any] = {}
    # Sets aside what a server answered since a time (seconds since 1970), and gives how much it was
    quarantine: Callable[[str, float], int] = staticmethod(lambda replica, since: 0)

    @classmethod
    def make(cls, config: Any, name: str) -> Engine:
        """The engine `name` of a pipeline file for a configuration of class `Config`, not
        started.
        """
        return cls(config, name)  # type: ignore[call-arg]  # a registered engine's constructor

    @property
    def servers(self) -> Sequence[ServerReport]:
        """The servers that it asks and what they did; nothing for an engine without one."""
        return ()

    @property
    def starting(self) -> bool:
        """Whether its server is being started by a first question."""
        return False

    def mute(self) -> None:  # noqa: B027  # a default
        """Print no progress while a server starts."""

    async def start(self) -> None:  # noqa: B027  # a default
        """Make ready to answer. Raises: EngineError with the reason and the remedy."""

    async def prepare(self, labels: tuple[str, ...]) -> None:  # noqa: B027  # a default
        """Find the token ids of `labels`, after `start`. Raises: EngineError when a label cannot be
        read.
        """

    async def probe(self) -> Mapping[str, Any]:
        """Find out with one or two short calls, after `start`, what the model does otherwise than
        most (see `engines.family.Family`); kept in `findings`. Raises: TransportError, EngineError.
        """
        return self.findings

    async def check_specials(self) -> list[str]:
        """Control tokens that neutralised text would still contain, as far as the engine can
        tell.
        """
        return []

    @abstractmethod
    async def complete(self, key: bytes, request: Request) -> Completion:
        """Answer one request. Raises: TransportError when no answer came after all retries."""

    async def verify(self) -> None:  # noqa: B027  # a default
        """Check after the last question that the servers still serve the model that they did.
        Raises: EngineError.
        """

    async def stop(self) -> None:  # noqa: B027  # a default
        """Release what `start` took. Safe to call twice."""
