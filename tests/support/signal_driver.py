"""The command line, held in one phase: `python signal_driver.py PHASE ARGUMENT...`. It prints a
line when the phase is reached, and then waits for a signal."""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PHASES = {
    "opening": ("prefab.pipelines.run.runner", "count_prompts"),
    "filling": ("prefab.pipelines.store.fill", "_replace"),
    "exporting": ("prefab.pipelines.store.export.card", "_card"),
    "planning": ("prefab.pipelines.run.plan", "plan"),
    "asking the store": ("prefab.factory.store.store", "read_store"),
}


def reached() -> None:
    print("reached", flush=True)


def linger() -> None:
    """Ten minutes of short waits: a signal between Python's look at signals and the system call
    that waits is heeded only after that call.
    """
    for _ in range(6000):
        time.sleep(0.1)


def hold(phase: str) -> None:
    """Make the phase last for ten minutes. `stuck` does so again while it ends."""
    if phase == "asking":
        from prefab.factory.engines.scripted import Scripted

        complete = Scripted.complete

        async def slow(self, key, request):
            reached()
            await asyncio.sleep(0.3)
            return await complete(self, key, request)

        Scripted.complete = slow
        return
    if phase == "training":
        from prefab.trainers.offline.loop import Loop

        step = Loop.training_step

        def at_the_sixth(self, *arguments, **named):
            if self.state.global_step == 5:
                reached()
                linger()
            return step(self, *arguments, **named)

        Loop.training_step = at_the_sixth
        return
    if phase == "policy gradient":
        from prefab.trainers.rl import rewards

        score, scored = rewards.score_ended, []

        def at_the_sixth_batch(*arguments, **named):
            scored.append(None)
            if len(scored) == 6:
                reached()
                linger()
            return score(*arguments, **named)

        rewards.score_ended = at_the_sixth_batch
        return
    module, name = PHASES["filling" if phase == "stuck" else phase]

    def wait(*_, **__):
        try:
            reached()
            linger()
        finally:
            if phase == "stuck":
                reached()
                linger()

    setattr(importlib.import_module(module), name, wait)


if __name__ == "__main__":
    from prefab.pipelines.cli.main import main

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under `nohup` ignore it, and so would we
    if sys.argv[1] != "-":
        hold(sys.argv[1])
    sys.argv = ["prefab", *sys.argv[2:]]
    main()
