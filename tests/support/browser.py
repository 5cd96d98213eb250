"""A real Chromium that looks at `prefab view`, and notes what no page may do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REBOUND = "attacker.example"  # a name of somebody else that resolves to this machine
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str:
    """Why there is no browser to test with; empty where there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return "" if path() else f"none of {', '.join(NAMES)} is installed"


def path() -> str | None:
    """The program."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def served(store: Path, *more: str) -> Iterator[str]:
    """`prefab view` on a store, as its own process; gives the address that it prints."""
    command = [sys.executable, "-m", "prefab.pipelines.cli.main", "view", str(store), "--port", "0"]
    with subprocess.Popen(
        [*command, "--no-browser", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
    assert server.returncode == 0  # it also ended what it had started


@dataclass
class Notes:
    """What the pages of a context did: messages of the console, errors, and requests elsewhere."""

    console: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # the sandbox of Chromium needs user namespaces, which containers often lack
        arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]
        found = play.chromium.launch(executable_path=path(), args=arguments)
        yield found
        found.close()


def page_of(
    chromium: Any, address: str, width: int = 1280, dark: bool = False
) -> tuple[Any, Notes]:
    """A page that has opened the address, and notes of all that it does from then on."""
    scheme = "dark" if dark else "light"
    context = chromium.new_context(viewport={"width": width, "height": 840}, color_scheme=scheme)
    page, notes = context.new_page(), Notes()
    page.on("console", lambda message: notes.console.append(message.text))
    page.on("pageerror", lambda error: notes.console.append(str(error)))
    own = address.split("?")[0]
    page.on("request", lambda r: None if r.url.startswith(own) else notes.elsewhere.append(r.url))
    page.goto(address)
    ready(page)
    return page, notes


def ready(page: Any, address: str = "") -> None:
    """Open an address, and wait until its figures are computed."""
    if address:
        page.goto(address)
    page.wait_for_selector("main .card, main .notice, main .rows", timeout=120_000)
