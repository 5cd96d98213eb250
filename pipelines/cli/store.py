"""Commands about a store as a whole: its contents, rebuilding, verifying, backing up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefab.factory.console import EXIT_FAILED, duration, say, table, warn
from prefab.factory.errors import StoreError
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
    help="Show the contents of a preference store; rebuild, verify, back it up.",
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
    from prefab.pipelines.store.compare import compare

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

    made = back_up_ledger(existing_store(store) / "ledger.sqlite", to / "ledger.sqlite")
    counts = {name: intact for name, intact, _, _ in made.rows()}
    if as_json:
        return print_json({"store": str(store), "backup": made.file, "rows": counts})
    say(f"{made.file}: {counts.get('calls', 0):,} answers, verified")
    hint_command("store", "info", "--store", to)
