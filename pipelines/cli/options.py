"""What the command line's files share: options, JSON on stdout, a pipeline by name, a store that
exists.
"""

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
from prefab.factory.paths import PACKAGE

STOPPED = 130
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="Override a field, such as policy.samples=8."),
]
Pipeline = Annotated[
    Path, typer.Argument(metavar="PIPELINE.yaml", help="A pipeline file, or a preset's name.")
]
Store = Annotated[
    Path, typer.Option("--store", help="The folder of ledger.sqlite and prefab.duckdb.")
]


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C is told, with the command that goes on from there: this one; the exit code is 130."""
    try:
        yield
    except KeyboardInterrupt:
        warn("stopped; the same command goes on from here")
        hint(shlex.join(["prefab", *sys.argv[1:]]))
        raise typer.Exit(STOPPED) from None


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    import orjson

    text = orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    sys.stdout.write(text.decode() + "\n")


def pipeline_path(path: Path) -> Path:
    """A pipeline file, or one of the presets by name: `demo` for pipelines/presets/demo.yaml."""
    preset = PACKAGE / "pipelines" / "presets" / f"{path.name.removesuffix('.yaml')}.yaml"
    return preset if not path.exists() and len(path.parts) == 1 and preset.exists() else path


def existing_store(store: Path) -> Path:
    """The store's folder.

    Raises: ConfigError where there is none.
    """
    if not (store / "ledger.sqlite").exists():
        raise ConfigError(
            f"{store}: there is no store here (no ledger.sqlite); name one with --store DIR, "
            "or make one with `prefab run`"
        )
    return store
