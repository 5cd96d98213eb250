"""The command `prefab` and its subcommands.

Results go to stdout (with `--json` as one JSON object), progress and errors to stderr. Exit codes:
0 done, 1 a check failed or a budget was exceeded, 2 wrong input or usage, 130 stopped by Ctrl-C
(143 by SIGTERM, 129 by SIGHUP).
Large packages are imported inside the commands, so that `--help` and `check` start quickly.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import prefab
from prefab.factory.console import console, fail, hint, say, table, warn
from prefab.factory.errors import ConfigError, PrefabError, StoreError
from prefab.factory.extras import EXTRA_OF, missing_package
from prefab.factory.numbers import counted
from prefab.factory.printable import guard_standard_streams
from prefab.factory.redaction import add_environment_secrets
from prefab.pipelines.cli import constitutions, exports, judge, lab, labels, planning, principles
from prefab.pipelines.cli import report as cli_report
from prefab.pipelines.cli import store as cli_store
from prefab.pipelines.cli import train as cli_train
from prefab.pipelines.cli import view as cli_view
from prefab.pipelines.cli.commands import COMMANDS, LogFile, OrderedGroup, Verbose, dress, log_as
from prefab.pipelines.cli.options import (
    Json,
    Map,
    Pipeline,
    Sets,
    Store,
    existing_store,
    print_json,
    resumable,
)
from prefab.pipelines.cli.run_report import next_command, report

if TYPE_CHECKING:
    from prefab.pipelines.run.runner import RunResult

app = typer.Typer(
    name="prefab",
    cls=OrderedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make preference data with AI judges (RLAIF, Constitutional AI), and train on it.",
)
app.add_typer(cli_store.app, name="store")
app.add_typer(judge.app, name="judge")
app.add_typer(constitutions.app)
app.add_typer(planning.app)
app.add_typer(lab.app)
app.add_typer(labels.app)
app.add_typer(principles.app)
app.add_typer(cli_report.app)
app.add_typer(exports.app)
app.add_typer(cli_train.app)
app.add_typer(cli_view.app)
COMPLETE = "_PREFAB_COMPLETE"  # set by the shell that asks for completions


def _print_version(wanted: bool) -> None:
    """Print the version and where Prefab lies, then exit."""
    if wanted:
        from prefab.factory.paths import IMPORT_ROOT

        say(f"prefab {prefab.__version__} ({IMPORT_ROOT})")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    verbose: Verbose = 0,
    log_file: LogFile = None,
) -> None:
    """Make preference data with AI judges (RLAIF, Constitutional AI), and train on it."""
    log_as(verbose, log_file)


def main() -> None:
    """Run the command line. A user's mistake is printed without a traceback; a bug keeps it."""
    add_environment_secrets()
    guard_standard_streams()
    if COMPLETE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
    try:
        app()
    except PrefabError as error:
        sys.exit(_report_error(error))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA_OF:
            raise
        words = next(
            (words for n in (2, 1) if (words := " ".join(sys.argv[1 : n + 1])) in COMMANDS), ""
        )
        sys.exit(_report_error(missing_package(error.name, f"`prefab {words}`")))
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.exit(_report_error(StoreError(f"{error.filename or 'the disk'}: {error.strerror}")))


def _report_error(error: PrefabError) -> int:
    """Print the error, with `--json` also as JSON; return the exit code."""
    code = fail(error)
    if "--json" in sys.argv or " --format json" in " ".join(sys.argv).replace("=", " "):
        problems = (
            [str(problem) for problem in error.problems]
            if isinstance(error, ConfigError)
            else [str(error)]
        )
        print_json({"error": type(error).__name__, "problems": problems, "exit": code})
    return code


