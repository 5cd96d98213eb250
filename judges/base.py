"""The protocol of judges (`Judge`), and what the kinds share: ready-made texts for the templates,
label reads, and the typed reasons why an answer is unscored.

A kind is one class. The pipelines use judges through this protocol alone: they ask what `requests`
gives, decode each answer once with `decode`, and combine the decoded answers of a comparison with
`verdict`. Most kinds derive from `PairJudge` (a question shows two answers) or `ScoreJudge` (a
question shows one answer) and write three short methods.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import exp
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.decision import weakest
from prefab.factory.label_text import find_label
from prefab.factory.spec.control_tokens import neutralise, neutralised
from prefab.factory.spec.templates import Template, conversation_text, fence
from prefab.factory.spec.yamlio import NAME_PATTERN
from prefab.factory.thinking import split_thinking
from prefab.factory.tool_calls import shown_answer
from prefab.factory.types import (
    LONGEST_TEXT,
    Comparison,
    Completion,
    Engine,
    Exactness,
    Message,
    Order,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    UnscoredReason,
    Verdict,
    Winner,
)
from prefab.factory.uses import PairUse, ScoreUse, Use
from prefab.judges.panel import orders

Examples = Sequence[
    Mapping[str, Any]
]  # few-shot, from the constitution, as the template's loop reads them

# The masses of one distribution sum to at most 1; servers round (bf16 logits), so a little more is
# let through.
_MASS_SLACK = 1.01


class JudgeConfig(BaseModel):
    """The fields that every judge has in a pipeline file; each kind adds its own.

    `template_kwargs` go to the chat template: a model that thinks unless told not to (Qwen3) would
    put a label read on `<think>`, so thinking is off unless asked for; templates that know no such
    switch ignore it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    engine: str | None = None
    weight: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    repeats: int = Field(1, ge=1)
    min_label_mass: float = Field(0.5, gt=0.0, le=1.0)
    template_kwargs: dict[str, Any] = {"enable_thinking": False}

    def ordered_kwargs(self) -> tuple[tuple[str, Any], ...]:
        """The chat template's arguments in the request's own, ordered form."""
        return tuple(sorted(self.template_kwargs.items()))


