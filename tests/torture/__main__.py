"""`python -m tests.torture`: all parts or some, and a table of what was tried and what failed.

`--only kills --n 100` runs one part, with a bound on its size. `--out FILE` keeps the figures of
the parts that ran, beside those of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prefab.factory.console import table
from tests.torture import crash_states, hostile, kills, server_faults
from tests.torture.faults import FAULTS
from tests.torture.kills import Result
from tests.torture.lab import Lab, lab

PLACES = ("middle", "first", "last")


def named_kills(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return islice(kills.named(here, kills.NAMED), n)


def operation_kills(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return kills.at_operations(here, n)


def export_kills(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return islice(kills.at_export_operations(here), n)


def random_kills(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return kills.at_random(here, min(n, 1000), seed)


def crashes(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return _states(here, ("all",), n, seed)


def power_cuts(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return _states(here, crash_states.POWER, n, seed)


def _states(here: Lab, ways: tuple[str, ...], n: int, seed: int) -> Iterator[Result]:
    operations = crash_states.recorded(here, kills.RUN)
    every = max(1, len(operations) * len(ways) // n)
    for how in ways:
        for place, sure in crash_states.states(here, operations, how, every, seed):
            yield Result(place, crash_states.check_state(here, sure))


def faults(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return islice(server_faults.faults(here, list(FAULTS), PLACES), n)


def hostile_table(here: Lab, n: int, seed: int) -> Iterator[Result]:
    return islice(hostile.hostile(here, list(hostile.CASES)), n)


Part = Callable[[Lab, int, int], Iterator[Result]]
# Each part: what it tries, whether it needs the shim, and the settings of its engine.
PARTS: dict[str, tuple[Part, str, bool, dict[str, object]]] = {
    "named": (named_kills, "SIGKILL at each named point", False, {}),
    "operations": (operation_kills, "SIGKILL before each file operation of a run", True, {}),
    "export": (export_kills, "SIGKILL before each file operation of an export", True, {}),
    "kills": (random_kills, "SIGKILL at random moments", False, {}),
    "crashes": (crashes, "crash states of a run", True, {}),
    "power": (power_cuts, "power cuts (synced data only, and with parts of the rest)", True, {}),
    "faults": (faults, "server faults", False, server_faults.QUICK),
    "hostile": (hostile_table, "hostile files, arguments and queries", False, {}),
}


def run_part(name: str, n: int, seed: int) -> dict[str, object]:
    """The figures of one part, with every failure by place."""
    part, what, shim, engine = PARTS[name]
    began = time.monotonic()
    tried = killed = repeated = 0
    failures: dict[str, list[str]] = {}
    with lab(shim=shim, **engine) as here:
        here.undisturbed()
        for result in part(here, n, seed):
            tried, killed = tried + 1, killed + result.killed
            repeated = max(repeated, result.repeated)
            if result.problems:
                place = result.place.replace(f"{here.folder}/", "")
                failures[place] = [p.replace(f"{here.folder}/", "") for p in result.problems]
                print(f"{name}: {place}: {'; '.join(failures[place])}", flush=True)
    command = f"python -m tests.torture --only {name} --n {n} --seed {seed}"
    figures: dict[str, object] = {"what": what, "command": command, "tried": tried}
    if killed:
        figures |= {"killed": killed, "most_asked_twice": repeated}
    seconds = round(time.monotonic() - began)
    return {**figures, "failed": len(failures), "seconds": seconds, "failures": failures}


def markdown(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as the table of docs/reliability.md."""
    lines = ["| tried | how many | killed | failed |", "|---|---|---|---|"]
    for part in figures.values():
        killed = part.get("killed", "")
        lines.append(f"| {part['what']} | {part['tried']} | {killed} | {part['failed']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--n", type=int, default=100_000, help="at most so many in each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with the figures of all parts")
    options = parser.parse_args()
    found = {}
    for name in options.only:
        found[name] = run_part(name, options.n, options.seed)
        if options.out:
            earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
            options.out.write_text(json.dumps({**earlier, name: found[name]}, indent=1) + "\n")
    columns = ("what", "tried", "killed", "failed", "seconds")
    lines = [[figures.get(column) for column in columns] for figures in found.values()]
    table("torture", columns, lines)
    return int(any(figures["failed"] for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