@app.command()
def demo(
    store: Store = Path("demo-store"),
    prompts: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of prompts from the embedded world. Every fifth is of the validation "
            "split, on which p_chosen is calibrated. Default: 96.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="320 prompts, and longer PPO: 15 minutes on two cores.")
    ] = False,
    sets: Sets = [],
    train: Annotated[
        bool, typer.Option(help="Also train policies on the data and evaluate them.")
    ] = True,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Real questions to a small real model (smollm2-135m, from the package index).",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run everything on the embedded world: make data with vLLM, train on it, and compare labels
    and policies with the known truth. With --real: on real questions, without a known truth.
    """
    with resumable():
        if real:
            from prefab.pipelines.cli.demo_real import demo_real

            code = demo_real(store, sets, train, as_json, print_json)
        else:
            from prefab.pipelines.cli.demo import demo as run_demo

            code = run_demo(store, prompts, full, sets, train, as_json, print_json)
    raise typer.Exit(code)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    as_json: Json = False,
) -> None:
    """Create a new project: constitution, templates, pipeline file and prompts."""
    from prefab.pipelines.cli.project import init_project

    files = init_project(folder)
    if as_json:
        return print_json({"folder": str(folder), "files": [str(file) for file in files]})
    say(f"{folder}: {counted(len(files), 'file')}")
    for file in files:
        say(f"  {file}")
    hint(f"cd {shlex.quote(str(folder))} && prefab check . && prefab plan pipeline.yaml")


@app.command()
def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Files, or folders with such files.")
    ],
    columns: Map = [],
    show: Annotated[
        bool,
        typer.Option("--show", help="Of data files: print the first row as a trainer reads it."),
    ] = False,
    model: Annotated[
        str, typer.Option(help="Whose tokenizer and chat template --show uses.")
    ] = "prefab-tiny",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 when there are warnings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check constitutions, templates, pipelines and data files (prompts, pairs, demonstrations);
    print every problem that is found, and what each column of a data file is taken for. Warnings
    about principles have a code, which `prefab explain CODE` explains.
    """
    from prefab.pipelines.cli.constitutions import report_check
    from prefab.pipelines.cli.data_check import check_data, is_data
    from prefab.pipelines.cli.project import check_paths

    if columns or show or all(is_data(path) for path in paths):
        return check_data(paths, columns, model if show else "", as_json)
    checked, problems = check_paths(paths)
    report_check(checked, problems, strict, as_json)


@app.command()
def run(
    pipeline: Pipeline,
    sets: Sets = [],
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not show progress.")] = False,
    retry_refused: Annotated[
        bool,
        typer.Option(
            "--retry-refused", help="Also ask again what a server has refused for good (HTTP 4xx)."
        ),
    ] = False,
    reask: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="First forget this run's answers that are unscored for a reason: parse, "
            "no_logprobs, ..., `unscored` for any, `empty` for empty texts. They are asked again.",
        ),
    ] = "",
    on: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Divide the prompts among several processes: local:4 for four of this machine "
            "(docs/scale.md).",
        ),
    ] = "",
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Work as task I of N of an array job on the same store, such as 17/64.",
        ),
    ] = "",
    metrics: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Serve metrics for Prometheus at this port of this machine (docs/runs.md).",
        ),
    ] = None,
) -> None:
    """Make preference data. The same command continues a run that was interrupted."""
    from prefab.pipelines.run.runner import run as run_pipeline

    again = _run_command(pipeline, sets, on, shard)
    if on or shard:
        if (on and shard) or reask or retry_refused or metrics is not None:
            raise ConfigError(
                "--on, --shard, and --reask, --retry-refused or --metrics exclude one another"
            )
        with resumable("all answers so far are in the ledgers", again):
            result = _run_shards(pipeline, sets, quiet or as_json, on, shard)
    else:
        if reask:
            _forget_first(pipeline, sets, reask)
        with resumable("all answers so far are in the ledger", again):
            result = run_pipeline(
                pipeline, sets, quiet, metrics_port=metrics, retry_refused=retry_refused
            )
    if as_json:
        print_json(result.summary())
    else:
        report(result)
    raise typer.Exit(next_command(result, again))


def _run_command(pipeline: Path, sets: list[str], on: str, shard: str) -> str:
    """The command that runs a pipeline, quoted for a shell."""
    words = ["prefab", "run", str(pipeline), *(word for text in sets for word in ("--set", text))]
    for option, value in (("--on", on), ("--shard", shard)):
        words += [option, value] if value else []
    return shlex.join(words)


def _run_shards(pipeline: Path, sets: list[str], quiet: bool, on: str, shard: str) -> RunResult:
    """Run a pipeline over shards: all of them, or as one task of an array."""
    if on:
        from prefab.pipelines.scale.driver import run_on

        return run_on(on, pipeline, sets, quiet)
    from prefab.pipelines.scale.array import run_task

    return run_task(shard, pipeline, sets, quiet)


