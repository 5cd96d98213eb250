"""`prefab view`: the store in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefab.factory.console import say

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
) -> None:
    """Show a store in the browser: runs, preferences and why each came out so, agreement,
    constitutions, labelling, training. Only this machine can open the page. Ctrl-C ends it.
    """
    from prefab.pipelines.view.serve import view as serve

    def tell(address: str) -> None:
        say(address)
        say("Ctrl-C ends it", stderr=True)

    try:
        serve(store, port, browser, annotator, tell)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
