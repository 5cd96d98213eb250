"""Python tests of verifiers a second, and the processor time of each.

    python -m benchmarks.verifier [PROGRAMS]        (60 programs: about 10 s)

Each program is a short function under three asserts, one at a time for each processor. The time is
that of starting the two Pythons and the jail: what a task costs comes on top."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from prefab.judges import sandbox

TESTS = "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(-1, 1) == 0"
ANSWER = "def add(a, b):\n    return a + b"


def cpu_s() -> float:
    """Processor time of the processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(programs: int) -> dict[str, object]:
    """Run so many programs and say what each took."""
    status = sandbox.isolation_status()[1]
    began, cpu_before, workers = time.monotonic(), cpu_s(), os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda _: sandbox.run_tests(TESTS, ANSWER), range(programs)))
    assert all(result["passed"] == 3 for result in found)
    return {
        "isolation": status,
        "at_a_time": workers,
        "programs_per_s": round(programs / (time.monotonic() - began), 1),
        "cpu_ms_each": round(1000 * (cpu_s() - cpu_before) / programs, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 60)))