class LabelJudgeConfig(JudgeConfig):
    """The fields of the kinds that read a label."""

    answer_tokens: int = Field(
        1,
        ge=1,
        exclude_if=lambda value: value == 1,
        description="Tokens of an answer without its thinking. 1: the label is its first token. More, "
        "where a template of your own asks for a form: Answer: A, [[A]], \\boxed{A}. The label's "
        "probability is then read at its own token.",
    )


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one answer: either `value` with the labels' `probabilities`, or `reason`; never
    both, never neither.

    `probabilities` are normalised over the labels, in their order; `mass` is the labels'
    probability together (None when the engine gave a bare label).
    """

    value: float | None
    probabilities: tuple[float, ...] = ()
    mass: float | None = None
    reason: UnscoredReason | None = None
    exactness: Exactness = "exact"

    @property
    def known(self) -> float:
        """`value` of an answer that is scored. Raises: ValueError for an unscored one."""
        if self.value is None:
            raise ValueError(f"an unscored answer ({self.reason}) has no value")
        return self.value


def spellings(labels: Sequence[str]) -> dict[str, int]:
    """Every spelling that is read (plain, and after a space) with the index of its label."""
    return {prefix + label: i for prefix in ("", " ") for i, label in enumerate(labels)}


def label_masses(
    completion: Completion, index: Mapping[str, int], n: int, forms: bool = False
) -> list[float] | UnscoredReason:
    """The probability of each of `n` labels, summed over its spellings, or why there is none.
    `forms`: without log-probabilities the label may stand in a form (Answer: A), as it may after
    thinking.

    A label that an exact read does not mention was not read at all, so nothing follows from its
    absence. In a top-k read (`bounds`) it lies below the k-th token and counts 0. Without
    log-probabilities the bare answer must be a label, whole and in its own case: `hard`.
    """
    if completion.finish == "context" or completion.finish == "refused":
        return completion.finish
    logps = completion.label_logps
    if logps is None:
        return _hard_masses(completion, index, n, forms)
    masses = [0.0] * n
    unread = (1 << n) - 1
    try:
        for spelling, logp in logps.items():
            i = index.get(spelling)
            if i is None:
                continue
            if not logp <= 0.01:  # NaN fails every comparison, so it ends here too
                return "no_logprobs"
            masses[i] += exp(logp)
            unread &= ~(1 << i)
    except (TypeError, AttributeError):  # null or text where a number should be
        return "no_logprobs"
    if (unread and completion.exactness == "exact") or sum(masses) > _MASS_SLACK:
        return "no_logprobs"
    return masses


def _hard_masses(
    completion: Completion, index: Mapping[str, int], n: int, forms: bool
) -> list[float] | UnscoredReason:
    if completion.exactness != "hard":
        return "no_logprobs"
    text = completion.text if isinstance(completion.text, str) else ""
    if len(text) > LONGEST_TEXT:
        return "too_long"
    thinking, answer, finished = split_thinking(text)
    if not finished:
        return "truncated"
    answer = answer.strip()
    i = index.get(answer)
    if i is None and (forms or thinking):
        found = find_label(answer, index)
        cut = completion.finish == "length"
        if found is not None and not (cut and answer.endswith(found.label)):
            i = index[found.label]
        elif cut:
            return "truncated"
    if i is None:
        return "parse"
    return [float(j == i) for j in range(n)]


def label_score(
    completion: Completion,
    index: Mapping[str, int],
    values: Sequence[float],
    min_mass: float,
    forms: bool = False,
) -> Score:
    """The expected value over labels worth `values`, or an unscored `Score`."""
    masses = label_masses(completion, index, len(values), forms)
    if isinstance(masses, str):
        return Score(None, reason=masses, exactness=completion.exactness)
    total = sum(masses)
    hard = completion.label_logps is None
    if total < min_mass:
        return Score(None, mass=total, reason="low_label_mass", exactness=completion.exactness)
    probabilities = tuple(mass / total for mass in masses)
    value = sum(p * v for p, v in zip(probabilities, values, strict=True))
    return Score(value, probabilities, None if hard else total, None, completion.exactness)


def label_request(
    model: str,
    messages: tuple[Message, ...],
    index: Mapping[str, int],
    config: JudgeConfig,
    repeat: int = 0,
    tokens: int = 1,
) -> Request:
    """A greedy read of the labels' probabilities: at the first token, or with more `tokens` at the
    token of the label that the answer names.
    """
    kwargs, key = config.ordered_kwargs(), repeat_key(repeat)
    return Request(model, messages, Sampling(tokens), tuple(index), kwargs, key)


def text_request(
    model: str,
    messages: tuple[Message, ...],
    sampling: Sampling,
    config: JudgeConfig,
    repeat: int = 0,
    place: tuple[int, ...] = (),
) -> Request:
    """A request for free text. At temperature above 0, `place` (samples, round) tells apart
    questions that are equal otherwise: two identical drafts do not share one answer.
    """
    key = (*place, repeat) if sampling.temperature > 0 else repeat_key(repeat)
    return Request(model, messages, sampling, (), config.ordered_kwargs(), key)


def repeat_key(repeat: int) -> tuple[int, ...]:
    """A greedy request's `repeat`: empty for the first one."""
    return (repeat,) if repeat else ()


@lru_cache(maxsize=2048)
def _talk(messages: tuple[Message, ...], specials: tuple[str, ...]) -> str:
    return neutralise(conversation_text(messages), specials)


def conversation(messages: tuple[Message, ...], specials: tuple[str, ...] = ()) -> str:
    """The prompt as a template shows it, fenced: all pairs, principles and orders of a prompt share
    it.
    """
    talk = _talk(messages, specials)
    return fence(talk, talk, specials)


def candidate(messages: tuple[Message, ...], text: str, specials: tuple[str, ...] = ()) -> str:
    """A candidate's text, neutralised and fenced (`fence` caches: every pair with the same answer
    shares it). To a conversation with tools, its calls are shown as lines `[call] name(arguments)`.
    """
    return fence(_talk(messages, specials), answer_words(messages, text), specials)


