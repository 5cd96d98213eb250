"""A server that stays up between commands: found by its settings, ended when told to or when idle,
and never taken for alive once its keeper is gone.

The server is a small program in place of vLLM's, in a folder that comes first on the path."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefab.factory.engines import kept_server
from prefab.factory.engines.vllm import VLLM, VllmConfig
from prefab.factory.engines.vllm_key import SERVER_KEY, SERVER_USED, RequireKey
from prefab.factory.engines.vllm_process import port_in_use
from prefab.factory.errors import EngineError
from prefab.pipelines.cli.main import app

FAKE = """
import http.server, json, os, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
model = sys.argv[sys.argv.index("--served-model-name") + 1]
if model == "prefab-nano":
    print("ValueError: this model does not load")
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers["Authorization"] == "Bearer " + os.environ["PREFAB_SERVER_KEY"]
        entry = {"id": model, "root": sys.argv[sys.argv.index("--model") + 1], "max_model_len": 512}
        body = json.dumps({"data": [entry]}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache folder of the test's own, and a program in place of vLLM's; all servers end."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    yield kept_server.folder()
    for server in kept_server.kept_servers():
        kept_server.stop(server)


def engine(**settings: object) -> VLLM:
    return VLLM(VllmConfig.model_validate({"model": "prefab-tiny", **settings}), "local")


def find(**settings: object) -> kept_server.KeptServer | None:
    wanted = engine(**settings)
    return kept_server.find(wanted.identity, wanted.config)


def why_not_used(wanted: VLLM) -> str:
    return kept_server.why_not_used(wanted.config.model, wanted.identity, wanted.config)


def keep(idle_s: float = 600.0, **settings: object) -> kept_server.KeptServer:
    return kept_server.keep(engine(**settings).config, idle_s, lambda line: None)


def gone(server: kept_server.KeptServer, within_s: float = 20.0) -> bool:
    """Whether the record and the address are free before the time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not server.file.exists() and not port_in_use(server.port):
            return True
        time.sleep(0.1)
    return False


def test_an_engine_with_the_same_model_and_settings_uses_the_server(servers: Path) -> None:
    kept = keep()
    assert stat.S_IMODE(kept.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(servers.stat().st_mode) == 0o700
    assert kept.key in kept.file.read_text() and kept.key not in json.dumps(kept.data())
    assert kept.key not in repr(kept)
    same = engine(batch=7, kv_cache_gib=0.5, max_in_flight=3)
    said: list[str] = []
    same.progress = said.append

    async def start() -> None:
        await same.start()
        assert same.process is None and same.kept is not None and same.kept.url == kept.url
        assert "uses the kept server" in said[0]
        await same.stop()
        await same.start()  # a second time
        await same.stop()

    asyncio.run(start())
    assert find() is not None  # the engine's stop did not end it
    for other in ({"max_model_len": 64}, {"dtype": "bfloat16"}, {"args": ["--seed", "1"]}):
        assert find(**other) is None
        why = why_not_used(engine(**other))
        assert f"has another {next(iter(other))}" in why
    assert why_not_used(engine()) == why_not_used(engine(model="prefab-nano")) == ""
    retrained = engine()
    retrained.identity = "folder:other"  # type: ignore[misc]  # a cached property
    assert "other files" in why_not_used(retrained)
    assert find(model="prefab-nano") is None
    with pytest.raises(EngineError, match="kept already"):
        keep()


def test_it_ends_when_told_to_and_leaves_nothing(servers: Path) -> None:
    kept = keep()
    done = CliRunner().invoke(app, ["serve", "--status", "--json"])
    shown = json.loads(done.output)["servers"]
    assert [one["pid"] for one in shown] == [kept.pid] and kept.key not in done.output
    done = CliRunner().invoke(app, ["serve", "prefab-nano", "--stop"])
    assert done.exit_code != 0 and "kept are: prefab-tiny" in str(done.exception)
    done = CliRunner().invoke(app, ["serve", "--stop"])
    assert done.exit_code == 0 and "has ended" in done.output, done.output
    assert kept.why_dead() and [file.suffix for file in servers.iterdir()] == [".log"]
    assert "no server is kept" in CliRunner().invoke(app, ["serve", "--stop"]).output


def test_it_ends_when_nothing_was_asked_for_long_enough() -> None:
    kept = keep(idle_s=1.5)
    os.utime(kept.file.with_suffix(".used"), (time.time() + 2, time.time() + 2))  # it answers
    time.sleep(2.2)
    assert kept.why_dead() is None
    assert gone(kept)


@pytest.mark.slow
def test_the_record_of_a_killed_keeper_is_removed_and_its_server_ends() -> None:
    kept = keep()
    os.kill(kept.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while kept.why_dead() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert find() is None and kept_server.kept_servers() == []
    assert not kept.file.exists()
    while port_in_use(kept.port) and time.monotonic() < end:
        time.sleep(0.1)
    assert not port_in_use(kept.port)
    assert keep().pid != kept.pid


def test_a_server_that_does_not_load_says_why(servers: Path) -> None:
    with pytest.raises(EngineError, match="this model does not load"):
        keep(model="prefab-nano")
    assert not list(servers.glob("*.json"))


@pytest.mark.slow_but("stale", "readable by others")
@pytest.mark.parametrize("how", ["stale", "readable by others", "a link", "half-written"])
def test_a_record_that_cannot_be_trusted_is_not_used(servers: Path, how: str) -> None:
    kept = keep()
    record = kept.file.read_text()
    if how == "stale":
        other = kept.file.with_name("0" * 16 + ".json")
        other.write_text(record)
        assert len(kept_server.kept_servers()) == 1 and not other.exists()
    elif how == "readable by others":
        kept.file.chmod(0o644)
        assert find() is None
        kept.file.chmod(0o600)
    elif how == "a link":
        moved = kept.file.rename(servers / "elsewhere")
        kept.file.symlink_to(moved)
        assert find() is None
        moved.rename(kept.file)
    elif how == "half-written":
        kept.file.write_text(record[: len(record) // 2])
        assert find() is None
        kept.file.write_text(record)
    assert find() is not None


def test_questions_mark_the_server_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = tmp_path / "used"
    used.touch()
    os.utime(used, (1, 1))
    monkeypatch.setenv(SERVER_KEY, "k")
    monkeypatch.setenv(SERVER_USED, str(used))
    during: list[float] = []

    async def inner(scope: object, receive: object, send: object) -> None:
        during.append(used.stat().st_mtime)

    async def ask(method: str, key: bytes) -> None:
        async def nothing(*_: object) -> None:
            return None

        headers = [(b"authorization", b"Bearer " + key)]
        scope = {"type": "http", "method": method, "headers": headers}
        await RequireKey(inner)(scope, nothing, nothing)

    asyncio.run(ask("GET", b"k"))
    asyncio.run(ask("POST", b"wrong"))
    assert used.stat().st_mtime == 1  # a look at its health is no use, nor is a stranger's question
    asyncio.run(ask("POST", b"k"))
    assert during[-1] > time.time() + 3600 and abs(used.stat().st_mtime - time.time()) < 60
