"""A run as one page, and what stands beside an export: complete, offline, and safe."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from typer.testing import CliRunner

from prefab import export, run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion
from prefab.pipelines.cli.main import app
from tests.support import project

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \x1b[31m \u202e"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run whose prompts and answers try to run in a browser."""
    folder = tmp_path_factory.mktemp("report")
    value = project.pipeline(folder, prompts=12)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": f"{EVIL} {i}"}) + "\n" for i in range(12))
    )

    def answer(request):
        if project.asked(request) == "sample":
            return Completion(f"draft {request.repeat[0]} {EVIL} {'x' * 5000}", "stop")
        return project.answer(request)

    run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    return folder


def written(made, *more):
    out = made / "page.html"
    words = ["report", "--store", str(made / "store"), "--out", str(out), *more]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    return found, out.read_text()


class Tags(HTMLParser):
    """The tags of a page, and what they would load."""

    def __init__(self, text):
        super().__init__()
        self.names, self.loads = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_page_tells_its_headline_first_and_has_every_part(made):
    found, page = written(made)
    headline = "Nobody has checked these labels"
    assert found.stdout.startswith(headline) and "kB; it needs no other file" in found.stdout
    parts = [headline, "What was asked", "Constitution: Small", "Which answer is kinder?", "Charts"]
    parts += ["p_chosen of the decided preferences", "How reliable the judges are", "Examples"]
    parts += ["Nearly even", "is better, with probability"]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert len(page.encode()) < 3_000_000


def test_the_page_runs_nothing_and_asks_for_nothing(made):
    _, page = written(made)
    tags = Tags(page)
    assert not tags.names & {"script", "img", "link", "iframe", "object", "form"} and not tags.loads
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)


def test_what_is_left_out_is_said(made):
    _, page = written(made, "--examples", "2")
    assert re.search(r"6 of 36 comparisons are shown", page) and page.count('class="example"') == 6
    assert re.search(r"\[\.\.\. 3,\d+ more characters\]", page)


def test_evaluations_of_the_store_are_told(made, tmp_path):
    import asyncio
    import shutil

    from prefab.factory.ledger.ledger import Ledger

    store = shutil.copytree(made / "store", tmp_path / "store")
    ledger = Ledger.open(store)
    share = {"value": 0.25, "low": 0.1, "high": 0.4}
    for policy in ("base", "dpo"):
        example = {"turns": [["user", "Is it open?"]], "text": f"{policy} {EVIL}", "score": 0.5}
        metrics = {"gold": share, "against base: win_rate": share, "against base: p": 0.5}
        value = {"name": "eval policy", "subject": policy, "policy": policy}
        ledger.add_eval({**value, "metrics": metrics, "examples": [example]})
    probe = {"flips": share, "again": {"value": None, "low": None, "high": None}}
    ledger.add_eval({"name": "audit judge", "subject": "judge", "metrics": {"authority": probe}})
    asyncio.run(ledger.close())
    out = tmp_path / "page.html"
    found = CliRunner().invoke(app, ["report", "--store", str(store), "--out", str(out)])
    assert found.exit_code == 0, found.output
    page = out.read_text()
    for part in (
        "Known biases of the judges",
        "authority",
        "Against the baseline",
        "0.25 (0.10 to 0.40)",
        "answers to the same prompts",
        "user: Is it open?",
        "dpo &lt;script&gt;",
    ):
        assert part in page, part
    assert not Tags(page).loads


def test_labels_of_people_come_into_the_headline(made, tmp_path):
    import shutil

    store = shutil.copytree(made / "store", tmp_path / "store")
    queue, words = tmp_path / "q.jsonl", ["label", "--store", str(store), "--annotator", "anna"]
    assert CliRunner().invoke(app, [*words, "--queue", str(queue), "--limit", "8"]).exit_code == 0
    rows = [json.loads(line) for line in queue.read_text().splitlines()]
    queue.write_text("".join(json.dumps({**row, "label": "a"}) + "\n" for row in rows))
    assert CliRunner().invoke(app, [*words, "--answers", str(queue)]).exit_code == 0
    out = tmp_path / "page.html"
    found = CliRunner().invoke(app, ["report", "--store", str(store), "--out", str(out)])
    assert "name the better answer, of 8 that are known from 8 comparisons" in found.stdout


def test_what_stands_beside_an_export(made, tmp_path):
    export(made / "store", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other" and head["size_categories"] == ["n<1K"]
    assert {config["config_name"] for config in head["configs"]} >= {"preference", "prompts"}
    for words in (
        "Nobody has checked these labels",
        "Models: `local`",
        "under CC0-1.0",
        '"chosen": [',
    ):
        assert words in card, words
    assert re.search(r"    \.5 \|[ ▁▂▃▄▅▆▇█]{10}\| 1", card)
    source = tmp_path / "out" / "source"
    config = yaml.safe_load((source / "pipeline.yaml").read_text())
    assert (
        config["policy"]["samples"] == 3 and str(made) not in (source / "pipeline.yaml").read_text()
    )
    assert yaml.safe_load((source / "constitution.yaml").read_text())["id"] == "small"
    assert "&lt;script&gt;" in (tmp_path / "out" / "report.html").read_text()
