"""The page of a run, which takes most of a small export's time, is made once for the exports of a
store."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from prefab.factory.store import store
from prefab.pipelines.store.export import base
from prefab.pipelines.store.run_page import RunPage, run_page


@pytest.fixture(scope="session", autouse=True)
def pages_made_once():
    kept: dict[Any, RunPage] = {}

    def page(folder: Path, run: dict[str, Any], examples: int) -> RunPage:
        file = (folder / store.FILE).stat()
        state = (str(folder), repr(run), examples, file.st_ino, file.st_size, file.st_mtime_ns)
        if state not in kept:
            kept[state] = run_page(folder, run, examples)
        return copy.deepcopy(kept[state])

    with mock.patch.object(base, "run_page", page):
        yield
