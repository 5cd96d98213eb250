"""How a run ends: what it did in its own terms, why calls failed, exit code and next command."""

import re
from math import log

import orjson
import pytest

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import TransportError, failure_kind, reason_of
from prefab.factory.types import Completion, ServerReport
from prefab.pipelines.cli.main import app
from prefab.pipelines.cli.run_report import next_command, report
from prefab.pipelines.run.runner import run
from tests.support import project
from tests.support.family_server import family_server


class Failing(Scripted):
    """Fails the questions that `dead` names, each with its own message."""

    def __init__(self, dead: dict[str, str]) -> None:
        super().__init__(ScriptedConfig(), project.answer)
        self.dead, self.n = dead, 0

    async def complete(self, key, request):
        self.n += 1
        if words := self.dead.get(project.asked(request)):
            raise TransportError(words.format(n=self.n))
        return await super().complete(key, request)


DEAD = {
    "judge": "http://host:{n}/v1/chat/completions: HTTP 503 try again in {n}.5s (request 7f{n})",
}


def ended(result, capsys, again="prefab run 'my pipeline.yaml'"):
    code = next_command(result, again)
    err = capsys.readouterr().err
    return code, re.findall(r"next: (.*)", err), " ".join(err.split())


def test_failures_are_told_by_reason_and_calls_are_missing(tmp_path, capsys):
    value = project.pipeline(tmp_path, prompts=2, budget={"failed": None})
    result = run(value, engines={"local": Failing(DEAD)})
    code, commands, err = ended(result, capsys)
    assert (result.state, result.failed, code) == ("done", 24, 1)
    assert list(result.failures) == ["HTTP 503 try again in N (request N)"]
    assert "24 calls failed: HTTP 503" in err and "for example: http://host:" in err
    assert "24 calls are missing" in err and commands == ["prefab run 'my pipeline.yaml'"]
    whole = run(value, engines={"local": Failing({})})
    assert ended(whole, capsys)[:2] == (
        0,
        [f"prefab export --store {tmp_path / 'store'} --format trl out"],
    )


class TwoServers(Scripted):
    """Two servers, one of which is down."""

    servers = (
        ServerReport("http://one", 90, 0, 0, "answers"),
        ServerReport("http://two", 3, 4, 1, "down: HTTP 503"),
    )


def test_the_report_names_each_server(tmp_path, capsys):
    engine = TwoServers(ScriptedConfig(), project.answer)
    result = run(project.pipeline(tmp_path, prompts=2), engines={"local": engine})
    report(result)
    told = capsys.readouterr().out
    assert "http://one" in told and "http://two" in told and "down: HTTP 503" in told
    assert [s["calls"] for s in orjson.loads(orjson.dumps(result.summary()))["servers"]] == [90, 3]


def test_a_passed_budget_tells_the_failures_too(tmp_path, capsys):
    result = run(project.pipeline(tmp_path, prompts=2), engines={"local": Failing(DEAD)})
    code, commands, err = ended(result, capsys)
    assert (result.state, code, commands) == ("budget", 1, ["prefab run 'my pipeline.yaml'"])
    assert "24 calls failed: HTTP 503" in err and "export" not in err


@pytest.mark.parametrize(
    ("behaviour", "remedy"),
    [
        ({"form": "**{}**"}, "answer_tokens: 16"),
        ({"think": "apart", "deaf": True, "thoughts_alone": True}, "thinking_tokens"),
    ],
)
def test_what_mends_unscored_answers_is_told(tmp_path, capsys, behaviour, remedy):
    with family_server(vary=True, **behaviour) as server:
        local = {"engine": "openai", "model": "mock", "base_url": f"{server.url}/v1"}
        result = run(project.pipeline(tmp_path, prompts=2, engines={"local": local}))
    code, _, err = ended(result, capsys)
    assert (result.state, code) == ("budget", 1) and remedy in " ".join(err.split())