def _forget_first(pipeline: Path, sets: list[str], reason: str) -> None:
    """Forget the unscored answers of a pipeline's run, if it has run before."""
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.store.forget import AnswerFilter, check_reason, forget

    check_reason(reason)
    config = resolve_pipeline(pipeline, sets).config
    if (Path(config.store) / "ledger.sqlite").exists():
        made = forget(Path(config.store), AnswerFilter(run=config.name, reason=reason))
        warn(f"{counted(made.answers if made else 0, 'answer is', 'answers are')} asked again")


@app.command()
def sql(
    query: Annotated[
        str,
        typer.Argument(
            metavar="SELECT",
            help='For example "SELECT outcome, count(*) FROM preferences GROUP BY 1".',
        ),
    ],
    store: Store = Path("store"),
    as_json: Json = False,
) -> None:
    """Query the store with SQL (DuckDB). One SELECT statement, which can read only the store.
    New answers in the ledger are added to the store first.
    """
    from prefab.pipelines.store.fill import query as ask

    with resumable("the ledger has everything"):
        frame = ask(existing_store(store), query)
    if as_json:
        return print_json(frame.to_dicts())
    shown = frame.head(200)
    table(
        "",
        frame.columns,
        [[_short(value) for value in row] for row in shown.iter_rows()],
        note=f"{frame.height:,} rows, the first {shown.height} are shown; --json prints all"
        if frame.height > 200
        else "",
    )


def _short(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)[:2000]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL|PIPELINE.yaml]",
            help="A model folder, a name on the model hub, or prefab-tiny. With --keep also a "
            "pipeline file: the models of its vLLM engines, with their settings.",
        ),
    ] = "",
    port: Annotated[
        int | None, typer.Option(help="Port of the server. Default: 8000; with --keep a free one.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Leave the server running. run, diff, watch, test and eval use it by themselves "
            "for the same model and settings.",
        ),
    ] = False,
    idle_minutes: Annotated[
        float,
        typer.Option(
            min=0.01, help="With --keep: minutes without a question after which the server ends."
        ),
    ] = 60.0,
    status: Annotated[bool, typer.Option("--status", help="List the servers that run.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the kept servers: all, or those of MODEL.")
    ] = False,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Start vLLM as Prefab starts it: in the foreground, or with --keep so that later commands
    need not wait for it. Arguments after `--` are given to vLLM.
    """
    from prefab.pipelines.cli import serve as serving

    if sum((keep, status, stop)) > 1:
        raise ConfigError("--keep, --status and --stop exclude one another")
    if status or stop:
        return serving.stop_kept(model, as_json) if stop else serving.show_kept(as_json)
    if not model:
        raise ConfigError("name a MODEL to serve; --status lists the servers that are kept")
    if keep:
        with resumable("no server is kept"):
            return serving.keep_model(model, port, context.args, idle_minutes, sets, as_json)
    raise typer.Exit(serving.serve_model(model, port or 8000, context.args))


@app.command()
def doctor(
    pipeline: Annotated[
        Path | None,
        typer.Argument(metavar="[PIPELINE.yaml]", help="Also start and check its engines."),
    ] = None,
    store: Store = Path("store"),
    as_json: Json = False,
) -> None:
    """Check the installation, the store and, for a pipeline, its engines."""
    from prefab.pipelines.cli.doctor import examine

    findings = examine(store, pipeline)
    bad = [finding for finding in findings if finding.state == "bad"]
    if as_json:
        print_json({"findings": [finding.data() for finding in findings], "ok": not bad})
        raise typer.Exit(1 if bad else 0)
    colour = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in findings:
        say(f"{finding.what}: {finding.words}", f"{finding.state:4}", colour[finding.state])
    first = "prefab init my-project" if importlib.util.find_spec("vllm") is None else "prefab demo"
    hint("prefab doctor    # after you have fixed the problems above" if bad else first)
    raise typer.Exit(1 if bad else 0)


@app.command()
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.")],
) -> None:
    """Print the script that completes `prefab` commands and options in a shell."""
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="prefab", complete_var=COMPLETE, shell=shell)
    console().print(script.strip())


dress(app)

if __name__ == "__main__":
    main()
