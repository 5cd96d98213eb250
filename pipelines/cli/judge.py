"""The commands `prefab judge ...`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from prefab.factory.console import say
from prefab.factory.redaction import add_secret
from prefab.pipelines.cli.options import Pipeline, Sets, resumable

KEY_VARIABLE = "PREFAB_JUDGE_KEY"
app = typer.Typer(no_args_is_help=True, help="Use a judge from other programs.")


@app.callback()
def _group() -> None:
    """Use a judge from other programs."""


@app.command()
def serve(
    pipeline: Pipeline,
    judge: Annotated[
        str, typer.Option(help="A pointwise judge of the panel. Default: the first one.")
    ] = "",
    port: Annotated[int, typer.Option(help="Port of the server; 0: a free one.")] = 8100,
    sets: Sets = [],
) -> None:
    """Serve a judge over HTTP: it scores answers under the pipeline's constitution, as a reward
    for verl, OpenRLHF, TRL or another trainer. An answer that was scored before costs no call.
    """
    from prefab.pipelines.cli.serve import new_key_file
    from prefab.pipelines.training.judge_server import serve_judge

    key, file = os.environ.get(KEY_VARIABLE, "").strip(), None
    if not key:
        key = secrets.token_urlsafe(32)
        file = new_key_file(f"judge-{port}", key)
    add_secret(key)

    def tell(address: str) -> None:
        say(f"the judge answers at {address} (Ctrl-C ends it)", stderr=True)
        if file:
            say(f"its key: export {KEY_VARIABLE}=$(cat {file})", stderr=True)
        say(
            f'to try it: curl -H "Authorization: Bearer ${KEY_VARIABLE}" {address}/score '
            '-d \'{"prompt": "...", "answer": "..."}\'',
            stderr=True,
        )

    try:
        with resumable("every score is kept"):
            serve_judge(pipeline, judge, port, key, sets, tell=tell)
    finally:
        if file:
            Path(file).unlink(missing_ok=True)
