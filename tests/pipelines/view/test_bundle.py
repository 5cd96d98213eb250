"""The pages as files: every link leads to a file, and each file says what the page says."""

from __future__ import annotations

import html
import json
import re

import pytest

from prefab.factory.errors import ConfigError
from prefab.pipelines.view.bundle import write_bundle
from prefab.pipelines.view.serve import opened
from tests.support import browser

LIMIT = 6


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory):
    reader = opened(made)
    out = tmp_path_factory.mktemp("bundle") / "pages"
    told = []
    found = write_bundle(reader, out, "world", LIMIT, lambda *progress: told.append(progress))
    assert found["preferences"] == LIMIT < found["of"]
    assert told[-1][0] == told[-1][1] == len(told)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        write_bundle(reader, out, "world")
    with pytest.raises(ConfigError, match="there is no run 'lost'"):
        write_bundle(reader, out.parent / "other", "lost")
    reader.end()
    return out


def test_every_link_leads_to_a_file_and_none_elsewhere(bundle):
    pages = sorted(bundle.glob("*.html"))
    assert len([page for page in pages if page.name.startswith("preference-")]) == LIMIT
    for page in pages:
        text = page.read_text()
        for link in re.findall(r'(?:href|src|data-copy-url)="([^"]+)"', text):
            file = html.unescape(link).partition("#")[0]
            assert not file or (bundle / file).is_file(), (page.name, link)
        assert not re.search(
            r"<form[^>]*method=.post|hx-get|hx-post|https?://(?!www\.w3\.org)", text
        ), page.name


def test_each_page_has_its_json_and_names_no_folder_of_this_machine(bundle, made):
    rows = json.loads((bundle / "preferences.json").read_text())["rows"]
    assert len(rows) == LIMIT
    for row in rows:
        shown = json.loads((bundle / f"preference-{row['preference']}.json").read_text())
        assert shown["row"]["outcome"] == row["outcome"] and shown["why"]["root"]["below"]
    for page in bundle.glob("*.html"):
        assert str(made.parents[2]) not in page.read_text(), page.name
    assert "The 6 of" in (bundle / "preferences.html").read_text()


def test_the_rows_are_filtered_in_the_page(bundle):
    if reason := browser.missing():
        pytest.skip(f"no Chromium: {reason}")
    rows = json.loads((bundle / "preferences.json").read_text())["rows"]
    with browser.browser() as chromium:
        page = chromium.new_page()
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.goto(f"file://{bundle}/preferences.html")
        outcome = rows[0]["outcome"]
        page.check(f"input[name=outcome][value={outcome}]")
        shown = [row for row in rows if row["outcome"] == outcome]
        assert page.locator(".rows > li:visible").count() == len(shown)
        assert page.locator("#found").text_content() == f"{len(shown)} preferences"
        page.goto(f"file://{bundle}/preferences.html#principle=harm&p_max=0.1")
        page.reload()
        assert page.locator(".rows > li:visible").count() == 0
        page.click("[data-clear]")
        assert page.locator(".rows > li:visible").count() == LIMIT
        page.locator("[data-row]").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/preference-*.html*")
        page.keyboard.press("n")
        page.wait_for_url(f"**/preference-{rows[1]['preference']}.html*")
        assert messages == []
