"""The store shows what a rebuild would show, whatever happened on the way; absence, damage and
company are told."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading

import duckdb
import pytest

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.ledger.db import connect
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.store import store
from prefab.factory.types import Completion, Message, Request, Sampling
from prefab.factory.uses import DraftUse, PairUse
from prefab.pipelines.store import derive
from prefab.pipelines.store.fill import SOURCES, FillReport, fill, query, rebuild
from prefab.pipelines.store.verdicts import RecordedUse
from tests.support.miniworld import CONFIG, CONSTITUTION, MiniEngine, pipeline, prompts, run
from tests.support.store_rows import dump, same

HOLD = """
import duckdb, sys
con = duckdb.connect(sys.argv[1], read_only=True)
print("held", flush=True)
sys.stdin.read()
"""


def only(folder, sql):
    return query(folder, sql).rows()[0][0]


def test_a_run_fills_every_table(tmp_path):
    ledger = asyncio.run(run(tmp_path, 12, MiniEngine()))
    report = fill(tmp_path)
    assert report.rows["calls"] == ledger.stats.asked and not report.held and not report.notes
    tables = dump(tmp_path)
    assert all(
        tables[t]
        for t in store.TABLES
        if t
        not in (
            "failures",
            "human_labels",
            "evals",
            "scores",
            "steps",
            "rankings",
            "strengths",
            "marks",
        )
    )
    assert fill(tmp_path).rows == {} or not any(
        fill(tmp_path).rows.get(t) for t in ("calls", "prompts")
    )
    assert same(dump(tmp_path), tables)
    rebuild(tmp_path)
    assert same(dump(tmp_path), tables)


def test_preferences_follow_from_the_verdicts_by_hand(tmp_path):
    """Two judges of weights 1 and 0.5, principles of weights 2 and 1: weighted mean of means of
    both orders."""
    asyncio.run(run(tmp_path, 30, MiniEngine()))
    found = 0
    decided = (
        "SELECT prompt, a, b, p_a, n_scored FROM preferences WHERE p_a IS NOT NULL AND NOT "
        "identical"
    )
    for prompt, a, b, p, n in query(tmp_path, decided).rows():
        rows = query_rows(tmp_path, prompt, a, b)
        assert len(rows) == 8
        weight = {
            ("kind", "one"): 2.0,
            ("kind", "two"): 1.0,
            ("brief", "one"): 1.0,
            ("brief", "two"): 0.5,
        }
        means = {place: [row[3] for row in rows if row[:2] == place] for place in weight}
        scored = {place: sum(ps) / 2 for place, ps in means.items() if None not in ps}
        assert n == len(scored)
        total = sum(weight[place] for place in scored)
        assert p == pytest.approx(
            sum(weight[place] * mean for place, mean in scored.items()) / total
        )
        found += 1  # noqa: SIM113
        if found == 5:
            return
    raise AssertionError("too few preferences to check")


def query_rows(folder, prompt, a, b):
    sql = 'SELECT principle, judge, "order", p_a FROM verdicts WHERE prompt = ? AND a = ? AND b = ?'
    return store.read_frame(folder, sql, [prompt, a, b]).rows()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_filling_at_random_moments_shows_what_one_rebuild_shows(tmp_path, seed):
    """Stops half-way, failures that heal, a wider context later, other versions of a run, and fills
    in between."""
    rng = random.Random(seed)

    async def some_work():
        ledger = Ledger.open(tmp_path)
        config = rng.choice([CONFIG, CONFIG, {**CONFIG, "seed": 1}])
        record = ledger.begin_run("mini", config, {"constitution": CONSTITUTION})
        ledger.add_prompts(prompts(10))
        share = rng.choice([0.0, 0.1, 0.5])
        engine = MiniEngine(
            lambda key: rng.random() < share, max_model_len=rng.choice([50, 52, 60])
        )
        tasks = [
            asyncio.create_task(pipeline(p, ledger, record.id, engine))
            for p in rng.sample(prompts(10), 6)
        ]
        for _ in range(rng.randrange(4)):
            answered = ledger.stats.asked + rng.randrange(20)
            while ledger.stats.asked < answered and not all(task.done() for task in tasks):
                await asyncio.sleep(0)
            fill(tmp_path)
        if rng.random() < 0.5:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ledger.close()

    for _ in range(4):
        asyncio.run(some_work())
    asyncio.run(run(tmp_path, 10, MiniEngine(max_model_len=rng.choice([50, 60]))))
    fill(tmp_path)
    filled = dump(tmp_path)
    rebuild(tmp_path)
    assert same(dump(tmp_path), filled)


def test_no_preference_before_all_calls_are_answered_and_one_after(tmp_path):
    asyncio.run(run(tmp_path, 5, MiniEngine(lambda key: key[5] % 2 == 0)))
    some = only(tmp_path, "SELECT count(*) FROM preferences")
    assert (
        only(tmp_path, "SELECT count(*) FROM work") > 0
        and only(tmp_path, "SELECT count(*) FROM failures") > 0
    )
    asyncio.run(run(tmp_path, 5, MiniEngine(max_model_len=60)))
    assert only(tmp_path, "SELECT count(*) FROM work") == 0
    assert only(tmp_path, "SELECT count(*) FROM preferences") > some
    uses = "SELECT run, prompt, a, b FROM preferences"
    assert len(query(tmp_path, uses)) == len(query(tmp_path, uses).unique())


@pytest.mark.slow
def test_a_wider_context_replaces_what_was_too_long(tmp_path):
    asyncio.run(run(tmp_path, 40, MiniEngine(max_model_len=50)))
    assert only(tmp_path, "SELECT count(*) FROM calls WHERE finish = 'context'") > 0
    asyncio.run(run(tmp_path, 40, MiniEngine(max_model_len=60)))
    assert only(tmp_path, "SELECT count(*) FROM calls WHERE finish = 'context'") == 0
    filled = dump(tmp_path)
    rebuild(tmp_path)
    assert same(dump(tmp_path), filled)


def test_another_parser_version_makes_the_store_anew_without_a_call(tmp_path, monkeypatch):
    asyncio.run(run(tmp_path, 4, MiniEngine()))
    assert fill(tmp_path).rebuilt == "" and fill(tmp_path).rebuilt == ""
    monkeypatch.setitem(derive.VERSIONS, "parse.pairwise", 99)
    assert fill(tmp_path).rebuilt == "made by another parse.pairwise"
    assert fill(tmp_path).rebuilt == ""


def test_unscored_is_neither_a_tie_nor_a_dropped_row(tmp_path):
    asyncio.run(run(tmp_path, 60, MiniEngine(max_model_len=60)))
    reasons = dict(
        query(
            tmp_path, "SELECT reason, sum(n)::INT FROM unscored WHERE role = 'judge' GROUP BY ALL"
        ).rows()
    )
    assert reasons["low_label_mass"] > 0 and reasons["refused"] > 0
    assert (
        only(tmp_path, "SELECT count(*) FROM verdicts WHERE (reason IS NULL) <> (p_a IS NOT NULL)")
        == 0
    )
    assert (
        only(
            tmp_path, "SELECT count(*) FROM critiques WHERE (reason IS NULL) <> (fault IS NOT NULL)"
        )
        == 0
    )
    assert (
        only(
            tmp_path,
            "SELECT count(*) FROM preferences WHERE outcome IN ('a', 'b') AND p_chosen < 0.5",
        )
        == 0
    )
    ties = query(
        tmp_path, "SELECT DISTINCT p_a, n_readings, chosen FROM preferences WHERE identical"
    ).rows()
    assert ties == [(0.5, 0, None)]


def test_a_held_store_lets_the_run_go_on_and_says_how_far_it_is_behind(tmp_path):
    asyncio.run(run(tmp_path, 2, MiniEngine()))
    fill(tmp_path)
    before = dump(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / store.FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        ledger = asyncio.run(run(tmp_path, 6, MiniEngine()))
        report = fill(tmp_path)
        assert (
            ledger.stats.asked > 0
            and report.behind >= ledger.stats.asked
            and str(holder.pid) in report.held
        )
        with pytest.raises(store.HeldError, match="behind"):
            query(tmp_path, "SELECT 1")
        with pytest.raises(store.HeldError):
            rebuild(tmp_path)
        threading.Timer(
            0.5, holder.stdin.close
        ).start()  # held for a moment only: that much is waited for
        assert query(tmp_path, "SELECT count(*) FROM calls").item() > len(before["calls"])
    finally:
        holder.stdin.close()
        holder.wait(10)
    assert not fill(tmp_path).held and len(dump(tmp_path)["calls"]) > len(before["calls"])


def test_a_store_that_is_current_is_not_filled_again(tmp_path):
    """Another program that reads the store does not stop a query of it; each table of the ledger
    makes it out of date."""
    asyncio.run(run(tmp_path, 2, MiniEngine()))
    before = query(tmp_path, "SELECT count(*) FROM calls").item()
    command = [sys.executable, "-c", HOLD, str(tmp_path / store.FILE)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert not fill(tmp_path).held
        assert query(tmp_path, "SELECT count(*) FROM calls").item() == before
        con = connect(tmp_path / "ledger.sqlite")
        tables = {
            name for (name,) in con.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        }
        unseen = {"meta", "names", "requests", "splits", "migrations", "sqlite_sequence"}
        unseen |= {"owners", "claims", "forgets", "forgotten"}  # `forgets` is in the versions
        shown = tables - unseen
        assert shown == set(SOURCES)
        for table in sorted(shown):
            con.execute("BEGIN")
            columns = con.execute(f"SELECT count(*) FROM pragma_table_info('{table}')").fetchone()[
                0
            ]
            con.execute(f"INSERT INTO {table} VALUES (NULL{', 0' * (columns - 1)})")
            con.execute("COMMIT")
            assert fill(tmp_path).held, table
            con.execute(f"DELETE FROM {table} WHERE id = (SELECT max(id) FROM {table})")
            assert not fill(tmp_path).held, table
        con.close()
    finally:
        holder.stdin.close()
        holder.wait(10)


def test_reads_of_one_block_share_a_connection_which_a_filling_closes(tmp_path, monkeypatch):
    asyncio.run(run(tmp_path, 2, MiniEngine()))
    opened, connect_to = [], duckdb.connect

    def counted(*arguments, **named):
        opened.append(named["read_only"])
        return connect_to(*arguments, **named)

    monkeypatch.setattr(duckdb, "connect", counted)
    fill(tmp_path)
    opened.clear()
    sql = "SELECT count(*) FROM prompts"
    with store.one_connection():
        assert [only(tmp_path, sql) for _ in range(3)] == [2, 2, 2] and opened == [True]
        asyncio.run(run(tmp_path, 3, MiniEngine()))
        assert [only(tmp_path, sql) for _ in range(3)] == [3, 3, 3]
        assert opened.count(True) == 2 and opened.count(False) > 0
        rebuild(tmp_path)
        with pytest.raises(ConfigError):
            only(tmp_path, "SELECT nothing FROM prompts")
        assert only(tmp_path, sql) == 3 and opened.count(True) == 4
    with store.opened(tmp_path):
        pass  # nothing in this process reads it any more


def test_absence_and_damage_are_told(tmp_path):
    with pytest.raises(StoreError, match="no ledger here"):
        fill(tmp_path)
    asyncio.run(run(tmp_path, 2, MiniEngine()))
    with pytest.raises(StoreError, match="no store here"):
        store.read_frame(tmp_path, "SELECT 1")
    fill(tmp_path)
    whole = dump(tmp_path)
    (tmp_path / store.FILE).unlink()
    assert same((fill(tmp_path), dump(tmp_path))[1], whole)
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(StoreError, match="no ledger here"):
        fill(tmp_path)


def test_a_ledger_restored_from_an_older_copy_makes_the_store_anew(tmp_path):
    asyncio.run(run(tmp_path, 2, MiniEngine()))
    old = (tmp_path / "ledger.sqlite").read_bytes()
    asyncio.run(run(tmp_path, 4, MiniEngine()))
    fill(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(old)
    assert fill(tmp_path).rebuilt == "the ledger is older than the store"
    assert only(tmp_path, "SELECT count(*) FROM prompts") == 2


def test_the_latest_run_of_a_name_is_the_one_started_last(tmp_path):
    for seed in (0, 1, 0):
        asyncio.run(run(tmp_path, 1, MiniEngine(), {**CONFIG, "seed": seed}))
    assert query(tmp_path, "SELECT version, latest FROM runs ORDER BY 1").rows() == [
        (1, True),
        (2, False),
    ]


def test_pairs_carry_texts_probability_and_split(tmp_path):
    asyncio.run(run(tmp_path, 20, MiniEngine(max_model_len=60)))
    rows = query(tmp_path, "SELECT * FROM pairs").to_dicts()
    assert rows and all(
        row["chosen"] != row["rejected"] and 0.52 < row["p_chosen"] <= 1 for row in rows
    )
    assert {row["split"] for row in rows} <= {"train", "val", "test"} and rows[0][
        "messages"
    ].startswith('[["user"')


def test_wrong_queries_are_the_users_to_mend(tmp_path):
    asyncio.run(run(tmp_path, 1, MiniEngine()))
    with pytest.raises(ConfigError, match="prefrences"):
        query(tmp_path, "SELECT * FROM prefrences")
    with pytest.raises(ConfigError):
        query(tmp_path, "DELETE FROM runs")


def test_a_query_is_bounded(tmp_path):
    asyncio.run(run(tmp_path, 1, MiniEngine()))
    for sql in ("SELECT " + "(" * 100_000, "SELECT 1 -- " + "x" * 100_000):
        with pytest.raises(ConfigError, match="a query has at most"):
            query(tmp_path, sql)
    with pytest.raises(ConfigError):
        query(tmp_path, "SET memory_limit='10GB'")


def test_a_judge_that_reasons_first_is_read_from_its_second_call():
    config = {
        **CONFIG,
        "panel": {**CONFIG["panel"], "judges": [{"name": "one", "reasoning": True}]},
    }
    rules = derive.rules(derive.RunRecord(1, "r", 1, config, {}, 1, 0.0), None)
    uses = [
        RecordedUse(i, PairUse(1, "p", role, 0, 1, "kind", "one", order), f"{role}{order}".encode())
        for i, (role, order) in enumerate([("reason", "ab"), ("reason", "ba"), ("judge", "ab")])
    ]
    thought, read = (
        Completion("because", "stop"),
        Completion("A", "stop", {"A": -0.1, "B": -3.0, "T": -4.0}),
    )
    answers = {b"reasonab": thought, b"reasonba": thought, b"judgeab": read}
    awaiting = derive.derive("p", uses, answers, rules)
    assert awaiting.open and len(awaiting.verdicts) == 1 and not awaiting.preferences
    cut = derive.derive("p", uses, {**answers, b"reasonba": Completion("becau", "length")}, rules)
    assert (
        not cut.open and cut.verdicts[1][11] == "truncated" and cut.preferences[0][5] == "unscored"
    )


def test_labels_evals_and_failures_are_copied(tmp_path):
    async def work():
        ledger = Ledger.open(tmp_path)
        ledger.add_human_label({"prompt": "p", "winner": "a", "annotator": "me"})
        ledger.add_eval({"name": "gold", "metrics": {"x": 1}})
        ask = (Request("name:m", (Message("user", "q"),), Sampling(1)), DraftUse(7, "p", 0))
        await ledger.ask_many([ask], MiniEngine(lambda key: True))
        await ledger.close()

    asyncio.run(work())
    assert query(tmp_path, "SELECT prompt, winner, annotator FROM human_labels").rows() == [
        ("p", "a", "me")
    ]
    assert query(tmp_path, "SELECT name FROM evals").rows() == [("gold",)]
    assert query(tmp_path, "SELECT run, kind, error FROM failures").rows() == [
        (7, "transport", "scripted failure")
    ]
    assert isinstance(fill(tmp_path), FillReport) and connect(
        tmp_path / "ledger.sqlite", readonly=True
    )
    assert duckdb.__version__


KINDS = """
import sys
import duckdb
from prefab.factory.store import store
some = [
    ("é", 1.5, -7, 2**40, True, ["a", ""], [1, 2]),
    (None, None, None, None, None, None, None),
    ("", 0.0, 0, 0, False, [], (3,)),
]
con = duckdb.connect()
con.execute("CREATE TABLE t (a VARCHAR, b DOUBLE, c INTEGER, d BIGINT, e BOOLEAN, f VARCHAR[], g INTEGER[])")
store.insert(con, "t", some * 20)
store.insert(con, "t", some)
rows = con.execute("SELECT * FROM t").fetchall()
assert rows == [(*row[:6], row[6] and list(row[6])) for row in some * 21], rows
assert "pandas" not in sys.modules, "pandas"
"""


def test_many_rows_are_inserted_as_they_are_and_without_pandas():
    subprocess.run([sys.executable, "-c", KINDS], check=True, timeout=120)
