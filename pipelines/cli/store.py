"""Commands about a store as a whole: its contents, rebuilding, verifying, backing up,
forgetting.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from prefab.factory.console import EXIT_FAILED, duration, say, table, warn
from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.numbers import counted
from prefab.pipelines.cli.options import (
    Json,
    Store,
    existing_store,
    hint_command,
    print_json,
    resumable,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Show the contents of a preference store; rebuild, verify or back it up; forget answers.",
)


@app.command()
def info(store: Store = Path("store"), as_json: Json = False) -> None:
    """Show the runs of a store and the number of rows in each table."""
    from prefab.factory.store.store import TABLES, read_frame
    from prefab.pipelines.store.fill import fill

    with resumable("the ledger has everything"):
        filled = fill(existing_store(store))
    if filled.held:
        raise StoreError(f"{filled.held}. The store is {filled.behind:,} ledger rows behind")
    counts = " UNION ALL ".join(
        f"SELECT '{name}' AS \"table\", count(*) AS rows FROM {name}" for name in TABLES
    )
    rows, runs = read_frame(store, counts), read_frame(store, "SELECT * FROM summary ORDER BY run")
    if as_json:
        return print_json(
            {"store": str(store), "tables": dict(rows.iter_rows()), "runs": runs.to_dicts()}
        )
    table(str(store), ("table", "rows"), rows.iter_rows())
    table("runs", runs.columns, runs.iter_rows())
    hint_command("export", "--store", store, "--format", "trl", "out")


@app.command()
def rebuild(store: Store = Path("store"), as_json: Json = False) -> None:
    """Delete prefab.duckdb and build it again from the ledger. The rows are the same."""
    from prefab.pipelines.store.fill import rebuild as rebuild_store

    with resumable("the ledger has everything"):
        made = rebuild_store(existing_store(store))
    if as_json:
        return print_json({"store": str(store), "rows": made.rows, "seconds": made.seconds})
    table(f"{store} rebuilt in {duration(made.seconds)}", ("table", "rows"), made.rows.items())
    hint_command("store", "info", "--store", store)


@app.command()
def verify(
    store: Annotated[
        Path, typer.Argument(metavar="[STORE]", help="The folder of ledger.sqlite.")
    ] = Path("store"),
    recover: Annotated[
        Path | None,
        typer.Option(metavar="NEW", help="Copy all that is intact to a new store in this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the ledger for damage (its structure, and the checksum of each row) and compare
    prefab.duckdb with it. Nothing is changed.
    """
    from prefab.factory.ledger.verify import recover_ledger, verify_ledger
    from prefab.factory.store.shared import refuse_shards
    from prefab.pipelines.store.compare import compare

    refuse_shards(store)
    file = existing_store(store) / "ledger.sqlite"
    found = recover_ledger(file, recover / "ledger.sqlite") if recover else verify_ledger(file)
    differences = compare(store) if found.whole and not found.unverified else []
    failed = not found.whole or bool(differences)
    if as_json:
        rows = [
            dict(zip(("table", "intact", "damaged", "unreadable"), row, strict=True))
            for row in found.rows()
        ]
        print_json(
            {
                "ledger": found.file,
                "whole": found.whole,
                "integrity": found.integrity,
                "tables": rows,
                "prefab.duckdb": differences,
                "recovered": str(recover) if recover else None,
            }
        )
        raise typer.Exit(EXIT_FAILED if failed else 0)
    table(found.file, ("table", "intact", "damaged", "unreadable"), found.rows())
    for text in found.integrity + differences + [found.unverified] * bool(found.unverified):
        warn(text)
    if not failed:
        say("nothing is damaged")
        return
    if recover:
        say(f"{recover}: a new ledger with all intact rows. `prefab run` on it asks for the rest")
        hint_command("run", "PIPELINE.yaml", "--set", f"store={recover}")
    elif not found.whole:
        hint_command("store", "verify", store, "--recover", f"{store}-recovered")
    else:
        hint_command("store", "rebuild", "--store", store)
    raise typer.Exit(EXIT_FAILED)


