"""`prefab serve`: start vLLM with the options that Prefab's engine uses, in the foreground, or as a
server that stays up between commands.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefab.factory.console import duration, hint, say, table
from prefab.factory.errors import ConfigError, EngineError, NotInstalledError
from prefab.factory.extras import install_command
from prefab.factory.paths import cache_folder
from prefab.factory.redaction import add_secret, secrets_in
from prefab.pipelines.cli.options import print_json
from prefab.pipelines.run.interrupts import signals_raise

if TYPE_CHECKING:
    from prefab.factory.engines.vllm import VllmConfig
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
        The exit code of vLLM; 130 after Ctrl-C, and 128 with the number of another signal.

    Raises:
        ConfigError: There is a key among the arguments, or there is no such model.
        EngineError: vLLM is not installed, or the port is in use.
    """
    for _, message in secrets_in({"args": list(extra)}):
        raise ConfigError(message)
    if importlib.util.find_spec("vllm") is None:
        raise NotInstalledError(f"vLLM is not installed here: {install_command('serve')}")
    from prefab.factory.engines import vllm_process
    from prefab.factory.engines.model_files import ask_hub
    from prefab.factory.engines.vllm import VLLM, VllmConfig

    if vllm_process.port_in_use(port):
        raise EngineError(f"port {port} is in use: choose another one with --port")
    engine = VLLM(VllmConfig(model=model, port=port, args=list(extra)), "serve")
    process = vllm_process.VllmProcess(engine.config, str(engine.path), port, "serve", None)
    process.offline |= not ask_hub(process.model)
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
        with signals_raise():
            for line in child.stdout or ():
                say(line.rstrip("\n"), stderr=True)
            return child.wait()
    except KeyboardInterrupt as error:
        child.communicate()  # closes its stdin: the supervisor ends the server
        return 128 + getattr(error, "number", signal.SIGINT)
    finally:
        if key_file:
            key_file.unlink(missing_ok=True)


def keep_model(
    model: str,
    port: int | None = None,
    extra: Sequence[str] = (),
    idle_minutes: float = 60.0,
    sets: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Start servers that stay up, wait until they answer, and print where they are.

    Args:
        model: A folder, a name on the model hub, an embedded model such as `prefab-tiny`, or a
            pipeline file, for the models of its vLLM engines with their settings.
        port: The port that the server listens on; default: a free one.
        extra: More command-line arguments for vLLM.
        idle_minutes: Minutes without a question after which a server is ended.
        sets: Overrides of the pipeline's fields.
        as_json: Print JSON.

    Raises:
        ConfigError: The pipeline has no vLLM engine, there is a key among the arguments, or there
            is no such model.
        EngineError: vLLM is not installed or does not start.
    """
    from prefab.factory.engines import kept_server
    from prefab.factory.engines.model_files import ask_hub
    from prefab.factory.engines.vllm import VLLM, VllmConfig

    for _, message in secrets_in({"args": list(extra)}):
        raise ConfigError(message)
    configs = [VllmConfig(model=model, port=port, args=list(extra))]
    if model.endswith((".yaml", ".yml")):
        configs = _engines_of(model, sets)
    servers = []
    for config in configs:
        engine = VLLM(config, "serve")
        kept = kept_server.find(engine.identity, config)
        if kept is None:
            if importlib.util.find_spec("vllm") is not None:  # else the keeper says how to get it
                ask_hub(str(engine.path), config.revision)
            kept = kept_server.keep(
                config, 60.0 * idle_minutes, lambda line: say(line, stderr=True)
            )
        servers.append(kept)
    if as_json:
        return print_json({"servers": [server.data() for server in servers]})
    for server in servers:
        say(
            f"{server.model} is kept at {server.url} until nothing was asked for "
            f"{duration(server.idle_s)}; commands with this model and these settings use it"
        )
    hint("prefab serve --stop")


def _engines_of(pipeline: str, sets: Sequence[str]) -> list[VllmConfig]:
    """The configurations of a pipeline's vLLM engines that start a server, each once."""
    from prefab.factory.engines.vllm import VllmConfig
    from prefab.pipelines.config.loader import resolve_pipeline

    engines = resolve_pipeline(pipeline, sets).config.engines.values()
    found: list[VllmConfig] = []
    for engine in engines:
        if engine.get("engine") == "vllm" and not (engine.get("url") or engine.get("urls")):
            config = VllmConfig.model_validate(dict(engine))
            if config not in found:
                found.append(config)
    if not found:
        raise ConfigError(f"{pipeline} has no vLLM engine that starts a server")
    return found


def show_kept(as_json: bool = False) -> None:
    """Print the servers that are kept."""
    from prefab.factory.engines.kept_server import kept_servers

    servers = kept_servers()
    if as_json:
        return print_json({"servers": [server.data() for server in servers]})
    if not servers:
        say("no server is kept")
        return hint("prefab serve prefab-tiny --keep")
    table(
        "",
        ("model", "url", "pid", "up for", "unused for", "ends after"),
        [
            (
                server.model,
                server.url,
                str(server.pid),
                duration(time.time() - server.started),
                duration(server.unused_s),
                duration(server.idle_s),
            )
            for server in servers
        ],
    )
    for server in servers:
        say(f"log of {server.model}: {server.log}")
    hint("prefab serve --stop")


def stop_kept(model: str = "", as_json: bool = False) -> None:
    """End the servers that are kept.

    Args:
        model: Only those of this model, as it was named when they were started.
        as_json: Print JSON.

    Raises:
        ConfigError: No server of this model is kept.
        EngineError: A server does not end.
    """
    from prefab.factory.engines.kept_server import kept_servers, stop

    running = kept_servers()
    chosen = [server for server in running if model in ("", server.model)]
    if model and not chosen:
        names = ", ".join(server.model for server in running) or "none"
        raise ConfigError(f"no server of {model} is kept; kept are: {names}")
    for server in chosen:
        stop(server)
    if as_json:
        return print_json({"stopped": [server.data() for server in chosen]})
    for server in chosen:
        say(f"the server of {server.model} at {server.url} has ended")
    if not chosen:
        say("no server is kept")


def _key_file(process: VllmProcess, port: int) -> Path | None:
    """The new file with the server's key; None where the environment names the key."""
    given = os.environ.get(KEY_VARIABLE, "").strip()
    if given:
        add_secret(given)
        process.key = given
        return None
    return new_key_file(f"serve-{port}", process.key)


def new_key_file(name: str, key: str) -> Path:
    """Write a key to a new file that only this user can read, in the cache folder."""
    file = cache_folder() / "keys" / f"{name}.key"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(file, flags, 0o600), "w", encoding="utf-8") as out:
        out.write(key + "\n")
    return file
