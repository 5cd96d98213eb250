"""Commands about constitution files: their warnings and versions, and files of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefab.factory.console import EXIT_FAILED, console, say, warn
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.numbers import counted
from prefab.pipelines.cli.options import Json, Store, existing_store, hint_command, print_json

if TYPE_CHECKING:
    from prefab.factory.types import Constitution
    from prefab.pipelines.quality.constitution_lints import Lint

app = typer.Typer()


@app.command()
def explain(
    code: Annotated[
        str, typer.Argument(metavar="[CODE]", help="Such as C101. Left out: all codes.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Explain a warning of `prefab check`: what it means, why it matters, an example, and how to
    mend it or silence it.
    """
    from prefab.pipelines.quality.constitution_lints import explain as find

    rules = find(code)
    if as_json:
        return print_json({"codes": [rule.data() for rule in rules]})
    if len(rules) > 1:
        for rule in rules:
            say(rule.title, rule.code, "bold")
        return hint_command("explain", rules[0].code)
    [rule] = rules
    say(rule.title, rule.code, "bold")
    say(f"why      {rule.why}")
    say(f"example  {rule.example}")
    say(f"mend     {rule.mend}")
    say(
        f"silence  `lint: {{ignore: [{rule.code}]}}` in the principle or at the top of the file, or "
        f"`# prefab: ignore {rule.code}` on the line or the line above"
    )


def report_check(
    checked: Sequence[tuple[Path, str]], problems: Sequence[Problem], strict: bool, as_json: bool
) -> None:
    """Print what `prefab check` found.

    Args:
        checked: The files, each with its kind.
        problems: What makes files invalid.
        strict: Exit with code 1 when there are warnings.
        as_json: Print one JSON object.

    Raises:
        ConfigError: There are problems, and they are not printed as JSON.
        typer.Exit: 1 for warnings with `strict`, 2 for problems with `as_json`.
    """
    constitutions = _loaded([path for path, what in checked if what == "constitution"])
    lints = _lints(list(constitutions))
    if as_json:
        print_json(_check_data(checked, problems, lints, constitutions))
        raise typer.Exit(2 if problems else EXIT_FAILED if lints and strict else 0)
    for lint in lints:
        warn(str(lint))
    if problems:
        raise ConfigError(list(problems))
    for path, what in checked:
        _show_checked(path, what, constitutions.get(path), alone=len(checked) == 1)
    if lints:
        say(
            f"{counted(len(lints), 'warning')}; `prefab explain {lints[0].code}` says what one means"
        )
    if lints and strict:
        raise typer.Exit(EXIT_FAILED)
    _hint_next(checked)


def _check_data(
    checked: Sequence[tuple[Path, str]],
    problems: Sequence[Problem],
    lints: Sequence[Lint],
    constitutions: dict[Path, Constitution],
) -> dict[str, Any]:
    """What a check found, as plain data."""
    return {
        "checked": [str(path) for path, _ in checked],
        "problems": [str(problem) for problem in problems],
        "lints": [lint.data() for lint in lints],
        "constitutions": [
            {"file": str(path), **versions(made)} for path, made in constitutions.items()
        ],
    }


def _hint_next(checked: Sequence[tuple[Path, str]]) -> None:
    """The command that follows a check."""
    pipelines = [path for path, what in checked if what == "pipeline"]
    hint_command(*(("plan", pipelines[0]) if pipelines else ("init", "my-project")))


def _loaded(files: Sequence[Path]) -> dict[Path, Constitution]:
    """The constitutions that are valid, by file."""
    from prefab.factory.spec.constitution import load_constitution

    found = {}
    for file in files:
        try:
            found[file] = load_constitution(file)
        except ConfigError:
            continue
    return found


def _lints(files: list[Path]) -> list[Lint]:
    if not files:
        return []
    from prefab.pipelines.quality.constitution_lints import equal_ids, lint_constitution

    return [*(lint for file in files for lint in lint_constitution(file)), *equal_ids(files)]


