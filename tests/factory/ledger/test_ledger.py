"""The ledger: durable, memoised, shared by processes, and loud when it cannot write."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import orjson
import pytest

from prefab.factory import types
from prefab.factory.errors import ConfigError, RequestRefused, StoreError, TransportError
from prefab.factory.keys import request_bytes, request_key
from prefab.factory.ledger import records as recorded
from prefab.factory.ledger.db import connect, create, undo_forget
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion, Message, Prompt, Request, Sampling
from prefab.factory.uses import DraftUse, IdenticalUse


def request(text: str) -> Request:
    return Request("name:m", (Message("user", text),), Sampling(8))


def use(i: int = 0, run: int = 1) -> DraftUse:
    return DraftUse(run, f"p{i}", 0)


def answered(text: str) -> Completion:
    return Completion("re " + text, "stop", {"A": -0.5, " B": -1.25}, "exact", 3, 1)


class Engine(types.Engine):
    """Answers with the question's own text after a moment, and counts."""

    identity, max_model_len = "name:m", 100

    def __init__(self, answer=None, max_in_flight=8, held=False):
        self.answer, self.max_in_flight = answer, max_in_flight
        self.began, self.released = asyncio.Event(), asyncio.Event()
        if not held:
            self.released.set()
        self.asked: list[str] = []
        self.now = self.most = 0

    async def complete(self, key: bytes, request: Request) -> Completion:
        text = request.messages[0].content
        self.asked.append(text)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            self.began.set()
            await self.released.wait()
        finally:
            self.now -= 1
        answer = self.answer(text) if self.answer else answered(text)
        if isinstance(answer, Exception):
            raise answer
        return answer


def using(folder, work):
    """Run `work(ledger)` in a loop of its own, close the ledger, and give what it gave."""

    async def main():
        ledger = Ledger.open(folder)
        try:
            return await work(ledger)
        finally:
            await ledger.close()

    return asyncio.run(main())


def count(folder, table):
    con = connect(folder / "ledger.sqlite", readonly=True)
    return con.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_an_answer_is_asked_once_and_kept_as_it_came(tmp_path):
    engine = Engine()
    asks = [(request(f"q{i % 50}"), use(i)) for i in range(300)]
    first = using(tmp_path, lambda ledger: ledger.ask_many(asks, engine))
    assert sorted(engine.asked) == sorted({f"q{i}" for i in range(50)}) and engine.most <= 8
    again = using(tmp_path, lambda ledger: ledger.ask_many(asks, engine))
    assert again == first and len(engine.asked) == 50
    assert first[7] == answered("q7")
    assert count(tmp_path, "calls") == 50 and count(tmp_path, "uses") == 300
    with closing(connect(tmp_path / "ledger.sqlite", readonly=True)) as con:
        assert con.execute("SELECT DISTINCT limit_tokens FROM calls").fetchall() == [(0,)]


def test_what_was_digested_is_kept_beside_the_answer(tmp_path):
    using(tmp_path, lambda ledger: ledger.ask(request("why"), use(), Engine()))
    con = connect(tmp_path / "ledger.sqlite", readonly=True)
    assert con.execute("SELECT request FROM requests").fetchone()[0] == request_bytes(
        request("why")
    )
    assert (
        recorded.request_json(con, request_key(request("why")))["messages"][0]["content"] == "why"
    )


def test_an_answer_reaches_the_asker_only_once_it_is_on_disk(tmp_path):
    async def work(ledger):
        await ledger.ask(request("q"), use(), Engine())
        other = sqlite3.connect(tmp_path / "ledger.sqlite")
        return [
            other.execute(f"SELECT count(*) FROM {t}").fetchone()[0]
            for t in ("calls", "uses", "requests")
        ]

    assert using(tmp_path, work) == [1, 1, 1]


def test_uses_are_there_before_the_answer_and_in_one_transaction(tmp_path):
    seen = []

    def look(text):
        seen.append(count(tmp_path, "uses"))
        return Completion("x", "stop")

    async def work(ledger):
        asks = [(request(f"q{i}"), use(i)) for i in range(20)]
        await ledger.ask_many(asks, Engine(look, max_in_flight=1))

    using(tmp_path, work)
    assert seen[0] in (0, 20) and seen[1:] == [20] * 19


