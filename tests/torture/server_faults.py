"""Each kind of server fault, at the first, the middle and the last question, once and for good.

Whatever the fault, the run ends by itself in bounded time and memory, without a traceback; every
sample and verdict in the store is one that the server gave; and once the server is well, the same
command makes the store that it should be, asking nothing that is committed.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.torture.faults import FAULTS
from tests.torture.kills import Result
from tests.torture.lab import Ended, Lab, committed, rows

# Patience for the tests: with the defaults, a hanging server is waited for much longer.
QUICK = {"retries": 2, "timeout_s": 1.5, "deadline_s": 6}
MEMORY_MB, SECONDS = 700, 60
DERIVED = ("samples", "verdicts")


def faults(lab: Lab, kinds: list[str], places: tuple[str, ...]) -> Iterator[Result]:
    """Each of `kinds` at each of `places` (first, middle, last), for one try and for all; every
    kind once before any is met again."""
    for place in places:
        for sticky in (True, False):
            for kind in kinds:
                reads = FAULTS[kind].reads
                total = len(lab.questions) // 2 if reads else len(lab.questions)
                numbers = {"first": 1, "middle": total // 2, "last": total}
                rule = {"kind": kind, "reads": reads, "places": [numbers[place]], "sticky": sticky}
                name = f"{kind}, {place} question, {'always' if sticky else 'once'}"
                yield Result(name, one_fault(lab, rule))


def one_fault(lab: Lab, rule: dict[str, object]) -> list[str]:
    lab.reset()
    lab.control(rule)
    ended = lab.prefab("run", "pipeline.yaml", "-q", timeout_s=SECONDS)
    problems = _ended_well(ended)
    if not lab.ask("/_log")["faulty"]:
        problems.append("HARNESS: nothing met the fault")
    problems += _invented(lab)
    before = committed(lab.store)
    lab.control()
    again = lab.prefab("run", "pipeline.yaml", "-q", "--retry-refused", timeout_s=SECONDS)
    if again.code != 0:
        problems.append(f"the same command, server well: exit code {again.code}: {again.last}")
    if asked := set(lab.log(killed=False)) & before.keys():
        problems.append(f"{len(asked)} committed answers were asked again")
    if again.code == 0 and (difference := lab.differences(("runs", "failures", "evals"))):
        problems.append(f"not mended: {difference}")
    return problems


def _ended_well(ended: Ended) -> list[str]:
    problems = []
    if ended.code not in (0, 1, 2):
        problems.append(f"exit code {ended.code}: {ended.last}")
    if "Traceback" in ended.err:
        problems.append(f"a traceback: {ended.last}")
    if ended.peak_mb > MEMORY_MB:
        problems.append(f"{ended.peak_mb} MB of memory")
    return problems


def _invented(lab: Lab) -> list[str]:
    """Samples and scored verdicts that the server did not give."""
    try:
        now = rows(lab.store)
    except Exception:
        return []  # the run ended before there was a store
    found = []
    for table in DERIVED:
        scored = [row for row in now[table] if "None" not in row or table == "samples"]
        if wrong := set(scored) - set(lab.rows[table]):
            found.append(f"{len(wrong)} {table} that the server did not give")
    return found
