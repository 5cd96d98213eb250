"""Marks and a key planted in every text that others write: no command prints a character that a
terminal acts on, and the key is in no file and no output."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import sys
import threading
import unicodedata
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from prefab.factory import redaction
from prefab.pipelines.cli.main import main
from tests.support import project

KEY = "sk-planted-4f9a1c77e2b04d5c"
MARKS = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\u200b[/red][bold]:boom:\x08\x7f\rx"
QUOTED = json.dumps(MARKS)  # for YAML and JSON
CLEAN = {"\n"}
FINE = ("store", "sql", "agreement", "audit", "why", "diff", "test", "calibrate", "doctor")


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible API that says its caller's key in every answer and every error, with
    marks."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = f"{MARKS} your key is {self.headers['Authorization']}"
        text = "\n".join(m["content"] for m in body["messages"])
        if "Question 3" in text:
            return self._send(400, {"error": {"message": said, "code": "bad"}})
        type(self).answered += 1
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if body.get("logprobs"):
            top = [
                {"token": t, "logprob": log(p)} for t, p in (("A", 0.7), ("B", 0.2), ("T", 0.05))
            ]
            choice["message"] = {"role": "assistant", "content": "A"}
            choice["logprobs"] = {
                "content": [{"token": "A", "logprob": log(0.7), "top_logprobs": top}]
            }
        else:
            content = f"answer {type(self).answered} {said}"
            choice["message"] = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": 3, "completion_tokens": 3}
        return self._send(200, {"id": said, "model": "m", "choices": [choice], "usage": usage})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        # the key's letters also as JSON escapes
        raw = json.dumps(body).replace(
            "sk-pl", "\\u0073k-pl" if type(self).answered % 2 else "sk-pl"
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def command(*words: str) -> tuple[int, str]:
    """Run a command in this process; exit code, and stdout and stderr as the terminal gets them."""
    stream = io.StringIO()
    kept = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = ["prefab", *words], stream, stream
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
    return code, stream.getvalue()


@pytest.fixture(scope="module")
def world(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with marks in its texts and file names, run once; the key is in the environment."""
    known, before = dict(redaction._known), os.environ.get("PLANTED_KEY")
    os.environ["PLANTED_KEY"] = KEY
    folder = tmp_path_factory.mktemp("planted") / "a\x1b[2J\u202eb[bold]"
    folder.mkdir()
    engine = {"engine": "openai", "model": "m", "base_url": api, "api_key_env": "PLANTED_KEY"}
    value = project.pipeline(
        folder,
        prompts=4,
        engines={"local": {**engine, "retries": 0, "deadline_s": 20}},
        budget={"unscored": None, "failed": None},
    )
    constitution = json.loads(json.dumps(project.CONSTITUTION))
    constitution["title"] = f"Title {MARKS}"
    for principle in constitution["principles"]:
        for name in ("title", "compare", "critique", "revise", "criterion"):
            principle[name] += MARKS
    constitution["tests"] = [
        {"prompt": MARKS, "a": "a" + MARKS, "b": "b" + MARKS, "prefer": "a", "principle": "kind"}
    ]
    (folder / "small.yaml").write_text(yaml.safe_dump(constitution, allow_unicode=False))
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"Question {i}? {MARKS}",
            "group": f"g{i}{MARKS}",
            "tags": [MARKS],
        }
        for i in range(4)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.write(folder, value)
    yield folder
    redaction._known.clear()
    redaction._known.update(known)
    os.environ.pop("PLANTED_KEY") if before is None else os.environ.update(PLANTED_KEY=before)


