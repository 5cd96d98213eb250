"""The pages in a real Chromium: every page without an error or a request elsewhere, by keys alone,
390 pixels wide, in the dark; and texts that attack the page."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefab.judges.kinds import human
from prefab.pipelines.cli.main import app
from prefab.pipelines.store.labels import recorded
from tests.support import browser

if reason := browser.missing():
    pytest.skip(f"no Chromium: {reason}", allow_module_level=True)

PAGES = (
    "runs",
    "run?run=world",
    "compare?old=world&new=world-rejudge",
    "preferences",
    "preferences?outcome=a&principle=harm",
    "preference?id={id}&at=0",
    "agreement",
    "judges",
    "constitution",
    "label?annotator=tester",
    "training",
)


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as found:
        yield found


@pytest.fixture(scope="module")
def address(made):
    with browser.served(made) as found:
        yield found


@contextmanager
def other_pages(folder: Path) -> Iterator[int]:
    """A web server of somebody else on this machine, whose pages are the files of a folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def first(page, own: str) -> str:
    """The id of the first preference of the grid."""
    script = "async () => (await (await fetch('preferences?format=json&outcome=a')).json()).rows[0].preference"
    return page.evaluate(script)


# Contrast of each text against what is behind it, and controls without a name.
CHECK = """
() => {
  const lum = (c) => { const v = c.map((x) => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = (one) => { for (let at = one; at; at = at.parentElement) {
    const c = rgb(getComputedStyle(at).backgroundColor);
    if (c.length && (c.length < 4 || c[3] > .99)) return c.slice(0, 3); } return [255, 255, 255]; };
  const bad = [];
  for (const one of document.querySelectorAll("main *, header *")) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || one.closest("svg, [disabled], noscript, option") || !one.getClientRects().length) continue;
    const a = lum(rgb(getComputedStyle(one).color).slice(0, 3)), b = lum(behind(one));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`contrast ${ratio.toFixed(2)}: ${one.tagName}.${one.className} ${one.textContent.trim().slice(0, 40)}`);
  }
  for (const one of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
    if (!(one.labels && one.labels.length) && !one.getAttribute("aria-label")) bad.push(`no label: ${one.name}`);
  }
  for (const one of document.querySelectorAll("button, a, summary")) {
    if (!one.textContent.trim() && !one.getAttribute("aria-label")) bad.push(`no name: ${one.outerHTML.slice(0, 80)}`);
  }
  for (const one of document.querySelectorAll("svg[role=img]")) if (!one.getAttribute("aria-label")) bad.push("svg without a label");
  return bad;
}
"""


@pytest.mark.parametrize(
    ("width", "dark"), [pytest.param(1280, False, marks=pytest.mark.slow), (390, True)]
)
def test_every_page_is_whole_readable_and_asks_nothing_elsewhere(chromium, address, width, dark):
    page, notes = browser.page_of(chromium, address, width, dark)
    own = address.split("?")[0]
    name = first(page, own)
    for at in PAGES:
        browser.ready(page, own + at.format(id=name))
        assert page.evaluate("document.documentElement.scrollWidth") <= width, at
        assert page.evaluate(CHECK) == [], at
        assert page.title().endswith("· Prefab") and page.locator("h1").count() == 1, at
    assert notes.console == [] and notes.elsewhere == []
    page.context.close()


def test_by_keys_alone_from_the_runs_to_a_call_behind_a_verdict_and_back(chromium, address):
    page, notes = browser.page_of(chromium, address)
    page.keyboard.press("g")
    page.keyboard.press("p")
    page.wait_for_url("**/preferences*")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.type("the")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=the*")
    assert "outcome=" not in page.url and "p_min=" not in page.url  # only what is set
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.evaluate("document.activeElement.href")
    page.keyboard.press("Enter")
    page.wait_for_url("**/preference?*")
    assert page.url == second
    page.keyboard.press("n")
    page.wait_for_url("**at=2*")
    page.keyboard.press("p")
    page.wait_for_url("**at=1*")
    page.locator("#why summary").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#why details').open")
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("u")
    page.wait_for_url("**/preferences?*")
    assert notes.console == []
    page.context.close()


