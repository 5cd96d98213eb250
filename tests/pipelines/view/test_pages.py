"""What the pages show is what the store holds; each filter holds; bad input is one line."""

from __future__ import annotations

import asyncio
import contextlib
import html
import itertools
import re
import shlex
import time
from collections.abc import Callable

import duckdb
import pytest

from prefab.factory.errors import StoreError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.store.store import read_frame
from prefab.judges.kinds import human
from prefab.pipelines.cli.main import app as cli
from prefab.pipelines.run.diff import diff
from prefab.pipelines.run.runner import fill_store
from prefab.pipelines.store.fill import query
from prefab.pipelines.view.filters import OUTCOMES
from prefab.pipelines.view.reader import IDLE_S
from tests.pipelines.view.conftest import client_of

READ = "SELECT preference FROM preferences p WHERE run = 1 AND "


def ids(client, address: str) -> set[str]:
    """The preferences under an address, all pages of them."""
    found, start = [], 0
    while True:
        data = client.get(f"/preferences?format=json&{address}&start={start}").json()
        found += [row["preference"] for row in data["rows"]]
        if not data["more"]:
            assert len(found) == len(set(found)) == data["total"]
            return set(found)
        start += data["of"]


def same(made, sql: str) -> set[str]:
    return set(query(made, sql)["preference"])


def test_runs_are_counted_as_the_store_counts_them(client, made):
    shown = client.get("/runs?format=json").json()
    rows = query(
        made, "SELECT name, decided, ties, unscored, verdicts FROM summary ORDER BY run DESC"
    ).rows()
    names = ("name", "decided", "ties", "unscored", "verdicts")
    assert [tuple(r[n] for n in names) for r in shown["runs"]] == rows
    assert shown["calls_per_s"] is None or shown["calls_per_s"] > 0


VERDICTS = "EXISTS (SELECT 1 FROM verdicts v WHERE v.run = 1 AND v.prompt = p.prompt AND v.a = p.a AND v.b = p.b AND "


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("", "true"),
        ("outcome=a&outcome=b", "outcome IN ('a', 'b')"),
        ("p_min=0.6&p_max=0.8", "p_chosen BETWEEN 0.6 AND 0.8"),
        ("spread_min=0.1", "spread >= 0.1"),
        ("principle=refusal", VERDICTS + "principle = 'refusal')"),
        (
            "judge=careful&principle=refusal&sort=sure",
            VERDICTS + "principle = 'refusal' AND judge = 'careful')",
        ),
        (
            "orders=differ&judge=drawn",
            "EXISTS (SELECT 1 FROM readings v WHERE v.run = 1 AND v.prompt = p.prompt AND v.a = p.a AND v.b = p.b "
            "AND judge = 'drawn' AND (winner_ab, winner_ba) IN (('a', 'b'), ('b', 'a')))",
        ),
        (
            "q=LAMP",
            "(prompt IN (SELECT prompt FROM samples WHERE run = 1 AND text ILIKE '%lamp%') "
            "OR prompt IN (SELECT prompt FROM prompts WHERE text ILIKE '%lamp%'))",
        ),
        (
            "length_min=20&sort=length",
            """(SELECT length(c.text) - length(j.text) FROM samples c, samples j WHERE c.run = 1 AND j.run = 1
            AND c.prompt = p.prompt AND j.prompt = p.prompt AND c."index" = CASE p.outcome WHEN 'b' THEN b ELSE a END
            AND j."index" = CASE p.outcome WHEN 'b' THEN a ELSE b END) >= 20""",
        ),
        (
            "against=world-rejudge",
            "outcome <> (SELECT o.outcome FROM preferences o WHERE o.run = 2 AND o.prompt = p.prompt AND o.a = p.a AND o.b = p.b)",
        ),
        ("tag=no-such-tag", "false"),
        ("mark=no-such-mark", "false"),
    ],
)
def test_a_filter_shows_what_its_sql_says(client, made, address, where):
    assert ids(client, f"run=world&{address}") == same(made, READ + where)


