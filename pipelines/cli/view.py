"""`prefab view`: the store in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefab.factory.console import Progress, say
from prefab.pipelines.cli.options import resumable

app = typer.Typer()


@app.command()
def view(
    store: Annotated[
        Path, typer.Argument(metavar="[STORE]", help="The folder of ledger.sqlite.")
    ] = Path("store"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port on this machine; 0: any that is free.")
    ] = 7323,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
    annotator: Annotated[
        str, typer.Option(help="Your name, stored with your labels. Default: your login name.")
    ] = "",
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write static pages into this new folder.")
    ] = None,
    run: Annotated[
        str, typer.Option(help="With --bundle: NAME or NAME@VERSION. Default: the latest run.")
    ] = "",
    limit: Annotated[
        int, typer.Option(min=1, help="With --bundle: at most so many preferences.")
    ] = 1000,
) -> None:
    """Show a store in the browser: runs, preferences and why each came out so, agreement,
    constitutions, labelling, training. Only this machine can open the page. Ctrl-C ends it.
    With --bundle: write the pages as files, to put on any web server.
    """
    if bundle:
        return _bundle(store, bundle, run, limit)
    import uvicorn  # noqa: F401  before the packages that it needs too

    from prefab.pipelines.view.serve import view as serve

    def tell(address: str) -> None:
        say(address)
        say("Ctrl-C ends it", stderr=True)

    try:
        serve(store, port, browser, annotator, tell)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _bundle(store: Path, out: Path, run: str, limit: int) -> None:
    """Write the pages as files."""
    from prefab.pipelines.view.bundle import write_bundle
    from prefab.pipelines.view.serve import opened

    reader = opened(store)
    try:
        with resumable("the folder is incomplete"), Progress("pages") as progress:

            def tell(done: int, total: int) -> None:
                progress.total = total
                progress.advance(1)

            found = write_bundle(reader, out, run, limit, tell)
    finally:
        reader.end()
    say(
        f"{out / 'index.html'}: {found['preferences']:,} of {found['of']:,} preferences of {found['run']}"
    )
