"""`prefab doctor`: what it looks at and what it says of it."""

from __future__ import annotations

import pytest

from prefab.judges import sandbox
from prefab.pipelines.cli import doctor

WEAK = {
    "isolated": False,
    "why": "no namespaces",
    "says": "limits only: the network and your files are within an answer's reach",
}


def said(tmp_path) -> doctor.Finding:
    return next(f for f in doctor.examine(tmp_path / "store") if f.what == "verifier's sandbox")


def test_how_a_verifiers_code_is_kept_in_is_told(tmp_path):
    try:
        isolated, words = sandbox.isolation_status()
    except sandbox.NoSandbox:
        pytest.skip("nothing is run here at all")
    found = said(tmp_path)
    assert (
        found.state == ("ok" if isolated else "note")
        and words in found.words
        and "limits" in found.words
    )


def test_limits_alone_are_a_note_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_known", [WEAK])
    found = said(tmp_path)
    assert (
        found.state == "note"
        and WEAK["says"] in found.words
        and "isolation: required" in found.words
    )
