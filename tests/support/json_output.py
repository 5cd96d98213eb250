"""What a command prints with `--json` is held to the schema of its output, wherever a test runs one
with typer's `CliRunner` or in a fork.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import typer.testing

from tests.support import fork_server


def closed(schema: Any) -> Any:
    """The schema, of which objects with named properties take no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    return found | ({"additionalProperties": False} if found.get("properties") else {})


@functools.cache
def validator(name: str) -> Any:
    """Of the output of a command, or of `error`."""
    import jsonschema

    place = {"$ref": f"#/$defs/{name.replace(' ', '-')}"}
    return jsonschema.Draft202012Validator(closed_outputs() | place)


@functools.cache
def closed_outputs() -> dict[str, Any]:
    """The closed schema of all outputs, which takes 0.3 s to make."""
    from prefab.pipelines.cli.outputs import output_schema

    return closed(output_schema())


def check(words: Sequence[object], printed: str) -> None:
    """Hold what a command printed to its schema.

    Args:
        words: Those after `prefab`, as in `("store", "info", "--json")`.
        printed: Its stdout, which is empty where the command was typed wrong.

    Raises:
        ValueError: It is no JSON.
        jsonschema.ValidationError: It does not keep to the schema.
    """
    from prefab.pipelines.cli.outputs import OUTPUTS

    texts = [*map(str, words)]
    if "--json" not in texts or not printed:
        return
    starts = (" ".join(texts[i : i + n]) for n in (2, 1) for i in range(len(texts)))
    name = next((name for name in starts if name in OUTPUTS), None)
    assert name is not None, f"{texts}: no command whose output has a schema"
    value = json.loads(printed)
    mistake = isinstance(value, dict) and {*value} == {"error", "problems", "exit"}
    validator("error" if mistake else name).validate(value)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Check the output of each command that is run with `--json` meanwhile."""

    def checking(run: Callable[..., Any], words_of: Callable[..., Sequence[object]]) -> Any:
        @functools.wraps(run)
        def run_and_check(self: Any, *args: Any, **settings: Any) -> Any:
            done = run(self, *args, **settings)
            check(words_of(*args), done.stdout)
            return done

        return run_and_check

    def of_prefab(words: Sequence[object]) -> Sequence[object]:
        """Those after `prefab`; none where another program is run."""
        return words[2:] if [*words[:2]] == ["-m", fork_server.COMMAND] else ()

    invoke, fork = typer.testing.CliRunner.invoke, fork_server.ForkServer.run
    with (
        mock.patch.object(
            typer.testing.CliRunner, "invoke", checking(invoke, lambda app, args=None: args or ())
        ),
        mock.patch.object(fork_server.ForkServer, "run", checking(fork, of_prefab)),
    ):
        yield