@app.command()
def backup(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store to copy.")],
    to: Annotated[Path, typer.Argument(metavar="DEST", help="A folder without a ledger.")],
    as_json: Json = False,
) -> None:
    """Copy the ledger to another folder, also during a run, and verify the copy. (A plain copy of
    the file lacks what SQLite has not moved into it yet.)
    """
    from prefab.factory.ledger.verify import back_up_ledger
    from prefab.factory.store.shared import refuse_shards

    refuse_shards(store)
    made = back_up_ledger(existing_store(store) / "ledger.sqlite", to / "ledger.sqlite")
    counts = {name: intact for name, intact, _, _ in made.rows()}
    if as_json:
        return print_json({"store": str(store), "backup": made.file, "rows": counts})
    say(f"{made.file}: {counted(counts.get('calls', 0), 'answer')}, verified")
    hint_command("store", "info", "--store", to)


@app.command()
def merge(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store in shards.")],
    to: Annotated[Path, typer.Argument(metavar="DEST", help="A folder without a ledger.")],
    as_json: Json = False,
) -> None:
    """Make an ordinary store of one in shards (`prefab run --on`): one ledger with all answers, and
    one DuckDB file.
    """
    from prefab.pipelines.scale.merge import merge as merge_shards

    with resumable("the store in shards is as it was"):
        made = merge_shards(store, to, quiet=as_json)
    if as_json:
        return print_json({"store": str(to), "calls": made.calls, "damaged": made.damaged})
    say(f"{to}: {made.calls:,} answers")
    hint_command("store", "info", "--store", to)


@app.command()
def forget(
    store: Store = Path("store"),
    run: Annotated[str, typer.Option(help="NAME or NAME@VERSION.")] = "",
    role: Annotated[
        str, typer.Option(help="sample, critique, revise, reason, judge, score or rank.")
    ] = "",
    reason: Annotated[
        str,
        typer.Option(
            help="Of unscored answers: parse, no_logprobs, truncated, ...; unscored for any; or "
            "empty for an empty text."
        ),
    ] = "",
    since: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Answers from this time on: 2026-11-27T12:00, local time."
        ),
    ] = "",
    until: Annotated[str, typer.Option(metavar="TIME", help="Answers before this time.")] = "",
    model: Annotated[str, typer.Option(help="The model that answered.")] = "",
    replica: Annotated[str, typer.Option(help="The server that answered.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the answers.")] = False,
    undo: Annotated[
        int | None, typer.Option(metavar="ID", help="Undo a forgetting; 0 lists them all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Mark answers as forgotten, so that the next run asks their questions again. They must meet
    all conditions. Nothing is deleted, and --undo brings them back.
    """
    from dataclasses import asdict

    from prefab.pipelines.store import forget as forgetting

    existing_store(store)
    if undo is not None:
        made = [forgetting.undo_forgetting(store, undo)] if undo else forgetting.forgettings(store)
        if as_json:
            return print_json([asdict(one) for one in made])
        rows = [(one.id, one.answers, one.reason, str(one.filter), one.undone) for one in made]
        return table(str(store), ("id", "answers", "reason", "conditions", "undone"), rows)
    times = _time("--since", since), _time("--until", until)
    wanted = forgetting.AnswerFilter(run, role, reason, *times, model, replica)
    if dry_run:
        count, done = len(forgetting.select_answers(store, wanted)), None
    else:
        done = forgetting.forget(store, wanted)
        count = done.answers if done else 0
    if as_json:
        return print_json({"answers": count, "id": done.id if done else None, "dry_run": dry_run})
    say(f"{counted(count, 'answer')} {'would be' if dry_run else 'now'} forgotten")
    if done:
        undo_it = shlex.join(["prefab", "store", "forget", "--store", str(store), "--undo"])
        say(f"`{undo_it} {done.id}` lets them count again")
        hint_command("run", "PIPELINE.yaml")


def _time(option: str, text: str) -> float | None:
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        raise ConfigError(f"{option} {text}: not a time like 2026-11-27T12:00") from None