def test_a_commit_is_on_disk_when_it_returns(tmp_path):
    """A power cut must not take what was committed: WAL with a sync at each commit."""
    with closing(create(tmp_path / "ledger.sqlite")) as con:
        assert con.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert con.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_while_the_disk_is_slow_no_more_is_asked_than_a_crash_may_repeat(tmp_path):
    """With `max_in_flight` 4, at most 4 answers wait to be committed, and 4 questions are asked."""
    blocker = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)

    def block_the_disk(text):
        if len(engine.asked) == 1:
            blocker.execute("BEGIN IMMEDIATE")
        return answered(text)

    engine = Engine(block_the_disk, max_in_flight=4)

    async def work(ledger):
        asks = [(request(f"q{i}"), use(i)) for i in range(100)]
        task = asyncio.ensure_future(ledger.ask_many(asks, engine))
        await asyncio.sleep(0.5)
        meanwhile = len(engine.asked)
        blocker.execute("ROLLBACK")
        await task
        return meanwhile

    assert 4 <= using(tmp_path, work) <= 8
    assert len(engine.asked) == 100


def test_identical_questions_in_flight_are_asked_once_and_survive_a_cancelled_asker(tmp_path):
    async def work(ledger):
        first = asyncio.create_task(ledger.ask(request("q"), use(1), engine))
        second = asyncio.create_task(ledger.ask(request("q"), use(2), engine))
        await engine.began.wait()
        first.cancel()
        engine.released.set()
        return await second

    engine = Engine(held=True)

    assert (
        using(tmp_path, work).text == "re q"
        and engine.asked == ["q"]
        and count(tmp_path, "uses") == 2
    )


def test_a_transport_failure_is_counted_returned_and_tried_by_the_next_run(tmp_path):
    broken = Engine(
        lambda text: TransportError("gone") if text == "bad" else Completion("ok", "stop")
    )
    asks = [(request("good"), use(0)), (request("bad"), use(1))]

    async def work(ledger):
        good, bad = await ledger.ask_many(asks, broken)
        assert good.text == "ok" and isinstance(bad, TransportError) and ledger.stats.failed == 1
        with pytest.raises(TransportError):
            await ledger.ask(*asks[1], broken)
        assert [window.uncommitted for window in ledger._windows.values()] == [0]

    using(tmp_path, work)
    assert count(tmp_path, "failures") == 2 and count(tmp_path, "calls") == 1
    healed = Engine()
    assert using(tmp_path, lambda ledger: ledger.ask_many(asks, healed))[
        1
    ].text == "re bad" and healed.asked == ["bad"]


def test_an_engine_that_fails_for_good_stops_who_asked(tmp_path):
    async def work(ledger):
        with pytest.raises(KeyError):
            await ledger.ask(request("q"), use(), Engine(lambda text: KeyError("bug")))
        return await ledger.ask(request("q"), use(), Engine())

    assert using(tmp_path, work).text == "re q"


class Unreadable(Engine):
    """An engine whose length cannot be read."""

    @property
    def max_model_len(self):
        raise ValueError("no length")


def test_a_question_that_a_defect_dropped_can_be_asked_again(tmp_path):
    async def work(ledger):
        engine = Engine()
        tasks = [
            asyncio.ensure_future(ledger.ask(request("q"), use(), engine)),
            asyncio.ensure_future(ledger.ask(request("r"), use(1), Unreadable())),
        ]
        for task in tasks:
            with pytest.raises(StoreError, match="no length"):
                await task
        assert engine.asked == []
        return await asyncio.wait_for(ledger.ask(request("q"), use(), engine), 120)

    assert using(tmp_path, work).text == "re q"


def test_a_quarantine_takes_what_is_not_yet_written_and_the_reader_cannot_write(tmp_path):
    found = []

    async def work(ledger):
        def answer(text):
            if text == "late":
                found.append(ledger.quarantine("sick", 0.0))
            return Completion(text, "stop", replica="sick")

        engine = Engine(answer, held=True)
        asks = [(request("early"), use(0)), (request("late"), use(1))]
        task = asyncio.ensure_future(ledger.ask_many(asks, engine))
        while engine.now < 2:
            await asyncio.sleep(0)
        engine.released.set()  # both answer in one turn of the event loop
        await task
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            ledger._reader.execute("DELETE FROM calls")

    using(tmp_path, work)
    assert found == [1]


