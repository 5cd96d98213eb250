"""`prefab serve` in the foreground: what a signal leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from prefab.factory.paths import IMPORT_ROOT

# a stand-in for vLLM's server
SERVER = "import os, time\nprint('the server is', os.getpid(), flush=True)\ntime.sleep(3600)\n"
SERVE = "from prefab.pipelines.cli.main import main; main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_leaves_no_key(tmp_path, number):
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    paths = os.pathsep.join([str(tmp_path), str(IMPORT_ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "PREFAB_CACHE": str(tmp_path / "cache")}
    environment.pop("PREFAB_SERVE_KEY", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", SERVE, "serve", "prefab-tiny", "--port", port]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("the server is"))
        assert [*(tmp_path / "cache/keys").iterdir()]
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode == 128 + number
    assert not psutil.pid_exists(int(said.split()[-1]))
    assert not [*(tmp_path / "cache/keys").iterdir()]
