"""`python -m tests.fuzz --minutes 60`: inputs made by hypothesis for each target of `targets.py` in
turn, until the time is over. Prints the inputs tried and each new kind of failure, with an
input; `--keep` adds those inputs to the corpus, which the tests replay.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
EXAMPLE_S = 5  # one input may take so long
ROUND = 400  # inputs of one target before the next one's turn
MEMORY = 4 << 30


class TooSlow(BaseException):
    """One input took more than EXAMPLE_S."""


def bounded(check: Callable[[Any], None], value: Any) -> None:
    """The check, ended after EXAMPLE_S. Raises: TooSlow."""

    def over(*_: object) -> None:
        raise TooSlow(f"took more than {EXAMPLE_S} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(EXAMPLE_S)
    try:
        check(value)
    finally:
        signal.alarm(0)


def kind_of(error: BaseException) -> str:
    """Two failures with the same exception at the same place are one finding."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "hypothesis" not in f.filename
    ]
    ours = [f for f in frames if "/prefab/" in f.filename or "targets.py" in f.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}"


def one_round(name: str, number: int, tried: Counter[str]) -> tuple[str, str, Any] | None:
    """ROUND inputs of a target; the kind of failure, its words, and an input, if any."""
    target, failing = TARGETS[name], []

    def check(value: Any) -> None:
        tried[name] += 1
        try:
            bounded(target.check, value)
        except BaseException as error:
            failing.append((kind_of(error), str(error)[:200], value))
            raise

    test = given(target.inputs)(check)
    options = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate,),  # the smallest of the failing inputs is near enough
        suppress_health_check=list(HealthCheck),
    )
    try:
        seed(number)(options(test))()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return min(failing, key=lambda found: len(json.dumps(found[2], default=str)), default=None)
    return None


def corpus(name: str) -> list[Any]:
    file = CORPUS / f"{name}.json"
    found: list[Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return found


def keep(name: str, value: Any) -> None:
    """Add an input to the corpus."""
    values = corpus(name)
    if value not in values:
        text = json.dumps([*values, value], indent=1, ensure_ascii=True)
        (CORPUS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add failing inputs to the corpus")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end, number = time.monotonic() + 60 * options.minutes, options.seed
    tried: Counter[str] = Counter()
    found: dict[str, set[str]] = {name: set() for name in options.only}
    while time.monotonic() < end:
        number += 1
        for name in options.only:
            if time.monotonic() > end:
                break
            if failure := one_round(name, number, tried):
                kind, words, value = failure
                if kind not in found[name]:
                    found[name].add(kind)
                    print(f"{name}: {kind}: {words!a}\n  input: {value!a}"[:1500], flush=True)
                    if options.keep:
                        keep(name, value)
    for name in options.only:
        print(f"{name}: {tried[name]:,} inputs, {len(found[name])} kinds of failures", flush=True)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
