"""What the command line's modules share: options, JSON output, and finding a store."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from prefab.factory.console import hint, warn
from prefab.factory.errors import ConfigError
from prefab.factory.printable import printable

STOPPED = 130  # by Ctrl-C
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Override a field, for example policy.samples=8. May be repeated.",
    ),
]
Map = Annotated[
    list[str],
    typer.Option(
        "--map",
        metavar="COLUMN=YOURS",
        help="Read a column under another name: --map prompt=question,chosen=good.",
    ),
]
Pipeline = Annotated[
    Path, typer.Argument(metavar="PIPELINE.yaml", help="A pipeline file, or the name of a preset.")
]
Store = Annotated[
    Path, typer.Option("--store", help="The folder of ledger.sqlite and prefab.duckdb.")
]


@contextmanager
def resumable(kept: str = "what is done is kept", again: str = "") -> Iterator[None]:
    """On Ctrl-C, SIGTERM or SIGHUP, print what is kept and the command that continues (the same
    one), and exit with 128 and the signal's number. A second signal ends the process at once.

    Args:
        kept: What is safe, where the work itself does not say it.
        again: The command; default: as it was typed.
    """
    from prefab.pipelines.run.interrupts import Interrupted, name_of, signals_raise

    try:
        with signals_raise():
            yield
    except KeyboardInterrupt as error:
        told = error if isinstance(error, Interrupted) else Interrupted()
        with suppress(OSError):  # the terminal may be gone
            warn(
                f"stopped by {name_of(told.number)}: {told.kept or kept}. The same command goes on"
            )
            hint(again or shlex.join(["prefab", *sys.argv[1:]]))
        raise typer.Exit(128 + told.number) from None


def hint_command(*words: object) -> None:
    """Print the next `prefab` command, quoted so that it can be pasted into a shell."""
    hint(shlex.join(["prefab", *map(str, words)]))


def print_json(value: Any) -> None:
    """Print a value as one JSON object to stdout, with characters that a terminal would act on
    written as escapes.
    """
    import orjson

    text = orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    sys.stdout.write(printable(text.decode()) + "\n")


def existing_store(store: Path) -> Path:
    """The store's folder.

    Raises:
        ConfigError: There is no store in it.
    """
    if not (store / "ledger.sqlite").exists():
        raise ConfigError(
            f"{store}: no store here (ledger.sqlite is missing). Name a store with --store DIR, "
            "or create one with `prefab run`"
        )
    return store
