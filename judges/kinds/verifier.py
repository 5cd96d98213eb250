"""A program judges one answer: by the right text or number, a pattern, a JSON schema, or Python
tests.

The `reference` says what is right: the text (or texts), the number, the regular expression, the
schema, or the tests' code; in the configuration, in a file, or by prompt. The check and the answer
are part of the request, so that a verdict is stored and found again like any call, and is asked
anew when either changes.

A wrong result, no number, broken JSON, code over a limit, or a text on which the pattern or schema
takes too long is the answer's fault: a score of 0. Tests that cannot be run, a schema that refers
elsewhere, or a missing reference are not: unscored with the reason `program`.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import orjson
from pydantic import Field, model_validator

from prefab.factory.errors import ConfigError, Problem, TransportError
from prefab.factory.keys import canonical, digest
from prefab.factory.spec import bounded, data_files, yamlio
from prefab.factory.types import (
    Completion,
    Engine,
    Message,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    Verdict,
)
from prefab.judges import sandbox
from prefab.judges.base import JudgeConfig, RequestContext, RubricLines, Score, ScoreJudge, unwrap
from prefab.judges.sandbox import timeout_worker

# Of what the checks below do; part of every key.
CHECK_VERSION = {"exact": 1, "numeric": 1, "regex": 2, "json_schema": 2, "python": 2}
EXTRACT_VERSION = 2  # of every check after `extract`
PATTERN_TIMEOUT_S = 3.0
MOST_DIGITS = 400  # of a number: the exact arithmetic on 10^100000 would take all day
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?: ?/ ?\d+)?%?",
    re.ASCII,
)
_FENCE = re.compile(r"`{3,}|~{3,}")
_LANGUAGE = re.compile(r"[ \t]*([\w+-]*)")


class VerifierConfig(JudgeConfig):
    """A judge that is a program. `extract` finds the part of an answer that is checked: the first
    group of its last match.

    Without it: exact and regex take the whole answer, numeric its last number, json_schema and
    python the fenced code block (the longest one of Python's) where there is one. `references` is a
    JSONL file of `{"prompt": id or text, "reference": ...}`; paths are relative to the pipeline's
    folder. `tolerance` is relative, `absolute` absolute; a number is right within either. For
    python, `timeout_s` is the limit of one test, five times that of all; an answer over a limit has
    failed.
    """

    kind: Literal["verifier"] = "verifier"
    check: Literal["exact", "numeric", "regex", "json_schema", "python"]
    reference: Any = None
    reference_file: str | None = None
    references: str | None = None
    extract: str | None = None
    ignore_case: bool = False
    ignore_space: bool = True
    whole: bool = Field(False, description="regex: the pattern must match all of the answer.")
    tolerance: float = Field(1e-6, ge=0, allow_inf_nan=False)
    absolute: float = Field(0.0, ge=0, allow_inf_nan=False)
    timeout_s: float = Field(10.0, gt=0, le=600)
    memory_mb: int = Field(512, ge=64)
    file_mb: int = Field(16, ge=1)
    processes: int = Field(1, ge=1, le=256)
    packages: bool = False
    partial: bool = Field(
        True, description="python: the share of tests passed; false: 1 only when all pass."
    )
    isolation: Literal["best", "required"] = Field(
        "required",
        description="python: `required` runs no answer where there is no complete jail; `best` runs "
        "it with what the machine has.",
    )
    workers: int | None = Field(
        None, ge=1, description="Checks at a time; left out: one a processor."
    )

    @model_validator(mode="after")
    def _sound(self) -> VerifierConfig:
        if self.reference is None and self.reference_file is None and self.references is None:
            raise ValueError(
                "say what is right: `reference`, `reference_file`, or `references` (by prompt)"
            )
        if self.reference is not None and self.reference_file is not None:
            raise ValueError("give `reference` or `reference_file`, not both")
        problem = None if self.extract is None else _extract_problem(self.extract)
        if problem:
            raise ValueError(f"extract: {problem}")
        problem = None if self.reference is None else reference_problem(self.check, self.reference)
        if problem:
            raise ValueError(f"reference: {problem}")
        return self


def _extract_problem(pattern: str) -> str | None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return str(error)
    return None if groups else "needs a group: (...) around what is to be checked"


def reference_problem(check: str, reference: Any) -> str | None:
    """What is wrong with a reference for this check, if anything."""
    return _REFERENCE_PROBLEMS[check](reference)


def _text_problem(reference: Any) -> str | None:
    texts = reference if isinstance(reference, list) else [reference]
    sound = texts and all(isinstance(text, str) for text in texts)
    return None if sound else "must be a text or a list of texts"


def _number_problem(reference: Any) -> str | None:
    given = isinstance(reference, (int, float, str)) and not isinstance(reference, bool)
    sound = given and number(str(reference)) is not None
    return None if sound else f"{reference!r} is not a number"


def _pattern_problem(reference: Any) -> str | None:
    if not isinstance(reference, str) or not reference.strip():
        return "must be a pattern"
    try:
        re.compile(reference)
    except re.error as error:
        return str(error)
    return None


def _tests_problem(reference: Any) -> str | None:
    if not isinstance(reference, str) or not reference.strip():
        return "must be the tests' code"
    try:
        compile(reference, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        return str(error)
    return None


def _schema_problem(schema: Any) -> str | None:
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, (dict, bool)):
        return "must be a JSON schema (an object)"
    try:
        validator_for(schema, Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"not a JSON schema: {error.message}"
    return None


_REFERENCE_PROBLEMS: dict[str, Callable[[Any], str | None]] = {
    "exact": _text_problem,
    "numeric": _number_problem,
    "regex": _pattern_problem,
    "json_schema": _schema_problem,
    "python": _tests_problem,
}


_DECIDES: dict[str, set[str]] = {
    "exact": {"ignore_case", "ignore_space"},
    "numeric": {"tolerance", "absolute"},
    "regex": {"ignore_case", "whole"},
    "json_schema": set(),
    "python": {"timeout_s", "memory_mb", "file_mb", "processes", "packages", "isolation"},
}


def _changed(file: str) -> int:
    """When the file was last modified, in nanoseconds."""
    if not Path(file).is_file():
        raise ConfigError([Problem(file, 0, 0, "", "no such file (references of a verifier)")])
    return Path(file).stat().st_mtime_ns


@lru_cache(maxsize=8)
def _reference_file(file: str, _changed: int, check: str) -> Any:
    text = yamlio.read_text(file)
    try:
        reference = (
            bounded.read_json(text)
            if check == "json_schema"
            else text
            if check == "python"
            else text.strip()
        )
    except ValueError as error:
        raise ConfigError([Problem(file, 0, 0, "", str(error))]) from error
    problem = reference_problem(check, reference)
    if problem:
        raise ConfigError([Problem(file, 0, 0, "", problem)])
    return reference


@lru_cache(maxsize=8)
def _references(file: str, _changed: int, check: str) -> dict[str, Any]:
    """References by prompt id or text; every mistake in the file at once."""
    found: dict[str, Any] = {}
    problems = []
    for _, line, row in data_files.jsonl_rows(Path(file)):
        try:
            prompt, reference = row["prompt"], row["reference"]
            problem = reference_problem(check, reference)
            if found.setdefault(prompt, reference) != reference:
                problem = f"the prompt {prompt!r} has another reference further up"
        except (ValueError, KeyError, TypeError):
            problem = 'each line is {"prompt": id or text, "reference": ...}'
        problems += [Problem(file, line, 1, "", problem)] if problem else []
    if problems:
        raise ConfigError(problems)
    return found


def identity(config: VerifierConfig) -> str:
    """The identity of this judge: the check and its settings, and for Python tests the version they
    run on.
    """
    settings = config.model_dump(mode="json", include=_DECIDES[config.check] | {"check", "extract"})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    runs_on = python if config.check == "python" else ""
    version = CHECK_VERSION[config.check]
    if config.extract is not None:
        version = max(version, EXTRACT_VERSION)
    return "verifier:" + digest(version, canonical(settings).decode(), runs_on)


class Verifier(Engine):
    """The engine: each request says all there is to check."""

    def __init__(self, config: VerifierConfig) -> None:
        self.config, self.identity = config, identity(config)
        self.max_in_flight = config.workers or os.cpu_count() or 1
        self._threads: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Make ready; with `isolation: required`, Python tests are refused where there is none.

        Raises: ConfigError.
        """
        self._threads = self._threads or ThreadPoolExecutor(
            self.max_in_flight, thread_name_prefix="verifier"
        )
        if self.config.check != "python":
            return
        try:
            complete, _ = await asyncio.get_running_loop().run_in_executor(
                self._threads, sandbox.isolation_status
            )
        except sandbox.NoSandbox as error:
            raise ConfigError(
                f"{self.config.name}: no answer's code can be run here: {error}"
            ) from error
        if self.config.isolation == "required" and not complete:
            raise ConfigError(f"{self.config.name}: {sandbox.how_to_isolate()}")

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The check's result as JSON. Raises: TransportError when no process could be started."""
        if self._threads is None:
            await self.start()
        job = orjson.loads(request.messages[-1].content)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, check, job)
        except sandbox.NoSandbox as error:
            raise TransportError(f"{self.config.name}: {error}") from error
        return Completion(canonical(found).decode(), "stop", completion_tokens=0)

    async def stop(self) -> None:
        """Let the checks at work end. Safe to call twice."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a check: `passed` of `total`, or `error` when it could not be made."""
    kind, reference, settings = job["check"], job["reference"], job["settings"]
    if reference is None:
        return {"error": "no reference for this prompt"}
    text = job["answer"]
    if settings["extract"] is not None:
        found = _outside({"do": "extract", "pattern": settings["extract"], "text": text})
        if "found" not in found:
            return found
        if found["found"] is None:
            return _wrong("`extract` finds nothing in the answer")
        text = found["found"]
    return _CHECKS[kind](text, reference, settings)


