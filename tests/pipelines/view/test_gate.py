"""Who may ask `prefab view`, and that nothing that models wrote runs in its pages."""

from __future__ import annotations

import re

import pytest
from markupsafe import escape

from prefab.pipelines.view import texts
from tests.pipelines.view.conftest import PORT, TOKEN, client_of

PAGES = ("/runs", "/run", "/preferences", "/compare?old=world&new=world-rejudge")


def test_a_page_without_the_token_says_nothing_of_the_store(stranger, made):
    for page in (*PAGES, "/static/view.css", "/text?id=a", "/nothing", "/?token=wrong"):
        answer = stranger.get(page)
        assert (
            answer.status_code == 403
            and answer.text == "open the address that `prefab view` printed"
        )


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(stranger):
    answer = stranger.get(f"/preferences?outcome=a&token={TOKEN}", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/preferences?outcome=a"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert stranger.get("/runs").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", ""]
)
def test_another_name_is_refused(client, host):
    """DNS rebinding: a foreign name that resolves to this machine."""
    assert client.get("/runs", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {
            "sec-fetch-site": "same-site",
            "sec-fetch-mode": "navigate",
            "sec-fetch-dest": "iframe",
        },
    ],
)
def test_another_pages_request_is_refused(client, headers):
    assert client.get("/runs?format=json", headers=headers).status_code == 403


def test_a_change_needs_this_servers_own_origin(client):
    assert client.post("/label", content="said=a").status_code == 403
    own = {"origin": f"http://127.0.0.1:{PORT}"}
    assert client.post("/runs", content="", headers=own).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/%2e%2e/x",
        "/static/",
    ],
)
def test_no_file_but_the_pages_own_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "import" not in answer.text


@pytest.mark.parametrize("page", PAGES)
def test_each_answer_has_the_policy_and_no_script_of_its_own(client, page):
    answer = client.get(page)
    assert answer.status_code == 200, answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    scripts = re.findall(r"<script[^>]*>", answer.text)
    assert scripts and all(re.search(r'src="static/[\w.]+"', script) for script in scripts)
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", answer.text)


def test_texts_that_attack_the_page_are_shown_as_text(attacked):
    with client_of(attacked) as client:
        row = client.get("/preferences?format=json").json()["rows"][0]
        for page in (
            "/preferences",
            f"/preference?id={row['preference']}",
            "/preferences?q=%3Cscript",
        ):
            html = client.get(page).text
            assert "<script>window" not in html and "<img" not in html and "&lt;script&gt;" in html
            assert not set(html) & set("\x1b\x07\u202e\u202c\u2028"), page
            assert "49" not in re.findall(r"\{\{[^}]*\}\}|49(?= &amp;lt)", html)
        raw = client.get(f"/text?id={row['preference']}&side=a")
        assert raw.headers["content-type"].startswith("text/plain")


def test_a_text_of_a_million_characters_is_cut_and_that_is_said():
    html = texts.shown("w" * 1_000_000)
    assert len(html) < 21_000 and "980,000 more characters" in html


def test_words_that_differ_are_marked_and_escaped():
    left, right = texts.words_apart("the <b>old</b> word", "the <b>new</b> word")
    assert left == "the <del>&lt;b&gt;old&lt;/b&gt;</del> word"
    assert right == "the <ins>&lt;b&gt;new&lt;/b&gt;</ins> word"
    long = "word " * 2_000
    assert texts.words_apart(long, long + "more") == (escape(long), escape(long + "more"))
