"""What all commands share: groups and examples in the help, the version, completion, and the format
of tables."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import py_compile
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from prefab import run
from prefab.factory.errors import InstallationError
from prefab.pipelines.cli.commands import COMMANDS, OrderedGroup, _all_commands
from prefab.pipelines.cli.main import COMPLETE, app
from tests.support import project

RUN = CliRunner()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store of a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    run(project.pipeline(folder, prompts=4), engines=project.engine())
    return folder / "store"


def invoked(*words: object):
    """The result of a command that succeeds."""
    found = RUN.invoke(app, list(map(str, words)))
    assert found.exit_code == 0, found.output
    return found


def test_every_command_has_a_group_and_an_example():
    found = {words for words, _ in _all_commands(app)}
    groups = {name.split()[0] for name in found if " " in name}
    assert found | groups == set(COMMANDS)
    assert {name for name, (_, examples) in COMMANDS.items() if not examples} == groups
    told = invoked("--help").output
    places = [told.index(panel) for panel in dict.fromkeys(panel for panel, _ in COMMANDS.values())]
    assert places == sorted(places) and "─ Commands ─" not in told


@pytest.mark.parametrize("words", sorted(n for n, (_, examples) in COMMANDS.items() if examples))
def test_the_examples_are_in_the_help_and_can_be_parsed(words):
    told = invoked(*words.split(), "--help").output
    command = typer.main.get_command(app)
    for word in words.split():
        command = command.commands[word]
    for example in COMMANDS[words][1]:
        assert example in " ".join(told.split()), told
        pasted = shlex.split(example)
        if pasted[0] == "prefab":
            assert pasted[1 : 1 + len(words.split())] == words.split()
            command.make_context(words, pasted[1 + len(words.split()) :])


def test_version():
    assert invoked("--version").output.startswith(f"prefab {version('prefab-rlaif')} (")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_scripts_name_the_command(shell):
    told = invoked("completion", shell).output
    assert COMPLETE in told and "prefab" in told
    if shell == "bash":
        subprocess.run(["bash", "-n", "-c", told], check=True)


def test_a_shell_gets_commands_and_options_completed():
    code = "import sys; sys.argv[0] = 'prefab'; from prefab.pipelines.cli.main import main; main()"
    for typed, at, expected in (
        ("prefab agr", "1", "agreement"),
        ("prefab sql --fo", "2", "--format"),
    ):
        env = {**os.environ, COMPLETE: "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": at}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr


QUERY = "SELECT outcome, avg(p_chosen) AS p, count(*) AS n FROM preferences GROUP BY 1 ORDER BY 1"


def test_piped_tables_have_no_lines_and_one_line_a_row(store):
    lines = invoked("sql", QUERY, "--store", store).stdout.splitlines()
    assert lines[0].split() == ["outcome", "p", "n"] and not any("─" in line for line in lines)


def test_tables_as_csv_as_markdown_and_as_json(store):
    rows = json.loads(invoked("sql", QUERY, "--store", store, "--json").stdout)
    assert json.loads(invoked("sql", QUERY, "--store", store, "--format", "json").stdout) == rows
    read = csv.DictReader(
        io.StringIO(invoked("sql", QUERY, "--store", store, "--format=csv").stdout)
    )
    assert [{**row, "p": float(row["p"]), "n": int(row["n"])} for row in read] == rows
    lines = invoked("sql", QUERY, "--store", store, "--format", "md").stdout.splitlines()
    assert lines[:2] == ["| outcome | p | n |", "| --- | ---: | ---: |"]
    assert len(lines) == 2 + len(rows)


def test_csv_on_stdout_is_the_table_alone(store):
    told = invoked("store", "info", "--store", store, "--format", "csv").stdout
    first = told.partition("\n\n")[0]
    assert {row["table"] for row in csv.DictReader(io.StringIO(first))} >= {
        "preferences",
        "samples",
    }


def test_two_formats_at_once_are_refused(store):
    found = RUN.invoke(app, ["sql", QUERY, "--store", str(store), "--json", "--format", "md"])
    assert found.exit_code != 0 and "give only one of them" in str(found.exception)


def test_intervals_show_both_bounds(store):
    plain = invoked("agreement", "--store", store, "--resamples", "50").stdout
    both = invoked("agreement", "--store", store, "--resamples", "50", "--intervals").stdout
    assert "±" in plain or " -." in plain or " +." in plain
    assert "±" not in both and " to " in both


@pytest.mark.parametrize("kept", [20, 60, -1])
def test_a_damaged_compiled_file_is_named(tmp_path, monkeypatch, kept):
    """Cut off or with a flipped byte; an EOFError would end as `Aborted.`, as after Ctrl-D."""
    (tmp_path / "lately_damaged.py").write_text("VALUES = {'a': 1, 'b': [2, 'three'], 'c': None}\n")
    file = Path(py_compile.compile(str(tmp_path / "lately_damaged.py"), doraise=True))
    whole = file.read_bytes()
    file.write_bytes(whole[:kept] if kept > 0 else whole[:16] + b"\xff" + whole[17:])
    monkeypatch.syspath_prepend(tmp_path)
    damaging = typer.Typer(cls=OrderedGroup)

    @damaging.command()
    def load():
        importlib.import_module("lately_damaged")

    @damaging.command()
    def other(): ...

    error = RUN.invoke(damaging, ["load"]).exception
    assert isinstance(error, InstallationError) and f"{file}: damaged (" in str(error)
