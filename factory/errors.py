"""Errors that a user can mend. Each says what is wrong, where, and how to mend it. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefab.factory.redaction import redact


class PrefabError(Exception):
    """Base of all errors that the user can mend; the command line prints them without a
    traceback. Known secrets are removed from the message.
    """

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


class EngineError(PrefabError, RuntimeError):
    """An engine cannot start or has failed for good (no server, wrong model name, bad key)."""


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
