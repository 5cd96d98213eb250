"""What tests/conftest.py promises: a skip it does not name is a failure; it names only files there
are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import conftest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

@pytest.mark.skip(reason="there is a GPU")
def test_allowed(): pass

@pytest.mark.xfail
def test_expected(): assert False

def test_unexpected(): pytest.importorskip("no_such_package")
"""


def pytest_of(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", "none.ini", "."],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_an_unexpected_skip_is_a_failure(tmp_path):
    (tmp_path / "none.ini").write_text("")
    (tmp_path / "test_skips.py").write_text(TESTS)
    done = pytest_of(tmp_path)
    assert "1 failed, 1 skipped, 1 xfailed" in done.stdout and done.returncode == 1
    assert "could not import 'no_such_package'" in done.stdout and "MAY_SKIP" in done.stdout
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such')")
    assert "could not import 'no_such'" in (done := pytest_of(tmp_path)).stdout
    assert done.returncode not in (0, 5)


def test_the_longest_files_are_there():
    assert not [name for name in conftest.LONGEST if not (conftest.HERE / name).is_file()]
