"""Answers that no longer count: they are asked again, stay in the ledger, and can be brought
back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.db import connect
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion
from prefab.pipelines.store.fill import query, rebuild
from prefab.pipelines.store.forget import (
    AnswerFilter,
    forget,
    forgettings,
    select_answers,
    undo_forgetting,
)
from tests.support.miniworld import MODEL, MiniEngine, run

PROMPTS = 8


class Ill(MiniEngine):
    """A server that gives no log-probabilities, and empty texts; its answers name it."""

    async def complete(self, key, request):
        await super().complete(key, request)
        return Completion("", "stop", None, replica="ill")


class Named(MiniEngine):
    async def complete(self, key, request):
        answer = await super().complete(key, request)
        return Completion(
            answer.text, answer.finish, answer.label_logps, limit=answer.limit, replica="well"
        )


def shown(folder: Path) -> list[str]:
    """The rows that are derived, without ids that depend on the order of calls."""
    sql = "SELECT prompt, a, b, outcome, p_a FROM preferences"
    return sorted(map(repr, query(folder, sql).rows()))


def asked(folder: Path, engine: MiniEngine) -> int:
    asyncio.run(run(folder, PROMPTS, engine))
    return len(engine.asked)


@pytest.mark.slow
def test_poisoned_answers_are_asked_again_and_brought_back(tmp_path):
    truth_folder, folder = tmp_path / "truth", tmp_path / "store"
    asked(truth_folder, MiniEngine())
    truth = shown(truth_folder)
    poisoned = asked(folder, Ill())
    before = shown(folder)
    assert asked(folder, MiniEngine()) == 0 and before != truth
    made = forget(folder, AnswerFilter(reason="empty"))
    assert made is not None and made.answers == poisoned
    assert query(folder, "SELECT count(*) FROM samples").item() == 0
    assert asked(folder, MiniEngine()) > poisoned  # real drafts differ, so there is more to ask
    assert shown(folder) == truth
    con = connect(folder / "ledger.sqlite", readonly=True)
    assert con.execute("SELECT count(*) FROM calls WHERE text = ''").fetchone()[0] >= poisoned
    con.close()
    rebuild(folder)
    assert shown(folder) == truth
    assert undo_forgetting(folder, made.id).undone
    assert asked(folder, MiniEngine()) == 0
    assert query(folder, "SELECT count(*) - count(DISTINCT call) FROM calls").item() == 0
    with pytest.raises(ConfigError, match="no forgetting"):
        undo_forgetting(folder, made.id)


def test_answers_are_selected_by_every_condition(tmp_path):
    total = asked(tmp_path, Named())
    now = time.time()

    def n(**conditions) -> int:
        return len(select_answers(tmp_path, AnswerFilter(**conditions)))

    assert n(run="mini") == n(run="mini@1") == n(model=MODEL) == n(model="mini") == total
    assert n(replica="well") == n(since=now - 600) == n(until=now + 600) == total
    assert n(since=now + 600) == n(until=now - 600) == 0
    roles = {role: n(role=role) for role in ("sample", "critique", "judge", "revise")}
    assert all(roles.values()) and sum(roles.values()) == total
    reasons = query(
        tmp_path,
        "SELECT reason, count(DISTINCT call) FROM verdicts WHERE reason IS NOT NULL GROUP BY 1",
    )
    for reason, count in reasons.rows():
        assert n(role="judge", reason=reason) == count
    assert n(role="judge", reason="unscored") == sum(count for _, count in reasons.rows()) > 0
    with pytest.raises(ConfigError, match="unscored for 'truncatd'; did you mean \"truncated\""):
        n(reason="truncatd")
    for wrong in ({}, {"run": "other"}, {"role": "none"}, {"model": "x"}, {"replica": "y"}):
        with pytest.raises(ConfigError):
            n(**wrong)
    assert forget(tmp_path, AnswerFilter(since=now + 600)) is None and forgettings(tmp_path) == []


def test_a_quarantine_takes_what_came_since_the_last_good_canary(tmp_path):
    total = asked(tmp_path, Named())

    async def set_aside() -> tuple[int, int]:
        ledger = Ledger.open(tmp_path)
        found = (
            ledger.quarantine("well", time.time() + 1),
            ledger.quarantine("well", time.time() - 600),
        )
        await ledger.close()
        return found

    assert asyncio.run(set_aside()) == (0, total)
    (made,) = forgettings(tmp_path)
    assert (made.answers, made.reason) == (total, "quarantine")
    assert query(tmp_path, "SELECT count(*) FROM calls").item() == 0
    undo_forgetting(tmp_path, made.id)
    assert query(tmp_path, "SELECT count(*) FROM calls").item() == total
    assert asked(tmp_path, MiniEngine()) == 0