def answer_words(messages: tuple[Message, ...], text: str) -> str:
    """An answer's text, and to a conversation with tools its calls as judges are shown them."""
    for message in messages:
        if message.more:
            return shown_answer(text)
    return text


def generated(completion: Completion) -> tuple[str, UnscoredReason | None]:
    """A free-text answer without the thinking before it, and why it cannot be used: `truncated`
    when it ends within the thinking or by its length, `parse` when nothing is left.
    """
    if completion.finish == "context" or completion.finish == "refused":
        return "", completion.finish
    text = completion.text if isinstance(completion.text, str) else ""
    if len(text) > LONGEST_TEXT:
        return "", "too_long"
    _, answer, finished = split_thinking(text)
    answer = answer.strip()
    if completion.finish == "length" or not finished:
        return answer, "truncated"
    return answer, None if answer else "parse"


_CODE_FENCE = re.compile(r"\A(`{3,}|~{3,})[^\n`]*\n(.*)\n?\1\Z", re.DOTALL)
_TAG_OPEN = re.compile(r"\A<([\w-]{1,40})(?: [^<>\n]{0,80})?>")


def unwrap(text: str) -> str:
    """The text without code fences or one pair of tags around the whole of it, as models echo them;
    else unchanged.
    """
    for _ in range(4):
        inner = _unwrap_once(text)
        if inner == text:
            break
        text = inner
    return text


def _unwrap_once(text: str) -> str:
    text = text.strip()
    fenced = _CODE_FENCE.match(text)
    if fenced and fenced.group(1) not in fenced.group(2):
        return fenced.group(2).strip()
    opened = _TAG_OPEN.match(text)
    if opened and text.endswith(closing := f"</{opened.group(1)}>"):
        inner = text[opened.end() : -len(closing)]
        return inner.strip() if closing not in inner else text
    return text


# --- the protocol -------------------------------------------------------------------------------

NO_ORDER = "-"  # the order of a verdict that was asked in none
NO_PRINCIPLE = Principle("", "", "", "", "", "")
Pair = tuple[int, int]  # the indices of samples a and b
Question = tuple[Comparison, list[Principle]]
Ask = tuple[Request, Use]
Shows = Literal["pair", "one", "all", "people"]
RubricLines = Sequence[tuple[str, float]]  # a prompt's own rubric: criterion and points
AnyConfig = TypeVar("AnyConfig", bound=JudgeConfig)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The samples' positions (as given to the request) from best to worst, or why there is no
    order.
    """

    order: tuple[int, ...] | None
    reason: UnscoredReason | None = None
    exactness: Exactness = "hard"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The text of a pass that is not the last one."""

    text: str
    reason: UnscoredReason | None = None


Value = Verdict | Score | Ranking | Reasoning


