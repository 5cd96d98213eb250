"""`prefab test`: tests are asked in both orders, and a preference becomes a test."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from prefab import run
from prefab.factory.errors import ConfigError
from prefab.factory.spec.constitution import load_constitution
from prefab.pipelines.cli.main import app
from prefab.pipelines.quality.constitution_tests import add_test, junit, run_tests
from prefab.pipelines.run.diff import diff
from prefab.pipelines.store.fill import query
from tests.pipelines.run import test_diff
from tests.support import planted, project

GOOD, BAD = "good answer to Q?", "bad 0 answer to Q?"


def written(folder: Path, *tests: dict[str, Any], text: str = "") -> Path:
    value = copy.deepcopy(project.CONSTITUTION)
    path = folder / "tested.yaml"
    body = {**value, "tests": list(tests)} if tests else value
    path.write_text(yaml.safe_dump(body, sort_keys=False) + text)
    return path


def a_test(a: str, b: str, prefer: str, principle: str | None = "kind") -> dict[str, Any]:
    test = {"prompt": "Q?", "a": a, "b": b, "prefer": prefer}
    return test | ({"principle": principle} if principle else {})


def asked(folder: Path, file: Path, say: Any = None, **settings: Any) -> Any:
    pipeline = project.write(folder, project.pipeline(folder))
    return run_tests(file, pipeline, engines=planted.engine(say=say), **settings)


def test_states_of_tests(tmp_path: Path) -> None:
    def say(request: Any) -> Any:
        text = str(request.messages)
        if "first wins" in text:
            return planted.read(request.labels, "A")
        if "low mass" in text:
            return planted.read(("x", *request.labels), "x", 0.98)
        return None

    file = written(
        tmp_path,
        a_test(BAD, GOOD, "b"),
        a_test(GOOD, BAD, "a", None),
        a_test(GOOD, BAD, "b"),
        a_test(BAD, "bad 2 answer", "tie"),
        a_test("first wins", "x", "a"),
        a_test("low mass", "x", "a"),
    )
    report = asked(tmp_path, file, say)
    assert [r.state for r in report.results] == [
        "passed",
        "passed",
        "failed",
        "passed",
        "unstable",
        "unscored",
    ]
    assert report.results[0].p_expected == pytest.approx(0.9 + 0.045, abs=0.06)
    assert report.results[4].orders == ("a", "b")
    assert report.results[5].reason == "low_label_mass"
    suite = ElementTree.fromstring(junit(report))
    assert suite.attrib["tests"] == "6" and suite.attrib["failures"] == "2"
    assert suite.attrib["errors"] == "1"
    assert len(suite.findall("testcase/failure")) == 2


def test_only_an_edited_principles_tests_are_asked_again(tmp_path: Path) -> None:
    tests = a_test(BAD, GOOD, "b", "kind"), a_test(BAD, GOOD, "b", "brief")
    file = written(tmp_path, *tests)
    assert asked(tmp_path, file).asked == 4
    assert asked(tmp_path, file).asked == 0
    file.write_text(file.read_text().replace("Which answer is kinder?", "Which answer is nicer?"))
    assert asked(tmp_path, file).asked == 2


@pytest.mark.parametrize("end", ["", "# the end\n", "examples: {}\n"])
def test_a_preference_becomes_a_test_and_the_rest_of_the_file_stays(
    tmp_path: Path, end: str
) -> None:
    run(project.pipeline(tmp_path), engines=planted.engine())
    name, outcome = query(
        tmp_path / "store", "SELECT preference, outcome FROM preferences WHERE outcome = 'b'"
    ).rows()[0]
    for tests in ((), (a_test(BAD, GOOD, "b"),)):
        file = written(tmp_path, *tests, text=end)
        before = file.read_text()
        added = add_test(file, tmp_path / "store", name[:12], principle="brief")
        assert added.number == len(tests) + 1 and added.test["prefer"] == outcome
        assert load_constitution(file).tests[-1]["principle"] == "brief"
        assert [line for line in before.split("\n") if line not in file.read_text()] == []
        with pytest.raises(ConfigError, match="already"):
            add_test(file, tmp_path / "store", name)
        assert {r.state for r in asked(tmp_path, file).results} == {"passed"}


def test_a_flip_of_a_diff_becomes_a_test(tmp_path: Path) -> None:
    run(project.pipeline(tmp_path), engines=test_diff.engine())
    edit = {"compare": "Which answer is worse?"}
    edited = test_diff.constitution(tmp_path, "edited.yaml", kind=edit, brief=edit)
    flip = diff(edited, store=tmp_path / "store", engines=test_diff.engine()).flips[0]
    added = add_test(edited, tmp_path / "store", flip.preference[:12])
    expected = {"a": flip.answer_a, "b": flip.answer_b, "prefer": flip.new, "prompt": flip.text}
    assert added.test == expected


def test_no_character_of_a_test_makes_the_xml_invalid(tmp_path: Path) -> None:
    hard = "".join(map(chr, [*range(1, 32), 0x7F, 0x85, 0xFFFD, 0x1F600])) + "]]> & <x a='1'>"
    report = asked(tmp_path, written(tmp_path, a_test(f"bad 0 answer {hard}", GOOD, "a")))
    report.file, bad = f"{report.file}\x01\ufffe\uffff\ud800", "\x01\ufffe\uffff\ud800"
    report.results[0] = replace(report.results[0], prompt=f"Q{bad}?", a=bad)
    suite = ElementTree.fromstring(junit(report).encode("utf-8"))
    assert suite.find("testcase/failure") is not None and "Q?" in suite[0].attrib["name"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"principles": ["kid"]}, 'no principle "kid"; did you mean'),
        ({"judge": "jugde"}, 'no judge is named "jugde"'),
        ({"principles": ["brief"]}, "has no tests of brief"),
    ],
)
def test_bad_names_are_told(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(tmp_path, written(tmp_path, a_test(BAD, GOOD, "b")), **settings)


def test_bad_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tests"):
        asked(tmp_path, written(tmp_path))
    with pytest.raises(ConfigError, match="same text as a"):
        asked(tmp_path, written(tmp_path, a_test(BAD, BAD, "b")))
    file = written(tmp_path, a_test(BAD, GOOD, "b"))
    (tmp_path / "pipeline.yaml").unlink()
    with pytest.raises(ConfigError, match="which judge shall be asked"):
        run_tests(file)
    run(project.pipeline(tmp_path), engines=planted.engine())
    with pytest.raises(ConfigError, match="no preference"):
        add_test(file, tmp_path / "store", "ffffffffffff00")


def test_the_command_exits_with_1_when_a_test_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, a_test(BAD, GOOD, "a"))
    project.write(tmp_path, project.pipeline(tmp_path))
    done = CliRunner().invoke(app, ["test", str(file), "--junit", "out.xml"])
    assert done.exit_code == 1 and "0 of 1 test passed" in done.output, done.output
    assert ElementTree.parse(tmp_path / "out.xml").getroot().attrib["tests"] == "1"


def test_the_worlds_constitution_passes_on_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sets = [f"store={tmp_path}", "engines.local={engine: hf, model: prefab-tiny}"]
    report = run_tests("constitutions/microworld.yaml", sets=sets)
    assert [(r.number, r.state) for r in report.failures] == [] and report.asked == 24
    principles = {r.principle for r in report.results}
    assert principles == {
        p.id for p in load_constitution("constitutions/microworld.yaml").principles
    }
