"""The pages as files, to be put on any web server or opened from a folder: the same templates, with
links to files and a filter that runs in the page.
"""

from __future__ import annotations

import html
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment

from prefab.factory.errors import ConfigError, PrefabError
from prefab.pipelines.view.app import HERE, PAGES, STATIC, as_json, environment, rendered
from prefab.pipelines.view.jobs import Jobs
from prefab.pipelines.view.pages import View
from prefab.pipelines.view.reader import FillingError, StoreReader

MOST = 10_000  # preferences; each is a file
ALONE = ("runs", "preferences", "agreement", "judges", "constitution", "training")
_LINK = re.compile(r'(href|data-copy-url)="([a-z]+)(?:\?([^"#]*))?"')


def write_bundle(
    reader: StoreReader,
    out: Path,
    run: str = "",
    limit: int = 1000,
    tell: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the pages of one run into a folder.

    Args:
        reader: The store.
        out: A new or empty folder.
        run: NAME or NAME@VERSION; default: the latest run.
        limit: At most so many preferences, those first that the panel is least sure of.
        tell: Called with the number of pages that are written, and of all.

    Returns:
        The folder, the run, how many preferences are in it, and of how many.

    Raises:
        ConfigError: The folder is not empty, or there is no such run.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder. Name a new one")
    if not 0 < limit <= MOST:
        raise ConfigError(f"at most {MOST:,} preferences can be written as files")
    jobs = Jobs()
    view = View(reader, jobs, bundle=True, rows=limit)
    try:
        return _written(view, filled(view, run), out, tell)
    finally:
        view.indexes.end()
        jobs.end()


def filled(view: View, run: str) -> str:
    """The run's full name, once the store is filled."""
    while True:
        try:
            return str(view.run(run)["named"])
        except FillingError:
            time.sleep(0.5)


def _written(view: View, run: str, out: Path, tell: Callable[[int, int], Any]) -> dict[str, Any]:
    env = environment()
    (out / "static").mkdir(parents=True)
    for name in STATIC:
        shutil.copy(HERE / "static" / name, out / "static" / name)
    grid = PAGES["preferences"](view, [("run", run)])
    ids = [row["preference"] for row in grid.data["rows"]]
    known = {"preference": set(ids), "run": {row["named"] for row in view.runs()}}
    pages: list[tuple[str, list[tuple[str, str]]]] = [
        *((name, [("run", run)]) for name in ALONE),
        *(("run", [("run", named)]) for named in sorted(known["run"])),
        *(
            ("preference", [("id", name), ("run", run), ("at", str(i))])
            for i, name in enumerate(ids)
        ),
    ]
    for done, (name, parameters) in enumerate(pages):
        _page(env, view, name, parameters, known, out)
        tell(done + 1, len(pages))
    shutil.copy(out / "runs.html", out / "index.html")
    return {"folder": str(out), "run": run, "preferences": len(ids), "of": grid.data["total"]}


def _page(
    env: Environment,
    view: View,
    name: str,
    parameters: Sequence[tuple[str, str]],
    known: dict[str, set[str]],
    out: Path,
) -> None:
    """One page, and its JSON beside it. One that cannot be made says why."""
    try:
        page = PAGES[name](view, parameters)
    except FillingError:
        raise
    except PrefabError as error:
        from prefab.pipelines.view.app import failed

        page = failed(error)
    text = rendered(env, view, page, name, parameters)
    path = out / address(name, parameters, known)
    path.write_text(_LINK.sub(lambda found: _link(found, known), text), encoding="utf-8")
    path.with_suffix(".json").write_bytes(as_json(page))


def address(name: str, parameters: Sequence[tuple[str, str]], known: dict[str, set[str]]) -> str:
    """The file of a page."""
    of = dict(parameters)
    if name == "preference":
        return f"preference-{of['id']}.html"
    if name == "run":
        return "run-" + re.sub(r"[^\w.-]", "-", of["run"]) + ".html"
    return f"{name}.html"


def _link(found: re.Match[str], known: dict[str, set[str]]) -> str:
    """A link to a page as one to its file. Filters follow after #, where the file's own script
    reads them; what has no file leads to the page of all preferences.
    """
    kind, name, query = found[1], found[2], html.unescape(found[3] or "")
    parameters = parse_qsl(query)
    of = dict(parameters)
    if name == "preference" and of.get("id") not in known["preference"]:
        name, parameters = "preferences", []
    if name == "run" and of.get("run") not in known["run"]:
        name = "runs"
    if name not in PAGES or name in ("label", "compare"):
        return f'{kind}="runs.html"'
    file = address(name, parameters, known)
    if of.get("format") == "json":
        return f'{kind}="{file.removesuffix(".html")}.json"'
    rest = [(k, v) for k, v in parameters if k != "run"] if name == "preferences" else []
    return f'{kind}="{file}{html.escape("#" + urlencode(rest)) if rest else ""}"'