def test_reasons_differ_in_words_not_in_numbers():
    one, two = (f"http://h:{n}/v1: HTTP 500 slot {n} is busy" for n in (17, 18))
    assert reason_of(TransportError(one)) == reason_of(TransportError(two))
    assert reason_of(TransportError(one)) != reason_of(TransportError(one.replace("500", "429")))
    assert reason_of(TransportError("")) == "TransportError"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("http://h/v1: HTTP 429 slow down; the deadline of 60 s passed", "rate_limit"),
        ("http://h/v1: its rate limit leaves no time; the deadline of 60 s passed", "rate_limit"),
        ("http://h/v1: HTTP 503 overloaded; gave up after 3 tries", "server_error"),
        ("http://h/v1: no answer (TimeoutError); gave up after 3 tries", "timeout"),
        ("http://h/v1: no answer (ServerDisconnectedError); gave up", "no_connection"),
        ("http://h/v1: 2 choices for 1 conversations", "malformed"),
        ("scripted failure", "transport"),
    ],
)
def test_a_failure_has_a_kind(message, kind):
    assert failure_kind(message, refused=False) == kind
    assert failure_kind(message, refused=True) == "refused"


def test_export_is_not_proposed_where_no_pair_was_decided(tmp_path, capsys):
    def undecided(request):
        if request.labels:
            even = log(0.99 / len(request.labels))
            return Completion("A", "stop", dict.fromkeys(request.labels, even))
        return project.answer(request)

    result = run(
        project.pipeline(tmp_path, prompts=2),
        engines={"local": Scripted(ScriptedConfig(), undecided)},
    )
    code, commands, err = ended(result, capsys)
    assert result.outcomes == {"tie": 6} and code == 0
    assert commands == [f"prefab agreement --store {tmp_path / 'store'}"]
    assert "no comparison was decided" in err


def test_the_summary_counts_what_the_store_holds(tmp_path, capsys):
    result = run(project.pipeline(tmp_path, revise={"rounds": 1}), engines=project.engine())
    outcomes = result.preferences["outcome"].to_list()
    assert result.outcomes == {one: outcomes.count(one) for one in set(outcomes)}
    faults = result.critiques.filter(result.critiques["fault"])["principle"].to_list()
    assert faults and result.faults == {one: faults.count(one) for one in set(faults)}
    both: dict[tuple, dict[str, str]] = {}
    for v in result.verdicts.iter_rows(named=True):
        place = (v["prompt"], v["a"], v["b"], v["principle"], v["judge"], v["repeat"])
        both.setdefault(place, {})[v["order"]] = v["winner"]
    pairs = [(v["ab"], v["ba"]) for v in both.values() if v.get("ab") and v.get("ba")]
    assert result.in_both_orders == len(pairs) > 0
    assert result.same_in_both_orders == sum(ab == ba for ab, ba in pairs)
    report(result)
    told = capsys.readouterr().out
    assert "comparisons decided" in told and "same winner in both orders" in told
    assert orjson.loads(orjson.dumps(result.summary(), default=str))["outcomes"] == result.outcomes


def test_the_command_that_is_printed_can_be_pasted(tmp_path, monkeypatch, capsys):
    path = project.write(tmp_path, project.pipeline(tmp_path, prompts=1), "my pipeline.yaml")
    words = ["run", str(path), "--quiet", "--set", "budget.calls=1"]
    with pytest.raises(SystemExit) as caught:
        app(words, standalone_mode=True)
    assert caught.value.code == 1
    assert f"'{path}'" in " ".join(capsys.readouterr().err.split())


def test_drafts_without_any_text_are_told(tmp_path, capsys):
    def answer(request):
        found = project.answer(request)
        return Completion(" \n", "stop") if project.asked(request) == "sample" else found

    engines = {"local": Scripted(ScriptedConfig(), answer)}
    result = run(project.pipeline(tmp_path, prompts=2), engines=engines)
    assert (result.empty, result.samples.height) == (6, 6)
    report(result)
    assert "drafts without any text" in capsys.readouterr().out


def test_the_start_of_an_engine_is_not_taken_off_a_later_run(tmp_path):
    """Two runs of one process on one engine, which started in the first of them."""
    engines = project.engine(delay_s=0.02)
    engines["local"].starting_s = 60.0
    result = run(project.pipeline(tmp_path, prompts=2), engines=engines)
    assert result.asked and result.seconds > 0.02
