"""What `prefab diff` shows: readable without colour in a narrow terminal, and as a page that asks
nobody for anything."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prefab import run
from prefab.factory import console as consoles
from prefab.factory.types import Completion
from prefab.factory.word_diff import word_differences
from prefab.pipelines.cli import diff_report
from prefab.pipelines.cli.main import app
from prefab.pipelines.run.diff import Diff, diff
from tests.pipelines.run.test_diff import constitution, engine, judge_of_worse
from tests.support import planted, project

HOSTILE = "<script>alert(1)</script><img src='http://x.example/a'> & \x1b[2J \u202e"


@pytest.mark.parametrize(
    ("a", "b", "own_a", "own_b"),
    [
        ("keep the boat dry", "keep the kettle dry", ["boat "], ["kettle "]),
        ("You fool. Do it.", "Do it.", ["You fool. "], []),
        ("same", "same", [], []),
        ("nothing in common here", "altogether different words", [], []),
        ("", "words", [], []),
    ],
)
def test_word_differences(a: str, b: str, own_a: list[str], own_b: list[str]) -> None:
    pieces = word_differences(a, b)
    assert tuple("".join(text for text, _ in side) for side in pieces) == (a, b)
    assert [text for text, own in pieces[0] if own] == own_a
    assert [text for text, own in pieces[1] if own] == own_b


@pytest.fixture
def found(tmp_path: Path) -> Diff:
    """Flips between long answers that differ in a few words, one of them hostile."""

    def say(request: Any) -> Any:
        if request.labels or request.messages[0].role == "system":
            return None
        word = "good" if request.repeat[0] == 1 else f"bad {request.repeat[0]}"
        longer = "answer: this is a longer one that has to be broken into several lines " * 3
        return Completion(f"{word} {longer} {HOSTILE if request.repeat[0] == 2 else ''}", "stop")

    def worse(request: Any) -> Any:
        return judge_of_worse(request) or say(request)

    run(project.pipeline(tmp_path, prompts=3), engines=planted.engine(say=worse))
    edit = {"compare": "Which answer is worse?"}
    edited = constitution(tmp_path, "edited.yaml", kind=edit, brief=edit)
    return diff(edited, store=tmp_path / "store", engines=planted.engine(say=worse))


def printed(found: Diff, monkeypatch: pytest.MonkeyPatch, width: int, **options: Any) -> str:
    """What a terminal of this width gets."""
    out = io.StringIO()
    terminal = consoles.PrintableConsole(
        file=out, width=width, highlight=False, soft_wrap=True, **options
    )
    monkeypatch.setattr(diff_report, "console", lambda stderr=False: terminal)
    monkeypatch.setattr(consoles, "console", lambda stderr=False: terminal)
    diff_report.show_diff(found)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_answers_are_side_by_side_within_the_width(
    found: Diff, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    assert found.flips
    text = printed(found, monkeypatch, width)
    pairs = [line for line in text.splitlines() if "longer" in line]
    framed = [line for line in text.splitlines() if set(line) & set("│┃─━")]
    assert pairs and max(map(len, pairs + framed)) <= width  # other lines break softly
    assert any(line.count("longer") == 2 for line in pairs)  # both columns in one line
    assert re.search(r"A( \(preferred \w+\))? +B \(preferred", text)
    assert "[good]" in text and "[bad 0]" in text and "\x1b" not in text
    assert "\\u001b" in text


def test_with_colour_there_are_no_brackets(found: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"force_terminal": True, "color_system": "standard"}
    text = printed(found, monkeypatch, 100, **options)
    assert "[good]" not in text and "\x1b[1;4mgood" in text
    text = printed(found, monkeypatch, 100, **options, no_color=True)
    assert "[good]" in text


class Page(HTMLParser):
    """The tags of a page, with everything that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset", "onclick")]


@pytest.mark.parametrize("only", ["", "flips"])
def test_the_page_loads_nothing_and_escapes_all_text(
    found: Diff, tmp_path: Path, only: str
) -> None:
    diff_report.write_diff(found, tmp_path / "diff.html", only)
    text = (tmp_path / "diff.html").read_text()
    page = Page()
    page.feed(text)
    assert page.loads == [] and not page.tags & {"script", "img", "link", "iframe"}
    assert "&lt;script&gt;" in text and "\x1b" not in text and "\u202e" not in text
    assert "url(" not in text and "@import" not in text
    assert text.count("<h3>") == len(found.flips if only else found.moved)
    assert "compare of principle kind changed" in text and "<mark>good" in text
    for line in diff_report.sentences(found):
        assert line.replace("'", "&#39;") in text


@pytest.mark.slow
def test_only_flips_and_json_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(project.pipeline(tmp_path), engines=engine())
    worse = {"compare": "Which answer is worse?"}
    edited = constitution(tmp_path, "edited.yaml", kind=worse, brief=worse)
    run(project.pipeline(tmp_path) | {"constitution": edited}, engines=engine())
    words = ["diff", "small@1", "small@2", "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(app, [*words, "--only", "flips", "--json"])
    shown = json.loads(done.stdout)
    assert shown["flips"] == 12 == len(shown["moved"])
    done = CliRunner().invoke(app, [*words, "--examples", "2"])
    assert "12 of 18 preferences flip (66.7%, 95% interval" in done.output, done.output
    assert "compare of principle kind changed" in done.output and "\n2. " in done.output
    assert "\n3. " not in done.output
    done = CliRunner().invoke(app, [*words, "--only", "flops"])
    assert done.exit_code != 0 and "did you mean flips" in str(done.exception)
    done = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "no" / "x.html")])
    assert done.exit_code != 0 and "cannot be written" in str(done.exception)


@pytest.mark.slow_but("title", "id", "compare")
@pytest.mark.parametrize(
    ("edit", "asked"),
    [
        (lambda text: text.replace("title: Kind", "title: Kindness"), 0),
        (lambda text: text.replace("title: Kind", "title: Kind\n  tags: [tone]"), 0),
        (lambda text: "# why\n" + text.replace("id: kind", "id: kind   # the first"), 0),
        (lambda text: text.replace("id: kind", "id: kinder"), 0),
        (lambda text: text.replace("id: kind", "id: kinder\n  formerly: [kind]"), 0),
        (lambda text: yaml.safe_dump(yaml.safe_load(text), default_flow_style=True), 0),
        (lambda text: yaml.safe_dump(yaml.safe_load(text), sort_keys=True), 0),
        (lambda text: text.replace("Which answer is kinder?", "Which answer is nicer?"), 12),
    ],
    ids=["title", "tags", "comment", "id", "formerly", "flow", "order", "compare"],
)
def test_edits_without_another_meaning_ask_nothing_on_the_command_line(
    tmp_path: Path, edit: Callable[[str], str], asked: int
) -> None:
    settings = project.pipeline(tmp_path, prompts=2)
    command = ["--store", str(tmp_path / "store")]
    run(settings)
    file = tmp_path / "small.yaml"
    before = file.read_text()
    file.write_text(edit(before))
    assert file.read_text() != before
    done = CliRunner().invoke(app, ["diff", str(file), *command, "--json"])
    shown = json.loads(done.stdout)
    assert (shown["new"]["asked"], bool(shown["changes"])) == (asked, asked > 0), shown["changes"]
    assert shown["flips"] == 0 or asked