def test_the_first_answer_that_counts_stands(tmp_path):
    def by(replica, text):
        return Engine(lambda _: Completion(text, "stop", replica=replica))

    async def work(ledger):
        key = request_key(request("q"))
        await ledger.ask(request("other"), use(), by("early", "x"))
        for replica in ("late", "early", "third"):
            await ledger.ask(request("q"), use(1), by(replica, replica))
            ledger.quarantine(replica, 0.0)
        found = [ledger.lookup([key])]
        for forget in (2, 1, 0):  # undone from the last to the first
            row = f"SELECT id FROM forgets WHERE undoes IS NULL ORDER BY id LIMIT 1 OFFSET {forget}"
            ledger._writer.run(
                lambda con, row=row: undo_forget(con, con.execute(row).fetchone()[0])
            )
            found.append(ledger.lookup([key])[key].text)
        return found

    assert using(tmp_path, work) == [{}, "third", "early", "late"]


def test_too_long_is_a_fact_until_a_larger_context_is_served(tmp_path):
    short = Engine(lambda text: Completion("", "context", limit=100))
    assert using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), short)).limit == 100
    assert (
        using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), short)).finish
        == "context"
    )
    assert short.asked == ["long"]
    wider = Engine(lambda text: Completion("", "context", limit=200))
    wider.max_model_len = 200
    assert using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), wider)).limit == 200
    widest = Engine()
    widest.max_model_len = 400
    assert (
        using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), widest)).text == "re long"
    )
    assert (
        using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), short)).text == "re long"
    )
    assert (len(short.asked), len(wider.asked), len(widest.asked)) == (1, 1, 1)


def test_too_long_without_a_known_limit_is_not_asked_again(tmp_path):
    unknown = Engine(lambda text: Completion("", "context", limit=0))
    unknown.max_model_len = None
    for _ in range(2):
        said = using(tmp_path, lambda ledger: ledger.ask(request("long"), use(), unknown))
        assert (said.finish, said.limit) == ("context", 0)
    assert unknown.asked == ["long"]


def test_odd_answers_survive(tmp_path):
    odd = {
        "inf": Completion("a\0b", "length", {"A": float("-inf"), "null": -1.0}, "bounds", 1, 2),
        "none": Completion("", "refused", None, "hard"),
        "half": Completion("\ud83d cut", "stop"),
    }
    asks = [(request(name), use()) for name in odd]
    using(tmp_path, lambda ledger: ledger.ask_many(asks, Engine(odd.get)))
    inf, none, half = using(tmp_path, lambda ledger: ledger.ask_many(asks, Engine()))
    assert (inf, none, half.text) == (odd["inf"], odd["none"], "\ufffd\ufffd\ufffd cut")


def test_a_refusal_is_asked_once_and_again_only_when_told_to(tmp_path):
    engine = Engine(lambda text: RequestRefused("HTTP 400 no") if text == "bad" else answered(text))
    asks = [(request("good"), use(0)), (request("bad"), use(1))]

    async def work(ledger):
        _, bad = await ledger.ask_many(asks, engine)
        again = (await ledger.ask_many(asks, engine))[1]
        assert type(bad) is type(again) is RequestRefused and str(again) == "HTTP 400 no"
        return ledger.stats

    first, second = using(tmp_path, work), using(tmp_path, work)
    assert engine.asked == ["good", "bad"]
    assert (first.asked, first.reused, second.asked, second.reused) == (1, 1, 0, 2)
    assert (first.failed, first.refused, second.failed, second.refused) == (1, 1, 0, 2)

    async def told():
        ledger = Ledger.open(tmp_path, retry_refused=True)
        answer = await ledger.ask(*asks[1], Engine())
        await ledger.close()
        return answer.text

    assert asyncio.run(told()) == "re bad"
    (answer,) = using(tmp_path, lambda ledger: ledger.ask_many(asks[1:], engine))
    assert answer.text == "re bad" and engine.asked == ["good", "bad"]


def test_a_transport_failure_is_no_refusal(tmp_path):
    engine = Engine(lambda text: TransportError("gone"))
    for _ in range(2):
        using(tmp_path, lambda ledger: ledger.ask_many([(request("q"), use())], engine))
    assert engine.asked == ["q", "q"]


class Probed(Engine):
    """An engine that can be probed; `fails` times the probe fails."""

    fails = 0
    probes = 0

    async def probe(self):
        self.probes += 1
        await asyncio.sleep(0)
        if self.probes <= self.fails:
            raise TransportError("nobody there")
        self.findings = {"thinking": "no"}
        return self.findings


