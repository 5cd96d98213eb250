"""The commands about constitution files, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prefab import run
from prefab.factory.errors import PrefabError
from prefab.pipelines.cli.main import app
from tests.support import planted, project


def prefab(*words: object, code: int = 0) -> str:
    """What a command prints, which must end with this exit code."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, PrefabError):
        assert code == 2, done.exception
        return str(done.exception)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def written(folder: Path, name: str = "small", **changes: Any) -> Path:
    """The small constitution, changed, as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(project.CONSTITUTION | changes, sort_keys=False))
    return path


@pytest.fixture
def warned(tmp_path: Path) -> Path:
    """A constitution with a warning."""
    rows = project.CONSTITUTION["principles"]
    return written(tmp_path, principles=[rows[0] | {"revise": "TODO"}, rows[1]])


def test_check_warns_and_exits_with_0(warned: Path) -> None:
    said = prefab("check", warned)
    assert f"{warned}:10:11 principles[0].revise: C106 is a placeholder" in said.replace("\n", " ")
    assert "prefab explain C106" in said and "2 principles in use" in said


def test_strict_exits_with_1(warned: Path, tmp_path: Path) -> None:
    prefab("check", warned, "--strict", code=1)
    prefab("check", warned, "--strict", "--json", code=1)
    prefab("check", written(tmp_path, "fine"), "--strict")


def test_check_as_json(warned: Path, tmp_path: Path) -> None:
    found = json.loads(prefab("check", warned, "--json"))
    [lint] = found["lints"]
    assert (lint["code"], lint["line"], lint["path"]) == ("C106", 10, "principles[0].revise")
    [constitution] = found["constitutions"]
    assert len(constitution["digest"]) == 32 and list(constitution["principles"]) == [
        "kind",
        "brief",
    ]
    same = json.loads(prefab("check", written(tmp_path, "same", title="Another"), "--json"))
    principles = same["constitutions"][0]["principles"]
    assert principles["brief"] == constitution["principles"]["brief"]
    assert principles["kind"] != constitution["principles"]["kind"]


def test_check_of_one_file_shows_what_tells_its_versions_apart(tmp_path: Path) -> None:
    path = written(tmp_path)
    [version] = json.loads(prefab("check", path, "--json"))["constitutions"]
    said = prefab("check", path)
    assert version["digest"][:8] in said and f"{version['principles']['kind'][:8]}  kind" in said


def test_check_of_a_file_whose_parent_is_wrong(tmp_path: Path) -> None:
    written(tmp_path, "base", titel="x")
    child = {"id": "child", "title": "C", "licence": "MIT", "extends": "base.yaml"}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    said = prefab("check", tmp_path / "child.yaml", code=2)
    assert "base.yaml" in said and 'titel: unknown field; did you mean "title"?' in said


def test_two_files_of_one_id_are_warned_of(tmp_path: Path) -> None:
    written(tmp_path, "one")
    written(tmp_path, "two", selection="weighted")
    assert "C109" in prefab("check", tmp_path)


def test_explain(tmp_path: Path) -> None:
    said = prefab("explain", "C105")
    assert "compare asks for the answer with the fault" in said and "prefab: ignore C105" in said
    assert "C110" in prefab("explain")
    assert len(json.loads(prefab("explain", "--json"))["codes"]) == 10
    assert "no warning has the code 'C9'" in prefab("explain", "C9", code=2)


def test_import_constitution(tmp_path: Path) -> None:
    rules = tmp_path / "rules.md"
    rules.write_text("- Be kind.\n- Be brief.\n")
    said = prefab("import-constitution", rules)
    assert "# Imported by" in said and "id: principle-2" in said
    out = tmp_path / "rules.yaml"
    said = prefab("import-constitution", rules, "--out", out, "--licence", "MIT")
    assert "2 principles (bullets)" in said and "licence is not known" not in said
    prefab("check", "--strict", out)
    assert "exists; give a new file" in prefab("import-constitution", rules, "--out", out, code=2)
    found = json.loads(prefab("import-constitution", rules, "--json"))
    assert (found["principles"], found["out"]) == (["principle-1", "principle-2"], None)
    assert "the licence is not known" in found["notes"][0]


def test_constitution_log_and_show(tmp_path: Path) -> None:
    child = {"id": "child", "title": "C", "licence": "MIT", "extends": "small.yaml"}
    pipeline = project.pipeline(tmp_path, prompts=2)
    run(pipeline, engines=planted.engine())
    settings = pipeline | {"constitution": str(tmp_path / "child.yaml")}
    for fields in ({}, {"title": "Other"}, {"override": {"kind": {"compare": "Kinder to all?"}}}):
        (tmp_path / "child.yaml").write_text(yaml.safe_dump(child | fields))
        run(settings, engines=planted.engine())
    store = ("--store", tmp_path / "store")
    found = json.loads(prefab("constitution", "log", *store, "--json"))["versions"]
    assert [(one["id"], one["runs"]) for one in found] == [
        ("small", ["small@1"]),
        ("child", ["small@2", "small@3"]),
        ("child", ["small@4"]),
    ]
    assert [one["changes"] for one in found] == [[], [], ["compare of principle kind changed"]]
    was, now = (one["principles"] for one in found[1:])
    assert was["brief"] == now["brief"] and was["kind"] != now["kind"]
    assert set(found[2]["files"]) == {"child.yaml", "small.yaml"}
    said = prefab("constitution", "log", *store, "--id", "child")
    assert "compare of principle kind changed" in said and "small@1" not in said
    shown = prefab("constitution", "show", found[2]["digest"][:8], *store)
    assert "Kinder to all?" in shown and "extends" not in shown
    parts = prefab("constitution", "show", found[2]["digest"], "--files", *store)
    assert "# small.yaml" in parts and "extends: small.yaml" in parts
    assert "no version" in prefab("constitution", "show", "0000", *store, code=2)
    assert "there are child, small" in prefab(
        "constitution", "log", *store, "--id", "none", code=2
    ).replace("\n", " ")


def test_digests_are_shown_by_plan_agreement_and_card(tmp_path: Path) -> None:
    value = project.pipeline(tmp_path, prompts=2)
    run(value, engines=project.engine())
    pipeline, store = project.write(tmp_path, value), ("--store", tmp_path / "store")
    [version] = json.loads(prefab("check", tmp_path / "small.yaml", "--json"))["constitutions"]
    planned = json.loads(prefab("plan", pipeline, "--json"))
    assert planned["constitution_digest"] == version["digest"]
    assert version["digest"][:8] in prefab("plan", pipeline)
    measured = json.loads(prefab("agreement", *store, "--json"))["constitution"]
    assert measured == {name: version[name] for name in ("id", "digest", "principles")}
    assert f"constitution small, version {version['digest'][:8]}" in prefab("agreement", *store)
    prefab("export", tmp_path / "out", *store)
    assert f"version {version['digest'][:12]}" in (tmp_path / "out" / "README.md").read_text()
