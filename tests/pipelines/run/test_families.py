"""Whole runs with models that behave otherwise than most: nothing is lost, and what is unusual is
told once."""

from __future__ import annotations

import pytest

from prefab.pipelines.cli import doctor
from prefab.pipelines.cli.run_report import next_command, report
from prefab.pipelines.quality import agreement, agreement_tables
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query
from tests.support import project
from tests.support.family_server import family_server


def pipeline(folder, server, **changes):
    engine = {"engine": "openai", "model": "mock", "base_url": f"{server.url}/v1", **changes}
    return project.pipeline(folder, prompts=2, engines={"local": engine})


@pytest.mark.slow_but("{'logprobs': 'absent'}", "{'think': 'open'}", "{'quota': 4}")
@pytest.mark.parametrize(
    "behaviour",
    [
        {"system": "refused"},
        {"gpt5": True, "refuses": ("top_p", "frequency_penalty")},
        {"logprobs": "absent"},
        {"logprobs": "refused"},
        {"think": "open"},
        {"think": "hidden", "deaf": True},
        {"quota": 4},
        {"quota": 4, "hints": ""},
    ],
    ids=str,
)
def test_every_call_is_answered_and_a_rerun_asks_nothing(tmp_path, behaviour):
    with family_server(vary=True, **behaviour) as server:
        source = pipeline(tmp_path, server)
        first = run(source)
        assert (first.state, first.failed, first.unscored) == ("done", 0, {})
        sent = len(server.bodies)
        second = run(source)
        assert (second.asked, second.version, len(server.bodies)) == (0, first.version, sent)


def test_what_the_probe_found_is_kept_and_told_once(tmp_path, capsys):
    with family_server(vary=True, system="refused", logprobs="absent") as server:
        run(pipeline(tmp_path, server), quiet=False)
    told = capsys.readouterr().err
    assert told.count("takes no system turn") == 1 and told.count("labels are hard") == 1
    columns = "system_role, labels, logprobs, max_tokens_field, temperature, thinking, left_out"
    found = query(tmp_path / "store", f"SELECT {columns} FROM model_probes").rows()
    assert found == [(False, True, False, "max_tokens", True, "no", [])]


def test_what_is_refused_for_good_is_asked_once(tmp_path, capsys):
    with family_server(vary=True, bad="Question 1") as server:
        source = {**pipeline(tmp_path, server), "budget": {"failed": None, "unscored": None}}
        first, second = run(source), run(source)
        assert first.failed == second.failed > 0
        assert server.counts["400"] == first.failed
        assert first.refused == first.failed
        found = query(tmp_path / "store", "SELECT kind, reason FROM failures GROUP BY ALL").rows()
        assert [kind for kind, _ in found] == ["refused"] and "HTTP 400" in found[0][1]
        next_command(first, "prefab run p.yaml")
        told = capsys.readouterr().err
        assert "prefab run p.yaml --retry-refused" in told and "makes them again" not in told
        run(source, retry_refused=True)
        assert server.counts["400"] == 2 * first.failed


def test_doctor_tells_what_is_unusual(tmp_path):
    with family_server(system="refused", logprobs="absent") as server:
        file = project.write(tmp_path, pipeline(tmp_path, server))
        findings = doctor.examine(tmp_path / "store", file)
    words = next(f.words for f in findings if f.what == "engine local")
    assert "takes no system turn" in words and "labels are hard" in words


@pytest.mark.slow_but("absent-True")
@pytest.mark.parametrize(("logprobs", "hard"), [("absent", True), ("given", False)])
def test_screen_agreement_and_card_tell_of_hard_labels(tmp_path, capsys, logprobs, hard):
    with family_server(vary=True, logprobs=logprobs) as server:
        report(run(pipeline(tmp_path, server)))
    assert ("verdicts on hard labels" in capsys.readouterr().out) == hard
    store = tmp_path / "store"
    agreement_tables.show(agreement.measure(store))
    told = " ".join(capsys.readouterr().out.split())
    assert ("verdicts are hard labels" in told) == hard
    export(store, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("stand on hard labels" in card) == hard
