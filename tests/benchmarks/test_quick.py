"""The benchmarks run: their quick forms, whose figures mean nothing."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "agreement",
        "export",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("editing", "rerun", "view")),
    ],
)
def test_a_quick_form_runs(name, forks):
    done = forks.run(["-m", f"benchmarks.{name}", "--quick"], timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
