"""Runs under composed constitutions: what is inherited unchanged is not asked again, and the store
keeps every file's text."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from prefab import resolve_pipeline, run
from prefab.factory.errors import ConfigError
from prefab.factory.ledger import db, records
from prefab.pipelines.run.diff import diff, read_version
from prefab.pipelines.run.watch import watch
from prefab.pipelines.store.fill import query
from tests.support import planted, project


def child(folder: Path, name: str = "child", **fields: object) -> str:
    """A constitution that extends the small one."""
    value = {"id": name, "title": "C", "licence": "CC0-1.0", "extends": "small.yaml", **fields}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    return str(folder / f"{name}.yaml")


def made(folder: Path, constitution: object) -> tuple[int, int]:
    """Calls asked and reused of a run under a constitution."""
    done = run(project.pipeline(folder) | {"constitution": constitution}, engines=planted.engine())
    return done.asked, done.reused


def test_what_is_inherited_unchanged_asks_nothing(tmp_path):
    run(project.pipeline(tmp_path), engines=planted.engine())
    assert made(tmp_path, child(tmp_path))[0] == 0
    edited = child(tmp_path, "edited", override={"kind": {"compare": "Which is kinder to all?"}})
    assert made(tmp_path, edited)[0] == 36  # 18 comparisons in two orders
    fewer = child(tmp_path, "fewer", disable=["kind"])
    assert made(tmp_path, fewer)[0] == 0
    sql = "SELECT DISTINCT principle FROM verdicts v JOIN runs r USING (run) WHERE r.latest"
    assert query(tmp_path / "store", sql)["principle"].to_list() == ["brief"]
    found = diff(str(tmp_path / "small.yaml"), edited, tmp_path / "store", engines=planted.engine())
    assert found.changes == ["compare of principle kind changed"]


def test_the_ledger_keeps_the_files_that_were_extended(tmp_path):
    edited = child(tmp_path, override={"kind": {"weight": 2.0}})
    made(tmp_path, edited)
    with db.connect(tmp_path / "store" / db.FILE, readonly=True) as con:
        [record] = records.runs(con)
    names = ("child.yaml", "small.yaml")
    assert [record.texts[f"constitution file {name}"] for name in names] == [
        (tmp_path / name).read_text() for name in names
    ]
    (tmp_path / "small.yaml").unlink()
    assert query(tmp_path / "store", "SELECT weight FROM principles")["weight"].to_list() == [2, 1]


def test_a_run_under_several_constitutions(tmp_path):
    run(project.pipeline(tmp_path), engines=planted.engine())
    own = {name: f"{name.title()} this?" for name in ("title", "compare", "critique", "revise")} | {
        "id": "plain",
        "criterion": "Not plain.",
    }
    path = tmp_path / "more.yaml"
    fields = {"id": "more", "title": "M", "licence": "MIT", "selection": "all"}
    path.write_text(yaml.safe_dump(fields | {"principles": [own]}))
    both = [str(tmp_path / "small.yaml"), str(path)]
    assert made(tmp_path, both)[0] == 36
    again = project.pipeline(tmp_path) | {"constitution": [both[0]]}
    done = run(again, engines=planted.engine())
    assert (done.version, done.asked) == (1, 0)  # a list of one is the same run
    rows = query(tmp_path / "store", "SELECT id, licence FROM constitutions ORDER BY ALL").rows()
    assert rows == [("small", "CC0-1.0"), ("small-and-more", "CC0-1.0 AND MIT")]


def test_a_constitution_of_several_that_does_not_exist(tmp_path):
    settings = project.pipeline(tmp_path)
    settings["constitution"] = [settings["constitution"], "none.yaml"]
    with pytest.raises(ConfigError, match=r"constitution\[1\]: no such file: none.yaml"):
        resolve_pipeline(settings)


def git(folder: Path, *words: str) -> None:
    """A git command in a folder."""
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_a_git_revision_is_read_with_the_files_that_it_extended(tmp_path, monkeypatch):
    run(project.pipeline(tmp_path), engines=planted.engine())
    edited = child(tmp_path)
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "small.yaml", "child.yaml")
    git(tmp_path, "commit", "-qm", "first")
    small = tmp_path / "small.yaml"
    small.write_text(small.read_text().replace("kinder?", "kinder to all?"))
    found = diff("HEAD:child.yaml", edited, tmp_path / "store", engines=planted.engine())
    assert found.changes and "kind" in found.changes[0] and found.new.asked == 36
    (tmp_path / "own.yaml").write_text("id: own\ntitle: O\nlicence: MIT\nextends: [everyday]\n")
    git(tmp_path, "add", "own.yaml")
    git(tmp_path, "commit", "-qm", "second")
    made = read_version("HEAD:own.yaml", tmp_path / "store").constitution
    assert made is not None and len(made.principles) == 3


def test_a_save_of_an_extended_file_is_seen_by_watch(tmp_path):
    run(project.pipeline(tmp_path), engines=planted.engine())
    file, small = child(tmp_path), tmp_path / "small.yaml"
    text, shown, looks = small.read_text(), [], 0

    def until() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            small.write_text(text.replace("kinder?", "kinder to all?"))
        return looks > 6

    def show(last, start, seconds):
        shown.append(last)

    watch(file, tmp_path / "store", show, shown.append, engines=planted.engine(), until=until)
    assert len(shown) == 2 and shown[1].new.asked == 36
