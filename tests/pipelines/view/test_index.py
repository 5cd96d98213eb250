"""The index of a run's preferences gives what the store gives, also after rows were added, removed
and moved."""

from __future__ import annotations

import duckdb
import pytest

from prefab.factory.store.store import MemoryLimitError
from prefab.judges.kinds import human
from prefab.pipelines.quality.labeling import tasks
from prefab.pipelines.store.fill import fill
from prefab.pipelines.store.labels import recorded
from prefab.pipelines.view.filters import SORTS
from prefab.pipelines.view.index import Indexes
from prefab.pipelines.view.index_build import main
from prefab.pipelines.view.label import _SESSIONS
from prefab.pipelines.view.reader import StoreReader
from tests.pipelines.view.conftest import OWN, client_of, ready

ADDRESSES = (
    "",
    "outcome=a&outcome=tie",
    "outcome=unscored",
    "p_min=0.7&p_max=0.9&spread_max=0.3",
    "length_min=-10&length_max=25",
    "principle=refusal",
    "judge=hasty&principle=harm",
    "principle=nobody",
    "orders=differ",
    "orders=agree&judge=drawn",
    "orders=differ&reason=low_label_mass",
    "judges=hasty,careful",
    "judges=careful,drawn&principle=harm",
    "people=labelled",
    "people=disagree&outcome=b",
    "mark=made-up",
    "tag=harmful",
    "q=LAMP",
    "q=please the",
    "q=...",
    "q=no-such-word-at-all",
    "against=world-rejudge",
    "against=world-rejudge&was=a",
    "q=a&outcome=a&principle=harm&spread_min=0.01",
)


def shown(client, address: str) -> tuple:
    """All that the grid shows under an address, with every row in its order."""
    found, rows, start = None, [], 0
    while True:
        answer = client.get(f"/preferences?format=json&run=world&{address}&start={start}")
        assert answer.status_code == 200, answer.text
        data = answer.json()
        found = found or data
        rows += [(row["preference"], row["prompt"], row["text_a"]) for row in data["rows"]]
        if not data["more"]:
            break
        start += data["of"]
    assert len(rows) == found["total"]
    return rows, found["counts"], [(h["name"], h["counts"]) for h in found["histograms"]]


def index_of(store, tmp_path) -> Indexes:
    """Indexes of both runs, made now."""
    for run in (1, 2):
        main(store, run, tmp_path / "index" / str(run))
    return Indexes(store, 0, tmp_path / "index")


@pytest.fixture
def marked(store):
    """A store with a mark of an audit on a third of the preferences."""
    with duckdb.connect(str(store / "prefab.duckdb")) as con:
        con.execute(
            "INSERT INTO marks SELECT run, preference, 'made-up', '', false FROM preferences WHERE hash(preference) % 3 = 0"
        )
    fill(store)
    return store


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_index_shows_what_the_store_shows(marked, tmp_path, every):
    with client_of(marked) as plain, client_of(marked, index_of(marked, tmp_path)) as indexed:
        assert indexed.get("/preferences?format=json").json()["index"]["state"] == "current"
        assert plain.get("/preferences?format=json").json()["index"]["state"] == "none"
        totals = set()
        addresses = (*ADDRESSES, *(f"sort={sort}" for sort in SORTS))[::every]
        for address in addresses:
            expected = shown(plain, address)
            assert shown(indexed, address) == expected, address
            totals.add(len(expected[0]))
        assert len(totals) > 10 // every  # the filters differ
        for old, new in (("world", "world-rejudge"), ("world-rejudge", "world")):
            address = f"/compare?format=json&old={old}&new={new}"
            found, expected = (c.get(address).json() for c in (indexed, plain))
            assert found["table"] == expected["table"] and found["comparisons"] > 0
            assert found["flip_rate"] == expected["flip_rate"]


def test_a_store_that_changes_is_followed(store, tmp_path):
    """Rows that come later, go, and come back at another place: as in the store itself."""
    file = str(store / "prefab.duckdb")
    some = "(SELECT prompt FROM prompts ORDER BY prompt LIMIT 6)"
    more = "(SELECT prompt FROM prompts ORDER BY prompt LIMIT 4 OFFSET 4)"
    with duckdb.connect(file) as con:
        con.execute(f"CREATE TABLE away AS SELECT * FROM preferences WHERE prompt IN {some}")
        con.execute(f"DELETE FROM preferences WHERE prompt IN {some}")
    fill(store)
    indexes = index_of(store, tmp_path)
    with duckdb.connect(file) as con:
        con.execute(
            f"INSERT INTO preferences SELECT * FROM away WHERE prompt NOT IN {more}; DROP TABLE away"
        )
        con.execute(f"DELETE FROM preferences WHERE prompt IN {more}")
        con.execute(
            "CREATE TABLE moved AS SELECT * FROM preferences ORDER BY hash(preference); DELETE FROM preferences"
        )
        con.execute("INSERT INTO preferences SELECT * FROM moved; DROP TABLE moved")
    fill(store)
    with client_of(store) as plain, client_of(store, indexes) as indexed:
        # the old index names rows that are not there: the store is asked until there is a new one
        assert shown(indexed, "principle=harm")[0] == shown(plain, "principle=harm")[0]
        indexes.wait()
        assert (
            indexed.get("/preferences?format=json&run=world").json()["index"]["state"] == "current"
        )
        found = indexes.get(1, 10**6)
        assert found is not None and len(found.segments) == 2 and not found.there.all()
        for address in (
            "",
            "sort=stored",
            "principle=harm",
            "q=the",
            "against=world-rejudge",
            "tag=harmful",
        ):
            assert shown(indexed, address) == shown(plain, address), address


@pytest.mark.slow
def test_what_people_may_label_of_a_large_run_is_read_by_a_process_and_kept(store, tmp_path):
    """The page says so until it is there; the labels are those of `prefab label`."""
    indexes = index_of(store, tmp_path)
    with client_of(store, indexes) as client:
        assert ready(client, "/preferences?run=world").status_code == 200  # begins it
        page = ready(client, "/label?run=world&annotator=fay")
        assert "a sample of the run" in page.text
        shown = client.get("/label?run=world&annotator=fay&format=json").json()
        todo = tasks(store, "world", "fay")
        assert shown["left"] == len(todo) and shown["task"]["name"] == todo[0].name()
        assert shown["task"]["shown"] == list(todo[0].shown)
        fields = {"run": "world", "annotator": "fay", "task": todo[0].name(), "said": "a"}
        client.post("/label", data=fields, headers=OWN)
        said = [label for label in human.latest(recorded(store)) if label.annotator == "fay"]
        assert [label.prompt for label in said] == [todo[0].prompt]
    kept = list((indexes.out / "figures").glob("*.json"))
    assert len(kept) >= 1
    _SESSIONS.clear()


def test_a_query_for_which_memory_was_short_is_asked_again_with_fresh_memory(made):
    reader = StoreReader(made)
    first, tried = reader._rows, []

    def short_at_first(sql, values):
        tried.append(sql)
        if len(tried) == 1:
            raise MemoryLimitError("out of memory")
        return first(sql, values)

    reader._rows = short_at_first
    assert reader.rows("SELECT 1 AS x") == [{"x": 1}] and len(tried) == 2
    reader.end()