@dataclass(frozen=True, slots=True)
class Decoded:
    """One answer as its judge reads it. `use` says what was asked (one of `prefab.factory.uses`);
    `value` is None while there is no answer; `call` is the call's key in hex, empty during a run;
    `text` is the answer's text, during a run only.
    """

    use: Any
    value: Value | None
    call: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a request needs beside its question.

    Args:
        run: The run's number in the ledger, for the uses.
        model: Identity of the model that answers; part of every key.
        templates: By the names that `Judge.templates` gives.
        specials: Control tokens that no text may become.
        examples: From a template's file and a principle to the few-shot examples.
        seed: The run's seed, used at temperature above 0 and for draws.
        orders: The panel's setting: both, random or first.
        repeats: The repeats to ask for; None: all that the configuration names.
        people: People's labels, for a judge that they answer (see `human.answers`).
    """

    run: int = 0
    model: str = ""
    templates: Mapping[str, Template] = field(default_factory=dict)
    specials: tuple[str, ...] = ()
    examples: Callable[[str, Principle], Examples] = lambda template, principle: ()
    seed: int = 0
    orders: Literal["both", "random", "first"] = "both"
    repeats: Sequence[int] | None = None
    people: Mapping[Any, Any] = field(default_factory=dict)

    def render(self, name: str, question: str, **variables: Any) -> tuple[Message, ...]:
        """The messages of the template `name`. No control token is left whole in the question: a
        principle, or a line of a prompt's rubric. The other variables hold none.
        """
        shown = neutralised(question, self.specials)
        return self.templates[name].render(self.specials, question=shown, **variables)


class Judge(ABC, Generic[AnyConfig]):
    """The protocol of a judge. One class a kind, one object a configured judge.

    Class attributes: `Config`, the pydantic class of its configuration; `PARSER_VERSION`, raised
    when answers are read in another way; `FILES`, fields that name the user's files; `shows`, what
    one question shows; `ordered`, whether a pair is asked in two orders; `per_principle`, whether
    it is asked under principles; `rewards`, whether `reward` gives a score for training; `own`,
    whether `own_engine` makes the engine that answers it.
    """

    Config: ClassVar[type[JudgeConfig]]
    PARSER_VERSION: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = ()
    shows: ClassVar[Shows]
    ordered: ClassVar[bool] = False
    per_principle: ClassVar[bool] = True
    rewards: ClassVar[bool] = False
    own: ClassVar[bool] = False

    def __init__(self, config: AnyConfig) -> None:
        self.config = config
        self.name = config.name
        self.weight = config.weight
        self.kind = str(config.model_dump(include={"kind"})["kind"])

    @property
    def engine(self) -> str:
        """The name of the engine that answers this judge."""
        return f"judge {self.name}" if self.own else str(self.config.engine)

    @property
    def repeats(self) -> int:
        """How often it is asked the same question; a program answers the same each time."""
        return 1 if self.own else self.config.repeats

    @property
    def passes(self) -> tuple[str, ...]:
        """The roles of its questions, in the order in which they are asked."""
        return ({"pair": "judge", "people": "judge", "one": "score", "all": "rank"}[self.shows],)

    def own_engine(self) -> Engine:
        """The engine that answers this judge, not yet started, where `own` is true."""
        raise NotImplementedError(f"{self.name} is answered by the engine {self.engine}")

    def templates(self) -> dict[str, tuple[str, str]]:
        """By the name under which a run keeps it: the template's file and its kind."""
        template = getattr(self.config, "template", None)
        return {} if self.own or template is None else {self.name: (template, self.kind)}

    def labels(self) -> tuple[str, ...]:
        """Every spelling whose probability it reads; none when it reads text."""
        return ()

    def reading(self) -> Any:
        """The part of the configuration that decides how answers are read, as plain data: part of
        the ids of verdicts.
        """
        asked = {"name", "engine", "weight", "repeats", "template", "template_kwargs"}
        return self.config.model_dump(mode="json", exclude=asked)

    def in_every_order(self) -> Judge[AnyConfig]:
        """The judge, asked in every order that a measurement of position bias needs."""
        return self

    def lines(self, principle: str, own: RubricLines | None) -> RubricLines:
        """The lines on which two answers are compared: one, under a principle."""
        return ((principle, -1.0),)

    def asked_repeats(self, context: RequestContext) -> Sequence[int]:
        """The repeats to ask for."""
        return range(self.repeats) if context.repeats is None else context.repeats

    @abstractmethod
    def requests(
        self,
        role: str,
        questions: Sequence[Question],
        context: RequestContext,
        earlier: Sequence[Decoded],
    ) -> list[Ask]:
        """The requests of one pass for one prompt's questions; `earlier` has the answers of the
        passes before.
        """

    @abstractmethod
    def n_calls(self, questions: Sequence[Question], context: RequestContext) -> int:
        """How many calls these questions are, all passes together."""

    @abstractmethod
    def decode(self, use: Any, completion: Completion) -> Value | None:
        """The value of one answer. Never raises; None where no answer has been given yet."""

    @abstractmethod
    def verdict(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, tuple[str, ...]] | None:
        """The verdict on a pair from the decoded answers of one place (principle, repeat, order),
        with the calls that it stands on; None while one is awaited.
        """

    def verdicts_by_order(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, Verdict]:
        """The verdicts with a shown first and with b shown first; the same twice where a question
        has no order. Without an answer: unscored, `transport`.
        """
        found = self.verdict(answers, pair, lines)
        verdict = found[0] if found else Verdict(None, None, "transport")
        return verdict, verdict

    def merit(self, score: Score) -> float | None:
        """A score as a number that is greater for the better answer; None when unscored."""
        return score.value

    def reward(self, score: Score) -> float | None:
        """A score from 0 to 1 rescaled to -1 (worst) to 1; None when unscored."""
        merit = self.merit(score)
        return None if merit is None else 2.0 * merit - 1.0


