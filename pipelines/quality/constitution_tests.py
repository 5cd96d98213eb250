"""`prefab test`: a constitution's own tests, asked of a judge in both orders.

A test is a prompt, two answers and the outcome that its author expects, under one principle or
under all that apply. It passes when both orders give that outcome; what only one order gives is
unstable, which is a failure too: such a judge goes by position. Answers are kept in `STORE/tests`,
so that a test whose principle has not changed asks nothing.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import yaml

from prefab.factory import decision
from prefab.factory.console import Progress
from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest
from prefab.factory.spec.constitution import load_constitution, parse_constitution
from prefab.factory.spec.yamlio import did_you_mean, read_text
from prefab.factory.types import (
    Comparison,
    Constitution,
    Engine,
    Message,
    Principle,
    Prompt,
    Sample,
    Verdict,
)
from prefab.judges import panel
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    find_judge,
    pipeline_for,
    resolve_pipeline,
)
from prefab.pipelines.run.asking import (
    RepeatedQuestion,
    asking_session,
    engine_for,
    judged,
    kinds_with_engine,
)
from prefab.pipelines.store.fill import query

State = Literal["passed", "failed", "unstable", "unscored"]


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test's result. `p_expected` is the probability of the expected answer, the mean of both
    orders; None where it is a tie or unscored. `orders` has the outcome of each order.
    """

    __test__ = False  # pytest would otherwise collect it

    number: int
    principle: str
    prompt: str
    a: str
    b: str
    prefer: str
    outcome: str
    orders: tuple[str, str]
    p_expected: float | None
    reason: str
    state: State


@dataclass(slots=True)
class TestReport:
    """All tests of a constitution, asked of one judge."""

    __test__ = False

    file: str
    judge: str
    model: str
    results: list[TestResult]
    asked: int = 0
    reused: int = 0

    @property
    def failures(self) -> list[TestResult]:
        """Every test that did not pass."""
        return [result for result in self.results if result.state != "passed"]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {
            "passed": len(self.results) - len(self.failures),
            "failed": len(self.failures),
        }


def run_tests(
    file: str | Path,
    pipeline: str | Path | None = None,
    sets: Sequence[str] = (),
    judge: str = "",
    principles: Sequence[str] = (),
    store: str | Path | None = None,
    engines: Mapping[str, Engine] | None = None,
    quiet: bool = True,
) -> TestReport:
    """Ask the tests of a constitution.

    Args:
        file: The constitution.
        pipeline: The pipeline whose judge is asked; default: `pipeline.yaml` beside the
            constitution, or the preset `demo` for the embedded world.
        sets: Overrides of the pipeline's fields.
        judge: Its name in `panel.judges`; default: the first.
        principles: Only the tests of these principles; default: all tests.
        store: The store whose folder `tests/` keeps the answers; default: the pipeline's.
        engines: Engines to use in place of those that the pipeline would start, by name.
        quiet: Do not show progress.

    Raises:
        ConfigError: The constitution has no tests, a principle or the judge does not exist, or no
            pipeline is found.
        EngineError: An engine does not start or fails.
    """
    constitution = load_constitution(file)
    tests = _chosen(constitution, str(file), principles)
    loaded = resolve_pipeline(pipeline or pipeline_for(file, constitution), sets)
    loaded = replace(loaded, constitution=constitution)
    config = find_judge(loaded, judge, kinds_with_engine("pair", "one"))
    engine, folder = engine_for(loaded, config, engines), Path(store or loaded.config.store)
    return asyncio.run(_ask(loaded, str(file), tests, config, engine, folder, quiet))


def _chosen(
    constitution: Constitution, file: str, principles: Sequence[str]
) -> list[tuple[int, Mapping[str, Any]]]:
    """The tests to ask, with their numbers in the file, from 1."""
    known = [p.id for p in constitution.principles]
    for name in principles:
        if name not in known:
            raise ConfigError(f'{file} has no principle "{name}"; {did_you_mean(name, known)}')
    tests = [
        (number, test)
        for number, test in enumerate(constitution.tests, 1)
        if not principles or test["principle"] in principles
    ]
    if not tests:
        of = f" of {', '.join(principles)}" if principles else ""
        raise ConfigError(
            f"{file} has no tests{of}. Write some under `tests:` (prompt, a, b, prefer, principle), "
            "or add a preference of a store with `prefab test FILE --add PREFERENCE`"
        )
    return tests