def test_people_against_judges(store):
    """Comparisons that people labelled: most of them as the panel decides, or against it."""
    rows = query(store, READ + "outcome = 'a' ORDER BY abs(p_a - 0.5) DESC LIMIT 2")["preference"]
    sql = (
        "SELECT p.prompt, x.sample AS a, y.sample AS b FROM preferences p JOIN samples x ON x.run = 1 "
        'AND x.prompt = p.prompt AND x."index" = p.a JOIN samples y ON y.run = 1 AND y.prompt = p.prompt '
        'AND y."index" = p.b WHERE p.run = 1 AND p.preference = ?'
    )
    ledger = Ledger.open(store)
    for preference, said in zip(rows, ("a", "b"), strict=True):
        at = query(store, sql, [preference]).row(0)
        for i in range(20):  # more than have labelled it before
            ledger.add_human_label(human.row(*at, "harm", said, "ab", f"person {i}", float(i)))
            # the other way round is the same label
            place = (at[0], at[2], at[1])
            ledger.add_human_label(human.row(*place, "harm", said, "ba", f"other {i}", float(i)))
    asyncio.run(ledger.close())
    query(store, "SELECT 1")
    with client_of(store) as client:
        labelled, agree, against = (
            ids(client, f"people={how}") for how in ("labelled", "agree", "disagree")
        )
    assert rows[0] in agree and rows[1] in against
    assert not agree & against and agree | against <= labelled


def test_two_judges_that_differ(client, made):
    sql = (
        "SELECT DISTINCT p.preference FROM preferences p JOIN (SELECT prompt, a, b, "
        "avg(p_a) FILTER (judge = 'careful') AS x, avg(p_a) FILTER (judge = 'hasty') AS y "
        "FROM verdicts WHERE run = 1 GROUP BY ALL) USING (prompt, a, b) WHERE p.run = 1 AND (x - .5) * (y - .5) < -1e-9"
    )
    assert ids(client, "judges=careful,hasty") == same(made, sql)


def test_the_histograms_count_what_the_other_filters_leave(client, made):
    data = client.get("/preferences?format=json&outcome=a&p_min=0.9").json()
    by = {h["name"]: sum(h["counts"]) for h in data["histograms"]}
    scored = query(made, READ + "outcome = 'a' AND p_chosen IS NOT NULL").height
    assert by["p"] == scored and by["spread"] == data["total"] == len(
        ids(client, "outcome=a&p_min=0.9")
    )


def test_the_order_is_the_same_on_every_page_and_next_and_previous_follow_it(client):
    rows = client.get("/preferences?format=json&sort=spread").json()["rows"]
    spreads = [row["spread"] for row in rows]
    assert spreads == sorted(spreads, reverse=True)
    middle = rows[1]["preference"]
    around = client.get(f"/preference?format=json&id={middle}&at=1&sort=spread").json()["around"]
    assert rows[0]["preference"] in around["previous"] and rows[2]["preference"] in around["next"]


def test_a_preference_shows_each_verdict_and_the_calls_with_their_log_probabilities(client, made):
    row = client.get("/preferences?format=json&outcome=a").json()["rows"][0]
    page = client.get(f"/preference?id={row['preference']}&run=world&format=json").json()
    shown = [v["call"] for g in page["verdicts"] for j in g["judges"] for v in j["verdicts"]]
    calls = query(
        made,
        "SELECT v.call FROM verdicts v JOIN preferences p USING (run, prompt, a, b) WHERE p.preference = ? AND run = 1",
        [row["preference"]],
    )["call"].to_list()
    assert sorted(shown) == sorted(calls)

    def all_calls(node):
        own = [node["call"]] if node["call"] else []
        return own + [c for below in node["below"] for c in all_calls(below)]

    read = [c for c in all_calls(page["why"]["root"]) if c["key"] in calls]
    assert len(read) == len(calls) and all(c["label_logps"] and c["messages"] for c in read)
    text = client.get(f"/preference?id={row['preference']}&run=world").text
    assert "Log-probability of each label" in text and f"call {calls[0][:12]}" in text


def test_the_same_answers_under_the_other_constitution(client):
    row = client.get("/preferences?format=json&run=world-rejudge").json()["rows"][0]
    page = client.get(
        f"/preference?format=json&id={row['preference']}&run=world-rejudge%401"
    ).json()
    assert [e["named"] for e in page["elsewhere"]] == ["world@1"]


