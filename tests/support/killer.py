"""A piece of work that is killed with SIGKILL at random moments and begun again, until it gets to
its end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def until_done(work: Callable[[], object], kills: int, seed: int, most_s: float) -> None:
    """Do `work` in forks of this process, which has imported what it needs, so that a try costs
    little.

    The first `kills` tries end after at most `most_s` seconds of CPU, drawn from the seed. Prints
    how many were killed, and exits when a try fails."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    draw, killed = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        limit = draw.uniform(0.1, most_s) if killed < kills else 1e9
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and cpu_s(child) < limit:
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


def cpu_s(pid: int) -> float:
    """CPU seconds of a process: on a busy machine, by the clock, a try would never get anywhere."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
