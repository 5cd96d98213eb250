"""Filling is bounded by the bytes of the answers: one of any length, or many long ones, stop
nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from prefab.factory.ledger.ledger import Ledger
from prefab.factory.store import store
from prefab.factory.types import LONGEST_TEXT, Completion, Engine, Request, Sampling
from prefab.factory.uses import DraftUse
from prefab.pipelines.store import fill as filling
from prefab.pipelines.store.fill import fill, query, rebuild
from tests.support.miniworld import CONFIG, CONSTITUTION, MODEL, prompts
from tests.support.store_rows import dump, same

PEAK = """
import resource, sys
from prefab.pipelines.store.fill import fill
fill(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


class LongAnswers(Engine):
    """An answer of some characters to each question, or to `question 0` alone and short ones to the
    others."""

    identity, max_in_flight, max_model_len = MODEL, 8, 10_000

    def __init__(self, length, first_only=False):
        self.length, self.first_only = length, first_only

    async def complete(self, key, request):
        wanted = not self.first_only or request.messages[0].content == "question 0"
        words = key.hex() + " a word and another"
        return Completion(
            (words * (self.length // len(words) + 1))[: self.length if wanted else 40], "stop"
        )


def sample(folder, n, engine):
    """Two samples of each of `n` prompts."""

    async def work():
        ledger = Ledger.open(folder)
        record = ledger.begin_run("mini", CONFIG, {"constitution": CONSTITUTION})
        ledger.add_prompts(prompts(n))
        for prompt in prompts(n):
            asks = [
                (
                    Request(MODEL, prompt.messages, Sampling(16, 1.0, seed=0), repeat=(k,)),
                    DraftUse(record.id, prompt.id, k),
                )
                for k in range(2)
            ]
            await ledger.ask_many(asks, engine)
        await ledger.close()

    asyncio.run(work())


def peak_mb(folder):
    made = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return int(made.stdout)


@pytest.mark.parametrize("length", [LONGEST_TEXT + 1, filling.LONGEST_BYTES + 1])
def test_an_answer_longer_than_the_store_takes_is_unscored_and_the_others_stay(tmp_path, length):
    sample(tmp_path, 6, LongAnswers(length, first_only=True))
    fill(tmp_path)
    found = query(
        tmp_path, "SELECT prompt, reason, count(*) FROM samples WHERE text IS NULL GROUP BY ALL"
    ).rows()
    assert ("p0", "too_long") in [row[:2] for row in found]
    assert query(tmp_path, "SELECT count(DISTINCT prompt) FROM samples").item() == 6
    assert query(tmp_path, "SELECT max(length(text)) FROM samples").item() < 100
    filled = dump(tmp_path)
    rebuild(tmp_path)
    assert same(dump(tmp_path), filled)


@pytest.mark.slow
def test_memory_does_not_grow_with_one_answers_length(tmp_path):
    for name, length in (("usual", 10), ("giant", 60 << 20)):
        sample(tmp_path / name, 3, LongAnswers(length, first_only=True))
    assert peak_mb(tmp_path / "giant") < peak_mb(tmp_path / "usual") + 30


def test_many_long_answers_are_filled_in_small_transactions(tmp_path, monkeypatch):
    sample(tmp_path, 40, LongAnswers(50_000))
    monkeypatch.setattr(filling, "BATCH_BYTES", 1 << 20)
    batches = []
    monkeypatch.setattr(
        filling,
        "_replace",
        lambda *args, then=filling._replace: (batches.append(args), then(*args)),
    )
    fill(tmp_path)
    texts = [[len(row[7] or "") for row in rows["samples"]] for _, _, _, rows, _ in batches]
    assert len(batches) >= 4 and all(sum(some) <= 1 << 20 for some in texts)
    filled = dump(tmp_path)
    monkeypatch.undo()
    rebuild(tmp_path)
    assert same(dump(tmp_path), filled)


@pytest.mark.slow
def test_a_store_gets_the_memory_that_its_texts_need_and_keeps_the_figure(tmp_path, monkeypatch):
    sample(tmp_path, 60, LongAnswers(60_000))
    monkeypatch.setattr(store, "MEMORY_MB", 9)
    fill(tmp_path)
    assert store.read_marks(tmp_path)["memory_mb"] > 9
    assert query(tmp_path, "SELECT count(text) FROM samples").item() > 100


def test_a_label_that_cannot_be_read_becomes_a_failure(tmp_path):
    async def work():
        ledger = Ledger.open(tmp_path)
        ledger.add_human_label({"prompt": "p", "winner": "a", "annotator": "x" * LONGEST_TEXT})
        ledger.add_human_label({"prompt": "q", "winner": "b", "annotator": "me"})
        await ledger.close()

    asyncio.run(work())
    assert query(tmp_path, "SELECT prompt FROM human_labels").rows() == [("q",)]
    ((error,),) = query(tmp_path, "SELECT error FROM failures").rows()
    assert error.startswith("label ") and "characters are more than" in error
