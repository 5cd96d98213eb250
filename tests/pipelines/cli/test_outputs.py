"""Each command with `--json` has a schema of its output, and what is printed keeps to it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import jsonschema
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from prefab import run
from prefab.pipelines.cli.main import app
from prefab.pipelines.cli.outputs import OUTPUTS, output_schema
from prefab.pipelines.store.fill import query
from tests.support import project
from tests.support.json_output import check


def with_json(command: Any, name: str = "") -> set[str]:
    """The words of each command that has `--json`."""
    inner = getattr(command, "commands", {})
    if not inner:
        return {name} if any("--json" in p.opts for p in command.params) else set()
    return {one for word in inner for one in with_json(inner[word], f"{name} {word}".strip())}


def test_each_command_with_json_has_a_schema():
    assert with_json(get_command(app)) == {*OUTPUTS} - {"error"}


def test_a_command_prints_the_schema_of_its_output_alone():
    done = CliRunner().invoke(app, ["why", "--json-schema"])  # without the argument it needs
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and "outcome" in told["properties"]
    assert {*told["$defs"]} < {*output_schema()["$defs"]} and "store-info" not in told["$defs"]
    done = CliRunner().invoke(app, ["store", "info", "--json-schema"])
    assert "runs" in json.loads(done.stdout)["properties"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a finished run."""
    folder = tmp_path_factory.mktemp("outputs")
    value = project.pipeline(folder, prompts=4)
    run(value, engines=project.engine())
    project.write(folder, value)
    text = (folder / "small.yaml").read_text()
    (folder / "other.yaml").write_text(text.replace("answer is kinder?", "answer is nicer?"))
    (folder / "pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "As.", "rejected": "No."}\n')
    return folder


TYPED = (
    ("init", "new"),
    ("check", "small.yaml"),
    ("check", "pairs.jsonl"),
    ("plan", "pipeline.yaml"),
    ("run", "pipeline.yaml"),
    ("sql", "'SELECT * FROM preferences'"),
    ("why", "PREFERENCE"),
    ("export", "out"),
    ("export", "out --dry-run"),
    ("diff", "small.yaml other.yaml"),
    ("principles", ""),
    ("explain", ""),
    ("agreement", "--resamples 0"),
    ("calibrate", "--source none"),
    ("audit data", ""),
    ("constitution log", ""),
    ("store info", ""),
    ("store rebuild", ""),
    ("store verify", "store"),
    ("store backup", "store copy"),
    ("store forget", "--role sample --dry-run"),
    ("import-preferences", "pairs.jsonl --name pairs"),
)


@pytest.mark.parametrize(("name", "rest"), TYPED)
def test_what_is_printed_keeps_to_the_schema(made, monkeypatch, name, rest):
    monkeypatch.chdir(made)
    if "PREFERENCE" in rest:
        rest = query("store", "SELECT max(preference) FROM preferences").item()
    done = CliRunner().invoke(app, [*name.split(), *shlex.split(rest), "--json"])
    assert done.exit_code in (0, 1) and done.stdout, done.output
    check([*name.split(), "--json"], done.stdout)


def test_a_wrong_output_is_found():
    with pytest.raises(jsonschema.ValidationError, match="'bytes' is a required property"):
        check(["report", "--json"], '{"file": "a", "run": "b", "headline": "c"}')
    with pytest.raises(jsonschema.ValidationError, match="'more' was unexpected"):
        check(["store", "rebuild", "--json"], '{"store": "", "rows": {}, "seconds": 1, "more": 0}')


def test_a_mistake_keeps_to_its_schema(monkeypatch, capsys):
    from prefab.pipelines.cli import main

    monkeypatch.setattr("sys.argv", ["prefab", "sql", "SELECT 1", "--store", "none", "--json"])
    with pytest.raises(SystemExit):
        main.main()
    check(["sql", "--json"], capsys.readouterr().out)