@pytest.mark.slow
def test_dragging_over_a_histogram_filters(chromium, address):
    page, notes = browser.page_of(chromium, address)
    browser.ready(page, address.split("?")[0] + "preferences")
    box = page.locator(".hist[data-name=p] svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 30, steps=4)
    page.mouse.up()
    page.wait_for_url("**p_min=*")
    shown = page.locator(".row .meta").all_text_contents()
    values = [float(found[1]) for text in shown if (found := re.search(r"p_chosen ([.\d]+)", text))]
    assert values
    assert all(0.75 < value < 0.99 for value in values)
    assert notes.console == []
    page.context.close()


@pytest.mark.slow
def test_rows_are_loaded_while_scrolling(chromium, address):
    page, notes = browser.page_of(chromium, address)
    browser.ready(page, address.split("?")[0] + "preferences?run=world&sort=stored")
    assert page.locator(".rows > li").count() == 50
    total = int(page.locator("#found").text_content().split()[0].replace(",", ""))
    for _ in itertools.repeat(None, 20):
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(150)
    assert page.locator(".rows > li").count() == min(total, 1000)
    assert notes.console == []
    page.context.close()


@pytest.mark.slow
def test_labelling_by_keys(chromium, store):
    with browser.served(store) as address:
        page, notes = browser.page_of(chromium, address)
        browser.ready(page, address.split("?")[0] + "label?annotator=keys")
        for key in ("a", "b", "t", "u", "s"):
            before = page.locator(".lead[role=status]").text_content()
            page.keyboard.press(key)
            page.wait_for_function(
                "(before) => document.readyState === 'complete' && document.querySelector('.lead[role=status]')"
                ".textContent !== before",
                arg=before,
            )
        said = [x.winner for x in human.latest(recorded(store)) if x.annotator == "keys"]
        assert len(said) == 3 and said[-1] == "skip"
        assert notes.console == []
        page.context.close()


@pytest.mark.slow
def test_an_edit_is_checked_in_the_page(chromium, address):
    page, notes = browser.page_of(chromium, address)
    browser.ready(page, address.split("?")[0] + "constitution")
    page.fill("#source", "id: [")
    page.click("button[value=check]")
    page.wait_for_selector("#tried .error", timeout=60_000)
    assert "line:" in page.locator("#tried").text_content()
    assert notes.console == []
    page.context.close()


@pytest.mark.slow
def test_texts_that_attack_run_nothing(chromium, attacked, tmp_path):
    """On each page, as files of `--bundle`, and in a run's report."""
    pages, report = tmp_path / "pages", tmp_path / "report.html"
    for words in (
        ["view", str(attacked), "--bundle", str(pages), "--run", "world", "--limit", "3"],
        ["report", "world", "--store", str(attacked), "--out", str(report)],
    ):
        assert CliRunner().invoke(app, words).exit_code == 0, words
    with browser.served(attacked) as address:
        page, notes = browser.page_of(chromium, address)
        own = address.split("?")[0]
        longest = "(await (await fetch('preferences?format=json&run=world&sort=length')).json())"
        name = page.evaluate(f"async () => {longest}.rows[0].preference")
        shown = [own + at.format(id=name) for at in (*PAGES, "preferences?q=%3Cscript")]
        shown += [f"file://{file}" for file in (report, *sorted(pages.glob("*.html")))]
        seen = ""
        for at in shown:
            page.goto(at)
            if at.startswith(own):
                browser.ready(page)
            assert page.evaluate("window.attacked") is None, at
            tags = "document.querySelectorAll('img, iframe, body script:not([src])').length"
            assert page.evaluate(tags) == 0, at
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280, at
            text = page.evaluate("document.documentElement.outerHTML")
            assert not set(text) & set("\x1b\x07\u202e\u202c\u2028"), at
            assert len(text) < 4_000_000, at  # the long word would stand in 66 calls
            seen += text
        assert notes.console == []
        assert [url for url in notes.elsewhere if not url.startswith("file:")] == []
        assert seen.count("&lt;img src=x onerror='window.attacked = 3'&gt;") > 10
        page.context.close()


HOSTILE = """<!doctype html><meta charset="utf-8"><body>
<iframe src="{own}preferences"></iframe><img src="{own}static/icon.svg">
<form method="post" action="{own}label" target="sent"><input name="annotator" value="thief">
<input name="said" value="undo"></form><iframe name="sent"></iframe></body>"""
STEAL = """async (own) => {
  const found = [];
  for (const how of [{credentials: "include"}, {mode: "no-cors", credentials: "include"},
                     {method: "POST", credentials: "include", body: "annotator=thief&said=undo"}])
    try { found.push(await (await fetch(own + "label", how)).text()); } catch (error) { found.push(""); }
  return found;
}"""


@pytest.mark.slow
def test_another_page_reads_and_changes_nothing(chromium, store, tmp_path):
    """A page of another port of this machine, and of a name that resolves to it, in a browser that
    has the cookie.
    """
    labels = recorded(store)
    with browser.served(store) as address, other_pages(tmp_path) as port:
        own, _, token = address.partition("?")
        (tmp_path / "index.html").write_text(HOSTILE.format(own=own))
        page, _ = browser.page_of(chromium, address)
        for host in ("127.0.0.1", browser.REBOUND):
            other = page.context.new_page()
            answers: dict[str, int] = {}
            other.on(
                "response",
                lambda r, seen=answers: seen.update({f"{r.request.method} {r.url}": r.status}),
            )
            other.goto(f"http://{host}:{port}/index.html")
            assert other.evaluate(STEAL, own) == ["", "", ""]
            with other.expect_response(lambda r: r.request.method == "POST"):
                other.evaluate("document.forms[0].submit()")
            refused = {at: status for at, status in answers.items() if own in at}
            assert {f"POST {own}label", f"GET {own}preferences"} <= refused.keys()
            assert set(refused.values()) == {403}
        rebound = own.replace("127.0.0.1", browser.REBOUND)
        answer = other.goto(f"{rebound}runs?{token}")
        assert answer.status == 421 and "another name" in other.content()
        page.context.close()
    assert recorded(store) == labels


def test_without_the_token_the_browser_sees_nothing(chromium, address):
    page = chromium.new_context().new_page()
    answer = page.goto(address.split("?")[0] + "runs")
    assert answer.status == 403 and "open the address" in page.content()
    page.context.close()