@pytest.mark.slow
def test_two_runs_are_compared_as_prefab_diff_compares_them(client, made):
    found = diff("world@1", "world-rejudge@1", made)
    page = client.get("/compare?format=json&old=world&new=world-rejudge").json()
    assert (page["comparisons"], page["flips"]) == (found.comparisons, len(found.flips))
    for was, now in itertools.product(OUTCOMES, OUTCOMES):
        assert page["table"][was][now] == found.table.get(was, {}).get(now, 0)
        if was != now:
            assert (
                len(ids(client, f"run=world-rejudge&against=world&was={was}&outcome={now}"))
                == page["table"][was][now]
            )


@pytest.mark.parametrize(
    "page",
    [
        "/constitution",
        "/training",
        "/runs",
        "/run",
        "/preferences?outcome=a&q=it's",
        "/compare?old=world&new=world-rejudge",
    ],
)
def test_what_is_copied_gives_the_same(client, made, page, capsys, monkeypatch):
    """The SQL runs, and so does the command."""
    text = html.unescape(client.get(page).text)
    sql = re.search(r'id="as-sql">(.*?)</pre>', text, re.S)[1]
    command = re.search(r'id="as-command">(.*?)</pre>', text, re.S)[1]
    rows = query(made, sql)
    if "rows" in (data := client.get(f"{page}{'&' if '?' in page else '?'}format=json").json()):
        assert set(rows["preference"]) == {row["preference"] for row in data["rows"]}
    time.sleep(IDLE_S + 0.2)  # in this process the file may be open in one way only
    words = shlex.split(command)
    assert words[0] == "prefab"
    cli(words[1:], standalone_mode=False)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/preferences?p_min=x", "p_min: 'x' is not a number"),
        ("/preferences?p_min=nan", "is not a number"),
        ("/preferences?outcome=c", "outcome: 'c' is none of"),
        ("/preferences?sort=random", "sort: 'random' is none of"),
        ("/preferences?run=lost", "there is no run 'lost'; there are: world-rejudge@1, world@1"),
        ("/preferences?q=" + "w" * 201, "at most 200 characters"),
        ("/preference?id=zzzz", "has no preference 'zzzz'"),
        ("/preference", "has no preference ''"),
        ("/preference?id=", "has no preference"),
        ("/lost", "there is no such page"),
    ],
)
def test_a_wrong_address_is_one_line(client, address, words):
    answer = client.get(address)
    assert answer.status_code == 404 and words in html.unescape(answer.text)


@pytest.mark.slow
def test_a_run_that_fills_the_store_is_not_disturbed_and_its_answers_appear(store):
    """A quarter of a second after a page the file can be written; while it is, pages say so."""
    with client_of(store) as client:
        wait_for(lambda: client.get("/runs").status_code == 200)
        time.sleep(IDLE_S + 0.2)
        con = duckdb.connect(str(store / "prefab.duckdb"))  # fails while another has it open
        con.execute("BEGIN")
        answer = client.get("/preferences")
        assert answer.status_code == 202 and "are being added" in answer.text
        con.execute("ROLLBACK")
        con.close()
        ledger = Ledger.open(store)
        ledger.add_eval({"name": "new", "subject": "x", "metrics": {}})
        asyncio.run(ledger.close())
        sql = "SELECT count(*) AS n FROM evals WHERE name = 'new'"
        wait_for(lambda: client.get("/runs").status_code == 200 and shown_later(store, sql) == 1)


@pytest.mark.slow
def test_a_run_that_ends_while_somebody_looks_fills_the_store(store):
    with client_of(store) as client:
        wait_for(lambda: client.get("/runs").status_code == 200)
        ledger = Ledger.open(store)
        ledger.add_eval({"name": "late", "subject": "x", "metrics": {}})
        asyncio.run(ledger.close())
        client.get("/preferences")
        assert fill_store(store) == 0
        sql = "SELECT count(*) AS n FROM evals WHERE name = 'late'"
        assert read_frame(store, sql)["n"][0] == 1


def shown_later(store, sql) -> int:
    """What a query gives once the pages have let go of the file."""
    time.sleep(IDLE_S + 0.2)
    return int(read_frame(store, sql)["n"][0])


def wait_for(done: Callable[[], bool], seconds: float = 600) -> None:
    """Until it is so; the store may be held for a moment."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StoreError):
            if done():
                return
        assert time.monotonic() < deadline
        time.sleep(0.3)
