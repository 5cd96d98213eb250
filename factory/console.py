"""Output on the terminal: results, tables, progress, errors and hints.

Results go to stdout, so that they can be piped; progress, hints and errors go to stderr. `NO_COLOR`
is honoured. Whatever is printed here is made printable first (`printable.py`), and rich's markup
and emoji codes in it mean nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Literal, TypeVar

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from prefab.factory.errors import BudgetError, ConfigError, PrefabError
from prefab.factory.numbers import cell
from prefab.factory.printable import printable
from prefab.factory.tables import as_csv, as_markdown, fitted, wrap

LOG = logging.getLogger("prefab")  # what goes where: `logs`
LOG.addHandler(logging.NullHandler())  # else Python prints each warning to stderr once more
ON_SCREEN = {"on_screen": True}  # `extra` of a line that the terminal has already
T = TypeVar("T")
MIN_WIDTH = 40  # narrower terminals get lines of this width
PLAIN_EVERY_S = 5.0  # seconds between progress lines where stderr is not a terminal
EXIT_FAILED, EXIT_USAGE = 1, 2
_EVERY_NOTE: ContextVar[str] = ContextVar("every_note", default="")


@dataclass(frozen=True, slots=True)
class OutputStyle:
    """How tables are printed.

    Attributes:
        format: Empty for people, `csv` or `md`.
        intervals: Whether estimates show the bounds of their intervals.
    """

    format: Literal["", "csv", "md"] = ""
    intervals: bool = False


_STYLE: ContextVar[OutputStyle] = ContextVar("style", default=OutputStyle())  # noqa: B039


class PrintableConsole(Console):
    """A rich console that prints no character a terminal would act on, except its own colours and
    cursor movements. Markup and emoji codes are not interpreted.
    """

    @property
    def file(self) -> IO[str]:
        """The stream that is written to: the standard one, below the guard that `main` puts on
        it.
        """
        file = self._file or (sys.stderr if self.stderr else sys.stdout)
        return getattr(file, "direct", file)

    @file.setter
    def file(self, new: IO[str]) -> None:
        """Write to another stream from now on."""
        self._file = new

    used = False  # whether anything was printed

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, as rich does; strings are made printable."""
        self.used = True
        options |= {"markup": False, "emoji": False}
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            s if s.control else Segment(printable(s.text), s.style) for s in buffer
        )


def console(stderr: bool = False) -> PrintableConsole:
    """The console for results (stdout), or for everything else (stderr). Colour only on a terminal,
    and never with NO_COLOR.
    """
    return _console(stderr)


@lru_cache
def _console(stderr: bool) -> PrintableConsole:
    return PrintableConsole(
        stderr=stderr,
        no_color=bool(os.environ.get("NO_COLOR")) or None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def say(text: str, state: str = "", style: str = "", stderr: bool = False) -> None:
    """Print a line, after a word in a colour where `state` is given. On a terminal long lines are
    broken between words. With `--format csv` it goes to stderr: stdout is for the table alone.
    """
    out = console(stderr or _STYLE.get().format == "csv")
    head = ((printable(state), style), " ") if state else ("", "")
    line = Text.assemble(*head, printable(text))
    out.print(line, soft_wrap=not out.is_terminal)


def heading(title: str, number: int = 0, of: int = 0) -> None:
    """Print a heading after an empty line; `number` of `of` steps where the text has steps."""
    count = f"{number} of {of} · " if number else ""
    console().print("")
    console().print(count + title, style="bold")


def exit_code(error: PrefabError) -> int:
    """2 for bad input or usage; 1 for a check, a budget, a server or a store that failed."""
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def fail(error: PrefabError, remedy: str = "") -> int:
    """Print a mistake the user can mend, without a traceback, and give the exit code.

    Each problem is one line, `file:line:col path: message`, which editors and terminals make
    clickable.
    """
    lines = (
        [str(problem) for problem in error.problems]
        if isinstance(error, ConfigError)
        else [str(error)]
    )
    for line in lines:
        say(line, "error", "red", stderr=True)
    if len(lines) > 1:
        say(f"{len(lines)} problems", stderr=True)
    remedy = remedy or _remedy(error)
    if remedy:
        say(f" {remedy}", "help", "cyan", stderr=True)
    return exit_code(error)


def _remedy(error: PrefabError) -> str:
    if isinstance(error, BudgetError):
        name = next((n for n in ("failed", "calls", "tokens") if f"budget.{n}" in str(error)), None)
        setting = f"budget.{name}" if name else "budget.unscored"
        return f"answers are kept; fix the cause or raise {setting} with --set, then run again"
    return error.help


def warn(message: str) -> None:
    """Print a warning to stderr."""
    LOG.warning(printable(message), extra=ON_SCREEN)
    say(f" {message}", "note", "yellow", stderr=True)


def hint(command: str) -> None:
    """Print the next command to type, to stderr."""
    console(stderr=True).print(Text.assemble("next: ", (printable(command), "bold")))


@contextmanager
def every_table_notes(note: str) -> Iterator[None]:
    """Within it, every table ends with this line too."""
    token = _EVERY_NOTE.set(note)
    try:
        yield
    finally:
        _EVERY_NOTE.reset(token)


@contextmanager
def output_style(style: OutputStyle) -> Iterator[None]:
    """Within it, tables are printed in this style."""
    token, console().used = _STYLE.set(style), False
    try:
        yield
    finally:
        _STYLE.reset(token)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = ""
) -> None:
    """Print a table to stdout, title and note on lines of their own. Columns of numbers are aligned
    right. On a terminal it is fitted to the width; elsewhere each row is one line.

    Args:
        title: What the table shows.
        columns: The headers; all empty: a list of names and values.
        rows: The rows; `prefab.factory.numbers.cell` writes the values.
        note: What the reader must know besides.
    """
    rows, style, out = [list(row) for row in rows], _STYLE.get(), console()
    notes = [line for line in (note, _EVERY_NOTE.get()) if line]
    if out.used and title:
        out.print("")
    if style.format == "csv":
        for line in (title, *notes):
            console(stderr=True).print(line)
        return out.print(as_csv(columns, rows), end="")
    if style.format == "md":
        return _print_markdown(title, as_markdown(columns, rows, style.intervals), notes)
    if title:
        _print_prose(out, title, "italic")
    for number, part in enumerate(
        fitted(columns, rows, line_width(), out.is_terminal, style.intervals)
    ):
        if number:
            out.print("")
        for line in part.header:
            out.print(line, style="bold")
        for line in part.body:
            out.print(line)
    for line in notes:
        _print_prose(out, line, "dim")
    return None