class PairJudge(Judge[AnyConfig]):
    """A question shows two answers. A kind writes `request` and `decode`."""

    shows = "pair"
    ordered = True

    @abstractmethod
    def request(
        self,
        role: str,
        comparison: Comparison,
        principle: Principle,
        order: Order,
        repeat: int,
        context: RequestContext,
        reasoning: str | None,
    ) -> Request:
        """The request of one pass; `reasoning` is the text of the pass before."""

    def requests(
        self,
        role: str,
        questions: Sequence[Question],
        context: RequestContext,
        earlier: Sequence[Decoded],
    ) -> list[Ask]:
        """Every pair under each of its principles, in each order, each repeat."""
        reasons = {_reading_of(d.use): d.value for d in earlier}
        asks: list[Ask] = []
        for comparison, principle, order, repeat in self._places(questions, context):
            a, b = comparison.a.index, comparison.b.index
            at = (context.run, comparison.prompt.id, role, a, b)
            use = PairUse(*at, principle.id, self.name, order, repeat)
            text = None
            if role != self.passes[0]:
                said = reasons.get(_reading_of(use))
                if not isinstance(said, Reasoning):
                    continue  # broken off, or never answered: nothing to score
                text = said.text
            request = self.request(role, comparison, principle, order, repeat, context, text)
            asks.append((request, use))
        return asks

    def n_calls(self, questions: Sequence[Question], context: RequestContext) -> int:
        """One call an order, repeat and pass."""
        return sum(1 for _ in self._places(questions, context)) * len(self.passes)

    def _places(
        self, questions: Sequence[Question], context: RequestContext
    ) -> Iterator[tuple[Comparison, Principle, Order, int]]:
        for comparison, principles in questions:
            a, b = comparison.a.index, comparison.b.index
            for order in orders(context.orders, context.seed, comparison.prompt.id, a, b):
                for principle, repeat in product(principles, self.asked_repeats(context)):
                    yield comparison, principle, order, repeat

    def verdict(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, tuple[str, ...]] | None:
        """The verdict of the last pass; that of an earlier one where it broke off."""
        return last_verdict(answers, self.passes)

    def verdicts_by_order(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, Verdict]:
        """One verdict an order."""
        found = [
            self.verdict([d for d in answers if d.use.order == order], pair, lines)
            for order in ("ab", "ba")
        ]
        ab, ba = (f[0] if f else Verdict(None, None, "transport") for f in found)
        return ab, ba


def _reading_of(use: Any) -> tuple[Any, ...]:
    return use.a, use.b, use.principle, use.order, use.repeat


def last_verdict(
    answers: Sequence[Decoded], passes: Sequence[str]
) -> tuple[Verdict, tuple[str, ...]] | None:
    """The verdict of the last of these passes that was asked, and its call; None while awaited."""
    last = max(answers, key=lambda d: passes.index(d.use.role), default=None)
    return (last.value, (last.call,)) if last and isinstance(last.value, Verdict) else None


def winner_of(a: float, b: float, tie: float) -> Winner:
    """The winner by the masses on a, on b and on tie: `tie` when it has more than both others
    together, or when a and b have the same.
    """
    if tie > a + b or a == b:
        return "tie"
    return "a" if a > b else "b"


def scale_verdict(a: Score, b: Score) -> Verdict:
    """Two scores on the same scale as a verdict: P(a above b) + half of P(equal), the two reads
    taken as independent.
    """
    wins = tie = losses = 0.0
    for i, p in enumerate(a.probabilities):
        tie += p * b.probabilities[i]
        wins += p * sum(b.probabilities[:i])
        losses += b.probabilities[i] * sum(a.probabilities[:i])
    total = wins + tie + losses
    exactness = weakest((a.exactness, b.exactness))
    winner = winner_of(wins, losses, tie)
    return Verdict((wins + tie / 2) / total, winner, None, total, tie, exactness)