def versions(constitution: Constitution) -> dict[str, Any]:
    """A constitution's id and digest, and those of its principles, as plain data."""
    from prefab.factory.spec.constitution import constitution_digest, principle_digest

    return {
        "id": constitution.id,
        "digest": constitution_digest(constitution),
        "principles": {p.id: principle_digest(p) for p in constitution.principles},
    }


def _show_checked(path: Path, what: str, constitution: Constitution | None, alone: bool) -> None:
    """One line for a file; of a constitution its digest, and alone also those of its principles."""
    if constitution is None:
        return say(f"{path} ({what})", "ok", "green")
    version = versions(constitution)
    used = sum(principle.enabled for principle in constitution.principles)
    say(
        f"{path} ({what} {version['digest'][:8]}, {counted(used, 'principle')} in use)",
        "ok",
        "green",
    )
    for principle in constitution.principles if alone else ():
        state = "" if principle.enabled else "  (disabled)"
        console().print(f"    {version['principles'][principle.id][:8]}  {principle.id}{state}")


@app.command("import-constitution")
def import_constitution(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="JSON, JSON lines, YAML, or a text with a list. Comparison strings and few-shot "
            "examples may be files of their own.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="The new file. Left out: print it."),
    ] = None,
    id: Annotated[str, typer.Option(help="Its id. Default: from the first file's name.")] = "",
    title: Annotated[str, typer.Option(help="Its title. Default: the first file's name.")] = "",
    licence: Annotated[
        str, typer.Option(help="The licence of the texts, an SPDX name such as MIT.")
    ] = "",
    source: Annotated[str, typer.Option(help="Where the files come from.")] = "",
    commit: Annotated[str, typer.Option(help="The version of the source.")] = "",
    as_json: Json = False,
) -> None:
    """Make a constitution from files of other projects: the prompts of the Constitutional AI
    paper, llm-swarm's and LangChain's principles, rubrics, or a plain list of rules.
    """
    from prefab.factory.spec.constitution_imports import import_constitution as read

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; give a new file")
    found = read(files, id, title, licence, source, commit)
    if out is not None:
        out.write_text(found.text, encoding="utf-8")
    if as_json:
        return print_json(found.data() | {"out": str(out) if out else None})
    for note in found.notes:
        warn(note)
    if out is None:
        return console().print(found.text, markup=False, highlight=False, soft_wrap=True)
    layouts = ", ".join(dict.fromkeys(found.layouts.values()))
    n = len(found.constitution.principles)
    say(f"{out}: {counted(n, 'principle')} ({layouts})")
    hint_command("check", out)


versions_app = typer.Typer(
    no_args_is_help=True, help="Show the versions of constitutions that the runs of a store used."
)
app.add_typer(versions_app, name="constitution")


@versions_app.command()
def log(
    store: Store = Path("store"),
    id: Annotated[str, typer.Option(help="Only the constitution with this id.")] = "",
    as_json: Json = False,
) -> None:
    """List the versions of constitutions in a store, the oldest first, each with what changed in
    meaning since the version before it.
    """
    from prefab.pipelines.quality.constitution_log import constitution_log

    found = constitution_log(existing_store(store), id)
    if as_json:
        return print_json({"versions": [version.data() for version in found]})
    for version in found:
        say(
            f"{version.id}  {version.date}  {counted(len(version.principles), 'principle')}  "
            f"runs {', '.join(version.runs)}",
            version.digest[:8],
            "bold",
        )
        for change in version.changes:
            say(f"          {change}")
    hint_command("constitution", "show", found[-1].digest[:8], "--store", store)


@versions_app.command()
def show(
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", help="A version's digest, or its beginning.")
    ],
    store: Store = Path("store"),
    files: Annotated[
        bool, typer.Option("--files", help="The files that it was made of, as they were.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the full text of a version, with everything that it extends resolved."""
    from prefab.pipelines.quality.constitution_log import constitution_version

    found = constitution_version(existing_store(store), digest)
    if as_json:
        return print_json(found.data())
    texts = list(found.files.items()) if files and found.files else [("", found.text)]
    for name, text in texts:
        shown = f"# {name}\n{text}" if name else text
        console().print(shown, markup=False, highlight=False, soft_wrap=True)
