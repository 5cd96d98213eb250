"""The process that keeps a vLLM server up: `python -m prefab.factory.engines.server_keeper`.
`kept_server.keep` starts it.

It gets the configuration on stdin, prints progress and, in a line that begins with `MARK`, how the
start ended. Then it lets go of the command that started it, and ends the server on SIGTERM, when
nothing was asked for too long, or when the server itself has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict

from prefab.factory.engines.kept_server import (
    MARK,
    KeptServer,
    held,
    last_use,
    record_file,
    settings_of,
    use_file,
)
from prefab.factory.engines.vllm import VLLM, VllmConfig
from prefab.factory.engines.vllm_key import SERVER_USED
from prefab.factory.engines.vllm_process import VllmProcess, free_port
from prefab.factory.errors import PrefabError

LOOK_EVERY_S = 0.5


async def _keep(config: VllmConfig, idle_s: float) -> None:
    """Start the server, write its record, and wait until it shall end."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    engine, settings = VLLM(config, "serve"), settings_of(config)
    file = record_file(engine.identity, settings)
    used = use_file(file)
    log = file.with_suffix(".log")
    with held(file, str(config.model)) as handle:
        used.touch(mode=0o600)
        port = config.port or free_port()
        started = config.model_copy(
            update={"log_file": log, "env": {**config.env, SERVER_USED: str(used)}}
        )
        process = VllmProcess(started, str(engine.path), port, "serve", _print)
        try:
            starting = asyncio.create_task(process.start())
            ending = asyncio.create_task(stopped.wait())
            await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                return
            await starting
            kept = KeptServer(
                str(config.model),
                engine.identity,
                settings,
                port,
                process.key,
                os.getpid(),
                idle_s,
                time.time(),
                str(log),
            )
            record = asdict(kept)
            del record["file"]
            os.utime(used)
            os.write(handle, json.dumps(record).encode())
            _print(MARK + json.dumps({"file": str(file)}))
            _let_go()
            while not stopped.is_set() and process.why_dead() is None:
                if time.time() - last_use(file) > idle_s:
                    break
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            await process.stop()


def _print(line: str) -> None:
    print(line, flush=True)


def _let_go() -> None:
    """Close the pipe to the command that started this process."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)


def main() -> int:
    """The keeper: reads what to serve from stdin, and tells on stdout how the start ended."""
    order = json.loads(sys.stdin.read())
    try:
        asyncio.run(_keep(VllmConfig.model_validate(order["config"]), order["idle_s"]))
    except PrefabError as error:
        with suppress(OSError):
            _print(MARK + json.dumps({"error": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
