"""How soon vLLM answers first, and how fast it then is: compiled or eager, with and without a kept
compile cache.

    python -m benchmarks.vllm_start [--models prefab-nano smollm2-135m] [--rounds 1] [--work 1]

Each variant starts twice on a compile cache of its own that is empty at first; after each start the
same work is timed. The variants of one round follow one another, so compare within a round: other
programs on the machine change the seconds, hardly the ratios. A CPU captures no graphs, so the
number of capture sizes has no effect there.

What was chosen: compiled, for every size, with what was compiled kept (`VLLM_CACHE_ROOT` below
`PREFAB_CACHE`) and read back at the next start (factory/engines/vllm_plugin.py). Only the very
first start of a model is slower than an eager one; `args: [--enforce-eager]` is for who starts it
once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from prefab.factory.engines.base import make
from prefab.factory.keys import request_key
from prefab.factory.types import Message, Request, Sampling

VARIANTS = {"compiled": ["--no-enforce-eager"], "eager": ["--enforce-eager"]}
QUESTIONS = (
    "How do I keep basil alive on a window sill in winter?",
    "Explain to a child why the sky is blue.",
    "What should I check before I buy a used bicycle?",
    "Write a short thank-you note to a neighbour who fed my cat.",
)


def requests(
    model: str, reads: int, answers: int, max_tokens: int
) -> tuple[list[Request], list[Request]]:
    """Label reads on prompts of about 250 tokens, and answers of up to `max_tokens` tokens."""
    text = " ".join(QUESTIONS) * 4
    labels = [
        Request(
            model,
            (Message("user", f"{i}. {text} Reply A or B."),),
            Sampling(max_tokens=1),
            ("A", "B"),
        )
        for i in range(reads)
    ]
    free = [
        Request(
            model,
            (Message("user", QUESTIONS[i % len(QUESTIONS)]),),
            Sampling(max_tokens=max_tokens, temperature=1.0, seed=0),
            repeat=(i,),
        )
        for i in range(answers)
    ]
    return labels, free


async def one_start(
    model: str, args: list[str], cache: Path, work: tuple[list[Request], list[Request]]
) -> dict[str, float]:
    """Seconds until the server is ready, until its first answer, and of the work, by the clock and
    of CPU (the server with its compilers): on a busy machine the latter say more.
    """
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "VLLM_CACHE_ROOT": str(cache)}
    engine = make({"engine": "vllm", "model": model, "args": args, "env": env}, "bench")
    engine.mute()
    began = time.perf_counter()
    try:
        await engine.start()
        told = {"ready_s": time.perf_counter() - began, "ready_cpu_s": cpu_s(engine)}
        for request in work[1][:1]:
            await engine.complete(request_key(request), request)
        told["first_answer_s"] = time.perf_counter() - began
        for name, asked in zip(("reads", "answers"), work, strict=True):
            before, used = time.perf_counter(), cpu_s(engine)
            done = await asyncio.gather(*(engine.complete(request_key(r), r) for r in asked))
            told[f"{name}_s"] = time.perf_counter() - before
            told[f"{name}_cpu_s"] = cpu_s(engine) - used
            told[f"{name}_tokens"] = sum(c.prompt_tokens + c.completion_tokens for c in done)
        return told
    finally:
        await engine.stop()


def cpu_s(engine: Any) -> float:
    """CPU seconds of the engine's server so far, with the processes that it started."""
    total = 0.0
    for process in common.tree(engine.process.supervisor.pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # a compiler that has just ended
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "prefab-nano"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=int, default=1, help="times 16 reads and 8 answers")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for round in range(options.rounds):
        for model in options.models:
            for variant in options.variants:
                with tempfile.TemporaryDirectory(prefix="prefab-start-") as folder:
                    for start in ("first", "second"):
                        work = requests(model, 16 * options.work, 8 * options.work, 64)
                        told = asyncio.run(one_start(model, VARIANTS[variant], Path(folder), work))
                        rows.append(
                            {
                                "round": round,
                                "model": model,
                                "variant": variant,
                                "start": start,
                                **{name: round_(value) for name, value in told.items()},
                            }
                        )
                        print(rows[-1], flush=True)
    columns = [name for name in rows[0] if name != "round"]
    common.table(columns, [[row[name] for name in columns] for row in rows])
    common.write("vllm_start", False, asked=common.asked(options), rows=rows)


def round_(value: float) -> float:
    """A measurement with one decimal."""
    return round(value, 1)


if __name__ == "__main__":
    main()
