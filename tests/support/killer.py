"""Do a piece of work in processes that are killed with SIGKILL, until one gets to its end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

Due = Callable[[int], bool]  # whether the process of this id is to be killed now


def until_done(work: Callable[[], object], dues: Iterable[Due] = ()) -> None:
    """Do `work` in forks of this process, which has imported what it needs, so that a try costs
    little.

    A try is killed when the next of `dues` says so. Prints how many were killed, and exits when a
    try fails."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    dues, killed = iter(dues), 0
    while True:
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        due = next(dues, None)
        if due is None:
            done = os.waitpid(child, 0)
        else:
            while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and not due(child):
                time.sleep(0.005)
            if done == (0, 0):
                os.kill(child, signal.SIGKILL)
                done = os.waitpid(child, 0)
        if os.WIFSIGNALED(done[1]):
            killed += 1
        elif os.WEXITSTATUS(done[1]):
            sys.exit(f"a try failed after {killed} were killed")
        else:
            print(f"{killed} killed")
            return


def fork_in_two() -> int:
    """Go on in two processes, each with the environment that a launcher gives: 0 in the second one,
    which ends when the first does; the second's id in the first.
    """
    from prefab.factory.engines.vllm_process import free_port
    from prefab.trainers import distributed

    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    second = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(second == 0))
    distributed.end_with_launcher()
    return second


def at_random(kills: int, seed: int, most_s: float) -> list[Due]:
    """After at most `most_s` seconds of CPU, drawn from the seed."""
    draw = random.Random(seed)
    return [partial(has_used, draw.uniform(0.1, most_s)) for _ in range(kills)]


def has_used(limit_s: float, pid: int) -> bool:
    """Whether a process has used so much CPU."""
    return cpu_s(pid) >= limit_s


def cpu_s(pid: int) -> float:
    """CPU seconds of a process: on a busy machine, by the clock, a try would never get anywhere."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
