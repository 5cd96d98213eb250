"""Every preset runs from prompts to exported rows, on the scripted engine and (slow) on vLLM with
the embedded model and with a small real one, and names its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefab import export, load_pipeline, run
from prefab.factory.engines import kept_server
from prefab.factory.engines.vllm import VllmConfig
from prefab.factory.spec import yamlio
from prefab.pipelines.config import schema
from prefab.pipelines.store.fill import query

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "pipelines/presets").glob("*.yaml"))
PAPERS = (
    *("direct-rlaif", "rubrics", "online-dpo", "rlvr"),  # a judge of each kind
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("ultrafeedback", "helpsteer", "self-rewarding", "safety", "length-controlled")
    ),
)


@pytest.fixture(scope="module")
def validator() -> Any:
    """Of the schema of pipeline files."""
    jsonschema = pytest.importorskip("jsonschema")
    made = schema.json_schema()
    kind = jsonschema.validators.validator_for(made)
    kind.check_schema(made)
    return kind(made)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid(name: str, validator: Any) -> None:
    path = ROOT / f"pipelines/presets/{name}.yaml"
    config, _ = load_pipeline(path)
    assert config.name
    assert path.read_text().startswith("# yaml-language-server: $schema=pipeline.schema.json")
    validator.validate(yamlio.load_document(path).value)


@pytest.mark.slow_but("online-dpo", "rlvr")
@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_of_a_paper_runs_from_prompts_to_exported_rows(name: str, tmp_path: Path) -> None:
    sets = [
        f"store={tmp_path / 'store'}",
        "engines.local={engine: scripted}",
        "prompts.limit=4",
        "policy.max_tokens=24",
    ]
    result = run(name, sets)
    assert result.state == "done" and result.preferences.height >= 4
    assert not any(reason.endswith(("program", "transport")) for reason in result.unscored)
    assert sum(export(tmp_path / "store", tmp_path / "out").counts["prompts"].values()) == 4
    text = (ROOT / f"pipelines/presets/{name}.yaml").read_text()
    assert "Deviations: " in text and "et al. 20" in text


@pytest.fixture(scope="module", params=["prefab-tiny", "smollm2-135m"])
def engine(request):
    """The settings of an engine whose vLLM server stays up for all presets."""
    pytest.importorskip("vllm")
    if request.param == "smollm2-135m":
        request.getfixturevalue("smollm")
    settings = {
        "engine": "vllm",
        "model": request.param,
        "max_model_len": 2048,
        "args": ["--enforce-eager"],
        "env": {"COVERAGE_PROCESS_CONFIG": ""},  # vLLM itself need not be measured
    }
    idle_s = (
        180.0  # when the tests are killed; an engine whose kept server has ended starts its own
    )
    server = kept_server.keep(VllmConfig.model_validate(settings), idle_s, lambda line: None)
    yield settings
    kept_server.stop(server)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_a_model(engine, name: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prompts = 1 if name == "real-world" else 3  # every principle criticises each of its answers
    sets = [
        f"store={store}",
        f"engines.local={json.dumps(engine)}",
        f"prompts.limit={prompts}",
        "policy.max_tokens=24",
        "budget.unscored=1.0",  # a small model seldom answers in the form asked for
    ]
    if load_pipeline(name)[0].revise is not None:
        sets.append("critic.max_tokens=24")
    result = run(name, sets)
    assert result.state == "done"
    assert not any(reason.endswith(("program", "transport")) for reason in result.unscored)
    (texts,) = query(store, "SELECT count(DISTINCT text) FROM samples").row(0)
    assert texts >= 3
    counts = export(store, tmp_path / "out", truncated=True).counts  # 24 tokens are few
    assert sum(counts["prompts"].values()) == prompts