async def _ask(
    loaded: ResolvedPipeline,
    file: str,
    tests: Sequence[tuple[int, Mapping[str, Any]]],
    judge: Any,
    engine: Engine,
    folder: Path,
    quiet: bool,
) -> TestReport:
    described = {"recipe": "test", "constitution": loaded.constitution.id}
    cases = [(number, test, _comparison(test)) for number, test in tests]
    prompts = {pair.prompt.id: pair.prompt for _, _, pair in cases}.values()
    name = f"test-{loaded.constitution.id}"
    async with asking_session(
        loaded, judge, engine, folder / "tests", name, described, prompts, folder, quiet
    ) as session:
        questions = [
            RepeatedQuestion(pair, principle)
            for _, test, pair in cases
            for principle in _principles(loaded.constitution, test)
        ]
        with Progress(f"{judge.name} on {file}", len(questions), quiet, "questions") as progress:
            heard = iter(await judged(questions, session, progress))
        results = [
            _result(
                number,
                test,
                [(p, next(heard)) for p in _principles(loaded.constitution, test)],
                loaded,
                judge.name,
            )
            for number, test, _ in cases
        ]
        return TestReport(file, judge.name, engine.identity, results, session.asked, session.reused)


def _comparison(test: Mapping[str, Any]) -> Comparison:
    prompt = Prompt(f"test-{digest(test['prompt'])[:16]}", (Message("user", test["prompt"]),))
    a, b = (Sample(prompt.id, i, test[side]) for i, side in enumerate("ab"))
    return Comparison(prompt, a, b)


def _principles(constitution: Constitution, test: Mapping[str, Any]) -> list[Principle]:
    """The test's principle, or all that apply to a prompt without tags."""
    if test["principle"]:
        return [p for p in constitution.principles if p.id == test["principle"]]
    return panel.applicable(constitution.principles, ())


def _result(
    number: int,
    test: Mapping[str, Any],
    heard: Sequence[tuple[Principle, tuple[Verdict, Verdict]]],
    loaded: ResolvedPipeline,
    judge: str,
) -> TestResult:
    settings = loaded.config.panel_settings()
    rule = decision.Rule(
        settings.min_scored, settings.tie_margin, log_odds=settings.combine == "log_odds"
    )

    def decided(orders: Sequence[int]) -> Any:
        readings = [
            decision.combine_orders([verdicts[o] for o in orders], p.weight, p.id, judge)
            for p, verdicts in heard
        ]
        return decision.decide(readings, rule)

    both, ab, ba = decided((0, 1)), decided((0,)), decided((1,))
    outcomes, prefer = (ab.outcome, ba.outcome), test["prefer"]
    state: State = "unstable"
    if "unscored" in (*outcomes, both.outcome):
        state = "unscored"
    elif outcomes == (prefer, prefer):
        state = "passed"
    elif prefer not in outcomes:
        state = "failed"
    p = both.p_a if prefer == "a" else None if both.p_a is None else 1.0 - both.p_a
    reasons = [v.reason for _, verdicts in heard for v in verdicts if v.reason]
    return TestResult(
        number,
        test["principle"] or "",
        test["prompt"],
        test["a"],
        test["b"],
        prefer,
        both.outcome,
        outcomes,
        None if prefer == "tie" else p,
        reasons[0] if state == "unscored" and reasons else "",
        state,
    )


# characters that XML 1.0 cannot hold
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: TestReport) -> str:
    """The results as JUnit XML, which continuous integration shows."""
    failed = [r for r in report.failures if r.state != "unscored"]
    file = _xml(report.file)
    suite = ElementTree.Element(
        "testsuite",
        name=file,
        tests=str(len(report.results)),
        failures=str(len(failed)),
        errors=str(len(report.failures) - len(failed)),
        skipped="0",
    )
    for result in report.results:
        name = f"{result.number}. {result.principle or 'all principles'}: {result.prompt}"
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=_xml(name))
        if result.state != "passed":
            tag = "error" if result.state == "unscored" else "failure"
            failure = ElementTree.SubElement(
                case, tag, message=_xml(sentence(result)), type=result.state
            )
            failure.text = _xml(f"A: {result.a}\nB: {result.b}")
    return ElementTree.tostring(suite, "unicode", xml_declaration=True)


def _xml(text: str) -> str:
    """The text without the characters that XML 1.0 cannot hold."""
    return _NOT_XML.sub("", text)


