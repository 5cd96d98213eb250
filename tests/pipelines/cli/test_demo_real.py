"""`prefab demo --real` on a scripted model, and the files it reads."""

from __future__ import annotations

import json
import re

import orjson
import pytest

from prefab.factory import console
from prefab.factory.paths import PACKAGE
from prefab.pipelines.cli.demo_real import (
    CHECKS,
    PRESET,
    WORTH,
    check_answers,
    demo_real,
    train_and_evaluate,
)
from prefab.pipelines.config.loader import resolve_pipeline
from prefab.pipelines.run.runner import run
from tests.support.json_output import check

RULES = [
    {"match": "Reply with None", "text": "Fault: it is too long."},
    {"match": "new answer alone", "text": "A short answer."},
]


def test_every_table_says_what_the_model_is_worth(smollm, tmp_path, capsys, monkeypatch):
    in_terminal = console.PrintableConsole(force_terminal=True, color_system=None, soft_wrap=True)
    monkeypatch.setattr(console, "console", lambda stderr=False: in_terminal)
    engine = f"engines.local={json.dumps({'engine': 'scripted', 'rules': RULES})}"
    sets = [engine, "prompts.limit=5"]
    assert demo_real(tmp_path / "store", sets, False, False, print) == 0
    out = capsys.readouterr().out
    tables = sum(set(line) == {"─"} for line in out.splitlines())  # the lines below headers
    assert 5 <= tables <= " ".join(out.split()).count(WORTH)
    assert "A short answer." in out and "Fault: it is too long." in out  # the example
    assert (tmp_path / "store-out" / "preference").is_dir()


def test_as_json_it_says_so_too(smollm, tmp_path):
    told: list[dict] = []
    engine = f"engines.local={json.dumps({'engine': 'scripted', 'rules': RULES})}"
    demo_real(tmp_path / "store", [engine, "prompts.limit=3"], False, True, told.append)
    check(["demo", "--json"], orjson.dumps(told[0], default=str).decode())
    assert told[0]["worth"] == WORTH
    assert {row["judge"] for row in told[0]["agreement"]["judges"]} >= {"pairwise", "pointwise"}


@pytest.mark.slow
def test_policies_are_trained_and_set_against_the_base(tmp_path, capsys):
    """With the smallest embedded model in the real one's place."""
    engine = f"engines.local={json.dumps({'engine': 'scripted', 'rules': RULES})}"
    store = tmp_path / "store"
    result = run(PRESET, [engine, f"store={store}"], quiet=True)
    found = train_and_evaluate(store, result, False, "prefab-nano")
    assert set(found["policies"]["policies"]) == {"base", "sft", "dpo"}
    assert {policy: n for policy, (_, n) in found["right"].items()} == {
        "base": 8,
        "sft": 8,
        "dpo": 8,
    }
    assert "known answer" in capsys.readouterr().out


def test_the_known_answers_are_of_questions_that_are_asked():
    config = resolve_pipeline(PRESET).config
    source = PACKAGE / config.prompts.source
    prompts = {row["id"]: row for row in map(json.loads, source.read_text().splitlines())}
    known = [json.loads(line) for line in CHECKS.read_text().splitlines()]
    assert {row["prompt"] for row in known} == {
        name for name, row in prompts.items() if row["tags"] == ["checkable"]
    }
    assert {row["split"] for row in prompts.values()} == {"train", "val", "test"}
    for row in known:
        assert re.compile(row["reference"]).groups <= 1


def test_answers_with_a_known_result_are_counted_by_policy(tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [
        ("base", "check-04", "It is Lyon."),
        ("base", "check-04", "Paris, of course."),
        ("dpo", "check-08", "In 1945."),
        ("dpo", "cooking-01", "Stir it."),  # has no known answer
    ]
    lines = [json.dumps({"policy": p, "prompt": q, "text": t}) for p, q, t in rows]
    file.write_text("\n".join(lines) + "\n")
    assert check_answers(file) == {"base": (0.5, 2), "dpo": (1.0, 1)}