def commands(folder: Path) -> list[tuple[str, ...]]:
    """Commands over a finished store, and ones that fail with what they were given."""
    store, pipeline, out = str(folder / "store"), str(folder / "pipeline.yaml"), str(folder / "out")
    bad = folder / f"bad{chr(27)}.yaml"
    bad.write_text(
        f"{QUOTED}: {QUOTED}\nname: {QUOTED}\nengines: {{{QUOTED}: {{engine: {QUOTED}}}}}\n"
    )
    changed = (folder / "small.yaml").read_text().replace("kinder", "much kinder")
    (folder / "other.yaml").write_text(changed)
    (folder / "bad.jsonl").write_text(json.dumps({MARKS: MARKS}) + "\n" + MARKS + "\n")
    (folder / "evil").mkdir(exist_ok=True)
    (folder / "evil" / "pairwise.jinja").write_text(
        "{% block user %}{{ " + MARKS + " }}{% endblock %}"
    )
    query = "SELECT *, chr(27) || '[2J' AS \"" + MARKS.replace('"', "") + '" FROM '
    tables = (
        "samples",
        "prompts",
        "principles",
        "constitutions",
        "verdicts",
        "preferences",
        "runs",
    )
    return [
        ("plan", pipeline),
        ("run", pipeline),
        ("check", str(folder)),
        ("check", str(bad)),
        ("check", str(folder / "bad.jsonl")),
        ("store", "info", "--store", store),
        ("store", "rebuild", "--store", store),
        ("store", "verify", store),
        *(("sql", query + table, "--store", store) for table in tables),
        ("sql", f"SELECT {MARKS}", "--store", store),
        ("agreement", "--store", store, "--examples", "3"),
        ("audit", "data", "--store", store),
        ("why", preference_of(folder), "--store", store),
        ("why", "nothing", "--store", store),
        ("calibrate", "--store", store),
        ("diff", str(folder / "small.yaml"), str(folder / "other.yaml"), "--store", store),
        ("test", str(folder / "small.yaml"), "--pipeline", pipeline),
        ("store", "backup", store, str(folder / "backup")),
        ("export", out, "--store", store),
        ("export", out, "--store", store, "--run", MARKS),
        ("doctor", pipeline, "--store", store),
        ("run", str(bad)),
        ("run", pipeline, "--set", f"policy.{MARKS}={MARKS}"),
        ("run", pipeline, "--set", f"engines.local.api_key_env={KEY}"),
        ("run", pipeline, "--set", f"engines.local.base_url=http://u:{KEY}@127.0.0.1:1/v1"),
        ("run", pipeline, "--set", f"engines.local.extra_body.token={KEY}"),
        ("run", pipeline, "--set", f"engines.local.model={KEY}"),
        ("export", MARKS, MARKS),
        (MARKS,),
        ("run", pipeline, f"--{MARKS}"),
        ("train", "dpo", str(bad)),
        ("eval", "policy", str(bad)),
        ("import-preferences", str(folder / "bad.jsonl"), "--store", store),
    ]


def preference_of(folder: Path) -> str:
    """The id of some preference of the store."""
    with duckdb.connect(str(folder / "store" / "prefab.duckdb"), read_only=True) as con:
        found = con.execute("SELECT preference FROM preferences").fetchone()
    assert found
    return str(found[0])


def unsafe(text: str) -> set[str]:
    """The characters of the text that must not reach a terminal."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - CLEAN


@pytest.mark.slow
def test_no_command_prints_a_mark_or_the_key_and_no_file_holds_the_key(world: Path) -> None:
    code, out = command("run", str(world / "pipeline.yaml"))
    assert Server.answered > 20 and "Traceback" not in out, out
    assert not unsafe(out) and KEY not in out
    every = commands(world)
    fine = [w for w in every[:2] if w] + [
        w for w in every if w[0] in FINE and w[1] not in ("nothing", "backup", f"SELECT {MARKS}")
    ]
    for words in every:
        for flags in ((), ("--json",)) if words in fine or words in every[::4] else ((),):
            code, out = command(*words, *flags)
            assert not unsafe(out), (words, unsafe(out), out[:2000])
            assert KEY not in out and "Traceback" not in out, (words, out[:3000])
            assert code in ((0, 1) if words in fine else (0, 1, 2)), (words, code, out)
            if flags and out.lstrip().startswith("{") and code == 0:
                assert "\x1b" not in json.dumps(out)
    for file in world.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file
    texts = "\n".join(values_of_sqlite(world / "store" / "ledger.sqlite"))
    texts += "\n".join(values_of_duckdb(world / "store" / "prefab.duckdb"))
    assert KEY not in texts
    assert texts.count(redaction.REDACTED) > 20  # the server did say the key


def values_of_sqlite(file: Path) -> Iterator[str]:
    with sqlite3.connect(file) as con:
        for (name,) in con.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            for row in con.execute(f'SELECT * FROM "{name}"'):
                yield from map(str, row)


def values_of_duckdb(file: Path) -> Iterator[str]:
    with duckdb.connect(str(file), read_only=True) as con:
        for (name,) in con.execute("SELECT table_name FROM duckdb_tables()").fetchall():
            for row in con.execute(f'SELECT * FROM "{name}"').fetchall():
                yield from map(str, row)


def test_a_bugs_traceback_is_printable_and_holds_no_key(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python prints it to stderr itself, which `main` guards."""
    import subprocess

    code = (
        "import sys; sys.argv = ['prefab', 'plan', 'x']\n"
        "from prefab.pipelines.cli import main as m\n"
        "import prefab.pipelines.run.plan as plan\n"
        "def broken(*_, **__): raise RuntimeError(sys.stdin.read())\n"
        "plan.plan = broken\nm.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=f"{MARKS} {KEY}",
        env={**os.environ, "PLANTED_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "RuntimeError" in done.stderr and "evil" in done.stderr
    assert not unsafe(done.stderr) and KEY not in done.stderr