def test_engines_are_probed_once_before_the_first_question_without_an_answer(tmp_path):
    engine, other = Probed(), Probed()
    asks = [(request(f"q{i}"), use(i)) for i in range(5)]

    async def work(ledger):
        ledger.probe_first([engine, other])
        return await ledger.ask_many(asks, engine)

    using(tmp_path, work)
    assert (engine.probes, other.probes, len(engine.asked)) == (1, 1, 5)
    con = connect(tmp_path / "ledger.sqlite", readonly=True)
    found = [orjson.loads(value) for (value,) in con.execute("SELECT value FROM evals")]
    con.close()
    assert found == [{"name": "model probe", "subject": "name:m", "metrics": {"thinking": "no"}}]
    using(tmp_path, work)  # every answer is there
    assert (engine.probes, other.probes) == (1, 1)


def test_nothing_is_asked_of_anybody_where_the_probe_fails_and_the_next_question_tries_again(
    tmp_path,
):
    engine = Probed()
    engine.fails = 1

    async def work(ledger):
        ledger.probe_first([engine])
        asks = [(request(f"q{i}"), use(i)) for i in range(3)]
        failed = await ledger.ask_many(asks, engine)
        assert all(isinstance(a, TransportError) for a in failed) and engine.asked == []
        return await ledger.ask_many(asks, engine)

    assert [a.text for a in using(tmp_path, work)] == ["re q0", "re q1", "re q2"]
    assert engine.probes == 2


def test_of_two_ledgers_one_asks_and_the_other_waits_for_its_answer(tmp_path):
    async def main():
        one, two = Ledger.open(tmp_path), Ledger.open(tmp_path)
        slow, never = Engine(lambda text: Completion("slow", "stop"), held=True), Engine()
        waiting = asyncio.create_task(one.ask(request("q"), use(1), slow))
        await slow.began.wait()
        second = asyncio.create_task(two.ask(request("q"), use(2), never))
        await asyncio.sleep(0.5)
        assert never.asked == []
        slow.released.set()
        answers = await asyncio.wait_for(asyncio.gather(waiting, second), 120)
        third = await asyncio.wait_for(two.ask(request("mine"), use(3), never), 120)
        await one.close()
        await two.close()
        return [a.text for a in (*answers, third)], never.asked

    assert asyncio.run(main()) == (["slow", "slow", "re mine"], ["mine"])
    assert count(tmp_path, "calls") == 2 and count(tmp_path, "uses") == 3
    assert count(tmp_path, "claims") == count(tmp_path, "owners") == 0


def test_what_is_in_flight_when_another_ledger_opens_is_claimed_first(tmp_path):
    """Also when that one comes after a third one that has been there and gone."""

    async def main():
        one, slow, never = Ledger.open(tmp_path), Engine(held=True), Engine()
        for question in ("q", "r"):
            slow.began.clear()
            waiting = asyncio.create_task(one.ask(request(question), use(1), slow))
            await slow.began.wait()
            two = Ledger.open(tmp_path)
            second = asyncio.create_task(two.ask(request(question), use(2), never))
            await asyncio.sleep(0.5)
            slow.released.set()
            await asyncio.wait_for(asyncio.gather(waiting, second), 120)
            slow.released.clear()
            await two.close()
            await asyncio.sleep(0.5)  # until the first one knows that it is alone again
        await one.close()
        return never.asked

    assert asyncio.run(main()) == []


def test_a_full_disk_fails_what_waits_stops_the_run_and_loses_nothing(tmp_path):
    engine = Engine(lambda text: Completion("x" * 3000, "stop"))

    async def work(ledger):
        await ledger.ask_many([(request(f"a{i}"), use(i)) for i in range(10)], engine)
        pages = ledger._writer._con.execute("PRAGMA page_count").fetchone()[0]
        ledger._writer._con.execute(f"PRAGMA max_page_count={pages + 4}")
        with pytest.raises(StoreError, match="disk is full.*run the same command again"):
            await asyncio.wait_for(
                ledger.ask_many([(request(f"b{i}"), use(i)) for i in range(99)], engine), 10
            )
        with pytest.raises(StoreError, match="full"):
            await ledger.ask(request("c"), use(), engine)

    with pytest.raises(StoreError, match="full"):
        using(tmp_path, work)
    again = Engine()
    using(
        tmp_path,
        lambda ledger: ledger.ask_many([(request(f"a{i}"), use(i)) for i in range(10)], again),
    )
    assert again.asked == []


