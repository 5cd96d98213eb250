"""A small pipeline with every kind of use, and an engine whose answers are functions of the key,
for the store's tests.

It behaves as the recipes do (all asks of a comparison by one judge at once; a critique decides on a
revision) and meets what they meet: cut-off, refused and too long answers, unreadable critiques, low
label mass, identical texts."""

from __future__ import annotations

import asyncio
from math import log

from prefab.factory.errors import TransportError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion, Engine, Message, Prompt, Request, Sampling
from prefab.factory.uses import CritiqueUse, DraftUse, IdenticalUse, PairUse, RevisionUse

MODEL = "name:mini"
LABELS = ("A", "B", "T", " A", " B", " T")
CONSTITUTION = """
id: mini
title: Mini
licence: CC0-1.0
selection: all
principles:
  - {id: kind, title: t, compare: Which is kinder, critique: c, revise: r, criterion: x, weight: 2.0}
  - {id: brief, title: t, compare: Which is briefer, critique: c, revise: r, criterion: x}
"""
CONFIG = {
    "recipe": "mini",
    "seed": 0,
    "panel": {
        "orders": "both",
        "min_scored": 0.5,
        "tie_margin": 0.02,
        "judges": [
            {"name": "one", "kind": "pairwise", "engine": "e"},
            {"name": "two", "kind": "pairwise", "engine": "e", "weight": 0.5},
        ],
    },
}
PRINCIPLES = ("kind", "brief")


def prompts(n: int) -> list[Prompt]:
    """The first `n` prompts."""
    return [
        Prompt(f"p{i}", (Message("user", f"question {i}"),), ("odd",) if i % 2 else ())
        for i in range(n)
    ]


def answer(key: bytes, request: Request, max_model_len: int) -> Completion:
    """A function of the key, so that every process gets the same answers."""
    text, draw = request.messages[0].content, key[0]
    if draw < 4:
        limit = 50 + draw
        return (
            Completion("", "context", limit=limit)
            if max_model_len <= limit
            else Completion("None.", "stop")
        )
    if draw < 6:
        return Completion("", "refused")
    if request.labels:
        weights = [1 + key[1], 1 + key[2], 1 + key[3] // 4]
        total = sum(weights) * (3.0 if draw < 16 else 1.05)
        return Completion(
            "A",
            "stop",
            {label: log(w / total) for label, w in zip(LABELS[:3], weights, strict=True)},
            "exact",
            40,
            1,
        )
    if text.startswith("critique"):
        return Completion(
            ("Fault: it is rude.", "None.", "Well...")[key[1] % 7 // 3],
            "stop",
            None,
            "exact",
            20,
            5,
        )
    return Completion(f"text {key[1] % 5}", "length" if draw < 20 else "stop", None, "exact", 10, 7)


class MiniEngine(Engine):
    """Answers by `answer`; `fails(key)` says for which questions the transport breaks."""

    identity = MODEL

    def __init__(
        self, fails=lambda key: False, max_in_flight: int = 8, max_model_len: int = 50
    ) -> None:
        self.fails, self.max_in_flight, self.max_model_len = fails, max_in_flight, max_model_len
        self.asked: list[bytes] = []

    async def complete(self, key: bytes, request: Request) -> Completion:
        self.asked.append(key)
        await asyncio.sleep(0)
        if self.fails(key):
            raise TransportError("scripted failure")
        return answer(key, request, self.max_model_len)


async def pipeline(prompt: Prompt, ledger: Ledger, run: int, engine, config: dict = CONFIG) -> None:
    """Three samples, critiques and revisions of them, and every pair judged under both principles
    by both judges."""
    question = prompt.messages[0].content
    sampling = Sampling(16, 1.0, seed=0)
    asks = [
        (
            Request(MODEL, (Message("user", question),), sampling, repeat=(k,)),
            DraftUse(run, prompt.id, k),
        )
        for k in range(3)
    ]
    texts = {
        k: a.text
        for k, a in enumerate(await ledger.ask_many(asks, engine))
        if isinstance(a, Completion) and a.finish in ("stop", "length")
    }
    await _revise(prompt, texts, ledger, run, engine)
    pairs = [(a, b) for a in texts for b in texts if a < b]
    for a, b in pairs:
        if texts[a] == texts[b]:
            ledger.note(IdenticalUse(run, prompt.id, a, b))
    for judge in config["panel"]["judges"]:
        asks = [
            (
                _judgment(question, texts[a], texts[b], principle, judge["name"], order),
                PairUse(run, prompt.id, "judge", a, b, principle, judge["name"], order),
            )
            for a, b in pairs
            if texts[a] != texts[b]
            for principle in PRINCIPLES
            for order in ("ab", "ba")
        ]
        await ledger.ask_many(asks, engine)


async def _revise(prompt: Prompt, texts: dict[int, str], ledger: Ledger, run: int, engine) -> None:
    places = [(k, principle) for k in texts for principle in PRINCIPLES]
    asks = [
        (
            Request(
                MODEL,
                (Message("user", f"critique {texts[k]} by {p} of {prompt.id}"),),
                Sampling(16),
            ),
            CritiqueUse(run, prompt.id, k, p),
        )
        for k, p in places
    ]
    named = [
        place
        for place, a in zip(places, await ledger.ask_many(asks, engine), strict=True)
        if isinstance(a, Completion) and a.text.startswith("Fault")
    ]
    asks = [
        (
            Request(
                MODEL, (Message("user", f"revise {texts[k]} by {p} of {prompt.id}"),), Sampling(16)
            ),
            RevisionUse(run, prompt.id, 3 + 2 * k + PRINCIPLES.index(p), k, p),
        )
        for k, p in named
    ]
    await ledger.ask_many(asks, engine)


def _judgment(question: str, a: str, b: str, principle: str, judge: str, order: str) -> Request:
    first, second = (a, b) if order == "ab" else (b, a)
    text = f"{judge} judges by {principle}: {question} A: {first} B: {second}"
    return Request(MODEL, (Message("user", text),), Sampling(1), LABELS)


async def run(
    folder, n: int, engine, config: dict = CONFIG, name: str = "mini", at_once: int = 8
) -> Ledger:
    """Run the pipeline over `n` prompts, some at once, and close the ledger; gives the closed
    ledger for its counts."""
    ledger = Ledger.open(folder)
    try:
        record = ledger.begin_run(name, config, {"constitution": CONSTITUTION})
        todo = prompts(n)
        ledger.add_prompts(todo)
        rest = iter(todo)

        async def worker() -> None:
            for prompt in rest:
                await pipeline(prompt, ledger, record.id, engine, config)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    finally:
        await ledger.close()
    return ledger
