"""What the command line's modules share: options, JSON output, and finding a store."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from prefab.factory.console import hint, warn
from prefab.factory.errors import ConfigError
from prefab.factory.printable import printable

STOPPED = 130
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
def resumable() -> Iterator[None]:
    """On Ctrl-C, print the command that continues (the same one) and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        warn("stopped; the same command continues from here")
        hint(shlex.join(["prefab", *sys.argv[1:]]))
        raise typer.Exit(STOPPED) from None


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
