"""What all commands have in common: their groups and examples in `--help`, and the options that say
how tables are printed.
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, Literal

import typer
import typer.core

import prefab
from prefab.factory.console import LOG, ON_SCREEN, OutputStyle, output_style
from prefab.factory.errors import ConfigError, InstallationError, PrefabError
from prefab.factory.logs import FILE_VARIABLE, LEVEL_VARIABLE, logging_to
from prefab.factory.printable import printable
from prefab.factory.telemetry import stage
from prefab.factory.tracing import tracing_by_environment

START, DATA, RULES = "Start here", "Make and look at data", "Work on a constitution"
LABELS, TRAIN, KEEP = "Check labels and judges", "Train and evaluate", "Stores and servers"
# By command: its group in `prefab --help`, and examples.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": (START, ("prefab demo", "prefab demo --full --store demo-store", "prefab demo --real")),
    "init": (START, ("prefab init my-project",)),
    "check": (START, ("prefab check .", "prefab check pairs.jsonl --map prompt=question --show")),
    "doctor": (START, ("prefab doctor", "prefab doctor pipeline.yaml --store store")),
    "completion": (START, ("source <(prefab completion bash)",)),
    "plan": (
        DATA,
        ("prefab plan pipeline.yaml", "prefab plan pipeline.yaml --set policy.samples=8"),
    ),
    "run": (DATA, ("prefab run pipeline.yaml", "prefab run pipeline.yaml --reask parse")),
    "sql": (DATA, ('prefab sql "SELECT outcome, count(*) AS n FROM preferences GROUP BY 1"',)),
    "view": (DATA, ("prefab view store",)),
    "why": (DATA, ("prefab why 3f2a --store store --calls",)),
    "report": (DATA, ("prefab report mine --store store --out report.html",)),
    "export": (DATA, ("prefab export out --store store", "prefab export pipeline.yaml out")),
    "import-preferences": (DATA, ("prefab import-preferences pairs.jsonl --by people",)),
    "diff": (RULES, ("prefab diff HEAD~1:constitution.yaml constitution.yaml",)),
    "watch": (RULES, ("prefab watch constitution.yaml --store store",)),
    "test": (RULES, ("prefab test constitution.yaml",)),
    "principles": (RULES, ("prefab principles --store store",)),
    "induce": (RULES, ("prefab induce pipeline.yaml --pairs pairs.jsonl --out constitution.yaml",)),
    "explain": (RULES, ("prefab explain C101",)),
    "render": (RULES, ("prefab render pairwise.jinja pipeline.yaml",)),
    "preview": (RULES, ("prefab preview pipeline.yaml",)),
    "import-constitution": (
        RULES,
        ("prefab import-constitution rubric.json --out constitution.yaml",),
    ),
    "constitution": (RULES, ()),
    "constitution log": (RULES, ("prefab constitution log --store store",)),
    "constitution show": (RULES, ("prefab constitution show VERSION --store store",)),
    "agreement": (LABELS, ("prefab agreement --store store", "prefab agreement --format md")),
    "calibrate": (LABELS, ("prefab calibrate --store store --source human",)),
    "label": (LABELS, ("prefab label --store store --annotator anna",)),
    "audit judge": (LABELS, ("prefab audit judge pipeline.yaml -n 100",)),
    "audit data": (LABELS, ("prefab audit data --store store --eval benchmark.jsonl",)),
    "eval judge": (
        LABELS,
        ("prefab eval judge pipeline.yaml --benchmark rewardbench --data rewardbench.jsonl",),
    ),
    "train": (TRAIN, ()),
    "train sft": (TRAIN, ("prefab train sft sft --set data.sources.0.store=store --set out=sft",)),
    "train reward": (TRAIN, ("prefab train reward reward --set data.sources.0.store=store",)),
    "train process": (TRAIN, ("prefab train process process --set out=trained/process",)),
    "train dpo": (TRAIN, ("prefab train dpo dpo --set data.sources.0.store=store --set out=dpo",)),
    "train kto": (TRAIN, ("prefab train kto kto --set data.sources.0.store=store",)),
    "train ppo": (TRAIN, ("prefab train ppo ppo --set data.sources.0.store=store",)),
    "train grpo": (TRAIN, ("prefab train grpo grpo --set method=rloo",)),
    "train online": (TRAIN, ("prefab train online online --set rounds=3",)),
    "sweep": (TRAIN, ("prefab sweep sweep --set 'betas=[0.03, 0.1, 0.3]'",)),
    "eval": (TRAIN, ()),
    "eval policy": (
        TRAIN,
        ("prefab eval policy --set 'policies={base: prefab-tiny, dpo: dpo}' --format md",),
    ),
    "eval weak-to-strong": (TRAIN, ("prefab eval weak-to-strong weak-to-strong",)),
    "audit": (LABELS, ()),
    "judge": (KEEP, ()),
    "judge serve": (KEEP, ("prefab judge serve pipeline.yaml --port 8100",)),
    "store": (KEEP, ()),
    "store info": (KEEP, ("prefab store info --store store",)),
    "store rebuild": (KEEP, ("prefab store rebuild --store store",)),
    "store merge": (KEEP, ("prefab store merge store whole-store",)),
    "store verify": (KEEP, ("prefab store verify store --recover new-store",)),
    "store backup": (KEEP, ("prefab store backup store backup",)),
    "store forget": (KEEP, ("prefab store forget --store store --reason parse --dry-run",)),
    "serve": (KEEP, ("prefab serve prefab-tiny --port 8000",)),
}
Format = Annotated[
    Literal["csv", "md", "json"] | None,
    typer.Option("--format", help="Print tables as CSV or Markdown, or the result as JSON."),
]
Intervals = Annotated[
    bool, typer.Option("--intervals", help="Show both bounds of each interval, not ±.")
]

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        envvar=LEVEL_VARIABLE,
        help="Print a log to stderr: calls, retries, servers. -vv: with the texts of questions and "
        "answers.",
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar=FILE_VARIABLE, help="Add the log to a file. With -vv: with texts."
    ),
]
# What the options before the command say.
_LOG_SETTINGS: ContextVar[tuple[int, Path | None]] = ContextVar("log_settings", default=(0, None))
# Both are options of `prefab`; each command takes them too, without a place in its help.
_LOG_OPTIONS: dict[str, tuple[Any, Any]] = {
    "verbose": (
        Annotated[int, typer.Option("--verbose", "-v", count=True, hidden=True)],
        0,
    ),
    "log_file": (Annotated[Path | None, typer.Option("--log-file", hidden=True)], None),
}
_STYLE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "output_format": (Format, None),
    "intervals": (Intervals, False),
}


def _schema_option(words: str) -> dict[str, tuple[Any, Any]]:
    """`--json-schema` of a command."""

    def print_schema(wanted: bool) -> None:
        if wanted:
            from prefab.pipelines.cli.options import print_json
            from prefab.pipelines.cli.outputs import schema_of

            print_json(schema_of(words))
            raise typer.Exit

    option = typer.Option(
        "--json-schema",
        is_eager=True,  # before missing arguments are noticed
        callback=print_schema,
        help="Print the JSON schema of what --json prints.",
    )
    return {"json_schema": (Annotated[bool, option], False)}


def log_as(verbose: int, log_file: Path | None) -> None:
    """Log the command that follows so (see `logging_to`)."""
    _LOG_SETTINGS.set((verbose, log_file))


class OrderedGroup(typer.core.TyperGroup):
    """A group that lists its commands in the order of `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in order; those that are not in `COMMANDS` last."""
        order = list(COMMANDS)
        place = {name: order.index(name) if name in order else len(order) for name in self.commands}
        return sorted(self.commands, key=lambda name: place[name])

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises: InstallationError where a module could not be loaded from its compiled file. An
        EOFError, which this raises, is taken for Ctrl-D otherwise.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:
            file = damaged_bytecode(error)
            if not file:
                raise
            raise InstallationError(
                f"{file}: damaged ({error}). Delete it: Python compiles the module again"
            ) from error


def damaged_bytecode(error: BaseException) -> str:
    """The compiled file (.pyc) that Python was reading when this error was raised; else empty."""
    for frame, _ in walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_name == "get_code" and "importlib" in code.co_filename:
            return str(frame.f_locals.get("bytecode_path") or "")
    before = error.__cause__ or error.__context__
    return damaged_bytecode(before) if before else ""


def dress(app: typer.Typer) -> None:
    """Give every command of an app its group and examples in `--help`, and the options of the log;
    to those that print a result (they have `--json`) also `--format`, `--intervals` and
    `--json-schema`.
    """
    for words, info in _all_commands(app):
        panel, examples = COMMANDS.get(words, (None, ()))
        info.rich_help_panel = panel if " " not in words else None
        heading = "Examples:" if examples[1:] else "Example:"
        info.epilog = "\n\n".join([heading, *examples]) if examples else None
        assert info.callback is not None
        info.short_help = _first_sentence(info.callback.__doc__ or "")
        info.callback = _with_common_options(info.callback, words)
    for group in _named_groups(app):
        group.rich_help_panel = COMMANDS.get(str(group.name), (None, ()))[0]


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    return re.split(r"(?<=\w\w)[.:;] ", words + " ")[0].strip().rstrip(".")


def _named_groups(app: typer.Typer) -> Iterator[Any]:
    for group in app.registered_groups:
        assert group.typer_instance is not None
        if isinstance(group.name, str):
            yield group
        yield from _named_groups(group.typer_instance)


def _all_commands(app: typer.Typer, before: str = "") -> list[tuple[str, Any]]:
    """Each command of an app and of its groups, with the words that call it."""
    found = []
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        found.append((f"{before} {name}".strip(), info))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        named = f"{before} {group.name or ''}".strip() if isinstance(group.name, str) else before
        found += _all_commands(group.typer_instance, named)
    return found


def _with_common_options(command: Callable[..., Any], words: str) -> Callable[..., Any]:
    """The command with the options of the log and, where it has `as_json`, those of `OutputStyle`
    (but `--format` where it has one of its own) and `--json-schema`.
    """
    signature = inspect.signature(command, eval_str=True)
    prints = "as_json" in signature.parameters
    more = dict(_LOG_OPTIONS)
    if prints:
        more |= _STYLE_OPTIONS | _schema_option(words)
    if "format" in signature.parameters:
        more.pop("output_format", None)

    @functools.wraps(command)
    def with_options(*args: Any, **given: Any) -> Any:
        with _logged(words, given.pop("verbose"), given.pop("log_file")):
            if not prints:
                return command(*args, **given)
            form = given.pop("output_format", None)
            intervals = given.pop("intervals")
            given.pop("json_schema")
            if form == "json" or given["as_json"]:
                if form not in (None, "json"):
                    raise ConfigError(f"--json and --format {form}: give only one of them")
                given["as_json"], form = True, None
            with output_style(OutputStyle(form or "", intervals)):
                return command(*args, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, default=default, annotation=kind)
        for name, (kind, default) in more.items()
    ]
    with_options.__signature__ = signature.replace(  # type: ignore[attr-defined]  # as `inspect` reads it
        parameters=[*signature.parameters.values(), *added]
    )
    with_options.__annotations__ = {
        name: one.annotation
        for name, one in with_options.__signature__.parameters.items()  # type: ignore[attr-defined]
    }
    return with_options


@contextmanager
def _logged(words: str, verbose: int, log_file: Path | None) -> Iterator[None]:
    """A command with its log: also as the options before the command say. An error is written to
    the log; a bug with its traceback.
    """
    before = _LOG_SETTINGS.get()
    with ExitStack() as stack:
        stack.enter_context(logging_to(verbose + before[0], log_file or before[1]))
        stack.enter_context(tracing_by_environment())
        LOG.info("prefab %s: %s", prefab.__version__, shlex.join(sys.argv[1:]))
        ending: BaseException | None = None
        with stage(f"prefab {words}"):
            try:
                yield
            except (typer.Exit, typer.Abort) as error:
                ending = error  # no failure of the stage
            except PrefabError as error:
                LOG.error("%s: %s", type(error).__name__, printable(str(error)), extra=ON_SCREEN)
                raise
            except Exception:
                LOG.exception("a bug", extra=ON_SCREEN)
                raise
        LOG.info("exit code %d", getattr(ending, "exit_code", 0))
        if ending is not None:
            raise ending
