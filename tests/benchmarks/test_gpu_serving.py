"""The benchmark of serving on a GPU: its quick form asks each server in every way, here the mock
server in vLLM's place, and names what it could not measure."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("httptools")

from benchmarks.gpu_serving import as_fields
from prefab.factory.engines.vllm_key import SERVER_KEY
from prefab.factory.engines.vllm_process import has_gpu

MOCK = """
import sys
from contextlib import contextmanager

from benchmarks import common, gpu_serving, vllm_load
from prefab.factory.engines.vllm_process import free_port
from prefab.factory.errors import EngineError


@contextmanager
def served(model, args):
    if args:
        raise EngineError("vLLM ended (status 1): out of memory, say")
    with common.mock(sys.executable, free_port(), 0) as url:
        yield url


vllm_load.served = served
sys.modules["vllm"] = None
gpu_serving.main()
"""


def look(forks, tmp_path, *words):
    """One quick look, by a process of its own, since it forks; its cases as they were written."""
    env = {**os.environ, "OUT": str(tmp_path), SERVER_KEY: "any"}
    done = forks.run([*words, "--quick"], env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu_serving.quick.json").read_text())
    return written["cases"], done.stdout


def test_a_quick_look_asks_in_every_way_and_names_what_failed(training_forks, tmp_path):
    words = ["--model", "mock-ab", "--api-servers", "1", "2"]
    cases, table = look(training_forks, tmp_path, "-c", MOCK, *words)
    asked, failed, last = cases.values()
    assert asked["prefab"]["n"] == asked["one a POST"]["n"] == asked["32 a POST"]["n"] > 40
    assert "out of memory, say" in failed["error"] and "start_s" not in failed
    assert "import of vllm halted" in last["error"]
    assert (
        "| 2 API server processes |  |  |  |  |  | prefab.factory.errors.EngineError: vLLM" in table
    )
    assert "(goal 2,500); prefab run" in table


def test_arguments_of_vllm_are_fields_of_its_engine():
    words = ["--attention-backend", "TRITON_ATTN", "--enforce-eager", "--seed=1"]
    fields = {"attention_backend": "TRITON_ATTN", "enforce_eager": True, "seed": 1}
    assert as_fields(words) == fields


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(training_forks):
    done = training_forks.run(["-m", "benchmarks.gpu_serving"])
    assert done.returncode == 2 and "needs a GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_quick_look_at_a_real_vllm(training_forks, tmp_path):
    """Also the engine in the asking process, which reads as much as the server does."""
    pytest.importorskip("vllm")
    cases, _ = look(training_forks, tmp_path, "-m", "benchmarks.gpu_serving", "--api-servers", "1")
    server, inside = cases.values()
    assert not (server.keys() | inside.keys()) & {"error", "late"}
    assert server["start_s"] > 0 and inside["start_s"] > 0
    assert server["prefab"]["n"] == inside["all at once"]["n"] > 100
