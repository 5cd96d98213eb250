"""The benchmark of serving on a GPU: its quick form asks each server in every way, here the mock
server in vLLM's place, and names what it could not measure."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import pytest

pytest.importorskip("torch")
pytest.importorskip("httptools")

from benchmarks import common, gpu_serving, vllm_load
from prefab.factory.engines.vllm_key import SERVER_KEY
from prefab.factory.engines.vllm_process import free_port
from prefab.factory.errors import EngineError


def look(monkeypatch, tmp_path, *words):
    """One quick look; its cases as they were written."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["gpu_serving", "--quick", *words])
    gpu_serving.main()
    return json.loads((tmp_path / "gpu_serving.quick.json").read_text())["cases"]


def test_a_quick_look_asks_in_every_way_and_names_what_failed(monkeypatch, tmp_path, capsys):
    @contextmanager
    def served(model, args):
        if args:
            raise EngineError("vLLM ended (status 1): out of memory, say")
        with common.mock(sys.executable, free_port(), 0) as url:
            yield url

    monkeypatch.setenv(SERVER_KEY, "any")
    monkeypatch.setattr(vllm_load, "served", served)
    monkeypatch.setitem(sys.modules, "vllm", None)
    cases = look(monkeypatch, tmp_path, "--model", "mock-ab", "--api-servers", "1", "2")
    asked, failed, last = cases.values()
    assert asked["prefab"]["n"] == asked["one a POST"]["n"] == asked["32 a POST"]["n"] > 40
    assert "out of memory, say" in failed["error"] and "start_s" not in failed
    assert "import of vllm halted" in last["error"]
    table = capsys.readouterr().out
    assert (
        "| 2 API server processes |  |  |  |  |  | prefab.factory.errors.EngineError: vLLM" in table
    )
    assert "(goal 2,500); prefab run" in table


@pytest.mark.slow
def test_a_quick_look_at_a_real_vllm(monkeypatch, tmp_path):
    """Also the engine in the asking process, which reads as much as the server does."""
    pytest.importorskip("vllm")
    cases = look(monkeypatch, tmp_path, "--api-servers", "1")
    server, inside = cases.values()
    assert server["start_s"] > 0 and inside["start_s"] > 0
    assert server["prefab"]["n"] == inside["all at once"]["n"] > 100
