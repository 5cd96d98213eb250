"""The log of a command, its exit code, and what neither may show."""

from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import prefab
from prefab.factory import redaction, telemetry
from prefab.factory.console import EXIT_FAILED, EXIT_USAGE, LOG
from prefab.factory.engines.http import HttpClient, HttpConfig, Throttle
from prefab.factory.logs import logging_by_environment, logging_to
from prefab.pipelines.cli.main import app, main
from prefab.pipelines.run.interrupts import SIGNALS
from tests.support import project

RUN = CliRunner()
RUNS_PAGE = Path(__file__).resolve().parents[3] / "docs" / "runs.md"
ENGINE = ("--set", "engines.local={engine: scripted}")


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline file of two prompts."""
    return str(project.write(tmp_path, project.pipeline(tmp_path, prompts=2)))


def invoked(*words: str) -> tuple[str, str]:
    """What a command that succeeds prints to stdout and to stderr."""
    found = RUN.invoke(app, list(words))
    assert found.exit_code == 0, found.output
    return found.stdout, found.stderr


def clean() -> bool:
    """Whether nothing is left of the log."""
    kinds = [type(handler).__name__ for handler in LOG.handlers]
    return "ScreenHandler" not in kinds and "FileHandler" not in kinds and not telemetry.observers


def test_a_log_names_calls_and_stages_and_no_text(pipeline, tmp_path):
    file = tmp_path / "run.log"
    out, err = invoked("run", pipeline, *ENGINE, "--json", "-v", "--log-file", str(file))
    kept = file.read_text()
    for told in (kept, err):
        assert re.search(
            r" DEBUG prefab\.calls: [0-9a-f]{12} sample of prompt p0: .*: stop, ", told
        )
        assert re.search(r"[0-9a-f]{12} judge judge kind of prompt p1: ", told)
        assert "INFO prefab.stages: ask ends after" in told and "exit code 0" in told
        assert "Question 0?" not in told
    assert '"state": "done"' in out and "prefab.calls" not in out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert clean()


def test_texts_are_logged_where_they_are_asked_for(pipeline):
    _, before = invoked("-v", "run", pipeline, *ENGINE, "--set", "prompts.limit=1")
    _, asked = invoked("-v", "run", pipeline, *ENGINE, "-v")
    assert "Question" not in before
    assert "user: 'Question 1?'" in asked and re.search(r"[0-9a-f]{12} answer: '", asked)


def test_without_the_options_nothing_is_logged(pipeline):
    assert "prefab.calls" not in invoked("run", pipeline, *ENGINE)[1]


def test_a_mistake_is_in_the_log_once_on_the_screen_and_its_secrets_nowhere(
    tmp_path, monkeypatch, capsys
):
    file, secret = tmp_path / "mistake.log", "sesame-open-2718"
    monkeypatch.setattr(redaction, "_known", {})
    redaction.add_secret(secret)
    words = ["prefab", "check", f"{secret}.yaml", "-v", "--log-file", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == EXIT_USAGE
    assert "ERROR prefab: ConfigError: [redacted].yaml" in file.read_text()
    assert "no such file" in told and "ERROR prefab" not in told
    assert secret not in told + file.read_text()


def test_a_warning_is_in_the_log(tmp_path):
    from prefab.factory.console import warn

    with logging_to(0, tmp_path / "log"):
        warn("the disk is old")
    assert "WARNING prefab: the disk is old" in (tmp_path / "log").read_text()


def test_a_warning_is_printed_once_where_prefab_is_a_library():
    """Python itself prints warnings of a logger that has no handler."""
    code = "from prefab.factory.console import warn; warn('the disk is old')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("the disk is old")) == (0, 1)


def test_a_log_that_cannot_be_written_is_a_mistake(tmp_path, pipeline):
    found = RUN.invoke(app, ["plan", pipeline, "--log-file", str(tmp_path / "none" / "log")])
    assert "--log-file" in str(found.exception) and "cannot be written" in str(found.exception)
    assert clean()


def test_a_process_that_is_started_logs_to_the_same_file(tmp_path, monkeypatch):
    file = tmp_path / "log"
    with logging_to(1, file):
        given = dict(os.environ)
    assert "PREFAB_LOG_FILE" not in os.environ
    monkeypatch.setattr(os, "environ", given)
    with logging_by_environment():
        logging.getLogger("prefab.servers").debug("from a worker")
    assert "DEBUG prefab.servers: from a worker" in file.read_text()


def test_rate_limits_are_logged_and_counted(tmp_path):
    client = HttpClient("http://nowhere", HttpConfig())
    client.throttle = Throttle(4)
    with logging_to(0, tmp_path / "log"):
        client._limited(0.0, "slow down", 1.0)
    assert client.retries == 1
    assert "DEBUG prefab.servers: http://nowhere limits the rate" in (tmp_path / "log").read_text()


def test_the_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", prefab.__version__)
    assert prefab.__version__ in invoked("--version")[0]


def test_the_exit_codes_are_those_of_the_table(tmp_path, monkeypatch):
    rows = re.findall(r"^\| ([\d, ]+) \| ", RUNS_PAGE.read_text(), re.M)
    documented = {int(code) for row in rows for code in row.split(",")}
    assert documented == {0, EXIT_FAILED, EXIT_USAGE, *(128 + number for number in SIGNALS)}
    (tmp_path / "bad.yaml").write_text("id: 1\nprinciples: []\n")
    project.pipeline(tmp_path)
    two = (
        (tmp_path / "small.yaml")
        .read_text()
        .replace("answer is kinder?", "answer is more helpful and more honest?")
    )
    (tmp_path / "two.yaml").write_text(two)
    for words, code in (
        (("explain", "C101"), 0),
        (("check", "--strict", str(tmp_path / "two.yaml")), EXIT_FAILED),
        (("check", str(tmp_path / "bad.yaml")), EXIT_USAGE),
        (("check", str(tmp_path / "none.yaml")), EXIT_USAGE),
        (("check",), EXIT_USAGE),
        (("--nothing",), EXIT_USAGE),
    ):
        monkeypatch.setattr(sys, "argv", ["prefab", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code, words