@pytest.mark.parametrize(
    "damage",
    [
        "label_logps = '{\"A\"#-0.5}'",
        "label_logps = '[-0.5]'",
        "text = CAST(x'ff' AS TEXT)",
        "text = x'00'",
        "model = 99",
        "at = at + 1",
        "finish = 'context', limit_tokens = 'many'",
    ],
)
def test_a_damaged_answer_is_asked_again_and_said_once(tmp_path, damage, capsys):
    asks = [(request(f"q{i}"), use(i)) for i in range(40)]
    using(tmp_path, lambda ledger: ledger.ask_many(asks, Engine()))
    bad = request_key(asks[7][0])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as con:
        con.execute(f"UPDATE calls SET {damage} WHERE key = ?", [bad])
    engine = Engine(lambda text: Completion("new " + text, "stop"))
    for _ in range(2):
        answers = using(tmp_path, lambda ledger: ledger.ask_many(asks, engine))
        assert [a.text for a in answers] == [f"{'new' if i == 7 else 're'} q{i}" for i in range(40)]
    assert engine.asked == ["q7"] and count(tmp_path, "calls") == 41
    told = capsys.readouterr().err
    assert told.count("prefab store verify") == 1 and "1 damaged answers were asked again" in told


@pytest.mark.parametrize("reading", range(12))
def test_an_error_in_any_callback_reaches_all_who_wait(tmp_path, reading):
    class Odd(Engine):
        """The size of its window cannot be read at one moment: in the look-up, in a worker, or
        after a commit."""

        readings = 0

        @property
        def max_in_flight(self) -> int:
            self.readings += 1
            if self.readings == reading + 1:
                raise ArithmeticError("no number")
            return 2

        @max_in_flight.setter
        def max_in_flight(self, value: int) -> None:
            pass

    engine = Odd()

    async def work(ledger: Ledger) -> None:
        waiting = [
            asyncio.create_task(ledger.ask(request(f"q{i}"), use(i), engine)) for i in range(3)
        ]
        await asyncio.sleep(0)
        waiting += [
            asyncio.create_task(ledger.ask(request(f"q{i}"), use(i), engine)) for i in range(2, 7)
        ]
        errors = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 120)
        assert engine.readings > reading
        told = [str(error) for error in errors if isinstance(error, StoreError)]
        assert told and all(
            "ledger.sqlite" in text and "ArithmeticError: no number" in text for text in told
        )
        again = [ledger.ask(request(f"q{i}"), use(i), engine) for i in range(7)]
        assert [a.text for a in await asyncio.wait_for(asyncio.gather(*again), 120)] == [
            f"re q{i}" for i in range(7)
        ]

    using(tmp_path, work)


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_question_asked_while_the_ledger_closes_ends_too(tmp_path, turns):
    async def main() -> None:
        ledger, engine = Ledger.open(tmp_path), Engine(held=True)
        asking = [asyncio.create_task(ledger.ask(request("early"), use(1), engine))]
        await engine.began.wait()
        asking.append(asyncio.create_task(ledger.ask(request("late"), use(2), engine)))
        for _ in range(turns):
            await asyncio.sleep(0)
        await ledger.close(drain=False)
        results = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 120)
        assert all(isinstance(result, StoreError) and "closed" in str(result) for result in results)

    asyncio.run(main())


def test_what_is_queued_is_dropped_and_what_is_in_flight_is_kept(tmp_path):
    engine = Engine(held=True, max_in_flight=2)

    async def work(ledger):
        asks = [(request(f"q{i}"), use(i)) for i in range(6)]
        asking = asyncio.create_task(ledger.ask_many(asks, engine))
        await engine.began.wait()
        await asyncio.sleep(0)
        ledger.drop_queued(ValueError("enough"))
        with pytest.raises(ValueError, match="enough"):
            await asyncio.wait_for(asking, 120)
        engine.released.set()

    using(tmp_path, work)
    assert sorted(engine.asked) == ["q0", "q1"]
    assert count(tmp_path, "calls") == 2


def test_a_lone_surrogate_in_a_question_is_refused_before_it_is_asked(tmp_path):
    async def work(ledger):
        with pytest.raises(ValueError, match="surrogate"):
            await ledger.ask(request("\ud800"), use(), Engine())

    using(tmp_path, work)


def test_runs_resume_by_configuration_and_count_versions(tmp_path):
    async def work(ledger):
        runs = [
            ledger.begin_run("r", {"seed": seed}, {"constitution": text})
            for seed, text in ((0, "a"), (1, "a"), (0, "a"), (0, "b"))
        ]
        return [(run.version, run.resumed) for run in runs]

    assert using(tmp_path, work) == [(1, False), (2, False), (1, True), (3, False)]
    records = recorded.runs(connect(tmp_path / "ledger.sqlite", readonly=True))
    assert [(r.version, r.last_start) for r in records] == [(1, 3), (2, 2), (3, 4)]


