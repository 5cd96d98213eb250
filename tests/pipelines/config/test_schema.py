"""The pipeline file: what is filled in, what `--set` changes, and what is said of every kind of
mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from prefab.factory import console
from prefab.factory.errors import BudgetError, ConfigError, Problem, StoreError
from prefab.factory.spec import yamlio
from prefab.pipelines.config import schema as c

ROOT = Path(__file__).resolve().parents[3]
GOOD = """\
recipe: rlaif
name: harmless
constitution: constitutions/harmless.yaml
prompts: {source: prompts/real-world.jsonl, limit: 10}
engines:
  local: {engine: scripted, model: m}
  other: {engine: scripted, model: n}
policy: {engine: local, samples: 4, temperature: 1.0, max_tokens: 128}
panel:
  judges:
    - {name: tiny, kind: pairwise, engine: other}
    - {name: nano, kind: pairwise}
"""


def write(tmp_path: Path, text: str) -> Path:
    """A pipeline file."""
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *sets: str) -> list[str]:
    """What is said of a pipeline, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        c.load_pipeline(path, sets)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def test_defaults_and_inheritance(tmp_path):
    config, resolved = c.load_pipeline(write(tmp_path, GOOD))
    tiny, nano = config.judges()
    assert (tiny.engine, nano.engine, config.critic_config().engine) == ("other", "local", "local")
    assert (config.store, config.pairs, config.seed, config.revise) == ("store", "all", 0, None)
    assert (config.panel.orders, config.panel.tie_margin, config.panel.min_scored) == (
        "both",
        0.02,
        0.5,
    )
    assert (config.budget.unscored, config.budget.failed, config.budget.calls) == (0.05, 0.01, None)
    assert resolved["policy"]["samples"] == 4 and json.loads(json.dumps(resolved)) == resolved
    assert config.locate(config.constitution[0]).is_file()


def test_the_resolved_configuration_is_a_fixed_point(tmp_path):
    config, resolved = c.load_pipeline(
        write(tmp_path, GOOD), ["panel.repeats=2", "panel.weights.nano=0.5"]
    )
    again, same = c.make_pipeline(resolved)
    assert same == resolved == config.model_dump(mode="json")
    assert [(judge.repeats, judge.weight) for judge in again.judges()] == [(2, 1.0), (2, 0.5)]


def test_comments_order_and_folder_do_not_change_it(tmp_path):
    lines = GOOD.splitlines()
    other = "# a comment\n" + "\n".join([lines[1], lines[0], *lines[2:]])
    (tmp_path / "x").mkdir()
    assert (
        c.load_pipeline(write(tmp_path, GOOD))[1]
        == c.load_pipeline(write(tmp_path / "x", other))[1]
    )


def test_set_overrides_and_adds(tmp_path):
    config, _ = c.load_pipeline(
        write(tmp_path, GOOD),
        [
            "policy.samples=8",
            "engines.local.model=Qwen/Qwen3-32B",
            "budget.calls=100",
            "panel.judges.1.name=two",
            "policy.stop=[a, 'no']",
            "revise.rounds=2",
            "prompts.limit=null",
            "policy.temperature=1e-1",
        ],
    )
    assert (config.policy.samples, config.engines["local"]["model"]) == (8, "Qwen/Qwen3-32B")
    assert (config.budget.calls, config.panel.judges[1].name, config.revise.rounds) == (
        100,
        "two",
        2,
    )
    assert (config.policy.stop, config.prompts.limit, config.policy.temperature) == (
        ["a", "no"],
        None,
        0.1,
    )


def test_set_mistakes_name_the_option(tmp_path):
    path = write(tmp_path, GOOD)
    assert problems(path, "policy.sampels=8") == [
        '--set policy.sampels=8 policy.sampels: unknown field; did you mean "samples"?'
    ]
    assert problems(path, "policy.samples=many") == [
        '--set policy.samples=many policy.samples: must be a whole number, not "many"'
    ]
    assert problems(path, "policy.samples") == [
        "--set policy.samples: write --set name=value, such as --set policy.samples=8"
    ]
    assert problems(path, "panel.orders=no") == [
        "--set panel.orders=no panel.orders: `no` would be read by YAML as false; write false, or "
        '"no" in quotes'
    ]
    assert problems(path, "panel.judges.7.name=x") == [
        "--set panel.judges.7.name=x panel.judges[7]: there is nothing of that name to set a "
        "field of"
    ]
    assert problems(path, "name.x=1") == ["--set name.x=1 name.x: cannot be set there"]


