"""Every preset runs from prompts to exported rows on the scripted engine, and names its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefab import export, load_pipeline, run
from prefab.factory.spec import yamlio
from prefab.pipelines.config import schema

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "pipelines/presets").glob("*.yaml"))
PAPERS = (
    *("direct-rlaif", "ultrafeedback", "helpsteer", "rubrics", "self-rewarding", "online-dpo"),
    *("rlvr", "safety", "length-controlled"),
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = ROOT / f"pipelines/presets/{name}.yaml"
    config, _ = load_pipeline(path)
    assert config.name
    assert path.read_text().startswith("# yaml-language-server: $schema=pipeline.schema.json")
    jsonschema.validate(yamlio.load_document(path).value, schema.json_schema())


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
