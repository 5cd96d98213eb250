"""`prefab store verify`, `backup`, `forget` and `prefab run --reask`, as a user runs them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.main import app
from tests.support.project import pipeline, write


def prefab(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.stdout


def refused(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, ConfigError), done.output


@pytest.fixture
def project(tmp_path):
    """A pipeline file whose run is finished. No verdict has enough label mass."""
    rule = {"match": "Which answer", "labels": {"A": 0.001, "B": 0.001}}
    settings = pipeline(
        tmp_path,
        prompts=4,
        engines={"local": {"engine": "scripted"}, "ill": {"engine": "scripted", "rules": [rule]}},
        panel={"judges": [{"name": "judge", "kind": "pairwise", "engine": "ill"}]},
        budget={"unscored": None},
    )
    file = write(tmp_path, settings)
    prefab("run", file)
    return file


def calls(store, what="calls") -> int:
    with closing(sqlite3.connect(store / "ledger.sqlite")) as con:
        return con.execute(f"SELECT count(*) FROM {what}").fetchone()[0]


def test_verify_finds_a_changed_bit_and_recovers_the_rest(project, tmp_path):
    store = tmp_path / "store"
    assert "nothing is damaged" in prefab("store", "verify", store)
    with closing(sqlite3.connect(store / "ledger.sqlite")) as con:
        con.execute("UPDATE calls SET text = text || 'x' WHERE id = 3")
        con.commit()
    told = json.loads(prefab("store", "verify", store, "--json", code=1))
    assert {row["table"]: row["damaged"] for row in told["tables"]}["calls"] == 1
    assert not told["whole"]
    prefab("store", "verify", store, "--recover", tmp_path / "new", code=1)
    assert calls(tmp_path / "new") == calls(store) - 1
    assert "nothing is damaged" in prefab("store", "verify", tmp_path / "new")
    again = json.loads(prefab("run", project, "--set", f"store={tmp_path / 'new'}", "--json"))
    assert again["asked"] == 1 and again["resumed"]


def test_a_backup_is_a_store_from_which_the_run_goes_on(project, tmp_path):
    store, copy = tmp_path / "store", tmp_path / "copy"
    assert "verified" in prefab("store", "backup", store, copy)
    assert calls(copy) == calls(store)
    again = json.loads(prefab("run", project, "--set", f"store={copy}", "--json"))
    assert (again["asked"], again["resumed"]) == (0, True)
    prefab("store", "backup", store, copy, code=1)  # nothing is overwritten
    refused("store", "backup", tmp_path / "none", copy)


def test_what_is_forgotten_is_asked_again_and_comes_back(project, tmp_path):
    store = tmp_path / "store"
    forget = ("store", "forget", "--store", store)
    counted = json.loads(prefab(*forget, "--role", "sample", "--dry-run", "--json"))
    assert counted["answers"] == 12 and calls(store, "forgotten") == 0
    done = json.loads(prefab(*forget, "--role", "sample", "--json"))
    assert done["answers"] == 12
    again = json.loads(prefab("run", project, "--json"))
    assert again["asked"] >= 12 and again["version"] == 1
    prefab(*forget, "--undo", done["id"])
    assert json.loads(prefab("run", project, "--json"))["asked"] == 0
    refused(*forget)  # no condition
    refused(*forget, "--since", "yesterday")


def test_reask_asks_again_what_could_not_be_read(project, tmp_path):
    store = tmp_path / "store"
    before = calls(store)
    done = json.loads(prefab("run", project, "--reask", "unscored", "--json"))
    unscored = sum(done["unscored"].values())
    assert done["asked"] == unscored > 0 and done["version"] == 1
    assert calls(store) == before + unscored  # the earlier answers stay in the ledger
    assert json.loads(prefab("run", project, "--json"))["asked"] == 0
