"""`prefab doctor`: what it looks at and what it says of it."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(
    "torch,runtime,driver,state,words",
    [
        ("2.13.0", "13.0.96", "580.65.06", "ok", "driver 580.65.06"),
        ("2.13.0", "13.0.96", "570.10", "bad", "driver 570.10: .* needs driver 580 or newer"),
        ("2.8.0", "12.8.90", "570.10", "ok", "driver 570.10"),
        ("2.13.0+cpu", "13.0.96", "580.65", "bad", "torch 2.13.0.cpu is for CPUs.*CPU index"),
        ("2.13.0", "13.0.96", None, "ok", "nvidiactl$"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told(monkeypatch, torch, runtime, driver, state, words):
    versions = {"torch": torch, "nvidia-cuda-runtime": runtime}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    found = doctor._gpu("/dev/nvidiactl")
    assert found.state == state and re.search(words, found.words)


def test_the_drivers_version_is_read(tmp_path):
    file = tmp_path / "version"
    line = "NVRM version: NVIDIA UNIX {} 580.65.06  Release Build\nGCC version: gcc 13.2.0\n"
    for words in ("x86_64 Kernel Module ", "Open Kernel Module for x86_64 "):
        file.write_text(line.format(words))
        assert doctor.nvidia_driver(file) == "580.65.06"
    assert doctor.nvidia_driver(tmp_path / "missing") is None
