"""The scripted server as a process of its own, which counts what it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prefab.factory.paths import IMPORT_ROOT


@contextmanager
def scripted_server(delay_ms: int) -> Iterator[str]:
    """The address of a server that takes so long for an answer."""
    command = [sys.executable, "-m", "prefab.factory.engines.scripted", "--delay-ms", str(delay_ms)]
    environment = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
