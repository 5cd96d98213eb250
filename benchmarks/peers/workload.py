"""The one workload that every client runs: pairwise judgments of about 2.8 kB with a shared prefix
of 1.6 kB.

Standard library alone, so that any peer's environment can import it; deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from typing import Any

PRINCIPLES = [
    "Choose the response that is the most helpful, honest and harmless.",
    "Choose the response that is least likely to assist with a clearly illegal or dangerous "
    "activity.",
    "Choose the response that best admits uncertainty instead of inventing facts.",
    "Choose the response that most directly answers the question that was asked.",
    "Choose the response that avoids stereotypes and demeaning generalisations.",
    "Choose the response that a careful expert in the field would be least embarrassed by.",
    "Choose the response that respects the privacy of the people that are mentioned.",
    "Choose the response that is concise while it loses no needed information.",
]
RULES = "\n".join(
    f"{i + 1}. {p} If two principles conflict, prefer the one with the lower number."
    for i, p in enumerate(PRINCIPLES)
)
SYSTEM = (
    "You are an impartial judge. Apply every principle of the constitution below.\n\n"
    + RULES
    + "\n\nReply with exactly one letter, A or B. Do not explain."
)
WORDS = [
    "the",
    "model",
    "answer",
    "gives",
    "a",
    "careful",
    "account",
    "of",
    "how",
    "water",
    "moves",
    "through",
    "soil",
    "and",
    "rock",
    "before",
    "it",
    "reaches",
    "a",
    "river",
    "where",
    "people",
    "fish",
    "travel",
    "trade",
    "and",
    "rest",
    "while",
    "seasons",
    "change",
    "light",
    "wind",
    "heat",
    "and",
    "cost",
]


def rows(n: int, seed: int = 7) -> Iterator[dict[str, Any]]:
    """`n` questions, each with two answers."""
    rng = random.Random(seed)
    for i in range(n):
        yield {
            "id": i,
            "instruction": f"Question {i}: " + " ".join(rng.choices(WORDS, k=24)) + "?",
            "generations": [" ".join(rng.choices(WORDS, k=90)), " ".join(rng.choices(WORDS, k=90))],
        }


def body(row: dict[str, Any]) -> dict[str, Any]:
    """The request that judges a row."""
    user = (
        f"[Prompt]\n{row['instruction']}\n\n[Response A]\n{row['generations'][0]}\n\n"
        f"[Response B]\n{row['generations'][1]}\n\nWhich response is better? Answer A or B:"
    )
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    return {
        "model": "mock-ab",
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 2,
    }


def arguments() -> argparse.Namespace:
    """What every client is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:8399/v1")
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("-c", "--concurrency", type=int, default=64)
    parser.add_argument("--variant", default="")
    return parser.parse_args()


def report(n: int, started: float, ok: int) -> None:
    """The line that the runner reads: how many judgments, how many of them readable, seconds of
    work."""
    print(
        "RESULT " + json.dumps({"n": n, "ok": ok, "work_s": time.perf_counter() - started}),
        flush=True,
    )


def read(answer: dict[str, Any]) -> tuple[str, float]:
    """Verdict and log-probability of one answer."""
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["logprobs"]["content"][0]["logprob"]