def sentence(result: TestResult) -> str:
    """What came out, against what was expected."""
    if result.state == "unscored":
        return f"expected {result.prefer}; the judge's answer could not be read ({result.reason})"
    p = (
        ""
        if result.p_expected is None
        else f", probability of {result.prefer} {result.p_expected:.2f}"
    )
    shown = f"{result.orders[0]} with a first, {result.orders[1]} with b first"
    return f"expected {result.prefer}; got {shown}{p}"


@dataclass(slots=True)
class AddedTest:
    """A test that was written into a constitution."""

    file: str
    number: int
    test: dict[str, str] = field(default_factory=dict)


def add_test(
    file: str | Path, store: str | Path, preference: str, prefer: str = "", principle: str = ""
) -> AddedTest:
    """Write a preference of a store into a constitution as a test; the rest of the file stays.

    Args:
        file: The constitution.
        store: The store.
        preference: The preference's id, or the beginning of it.
        prefer: The expected outcome (a, b or tie); default: what the store says.
        principle: The principle to test; default: all that apply.

    Raises:
        ConfigError: There is no such preference, its prompt has several turns, or the file would
            not be valid.
    """
    test = _as_test(Path(store), preference, prefer)
    if principle:
        test["principle"] = principle
    constitution = load_constitution(file)
    same = ("prompt", "a", "b")
    if any(all(t[name] == test[name] for name in same) for t in constitution.tests):
        raise ConfigError(f"{file} has a test of these two answers already")
    text = _with_test(read_text(file), test)
    changed = parse_constitution(text, str(file))
    Path(file).write_text(text, encoding="utf-8")
    return AddedTest(str(file), len(changed.tests), test)


_PREFERENCE = """
SELECT DISTINCT p.preference, q.messages, x.text, y.text, p.outcome, coalesce(x.context, y.context) FROM preferences p
JOIN samples x ON x.run = p.run AND x.prompt = p.prompt AND x."index" = p.a
JOIN samples y ON y.run = p.run AND y.prompt = p.prompt AND y."index" = p.b
JOIN prompts q ON q.prompt = p.prompt WHERE starts_with(p.preference, $name) LIMIT 2"""


def _as_test(store: Path, preference: str, prefer: str) -> dict[str, str]:
    rows = query(store, _PREFERENCE, {"name": preference}).rows()
    if not rows or not preference:
        raise ConfigError(
            f"{store} has no preference {preference!r}. `prefab diff` and "
            '`prefab sql "SELECT preference, outcome FROM preferences"` show their ids'
        )
    if len(rows) > 1 and rows[0][0] != rows[1][0]:
        raise ConfigError(f"several preferences begin with {preference!r}; give more of the id")
    _, messages, a, b, outcome, context = rows[0]
    turns = json.loads(messages)
    if context:
        raise ConfigError(
            f"{preference}: its answers follow different turns; a test has one prompt"
        )
    if len(turns) > 1:
        raise ConfigError(
            f"{preference}: its prompt has {len(turns)} turns, and a test has one prompt text"
        )
    if not prefer and outcome == "unscored":
        raise ConfigError(f"{preference} is unscored; say what you expect with --prefer")
    return {"prompt": turns[0][1], "a": a, "b": b, "prefer": prefer or outcome}


def _with_test(text: str, test: Mapping[str, str]) -> str:
    """A constitution's text with one more test at the end of its `tests:`."""
    dumped = yaml.safe_dump([dict(test)], sort_keys=False, allow_unicode=True, width=10_000)
    lines = text.rstrip("\n").split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("tests:")), None)
    if start is None or lines[start].split("#")[0].strip() == "tests: []":
        kept = lines if start is None else lines[:start] + lines[start + 1 :]
        return "\n".join([*kept, "tests:", *_indented(dumped, "  ")]) + "\n"
    end = start + 1
    while end < len(lines) and (not lines[end] or lines[end][0] in " -#"):
        end += 1
    items = [line for line in lines[start + 1 : end] if line.lstrip().startswith("- ")]
    margin = items[0][: len(items[0]) - len(items[0].lstrip())] if items else "  "
    return "\n".join([*lines[:end], *_indented(dumped, margin), *lines[end:]]) + "\n"


def _indented(dumped: str, margin: str) -> list[str]:
    return [margin + line for line in dumped.rstrip("\n").split("\n")]
