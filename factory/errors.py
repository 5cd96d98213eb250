"""Errors that a user can mend. Each says what is wrong, where, and how to mend it. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefab.factory.redaction import redact

REASON_LENGTH = 120  # characters of a message that tell its reason


class PrefabError(Exception):
    """Base of all errors that the user can mend; the command line prints them without a
    traceback. Known secrets are removed from the message. `help` is printed after it.
    """

    help = ""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file. `line` and `column` count from 1; 0 means unknown. `path` is like
    principles[2].weight.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        place = f"{where} {self.path}".strip()
        return redact(f"{place}: {self.message}" if place else self.message)


class ConfigError(PrefabError, ValueError):
    """Wrong configuration; carries every problem found, not only the first."""

    def __init__(self, problems: list[Problem] | str) -> None:
        self.problems = [Problem("", 0, 0, "", problems)] if isinstance(problems, str) else problems
        super().__init__(problems if isinstance(problems, str) else "\n".join(map(str, problems)))


class StoreError(PrefabError, RuntimeError):
    """The ledger or the DuckDB file is absent, damaged, locked, or the disk is full."""

    help = "`prefab doctor` says what is wrong with a store"


class InstallationError(PrefabError, RuntimeError):
    """A file of Prefab, or of a package that it uses, is damaged."""


class EngineError(PrefabError, RuntimeError):
    """An engine cannot start or has failed for good (no server, wrong model name, bad key)."""

    help = "`prefab doctor` tries every engine of a pipeline"


class NotInstalledError(EngineError):
    """A package that an engine needs is not installed; the message has the command that installs
    it.
    """

    help = ""


class TransportError(EngineError):
    """No answer came for one request after all retries; counted, and asked again by the next
    run.
    """


class RequestRefused(TransportError):
    """The server refused one request for good (HTTP 4xx): counted, and not asked again by the next
    run unless told to.
    """


class BudgetError(PrefabError, RuntimeError):
    """A run passed the share of unscored or failed answers, or the number of calls or tokens, that
    it allows.
    """


def reason_of(error: Exception | str) -> str:
    """What failures of one kind have in common: the message without addresses and numbers that
    differ from call to call.
    """
    words = re.sub(r"https?://\S+\s*", "", str(error))
    kept = re.sub(r"(?<!HTTP )\b\d[\w.,:-]*", "N", words)
    return kept[:REASON_LENGTH].strip() or type(error).__name__


_DIED = "the server dies of this question"
_KINDS = {
    "rate_limit": r"HTTP 429|rate limit leaves no time",
    "server_error": r"HTTP 5\d\d",
    "timeout": r"no answer \(\w*Timeout",
    "no_connection": r"no answer \(|is down \(|has not answered for",
    "malformed": r"not a JSON object|not a chat completion|\bchoices\b|finish_reason|log-probabilit"
    r"|larger than|that of another request|an error at HTTP 200|tokens?, where|token ids|surrogate",
}


def failure_kind(error: str, refused: bool) -> str:
    """The kind of a call's failure, by its message: `engine_died` (the server that Prefab started
    dies of this question; not asked again either), `refused` (by the server, for good),
    `rate_limit`, `server_error` (HTTP 5xx), `timeout`, `no_connection`, `malformed` (an answer
    that cannot be read), or `transport` for any other.
    """
    if refused:
        return "engine_died" if error.startswith(_DIED) else "refused"
    found = (kind for kind, pattern in _KINDS.items() if re.search(pattern, error))
    return next(found, "transport")
