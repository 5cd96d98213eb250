"""`prefab doctor`: what it looks at and what it says of it."""

from __future__ import annotations

import json
import socket

import pytest
from typer.testing import CliRunner

from prefab import doctor as examine
from prefab import run
from prefab.judges import sandbox
from prefab.pipelines.cli import doctor
from prefab.pipelines.cli.main import app
from tests.support import project

ISOLATED = {"isolated": True, "why": "", "says": "no network and no files of yours"}
WEAK = {
    "isolated": False,
    "why": "no namespaces",
    "says": "limits only: the network and your files are within an answer's reach",
}


def finding(what: str, store, pipeline=None) -> doctor.Finding:
    return next(f for f in examine(store, pipeline) if f.what == what)


@pytest.mark.parametrize(
    ("known", "state", "words"),
    [
        (ISOLATED, "ok", "limits of time, memory, file size and processes; no network and no file"),
        (WEAK, "note", f"{WEAK['says']}. A verifier with `isolation: required` refuses to run"),
    ],
)
def test_how_a_verifiers_code_is_kept_in_is_told(tmp_path, monkeypatch, known, state, words):
    monkeypatch.setattr(sandbox, "_known", [known])
    found = finding("verifier's sandbox", tmp_path / "store")
    assert found.state == state and found.words.startswith(words)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "BASE", ("duckdb", "no-such-package"))
    found = finding("packages", tmp_path)
    assert found == doctor.Finding(
        "packages", "bad", "missing: no-such-package. `make setup` installs them"
    )


def test_little_disk_space_is_told_for_the_folder_where_the_store_will_be(tmp_path, monkeypatch):
    assert finding("disk", tmp_path / "not/there/yet").words.endswith(f"free at {tmp_path}")
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", 1e9)
    assert finding("disk", tmp_path).state == "bad"


def test_a_store_is_looked_at_and_brought_up_to_date(tmp_path):
    store = tmp_path / "store"
    assert finding("store", store) == doctor.Finding("store", "note", f"{store}: no store here yet")
    result = run(project.pipeline(tmp_path, prompts=2), engines=project.engine())
    (store / "prefab.duckdb").unlink()
    assert finding("ledger", store) == doctor.Finding("ledger", "ok", f"{result.asked} answers")
    assert finding("store", store).state == "ok" and (store / "prefab.duckdb").exists()
    ledger = store / "ledger.sqlite"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:4096] + b"\xff" * 4096 + whole[8192:])
    assert "bad" in {f.state for f in examine(store) if f.what in ("ledger", "store")}


def test_engines_are_started(tmp_path):
    with socket.socket() as free:  # nobody listens here
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    far = {"engine": "vllm", "model": "m", "url": url, "retries": 0}
    engines = {"local": {"engine": "scripted"}, "far": far}
    judges = [{"name": "j", "kind": "pairwise", "engine": "far"}]
    value = project.pipeline(tmp_path, engines=engines, panel={"judges": judges})
    file = project.write(tmp_path, value)
    local, found = (f for f in examine(tmp_path, file) if f.what.startswith("engine "))
    assert (local.what, local.state) == ("engine local", "ok") and "name:scripted" in local.words
    assert found.state == "bad" and url.removesuffix("/v1") in found.words
    done = CliRunner().invoke(app, ["doctor", str(file), "--store", str(tmp_path), "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["ok"] is False
    assert found.data() in told["findings"]
    shown = CliRunner().invoke(app, ["doctor", str(file), "--store", str(tmp_path)])
    assert shown.exit_code == 1 and "bad  engine far: " in shown.output