def _print_markdown(title: str, made: str, notes: Sequence[str]) -> None:
    out = console()
    if title:
        out.print(f"**{title}**\n")
    out.print(made, end="")
    for line in notes:
        out.print(f"\n{line}")


def line_width() -> int | None:
    """Characters of a line of stdout; None where it is no terminal and COLUMNS says nothing."""
    out = console()
    if not out.is_terminal and not os.environ.get("COLUMNS"):
        return None
    return max(MIN_WIDTH, out.width)


def _print_prose(out: PrintableConsole, text: str, style: str = "") -> None:
    """Print sentences, broken between words where lines have a width."""
    width = line_width()
    for line in text.split("\n"):
        for part in wrap(line, width) if width else [line]:
            out.print(part, style=style or None)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Progress of long work: a bar on a terminal, elsewhere a plain line every few seconds, nothing
    when quiet.

    `with Progress("judging", total) as p: p.advance(3, reused=12, unscored="0.4%")`
    """

    def __init__(
        self, what: str, total: int | None = None, quiet: bool = False, unit: str = ""
    ) -> None:
        self.what, self.total, self.quiet, self.unit = what, total, quiet, unit
        self.done, self.facts = 0, ""
        # share of the work that is done, where `done / total` is a bad estimate (many begun at
        # once)
        self.share: float | None = None
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                console=console(stderr=True),
            )
            self._task = self._bar.add_task(self.what, total=self.total, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, facts=self.facts)
            self._bar.stop()
        elif not self.quiet:
            self._line()

    def restart(self) -> None:
        """Count the time from now: what came before was preparation."""
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=self.total, completed=self.done)

    async def over(
        self, items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int
    ) -> None:
        """Run `work` on every item, `at_once` at a time, and count each. One that fails cancels the
        others.
        """
        rest = iter(items)

        async def worker() -> None:
            for item in rest:
                await work(item)
                self.advance()

        workers = [asyncio.create_task(worker()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Count n more as done. `facts` (calls a second, answers reused, unscored) replace those
        shown beside the bar; without any, the last ones stay.
        """
        self.done += n
        if facts:
            self.facts = " · ".join(
                f"{name.replace('_', ' ')} {cell(value)}" for name, value in facts.items()
            )
        self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, facts=f"{self._left()} {self.facts}".strip()
            )
        elif (
            not self.quiet
            and self.done != self.total
            and time.monotonic() - self._printed >= PLAIN_EVERY_S
        ):
            self._line()  # the last one is written at the end

    def _left(self) -> str:
        """How long the rest will take at the pace so far; empty while unknown."""
        share = (
            self.share if self.share is not None else self.done / self.total if self.total else 0.0
        )
        if not 0 < share < 1:
            return ""
        return f"· {duration((time.monotonic() - self._started) * (1 - share) / share)} left"

    def _line(self) -> None:
        self._printed = time.monotonic()
        spent = self._printed - self._started
        of = f"/{self.total:,}" if self.total else ""
        unit = f" {self.unit}" if self.unit else ""
        facts = f" · {self.facts}" if self.facts else ""
        left = f" {self._left()}" if self._left() else ""
        line = f"{self.what} {self.done:,}{of}{unit} · {duration(spent)}{left}{facts}"
        say(line, stderr=True)