def _wrong(why: str) -> dict[str, Any]:
    return {"passed": 0, "total": 1, "why": why[:300]}


def _outside(job: dict[str, Any]) -> dict[str, Any]:
    """A job in another process. Too long or too large for the check is wrong, not unscored."""
    found = timeout_worker.ask(job, PATTERN_TIMEOUT_S)
    return _wrong(found["late"]) if "late" in found else found


def _exact(text: str, reference: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    def plain(text: str) -> str:
        text = normalize("NFC", text)
        text = " ".join(text.split()) if settings["ignore_space"] else text
        return text.casefold() if settings["ignore_case"] else text

    right = {plain(t) for t in (reference if isinstance(reference, list) else [reference])}
    return {"passed": int(plain(text) in right), "total": 1}


def number(text: str) -> Fraction | None:
    """The last number in a text, exactly: 1,234.5, 3/4, 12%, 6.02e23; None where there is none."""
    found = None
    for found in _NUMBER.finditer(text[-10_000:].replace("\N{MINUS SIGN}", "-")):
        pass
    if found is None:
        return None
    told = found.group().replace(",", "").replace(" ", "")
    upper, _, lower = told.rstrip("%").partition("/")
    if len(told) > MOST_DIGITS:
        return None
    try:
        value = Fraction(Decimal(upper)) / (Fraction(lower) if lower else 1)
    except (ArithmeticError, InvalidOperation, ValueError):
        return None
    return value / 100 if told.endswith("%") else value


def _numeric(text: str, reference: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    found, right = number(text), number(str(reference))
    if right is None:
        return {"error": f"the reference {reference!r} is not a number"}
    if found is None:
        return _wrong("there is no number in the answer")
    near = max(Fraction(settings["absolute"]), Fraction(settings["tolerance"]) * abs(right))
    return {"passed": int(abs(found - right) <= near), "total": 1}


def _regex(text: str, reference: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    job = {
        "do": "match",
        "pattern": reference,
        "text": text,
        "whole": settings["whole"],
        "ignore_case": settings["ignore_case"],
    }
    return _outside(job)


def _json(text: str, reference: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    blocks = [body for name, body in code_blocks(text) if name in ("json", "")]
    text = blocks[-1] if blocks else unwrap(text)
    return _outside({"do": "validate", "text": text, "schema": reference})


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The fenced code blocks: language (lower case) and body.

    A block goes from a line that begins with three or more backticks or tildes to the next line of
    as many of them and nothing else (or of fewer, when there is none). Takes time in proportion to
    the text, whatever is in it.
    """
    lines = text.split("\n")
    closing: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines):
        mark = line.rstrip(" \t")
        if _FENCE.fullmatch(mark):
            closing.setdefault((mark[0], len(mark)), []).append(number)
    blocks, at = [], 0
    while at < len(lines):
        size, end = _closing(lines[at], at, closing)
        if size:
            language = _LANGUAGE.match(lines[at], size)
            body = "".join(f"{line}\n" for line in lines[at + 1 : end])
            blocks.append((language.group(1).lower() if language else "", body))
        at = end + 1
    return blocks


def _closing(line: str, at: int, closing: Mapping[tuple[str, int], list[int]]) -> tuple[int, int]:
    """The length of the fence that a line opens, and the line that closes it; 0 and `at`: none."""
    fence = _FENCE.match(line)
    for size in range(fence.end() if fence else 0, 2, -1):
        ends = closing.get((line[0], size), [])
        next_end = bisect_right(ends, at)
        if next_end < len(ends):
            return size, ends[next_end]
    return 0, at


def code_of(text: str) -> str:
    """The Python in an answer: its longest fenced block, else all of it."""
    languages = ("python", "py", "python3", "")
    blocks = [body for language, body in code_blocks(text) if language in languages]
    return max(blocks, key=len, default=text)


def _python(text: str, reference: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("timeout_s", "memory_mb", "file_mb", "processes", "packages")
    limits = sandbox.Limits(**{name: settings[name] for name in names})
    found = sandbox.run_tests(reference, code_of(text), limits, settings["isolation"] == "required")
    return {"error": found["broken"]} if "broken" in found else found


_CHECKS = {
    "exact": _exact,
    "numeric": _numeric,
    "regex": _regex,
    "json_schema": _json,
    "python": _python,
}


class VerifierJudge(ScoreJudge[VerifierConfig]):
    """A program checks one answer; it needs no principle."""

    Config = VerifierConfig
    FILES = ("reference_file", "references")
    per_principle = False
    own = True

    def own_engine(self) -> Verifier:
        """The engine that makes the checks, not yet started."""
        return Verifier(self.config)

    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The check of one answer, as canonical JSON in one message.

        Raises: ConfigError when a file of references cannot be read.
        """
        config, reference = self.config, self.reference(prompt)
        if config.check == "numeric" and reference is not None:
            reference = str(reference)  # 42 and "42" are one question
        job = {
            "answer": sample.text,
            "check": config.check,
            "reference": reference,
            "settings": config.model_dump(
                mode="json", include=_DECIDES[config.check] | {"extract"}
            ),
        }
        message = Message("user", canonical(job).decode())
        return Request(identity(config), (message,), Sampling(max_tokens=1))

    def reference(self, prompt: Prompt) -> Any:
        """What decides about answers to this prompt: the prompt's own reference, else the
        configuration's; None where there is none.

        Raises: ConfigError naming file and line.
        """
        config = self.config
        if config.references is not None:
            known = _references(config.references, _changed(config.references), config.check)
            for name in (prompt.id, prompt.messages[-1].content):
                if name in known:
                    return known[name]
        if config.reference_file is not None:
            file = config.reference_file
            return _reference_file(file, _changed(file), config.check)
        return config.reference

    def decode(self, use: Any, completion: Completion) -> Score:
        """1 or 0, or the share of tests passed; unscored (`program`) when the check itself could
        not be made.
        """
        if completion.finish == "context" or completion.finish == "refused":
            return Score(None, reason=completion.finish)
        try:
            found = orjson.loads(completion.text)
            if "error" in found:
                return Score(None, reason="program")
            passed, total = int(found["passed"]), int(found["total"])
        except (ValueError, TypeError, KeyError):
            return Score(None, reason="parse")
        if not 0 <= passed <= total or total < 1:
            return Score(None, reason="parse")
        shared = self.config.check == "python" and self.config.partial
        return Score(passed / total if shared else float(passed == total))

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """The better score wins with probability 1; equal ones, two wrong answers too, are a
        tie.
        """
        if a[0].known == b[0].known:
            return Verdict(0.5, "tie", None, 1.0, 1.0)
        better = a[0].known > b[0].known
        return Verdict(float(better), "a" if better else "b", None, 1.0)