class ScoreJudge(Judge[AnyConfig]):
    """A question shows one answer. A kind writes `request`, `decode` and `compare`."""

    shows = "one"

    @abstractmethod
    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The request about one answer; `line` is that of the prompt's own rubric, where the judge
        reads one.
        """

    def render(
        self,
        prompt: Prompt,
        sample: Sample,
        question: str,
        examples_of: Principle | None,
        context: RequestContext,
    ) -> tuple[Message, ...]:
        """The judge's template, filled in for one answer; `examples_of` is the principle whose
        few-shot examples are shown.
        """
        file, _ = self.templates()[self.name]
        return context.render(
            self.name,
            question,
            conversation=conversation(prompt.messages, context.specials),
            answer=candidate(prompt.messages, sample.text, context.specials),
            examples=() if examples_of is None else context.examples(file, examples_of),
        )

    @abstractmethod
    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """Two answers' scores, one a line, all of them scored, as a verdict."""

    def own_rubric(self, prompt: Prompt) -> str:
        """The name of the prompt's own rubric, where this judge reads it instead of principles."""
        return ""

    def requests(
        self,
        role: str,
        questions: Sequence[Question],
        context: RequestContext,
        earlier: Sequence[Decoded],
    ) -> list[Ask]:
        """One question an answer (and principle, and line of a rubric), in however many
        comparisons it stands.
        """
        asks: list[Ask] = []
        for sample, principle, line, repeat in self._places(questions, context):
            prompt = questions[0][0].prompt
            at = (context.run, prompt.id, sample.index, principle.id, self.name)
            use = ScoreUse(*at, line, self.own_rubric(prompt), repeat)
            asks.append((self.request(prompt, sample, principle, line, repeat, context), use))
        return asks

    def n_calls(self, questions: Sequence[Question], context: RequestContext) -> int:
        """One call an answer, principle, line and repeat."""
        return len(self._places(questions, context))

    def _places(
        self, questions: Sequence[Question], context: RequestContext
    ) -> list[tuple[Sample, Principle, int, int]]:
        """Sample, principle, line and repeat: each once, a sample's questions together."""
        if not questions:
            return []
        prompt = questions[0][0].prompt
        own = bool(self.own_rubric(prompt))
        free = own or not self.per_principle
        wanted: dict[int, tuple[Sample, dict[str, Principle]]] = {}
        for comparison, principles in questions:
            for sample in (comparison.a, comparison.b):
                _, under = wanted.setdefault(sample.index, (sample, {}))
                under.update({p.id: p for p in ([NO_PRINCIPLE] if free else principles)})
        lines = range(len(prompt.rubric) if own else 1)
        return [
            (sample, principle, line, repeat)
            for sample, under in (wanted[i] for i in sorted(wanted))
            for principle, line, repeat in product(
                under.values(), lines, self.asked_repeats(context)
            )
        ]

    def verdict(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, tuple[str, ...]] | None:
        """Both answers' scores on every line, as a verdict."""
        by_place = {(d.use.sample, d.use.line): d for d in answers}
        wanted = [by_place.get((i, line)) for i in pair for line in range(len(lines))]
        scores, calls = [], []
        for decoded in wanted:
            if decoded is None or not isinstance(decoded.value, Score):
                return None
            scores.append(decoded.value)
            calls.append(decoded.call)
        return self.verdict_of(scores[: len(lines)], scores[len(lines) :], lines), tuple(calls)

    def verdict_of(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """Two answers' scores as a verdict. Unscored when any score is: answers are compared on the
        same lines or not at all.
        """
        unread = next((s for s in (*a, *b) if s.value is None), None)
        if unread is not None:
            exactness = weakest(s.exactness for s in (*a, *b))
            return Verdict(None, None, unread.reason, exactness=exactness)
        return self.compare(a, b, lines)
