"""Servers that are started here: no route without the key, and no log written through a link."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from prefab.factory.engines import vllm_process
from prefab.factory.engines.http import HttpClient, HttpConfig
from prefab.factory.engines.vllm import VllmConfig
from prefab.factory.engines.vllm_key import SERVER_KEY, RequireKey
from prefab.factory.engines.vllm_process import VllmProcess, command_line, environment, open_log
from prefab.factory.errors import ConfigError, EngineError
from prefab.pipelines.cli import serve

ROUTES = (
    "/health",
    "/v1/models",
    "/collective_rpc",
    "/metrics",
    "/reset_prefix_cache",
    "/docs",
    "/",
)


async def ask(app: Any, **scope: Any) -> tuple[list[dict[str, Any]], bool]:
    """What the middleware sends, and whether the request reached the application."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    reached = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    guarded = app(inner)
    await guarded({"type": "http", "method": "GET", "headers": [], **scope}, None, send)
    return sent, bool(reached)


def test_every_route_and_method_wants_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_KEY, "the-key")
    good = (b"authorization", b"Bearer the-key")
    for path in ROUTES:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            for headers in (
                [],
                [(b"authorization", b"Bearer the-ke")],
                [(b"host", b"x")],
                [good] * 2,
            ):
                sent, reached = asyncio.run(
                    ask(RequireKey, path=path, method=method, headers=headers)
                )
                assert not reached and sent[0]["status"] == 401
            assert asyncio.run(ask(RequireKey, path=path, method=method, headers=[good])) == (
                [],
                True,
            )
    sent, reached = asyncio.run(ask(RequireKey, type="websocket", path="/v1/realtime"))
    assert not reached and sent == [{"type": "websocket.close", "code": 1008}]
    assert asyncio.run(ask(RequireKey, type="lifespan")) == ([], True)
    monkeypatch.delenv(SERVER_KEY)
    with pytest.raises(RuntimeError, match="open to everyone"):
        RequireKey(lambda *_: None)  # type: ignore[arg-type, return-value]


def test_a_server_gets_a_key_of_its_own_that_no_command_line_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "another")
    config = VllmConfig(model="m", env={"PYTHONPATH": "/theirs", SERVER_KEY: "weak"})
    one, two = (VllmProcess(config, "m", 1, "n", None) for _ in range(2))
    assert one.key != two.key and len(one.key) >= 40
    given, words = environment(one), command_line(one)
    assert given[SERVER_KEY] == one.key and "VLLM_API_KEY" not in given
    assert given["PYTHONPATH"].endswith(f"{os.pathsep}/theirs")
    assert not [word for word in words if one.key in word]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    module, _, name = words[words.index("--middleware") + 1].rpartition(".")
    assert getattr(sys.modules[module], name) is RequireKey
    client = HttpClient("http://127.0.0.1:1", HttpConfig(), key=one.key)
    assert client._headers()["Authorization"] == f"Bearer {one.key}"


def test_a_log_is_never_written_through_a_planted_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "logs"
    with open_log(folder / "a.log", ours=True) as log:
        log.write(b"x")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.log").stat().st_mode) == 0o600
    (folder / "b.log").symlink_to(precious)
    (folder / "dangling.log").symlink_to(tmp_path / "made")
    os.mkfifo(folder / "c.log")
    (tmp_path / "linked").symlink_to(tmp_path)
    for file in (
        folder / "b.log",
        folder / "dangling.log",
        folder / "c.log",
        tmp_path / "linked" / "precious",
    ):
        with pytest.raises(EngineError, match="link|regular|written"):
            open_log(file, ours=True)
    assert precious.read_text() == "mine" and not (tmp_path / "made").exists()


def test_serve_says_that_its_port_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match=r"port \d+ is in use: choose another"):
            serve.serve_model("prefab-tiny", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--api-key is a secret"):
        serve.serve_model("prefab-tiny", 1, ["--api-key", "hunter2-hunter2"])


def test_serves_key_is_in_a_file_of_this_user_alone_or_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    process = VllmProcess(VllmConfig(model="m"), "m", 8000, "serve", None)
    file = serve._key_file(process, 8000)
    assert file is not None and file.read_text().strip() == process.key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    monkeypatch.setenv(serve.KEY_VARIABLE, "chosen-by-a-person-1")
    assert serve._key_file(process, 8000) is None and process.key == "chosen-by-a-person-1"
    assert vllm_process.environment(process)[SERVER_KEY] == "chosen-by-a-person-1"


def test_a_response_that_is_no_completion_is_no_stray_one() -> None:
    """vLLM names completions after the request's id, not what `/tokenize` or private endpoints
    answer."""
    client = HttpClient("http://127.0.0.1:1", HttpConfig())
    assert not client._is_stray("id-1", b'{"id": "chatcmpl-id-1", "choices": []}')
    assert client._is_stray("id-2", b'{"id": "chatcmpl-id-1", "choices": []}')
    assert not client._is_stray("id-3", b'{"tokens": [1]}')
