"""`prefab serve`: start vLLM in the foreground, with the options that Prefab's engine uses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefab.factory.console import say
from prefab.factory.errors import ConfigError, EngineError
from prefab.factory.paths import cache_folder
from prefab.factory.redaction import add_secret, secrets_in

if TYPE_CHECKING:
    from prefab.factory.engines.vllm_process import VllmProcess

KEY_VARIABLE = "PREFAB_SERVE_KEY"


def serve_model(model: str, port: int, extra: Sequence[str] = ()) -> int:
    """Start vLLM in the foreground, as the engine would, and wait until it ends. Every route wants
    the key: the one in the environment variable PREFAB_SERVE_KEY, else a new one, written to a file
    that only this user can read.

    Args:
        model: A folder, a name on the model hub, or an embedded model such as `prefab-tiny`.
        port: The port that the server listens on.
        extra: More command-line arguments for vLLM.

    Returns:
        The exit code of vLLM; 130 after Ctrl-C.

    Raises:
        ConfigError: There is a key among the arguments.
        EngineError: vLLM is not installed, or the port is in use.
    """
    for _, message in secrets_in({"args": list(extra)}):
        raise ConfigError(message)
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed here: `make setup` installs it, or `pip install '.[serve]'`"
        )
    from prefab.factory.engines import vllm_process
    from prefab.factory.engines.vllm import VLLM, VllmConfig

    if vllm_process.port_in_use(port):
        raise EngineError(f"port {port} is in use: choose another one with --port")
    engine = VLLM(VllmConfig(model=model, port=port, args=list(extra)), "serve")
    process = vllm_process.VllmProcess(engine.config, str(engine.path), port, "serve", None)
    key_file = _key_file(process, port)
    say(
        f"serving {model} at http://127.0.0.1:{port}/v1 (Ctrl-C ends it)\n"
        + (f"its key: export {KEY_VARIABLE}=$(cat {key_file})\n" if key_file else "")
        + f"to use it in a pipeline: engines.local = {{engine: vllm, url: 'http://127.0.0.1:{port}', "
        f"model: {model}, api_key_env: {KEY_VARIABLE}}}",
        stderr=True,
    )
    supervisor = Path(vllm_process.__file__).with_name("supervisor.py")
    child = subprocess.Popen(
        [sys.executable, str(supervisor), str(os.getpid()), *vllm_process.command_line(process)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=vllm_process.environment(process),
        text=True,
        errors="replace",
    )
    try:
        for line in child.stdout or ():
            say(line.rstrip("\n"), stderr=True)
        return child.wait()
    except KeyboardInterrupt:  # the supervisor gets the signal too and ends the server
        child.communicate()
        return 130
    finally:
        if key_file:
            key_file.unlink(missing_ok=True)


def _key_file(process: VllmProcess, port: int) -> Path | None:
    """The new file with the server's key; None where the environment names the key."""
    given = os.environ.get(KEY_VARIABLE, "").strip()
    if given:
        add_secret(given)
        process.key = given
        return None
    file = cache_folder() / "keys" / f"serve-{port}.key"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(file, flags, 0o600), "w", encoding="utf-8") as out:
        out.write(process.key + "\n")
    return file