def test_the_first_split_of_a_group_stands(tmp_path):
    def prompt(name, group=None, split=None, tags=()):
        return Prompt(name, (Message("user", name),), tags, group, split)

    async def work(ledger):
        ledger.add_prompts(
            [prompt("a", "g", "test"), prompt("b", "g"), prompt("c"), prompt("c", tags=("x",))]
        )
        ledger.add_prompts([prompt("a", "g", "test")])
        with pytest.raises(ConfigError, match="'train'.*'group g'.*'test'"):
            ledger.add_prompts([prompt("d"), prompt("e", "g", "train")])
        ledger.add_human_label({"prompt": "a", "winner": "a"})
        ledger.add_human_label({"winner": "a", "prompt": "a"})
        ledger.add_eval({"name": "gold", "metrics": {"broken": 0.5}})

    using(tmp_path, work)
    rows = recorded.prompt_rows(connect(tmp_path / "ledger.sqlite", readonly=True), 0, 10)
    found = {name: (tags, split) for _, name, _, tags, _, split, _ in rows}
    assert (found["a"][1], found["b"][1], found["c"][0]) == (
        "test",
        "test",
        '["x"]',
    ) and "d" not in found
    assert (
        count(tmp_path, "human_labels") == 1
        and count(tmp_path, "evals") == 1
        and count(tmp_path, "prompts") == 4
    )


def test_a_prompt_s_own_rubric_comes_back(tmp_path):
    def prompt(*rubric):
        return Prompt("a", (Message("user", "a"),), rubric=rubric)

    async def work(ledger):
        for form in (
            prompt(("It helps.", 3.0)),
            prompt(("It helps.", 3.0)),
            prompt(("It is rude.", -1.0)),
        ):
            ledger.add_prompts([form])

    using(tmp_path, work)
    con = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    assert [row[-1] for row in recorded.prompt_rows(con, 0, 10)] == [
        '[["It helps.",3.0]]',
        '[["It is rude.",-1.0]]',
    ]
    con.close()


def test_uses_without_a_call_are_noted_once(tmp_path):
    async def work(ledger):
        for _ in range(3):
            ledger.note(IdenticalUse(1, "p", 0, 1))

    using(tmp_path, work)
    using(tmp_path, work)
    assert count(tmp_path, "uses") == 1


def test_damage_absence_and_strangers_are_told(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all" * 300)
    with pytest.raises(StoreError, match="damaged"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    (tmp_path / "prefab.duckdb").touch()
    with pytest.raises(StoreError, match="missing beside prefab.duckdb"):
        Ledger.open(tmp_path)
    con = sqlite3.connect(tmp_path / "ledger.sqlite")
    con.execute("PRAGMA application_id=7")
    con.close()
    with pytest.raises(StoreError, match="not a ledger"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as con:
        con.execute("CREATE TABLE cookies (name)")
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(StoreError, match="not a ledger"):
        Ledger.open(tmp_path)
    assert (tmp_path / "ledger.sqlite").read_bytes() == before
    with pytest.raises(StoreError, match="no ledger here"):
        connect(tmp_path / "nowhere.sqlite", readonly=True)


def test_a_closed_ledger_says_so_and_can_be_closed_again(tmp_path):
    async def main():
        ledger = Ledger.open(tmp_path)
        await ledger.close()
        await ledger.close()
        with pytest.raises(StoreError, match="the ledger is closed"):
            await ledger.ask(request("q"), use(), Engine())
        with pytest.raises(StoreError, match="the ledger is closed"):
            ledger.note(IdenticalUse(1, "p", 0, 1))

    asyncio.run(main())


def test_closing_leaves_one_file(tmp_path):
    using(
        tmp_path,
        lambda ledger: ledger.ask_many([(request(f"q{i}"), use(i)) for i in range(50)], Engine()),
    )
    assert [file.name for file in tmp_path.iterdir() if file.stat().st_size] == ["ledger.sqlite"]


def test_a_store_that_was_deleted_is_told(tmp_path, capsys):
    async def nothing(ledger):
        return None

    using(tmp_path, nothing)
    assert "there was a store here" not in capsys.readouterr().err
    (tmp_path / "prefab.marks").write_text("{}")
    (tmp_path / "ledger.sqlite").unlink()
    using(tmp_path, nothing)
    assert "there was a store here" in capsys.readouterr().err
