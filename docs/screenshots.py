"""Make the pictures of `prefab view` in docs/images anew, in a real Chromium.

`make screenshots` runs it. The store is a made-up one (tests/support/viewstore.py): scripted judges
of known faults on the embedded world's prompts, measured figures of policies, and a made-up curve
of reinforcement learning.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support import browser, viewstore

OUT = Path(__file__).with_name("images")
# Name, page, width, dark.
PICTURES = (
    ("preferences", "preferences?spread_min=0.1&sort=spread", 1280, False),
    ("preference", "", 1280, False),
    ("agreement", "agreement", 1280, False),
    ("training", "training", 1280, True),
    ("small", "", 390, True),
)


def main() -> None:
    """Take each picture."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = viewstore.make(Path(folder), prompts=80)
        with browser.served(store) as address, browser.browser() as chromium:
            own = address.split("?")[0]
            for name, at, width, dark in PICTURES:
                page, _ = browser.page_of(chromium, address, width, dark)
                if not at:
                    browser.ready(page, f"{own}preferences?outcome=a&sort=spread")
                    page.click("[data-row] >> nth=1")
                    browser.ready(page)
                else:
                    browser.ready(page, own + at)
                page.screenshot(path=OUT / f"view-{name}.png")
                page.context.close()


if __name__ == "__main__":
    main()
