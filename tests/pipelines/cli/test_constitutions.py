"""The commands about constitution files, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prefab.factory.errors import PrefabError
from prefab.pipelines.cli.main import app
from tests.support import project


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
    assert "no lint has the code 'C9'" in prefab("explain", "C9", code=2)


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
