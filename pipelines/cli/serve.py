"""`prefab serve`: start vLLM in the foreground, with the options that Prefab's engine uses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefab.factory.console import say
from prefab.factory.errors import EngineError


def serve_model(model: str, port: int, extra: Sequence[str] = ()) -> int:
    """Start vLLM in the foreground, as the engine would, and wait until it ends.

    Args:
        model: A folder, a name on the model hub, or an embedded model such as `prefab-tiny`.
        port: The port that the server listens on.
        extra: More command-line arguments for vLLM.

    Returns:
        The exit code of vLLM; 130 after Ctrl-C.

    Raises:
        EngineError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed here: `make setup` installs it, or `pip install '.[serve]'`"
        )
    from prefab.factory.engines import vllm_process
    from prefab.factory.engines.vllm import VLLM, VllmConfig
    from prefab.factory.engines.vllm_process import VllmProcess, command_line, environment

    engine = VLLM(VllmConfig(model=model, port=port, args=list(extra)), "serve")
    process = VllmProcess(engine.config, str(engine.path), port, "serve", None)
    words = command_line(process)
    say(
        f"serving {model} at http://127.0.0.1:{port}/v1 (Ctrl-C ends it)\n"
        f"to use it in a pipeline: engines.local = {{engine: vllm, url: 'http://127.0.0.1:{port}', "
        f"model: {model}}}",
        stderr=True,
    )
    supervisor = [
        sys.executable,
        str(Path(vllm_process.__file__).with_name("supervisor.py")),
        str(os.getpid()),
        "/dev/stderr",
    ]
    child = subprocess.Popen([*supervisor, *words], stdin=subprocess.PIPE, env=environment(process))
    try:
        return child.wait()
    except KeyboardInterrupt:  # the supervisor gets the signal too and ends the server
        child.wait()
        return 130
