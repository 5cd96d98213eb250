"""A store with something on every page, and the pages of it without a browser."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from starlette.testclient import TestClient

from prefab.pipelines.store.fill import fill
from prefab.pipelines.view import index, jobs, reader
from prefab.pipelines.view.app import make_app
from prefab.pipelines.view.index import Indexes
from prefab.pipelines.view.jobs import Jobs
from prefab.pipelines.view.pages import View
from prefab.pipelines.view.reader import StoreReader
from tests.support import viewstore

TOKEN, PORT = "a-token-that-is-not-guessed", 7323
OWN = {"origin": f"http://127.0.0.1:{PORT}"}


def ready(client, address: str, method: str = "GET", **more):
    """The page once its figures are computed."""
    deadline = time.monotonic() + 600
    while True:
        answer = client.request(method, address, **more)
        if answer.status_code != 202:
            return answer
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.3)


def made_once(tmp_path_factory, name: str, *how) -> Path:
    """A copy of a store that the first of all processes of the tests makes: in a thread of its own,
    since a browser that is open has an event loop in this one.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}-made"
    with open(shared.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "complete").exists():
            shared.mkdir()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(viewstore.make, shared, *how).result()
            (shared / "complete").touch()
    copied = Path(shutil.copytree(shared / "store", tmp_path_factory.mktemp(name) / "store"))
    fill(copied)  # which finds it up to date: a reader need not look any more
    return copied


@pytest.fixture(scope="session", autouse=True)
def forked_processes(forks, tmp_path_factory):
    """What the server starts is a fork, which has imported what it needs."""
    python = tmp_path_factory.mktemp("python") / "python"
    python.write_text(f'#!/bin/sh\nexec {forks.python()} "$@"\n')
    python.chmod(0o755)
    with ExitStack() as stack:
        for module in (index, jobs, reader):
            stack.enter_context(
                mock.patch.object(module, "sys", SimpleNamespace(executable=python))
            )
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Made once; never written to."""
    return made_once(tmp_path_factory, "view", 28)


@pytest.fixture(scope="session")
def attacked(tmp_path_factory) -> Path:
    """A store whose answers attack the page."""
    return made_once(tmp_path_factory, "attack", 3, True)


@pytest.fixture
def store(made, tmp_path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(made, tmp_path / "store"))


@contextmanager
def client_of(folder: Path, indexes: Indexes | None = None) -> Iterator[TestClient]:
    view = View(StoreReader(folder), Jobs())
    if indexes:
        view.indexes, view.jobs.folder = indexes, indexes.out / "figures"
    client = TestClient(make_app(view, TOKEN, PORT), base_url=f"http://127.0.0.1:{PORT}")
    client.get(f"/?token={TOKEN}")
    yield client
    view.end()


@pytest.fixture(scope="session")
def client(made):
    """A client that has the token, of the store that nobody writes to; it computes figures once."""
    with client_of(made) as client:
        yield client


@pytest.fixture
def stranger(made):
    """A client without the token."""
    with client_of(made) as client:
        client.cookies.clear()
        yield client