def test_every_mistake_is_told_at_once(tmp_path):
    path = write(
        tmp_path,
        """\
recipe: rliaf
nmae: harmless
constitution: constitutions/harmles.yaml
prompts: {source: nowhere.jsonl, limit: 0}
engines:
  local: {engine: scirpted, model: m}
  other: {engine: scripted, modle: m, delay_s: -1}
policy: {engine: locla, samples: "4", temperature: no}
panel:
  judges:
    - {name: tiny, kind: pairwise, engine: othr, templat: x}
    - {name: tiny, kind: pairwize}
    - {kind: pairwise, min_label_mass: 2}
  orders: bot
  weights: {tinny: 2}
budget: {unscored: 5%}
pairs: all
pairs: adjacent
""",
    )
    assert problems(path) == [
        "1:1 name: missing field; it is required",
        '1:9 recipe: there is no recipe "rliaf"; did you mean "rlaif"?',
        '2:1 nmae: unknown field; did you mean "name"?',
        "3:15 constitution: no such file: constitutions/harmles.yaml",
        "4:19 prompts.source: no such file: nowhere.jsonl",
        "4:41 prompts.limit: must be greater than or equal to 1, not the number 0",
        '6:19 engines.local.engine: there is no engine "scirpted"; did you mean "scripted"?',
        '7:29 engines.other.modle: unknown field; did you mean "model"?',
        "7:48 engines.other.delay_s: must be greater than or equal to 0, not the number -1",
        '8:18 policy.engine: no engine is named "locla"; did you mean "local"?',
        '8:34 policy.samples: must be a whole number, not "4"',
        '8:52 policy.temperature: `no` would be read by YAML as false; write false, or "no" in '
        "quotes",
        '11:44 panel.judges[0].engine: no engine is named "othr"; did you mean "other"?',
        '11:50 panel.judges[0].templat: unknown field; did you mean "template"?',
        '12:14 panel.judges[1].name: the name "tiny" is already taken by judges[0]',
        '12:26 panel.judges[1].kind: there is no kind of judge "pairwize"; did you mean '
        '"pairwise"?',
        "13:7 panel.judges[2].name: missing field; it is required",
        "13:40 panel.judges[2].min_label_mass: must be less than or equal to 1, not the number 2",
        '14:11 panel.orders: must be one of both, random, first, not "bot"; did you mean "both"?',
        '15:20 panel.weights.tinny: no judge is named "tinny"; did you mean "tiny"?',
        '16:20 budget.unscored: must be a number, not "5%"',
        '18:1 pairs: duplicate key "pairs" (first in line 17)',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1:1: the file is empty"]),
        ("[]", ["1:1: must be a mapping (key: value), not a list"]),
        ("a: 'b", ["1:6: a quote is opened and never closed"]),
    ],
)
def test_files_that_are_no_pipeline(tmp_path, text, expected):
    assert problems(write(tmp_path, text))[:1] == expected


def test_a_missing_pipeline_names_its_neighbour(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match="no such file; did you mean .*p.yaml"):
        c.load_pipeline(tmp_path / "q.yaml")


def test_files_are_found_beside_the_pipeline(tmp_path):
    (tmp_path / "mine.yaml").write_text("x")
    config, _ = c.load_pipeline(
        write(tmp_path, GOOD.replace("constitutions/harmless.yaml", "mine.yaml"))
    )
    assert config.locate(config.constitution[0]) == tmp_path / "mine.yaml"


def test_the_committed_schema_is_current():
    current = json.dumps(c.json_schema(bundled_only=True), indent=2, ensure_ascii=False) + "\n"
    assert c.SCHEMA_PATH.read_text() == current, (
        "run: python -m prefab.pipelines.config.schema --schema"
    )


