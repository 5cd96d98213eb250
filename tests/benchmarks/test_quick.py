"""The benchmarks run: their quick forms, whose figures mean nothing."""

from __future__ import annotations

import pytest

STORE = ("editing",)  # keep a store where they are told to
SLOW = ("editing", "grpo_speed", "rerun", "view")


@pytest.mark.parametrize(
    "name", ["agreement", "export", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_quick_form_runs(name, forks, tmp_path):
    more = ["--store", tmp_path / "store"] if name in STORE else []
    done = forks.run(["-m", f"benchmarks.{name}", "--quick", *more], timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
