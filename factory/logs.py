"""The log of a command, with Python's `logging` below the logger `prefab`: to stderr with `-v`, to
a file with `--log-file`.

A line names calls by digest, model and server. Known secrets are removed from every line. Texts of
questions and answers are in it only where they were asked for (`-vv`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefab.factory import telemetry
from prefab.factory.console import LOG, say
from prefab.factory.errors import ConfigError
from prefab.factory.printable import printable
from prefab.factory.telemetry import CallEvent, Value
from prefab.factory.types import Completion

CALLS = logging.getLogger("prefab.calls")
STAGES = logging.getLogger("prefab.stages")
LEVEL_VARIABLE, FILE_VARIABLE = "PREFAB_VERBOSE", "PREFAB_LOG_FILE"
TEXTS = 2  # the verbosity with texts


class LogFormatter(logging.Formatter):
    """Lines with time (UTC), process, level and logger, in printable characters."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(name)s: %(message)s",
            "%Y-%m-%dT%H:%M:%S",
        )

    def format(self, record: logging.LogRecord) -> str:
        """The line, without known secrets."""
        return printable(super().format(record))


class ScreenHandler(logging.Handler):
    """Prints lines to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line that is not on the screen already."""
        if not getattr(record, "on_screen", False):
            say(self.format(record), stderr=True)


class LogObserver:
    """Logs calls and stages. `texts`: with the texts of questions and answers."""

    def __init__(self, texts: bool) -> None:
        self.texts = texts

    def call(self, event: CallEvent) -> None:
        """One line a call."""
        use, outcome = event.use, event.outcome
        about = " ".join(filter(None, (use.role, use.judge, use.principle)))
        asked = f"{event.key.hex()[:12]} {about} of prompt {use.prompt[:12]}: {event.request.model[:40]}"
        if isinstance(outcome, Completion):
            CALLS.debug(
                "%s: %s, %d prompt tokens, %d new tokens, %.3f s%s",
                asked,
                outcome.finish,
                outcome.prompt_tokens,
                outcome.completion_tokens,
                event.seconds,
                f", {outcome.replica}" if outcome.replica else "",
            )
        else:
            told = f"{type(outcome).__name__}: {outcome}"
            CALLS.debug("%s: failed after %.3f s: %s", asked, event.seconds, told)
        if self.texts:
            for message in event.request.messages:
                CALLS.debug("%s %s: %r", event.key.hex()[:12], message.role, message.content)
            if isinstance(outcome, Completion):
                CALLS.debug("%s answer: %r", event.key.hex()[:12], outcome.text)

    @contextmanager
    def stage(self, name: str, attributes: dict[str, Value]) -> Iterator[None]:
        """A line at the begin of a stage and one at its end."""
        told = " ".join(f"{key}={value}" for key, value in attributes.items())
        STAGES.info("%s begins%s", name, f" {told}" if told else "")
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            STAGES.info(
                "%s ends by %s after %.2f s", name, type(error).__name__, time.monotonic() - began
            )
            raise
        STAGES.info("%s ends after %.2f s", name, time.monotonic() - began)


@contextmanager
def logging_to(verbose: int, file: Path | None) -> Iterator[None]:
    """Within it, log to stderr and to a file; processes started within it do too.

    Args:
        verbose: 0: nothing to stderr; 1: what happens; 2: also texts of questions and answers.
        file: Lines are added at its end. Only this user may read a file that is made.

    Raises:
        ConfigError: The file cannot be written.
    """
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_file_handler(file))
    if verbose and not any(isinstance(handler, ScreenHandler) for handler in LOG.handlers):
        handlers.append(ScreenHandler())
    if not handlers:
        yield
        return
    level, kept = LOG.level, {n: os.environ.get(n) for n in (LEVEL_VARIABLE, FILE_VARIABLE)}
    for handler in handlers:
        handler.setFormatter(LogFormatter())
        LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    os.environ[LEVEL_VARIABLE] = str(verbose)
    if file is not None:
        os.environ[FILE_VARIABLE] = str(file.absolute())
    try:
        with telemetry.observing(LogObserver(verbose >= TEXTS)):
            yield
    finally:
        LOG.setLevel(level)
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()


def _file_handler(file: Path) -> logging.Handler:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        return logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--log-file {file}: cannot be written ({error.strerror})") from None


@contextmanager
def logging_by_environment() -> Iterator[None]:
    """As `logging_to`, by the variables PREFAB_VERBOSE and PREFAB_LOG_FILE."""
    level, file = os.environ.get(LEVEL_VARIABLE, ""), os.environ.get(FILE_VARIABLE, "")
    with logging_to(int(level) if level.isdecimal() else 0, Path(file) if file else None):
        yield