def test_shipped_pipelines_are_valid():
    jsonschema = pytest.importorskip("jsonschema")
    for path in (ROOT / "pipelines").glob("*.yaml"):
        c.load_pipeline(path)
        assert path.read_text().startswith("# yaml-language-server: $schema=pipeline.schema.json")
        jsonschema.validate(yamlio.load_document(path).value, c.json_schema())


def test_errors_on_the_console(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console._console.cache_clear()
    both = [Problem("a.yaml", 3, 5, "x[0]", "bad [red]"), Problem("b", 0, 0, "", "gone")]
    assert console.fail(ConfigError(both)) == 2
    assert (
        console.fail(StoreError("full")) == 1
        and console.fail(BudgetError("over"), remedy="wait") == 1
    )
    console.hint("prefab run x.yaml")
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "error a.yaml:3:5 x[0]: bad [red]",
        "error b: gone",
        "2 problems",
        "error full",
        "help  `prefab doctor` says what is wrong with a store",
        "error over",
        "help  wait",
        "next: prefab run x.yaml",
    ]
    console._console.cache_clear()


def test_tables_and_cells():
    assert [console.cell(v) for v in (None, True, 12345, 0.12345, "x")] == [
        "",
        "yes",
        "12,345",
        "0.123",
        "x",
    ]
    assert [console.duration(s) for s in (8.4, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 05 min"]
    assert isinstance(console.console(), Console)


def test_progress_without_a_terminal_is_plain_lines(capsys):
    console._console.cache_clear()
    with console.Progress("judging", 10, unit="prompts") as progress:
        progress.advance(4, calls=1200, unscored="0.4%")
        progress._printed -= console.PLAIN_EVERY_S
        progress.advance(1)
        progress._printed -= console.PLAIN_EVERY_S
        progress.advance(4, calls=1300)
        progress._printed -= console.PLAIN_EVERY_S
        progress.advance(1, calls=1400)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "judging 5/10 prompts · 0 s · 0 s left · calls 1,200 · unscored 0.4%",
        "judging 9/10 prompts · 0 s · 0 s left · calls 1,300",
        "judging 10/10 prompts · 0 s · calls 1,400",
    ]
    console._console.cache_clear()
    with console.Progress("x", quiet=True) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_the_schema_checks_engines_judges_critic_and_recipe():
    jsonschema = pytest.importorskip("jsonschema")
    good = yamlio.parse(GOOD).value
    checker = jsonschema.Draft202012Validator(c.json_schema())
    assert checker.is_valid(good)
    for wrong in (
        {"engines": {"local": {"engine": "scripted", "modle": "m"}}},
        {"engines": {"local": {"engine": "scirpted"}}},
        {"panel": {"judges": [{"name": "a", "kind": "pairwise", "templat": "x"}]}},
        {"panel": {"judges": [{"name": "a", "kind": "pairwize"}]}},
        {"critic": {"templat": "x"}},
        {"recipe": "rliaf"},
    ):
        assert not checker.is_valid({**good, **wrong}), wrong


def test_engines_are_stored_as_written_and_judges_with_every_default(tmp_path):
    config, resolved = c.load_pipeline(write(tmp_path, GOOD), ["engines.local.delay_s=1"])
    assert (
        repr(resolved["engines"]["local"]) == "{'engine': 'scripted', 'model': 'm', 'delay_s': 1}"
    )
    assert resolved["panel"]["judges"][0] == config.judges()[0].model_dump(mode="json")
    assert resolved["panel"]["judges"][0]["template"] == "pairwise.jinja"


def test_a_name_without_a_folder_is_a_preset_unless_there_is_such_a_file(tmp_path, monkeypatch):
    assert c.load_pipeline("demo")[0].name == c.load_pipeline("demo.yaml")[0].name == "demo"
    with pytest.raises(ConfigError):
        c.load_pipeline(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # such as the output of an earlier command
    assert c.load_pipeline("demo")[0].name == "demo"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("recipe: rlaif\nname: mine\n")
    with pytest.raises(ConfigError) as caught:
        c.load_pipeline("demo")
    assert "demo" in str(caught.value) and "presets" not in str(caught.value)
