"""One real vLLM on a random tiny model, started by a process of its own that is killed in the last
test.

The supervisor, the router over replicas and the reading of logs are tested without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

import prefab.factory.engines.supervisor
from prefab.factory.engines.base import make
from prefab.factory.engines.http import Malformed
from prefab.factory.engines.prefix_router import PrefixRouter
from prefab.factory.engines.vllm import VLLM, IdRead, VllmConfig
from prefab.factory.engines.vllm_process import (
    VllmProcess,
    command_line,
    environment,
    free_port,
    gpus_hidden,
    has_gpu,
    reason,
)
from prefab.factory.errors import (
    ConfigError,
    EngineError,
    RequestRefused,
    TransportError,
    failure_kind,
)
from prefab.factory.keys import model_identity, request_key
from prefab.factory.types import Completion, Message, Request, Sampling

LABELS = ("A", "B", "T", " A", " B", " T")
KEY = "PREFAB_TEST_SERVER_KEY"  # the variable with the key of the server
STARTER = """
import asyncio, sys
from prefab.factory.engines.base import make

async def main():
    untraced = {"COVERAGE_PROCESS_CONFIG": ""}  # vLLM itself need not be measured
    engine = make({"engine": "vllm", "model": sys.argv[1], "log_file": sys.argv[2], "args": ["--enforce-eager"],
                   "env": untraced}, "t")
    await engine.start()
    print(engine.process.port, engine.process.supervisor.pid, engine.process.key, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def request(text: str, labels=(), repeat=(), **sampling) -> Request:
    return Request(
        "m", (Message("user", text),), Sampling(**{"max_tokens": 1, **sampling}), labels, (), repeat
    )


async def ask(engine, *requests):
    """All at once; failures are returned."""
    asks = (engine.complete(request_key(r), r) for r in requests)
    return await asyncio.gather(*asks, return_exceptions=True)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    from tests.support.tinymodel import build

    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The starter process, the server's address and the supervisor's process id."""
    pytest.importorskip("vllm")
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    command = [sys.executable, "-c", STARTER, str(folder), str(log)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = starter.stdout.readline().split()
    assert line, f"vLLM did not start:\n{log.read_text()[-3000:]}"
    os.environ[KEY] = line[2]
    yield starter, f"http://127.0.0.1:{line[0]}", int(line[1])
    del os.environ[KEY]
    starter.kill()
    starter.wait()


@pytest.fixture(scope="module")
def engine(server, folder, runner):
    engine = make(
        {
            "engine": "vllm",
            "model": str(folder),
            "url": server[1],
            "api_key_env": KEY,
            "retries": 1,
            "outage_s": 0,
        },
        "local",
    )
    runner.run(engine.start())
    yield engine
    runner.run(engine.stop())


@pytest.fixture(scope="module")
def local(folder, runner):
    engine = make({"engine": "hf", "model": str(folder)}, "hf")
    runner.run(engine.start())
    yield engine
    runner.run(engine.stop())


@pytest.mark.vllm
def test_the_servers_identity_is_the_folders(engine, server, folder):
    assert engine.identity == model_identity(str(folder), "float32")
    nameless = make({"engine": "vllm", "url": server[1] + "/v1", "api_key_env": KEY}, "remote")
    assert nameless.identity == engine.identity  # the server says where its folder is
    assert engine.max_model_len == 512 and "<|im_end|>" in engine.special_tokens


@pytest.mark.vllm
def test_no_route_answers_without_the_key(server):
    """Private endpoints (`/collective_rpc`) too, which vLLM's own `--api-key` leaves open."""
    paths = ("/health", "/v1/models", "/metrics", "/tokenize", "/collective_rpc", "/docs", "/none")
    for path in paths:
        for key in ("", "Bearer wrong"):
            asked = urllib.request.Request(server[1] + path, headers={"Authorization": key})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked, timeout=120)
            assert refused.value.code == 401
    key = os.environ[KEY]
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not [command for command in commands if key.encode() in command]


@pytest.mark.vllm
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_server_and_its_workers_listen_on_loopback_alone(server):
    sockets = set()
    for pid in descendants(server[2]):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
    heard = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                heard.append(local.split(":")[0])
    loopback = ("0100007F", "00000000000000000000000001000000")
    assert heard and not [address for address in heard if address not in loopback]


@pytest.mark.vllm
def test_label_reads_equal_transformers(engine, local, runner):
    asked = [request(f"Which answer {i}? Answer A, B or T.", LABELS) for i in range(12)]
    served, own = runner.run(ask(engine, *asked)), runner.run(ask(local, *asked))
    for s, o in zip(served, own, strict=True):
        assert set(s.label_logps) == set(LABELS) and s.exactness == "exact"
        assert all(s.label_logps[k] == pytest.approx(o.label_logps[k], abs=2e-3) for k in LABELS)
        assert (
            sum(map(exp, s.label_logps.values())) < 0.99
        )  # unconstrained: the rest of the vocabulary has its share


@pytest.mark.vllm
def test_batches_equal_single_reads(engine, server, folder, runner):
    asked = [request(f"word{i} " * (1 + i % 7) + "A or B?", LABELS) for i in range(40)]
    single = make(
        {"engine": "vllm", "model": str(folder), "url": server[1], "api_key_env": KEY, "batch": 1},
        "single",
    )
    runner.run(single.start())
    ones, many = runner.run(ask(single, *asked)), runner.run(ask(engine, *asked))
    runner.run(single.stop())
    for one, batched in zip(ones, many, strict=True):
        assert all(
            one.label_logps[k] == pytest.approx(batched.label_logps[k], abs=1e-3) for k in LABELS
        )
    assert sum(a.prompt_tokens for a in ones) == sum(a.prompt_tokens for a in many)


@pytest.mark.vllm
def test_completions_name_the_request_that_they_answer(engine, runner):
    """By `X-Request-Id`: so that the response to another request is told."""
    singles = [request(f"hello {i}", max_tokens=2) for i in range(2)]
    batch = [request(f"A or B? {i}", LABELS) for i in range(4)]
    client = engine._chats[0].server
    for asked in (singles, batch):
        client._echoes = False
        answers = runner.run(ask(engine, *asked))
        assert not any(isinstance(a, Exception) for a in answers) and client._echoes
        assert {a.replica for a in answers} == {client.url}


@pytest.mark.vllm
def test_greedy_text_equals_transformers(engine, local, runner):
    asked = [request(t, max_tokens=12) for t in ("hello", "Please tell me your name.")]
    assert [a.text for a in runner.run(ask(engine, *asked))] == [
        a.text for a in runner.run(ask(local, *asked))
    ]


@pytest.mark.vllm
def test_a_drawn_answer_depends_on_its_key_alone(engine, runner):
    draws = [request("go", (), (i,), max_tokens=8, temperature=1.0, seed=0) for i in range(4)]
    first, second = runner.run(ask(engine, *draws)), runner.run(ask(engine, *reversed(draws)))
    assert [a.text for a in first] == [a.text for a in reversed(second)]
    assert len({a.text for a in first}) == 4


@pytest.mark.slow
@pytest.mark.vllm
def test_policies_answers_are_the_token_ids_drawn(server, folder):
    """`prefab eval policy` by both samplers: the forward agrees with the server about the tokens
    that the server drew."""
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig as Eval
    from prefab.pipelines.evaluation.policy import evaluate_policies

    config = {
        "policies": {"tiny": str(folder)},
        "prompts": {"source": "microworld", "split": "test", "limit": 20},
        "samples": 4,
        "max_new_tokens": 12,
        "threads": 1,
    }
    ours = evaluate_policies(Eval.model_validate(config), True).policies["tiny"]
    served = evaluate_policies(
        Eval.model_validate(
            {**config, "sampler": "vllm", "vllm": {"url": server[1], "api_key_env": KEY}}
        ),
        True,
    ).policies["tiny"]
    assert served["sampler_gap"].value < 1e-3 and abs(served["kl"].value) < 1e-6
    assert (
        served["entropy"].low < ours["entropy"].high
        and ours["entropy"].low < served["entropy"].high
    )
    assert served["tokens"].value > 6


@pytest.mark.vllm
def test_a_draw_ends_at_its_stops_and_is_the_same_again(server, folder):
    engine = make(
        {"engine": "vllm", "model": str(folder), "url": server[1], "api_key_env": KEY}, "again"
    )
    asked = [request("go", (), (i,), max_tokens=60, temperature=1.0, seed=0) for i in range(3)]

    async def twice(stops):
        await engine.start()
        try:
            return [
                await asyncio.gather(*(engine.draw(request_key(r), r, stops) for r in asked))
                for _ in range(2)
            ]
        finally:
            await engine.stop()

    first, second = asyncio.run(twice([2]))
    assert [d.ids for d in first] == [d.ids for d in second] and len(
        {tuple(d.ids) for d in first}
    ) == 3
    token = first[0].ids[5]  # stopped at this one, it is the last and is there
    cut = asyncio.run(twice([token]))[0][0]
    assert (
        cut.ended
        and cut.ids == first[0].ids[: first[0].ids.index(token) + 1]
        and len(cut.logps) == len(cut.ids)
    )


@pytest.mark.vllm
def test_one_that_is_too_long_is_typed_and_spoils_no_other(engine, runner):
    asked = [request("fox " * (600 if i == 2 else 3), LABELS) for i in range(6)]
    answers = runner.run(ask(engine, *asked))
    assert [a.finish == "context" for a in answers] == [i == 2 for i in range(6)]
    assert answers[2].limit == 512
    (text,) = runner.run(ask(engine, request("fox " * 600, max_tokens=5)))
    assert text.finish == "context"


@pytest.mark.vllm
def test_control_tokens_in_users_text_stay_text(engine, runner):
    plain = runner.run(engine._tokens(engine._chats[0], "x y"))
    raw = runner.run(engine._tokens(engine._chats[0], "x<|im_end|> y"))
    assert len(raw) == len(plain) + 1, (
        "a served tokenizer makes control tokens of users' text: that is the threat"
    )
    assert runner.run(engine.check_specials()) == []


@pytest.mark.vllm
def test_labels_and_names_that_cannot_be(engine, server, runner):
    (answer,) = runner.run(ask(engine, request("q", ("A", "12345"))))
    assert isinstance(answer, EngineError) and "'12345'" in str(answer)
    stranger = make(
        {"engine": "vllm", "model": "Qwen/Qwen3-32B", "url": server[1], "api_key_env": KEY}, "far"
    )
    with pytest.raises(EngineError, match="has no model 'Qwen/Qwen3-32B'; it has"):
        runner.run(stranger.start())


@pytest.mark.vllm
def test_killing_the_starter_leaves_no_process_and_is_noticed(engine, server, runner):
    """Last: the server is gone afterwards. `kill -9` of whoever started it takes vLLM's engine and
    workers along."""
    starter, _, supervisor = server
    family = descendants(supervisor)
    assert len(family) >= 3, "API server, engine core, worker"
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert gone([supervisor, *family], within_s=30)
    began = time.monotonic()
    answers = runner.run(ask(engine, *[request(f"late {i}", LABELS) for i in range(8)]))
    answers += runner.run(ask(engine, *[request(f"later {i}", max_tokens=4) for i in range(8)]))
    assert all(isinstance(a, TransportError) for a in answers)
    assert any("outage_s" in str(a) for a in answers)
    assert time.monotonic() - began < 120


def descendants(pid: int) -> list[int]:
    """All processes under `pid`, by /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.1)
    return not any(map(alive, pids))


# A stand-in for vLLM: it has a child in a session of its own that shrugs off SIGTERM.
STUBBORN = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and subreapers")
@pytest.mark.parametrize("how", ["parent killed", "pipe closed", "server died"])
def test_the_supervisor_leaves_nothing(how, tmp_path, monkeypatch):
    supervisor = prefab.factory.engines.supervisor.__file__
    source = Path(supervisor).read_text().replace("GRACE_S = 8.0", "GRACE_S = 0.5")
    quick = tmp_path / "supervisor.py"
    quick.write_text(source)
    parent_code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, sys.argv[1], str(os.getpid()), sys.executable, '-c', "
        "sys.argv[2]]\n"
        "supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(supervisor.pid, flush=True)\n"
        "sys.stdin.readline()\nsupervisor.stdin.close()\ntime.sleep(3600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, str(quick), STUBBORN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid = int(parent.stdout.readline())
        end = time.monotonic() + 20
        while len(descendants(pid)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        family = descendants(pid)
        assert len(family) == 2
        if how == "parent killed":
            parent.kill()
        elif how == "pipe closed":
            parent.stdin.write("\n")
            parent.stdin.flush()
        else:
            os.kill(family[0], signal.SIGKILL)
        assert gone([pid, *family], within_s=20)
    finally:
        parent.kill()
        parent.wait()


def test_the_reason_is_the_root_cause():
    log = (
        "(EngineCore pid=7) INFO 11-21 00:58:28 [core.py:133] Initializing\n"
        "(EngineCore pid=7) ERROR 11-21 00:58:29 [core.py:900] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-21 00:58:29 [core.py:900] ValueError: No available memory "
        "for the cache blocks.\n"
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason(log) == "ValueError: No available memory for the cache blocks."
    assert reason("x.py: error: argument --port: invalid int value: 'x'\n").endswith(
        "invalid int value: 'x'"
    )
    assert reason("") == "it wrote nothing"


FAKE = """
import http.server, sys
if "--fail" in sys.argv:
    print(*(f"line {i}" for i in range(20)), "ValueError: no memory", "the end", sep="\\n")
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_servers_log_goes_when_it_ended_well_and_stays_when_not(fails, tmp_path):
    pytest.importorskip("vllm")
    server = tmp_path / "vllm" / "entrypoints" / "openai" / "api_server.py"
    server.parent.mkdir(parents=True)
    server.write_text(FAKE)
    for folder in (tmp_path / "vllm", tmp_path / "vllm" / "entrypoints", server.parent):
        (folder / "__init__.py").touch()
    model = tmp_path / "m"
    model.mkdir()
    config = VllmConfig(
        model=str(model), env={"PYTHONPATH": str(tmp_path)}, args=["--fail"] if fails else []
    )
    process = VllmProcess(
        config, str(model), free_port(), "local", lambda line: None, tmp_path / "logs"
    )

    async def work():
        try:
            await process.start()
            assert process.log_file.parent == tmp_path / "logs" and process.log_file.exists()
        finally:
            await process.stop()

    if not fails:
        asyncio.run(work())
        assert not (tmp_path / "logs").exists()
        return
    with pytest.raises(EngineError) as told:
        asyncio.run(work())
    words = str(told.value)
    assert (
        words.startswith("vLLM ended (status 3): ValueError: no memory\n")
        and str(process.log_file) in words
    )
    assert "| line 19\n" in words and "| the end\n" in words and "line 1\n" not in words
    assert process.log_file.read_text().startswith("line 0\n")


SERVER = """
import http.server, json, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"data": [{"id": MODEL, "root": MODEL, "max_model_len": 4096}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer({"tokens": [ord(c) for c in asked["prompt"]]})
        text = asked["messages"][-1]["content"]
        if DEADLY in text:
            time.sleep(0.1)
            os.kill(os.getpid(), 9)
        time.sleep(0.02)
        message = {"role": "assistant", "content": "said " + text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.answer({"id": "x", "choices": [choice], "usage": {}})
open("PIDS", "a").write(f"{os.getpid()}\\n")
if len(open("PIDS").readlines()) in FAILS:
    sys.exit("RuntimeError: no memory left")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(folder: Path, monkeypatch, fails=(), deadly="deadly") -> tuple[VLLM, Path, list[str]]:
    """An engine whose server is `SERVER`, the file that lists its processes, and what it says."""
    module = folder / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    for package in (folder / "vllm", folder / "vllm" / "entrypoints", module.parent):
        (package / "__init__.py").touch()
    pids = folder / "pids"
    model = folder / "m"
    model.mkdir()
    values = {"PIDS": str(pids), "FAILS": repr(tuple(fails)), "DEADLY": repr(deadly)}
    values["MODEL"] = repr(str(model))
    text = SERVER
    for name, value in values.items():
        text = text.replace(name, value)
    module.write_text(text)
    monkeypatch.syspath_prepend(folder)
    said: list[str] = []
    config = VllmConfig(
        model=str(model), env={"PYTHONPATH": str(folder)}, canary_every=0, retries=0
    )
    engine = VLLM(config, "local", said.append)
    engine.log_folder = folder / "logs"
    return engine, pids, said


@pytest.mark.slow_but("fails2")
@pytest.mark.skipif(sys.platform != "linux", reason="subreapers")
@pytest.mark.parametrize("fails", [(), pytest.param((2,), marks=pytest.mark.slow), range(2, 99)])
def test_our_own_server_is_started_again_when_it_dies(fails, tmp_path, monkeypatch):
    """A real process, killed twice under its questions; or one that does not start again."""
    engine, pids, said = stand_in(tmp_path, monkeypatch, fails)

    async def kill_under(numbers):
        asked = [asyncio.create_task(engine.complete(b"k" * 32, request(str(i)))) for i in numbers]
        await asyncio.sleep(0.01)
        os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
        return await asyncio.gather(*asked, return_exceptions=True)

    async def scenario():
        await engine.start()
        try:
            answers = [await engine.complete(b"k" * 32, request("first"))]
            for numbers in (range(20), range(20, 40))[: 1 if len(fails) > 1 else 2]:
                answers += await kill_under(numbers)
            return answers
        finally:
            await engine.stop()

    answers = asyncio.run(asyncio.wait_for(scenario(), 60))
    texts = [a.text if isinstance(a, Completion) else str(a) for a in answers]
    started = [line for line in said if "it is started again" in line]
    left = [pid for pid in map(int, pids.read_text().split()) if alive(pid)]
    assert not left
    if len(fails) < 2:
        assert texts == ["said first", *(f"said {i}" for i in range(40))]
        assert len(started) == 2 + len(fails) and "(1 of 3)" in started[0]
        assert "its log: " in started[0]
    else:
        assert sum("no memory left" in text for text in texts) >= 20 and len(started) == 3
        assert any("was started again 3 times" in text for text in texts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="subreapers")
@pytest.mark.parametrize("deadly", ["deadly", ""])
def test_a_question_of_which_our_server_dies_does_not_end_the_run(deadly, tmp_path, monkeypatch):
    """Two of 20 questions kill the process each time: these fail for good, the others are answered,
    and the next ones, too. Where every question kills it, it is the server."""
    engine, pids, said = stand_in(tmp_path, monkeypatch, deadly=deadly)
    texts = [f"deadly {i}" if i in (5, 13) else str(i) for i in range(20)]

    async def scenario():
        await engine.start()
        try:
            asked = [engine.complete(b"k" * 32, request(text)) for text in texts]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            last = [engine.complete(b"k" * 32, request("last"))]
            return [*answers, *await asyncio.gather(*last, return_exceptions=True)]
        finally:
            await engine.stop()

    answers = asyncio.run(asyncio.wait_for(scenario(), 150))
    starts = len(pids.read_text().split())
    if not deadly:
        assert {type(answer) for answer in answers} == {TransportError} and 4 <= starts <= 7
        return
    for text, answer in zip([*texts, "last"], answers, strict=True):
        if deadly in text:
            assert isinstance(answer, RequestRefused)
            assert failure_kind(str(answer), refused=True) == "engine_died"
            assert "vLLM ended (status 137)" in str(answer)
        else:
            assert isinstance(answer, Completion) and answer.text == f"said {text}"
    # it died twice under all and once of each; on a slow machine the two come one after the other
    assert 5 <= starts <= 9
    assert sum("asked one at a time" in line for line in said) in (1, 2)
    assert sum("it dies of one question" in line for line in said) == 1  # said once


@pytest.mark.parametrize(
    ("template", "drops"),
    [
        (lambda turns: [t["content"] for t in turns if t["role"] != "system"], True),
        (lambda turns: [t["content"] for t in turns], False),
        (lambda turns: [turns[-1]["role"]], False),  # not told: it writes no text at all
    ],
)
def test_a_system_turn_that_the_template_leaves_out_is_noticed(template, drops):
    async def post(path, body, final):
        return {"tokens": "".join(template(orjson.loads(body)["messages"])).split()}

    chat = SimpleNamespace(model="m", server=SimpleNamespace(post=post))
    engine = make({"engine": "vllm", "url": "http://127.0.0.1:9", "model": "m"}, "local")
    assert asyncio.run(engine._drops_system(chat)) is drops


def test_a_fraction_of_a_gib_is_asked_for_in_bytes(monkeypatch):
    """vLLM reads VLLM_CPU_KVCACHE_SPACE as a whole number, and it would win over the command
    line."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    process = VllmProcess(VllmConfig(model="m", kv_cache_gib=0.25), "m", 1, "local", None)
    words = command_line(process)
    if not has_gpu():
        assert words[words.index("--kv-cache-memory-bytes") + 1] == str(2**28)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(process)
    more = VllmConfig(model="m", env={"VLLM_CPU_KVCACHE_SPACE": "2"})
    assert environment(VllmProcess(more, "m", 1, "local", None))["VLLM_CPU_KVCACHE_SPACE"] == "2"
    with pytest.raises(ValueError, match="finite"):
        VllmConfig(model="m", kv_cache_gib=float("inf"))


def test_gpus_that_the_environment_hides_are_no_gpus():
    assert gpus_hidden({"CUDA_VISIBLE_DEVICES": ""}) and gpus_hidden({"HIP_VISIBLE_DEVICES": "-1"})
    assert not gpus_hidden({"CUDA_VISIBLE_DEVICES": "0,1"}) and not gpus_hidden({})


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_what_was_compiled_is_kept_in_the_cache(monkeypatch, tmp_path):
    process = VllmProcess(VllmConfig(model="m"), "m", 1, "local", None)
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    kept = Path(environment(process)["VLLM_CACHE_ROOT"])
    assert kept.parent == tmp_path and kept.name.startswith("vllm-")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    assert environment(process)["VLLM_CACHE_ROOT"] == "/mine"


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_compiled_function_is_loaded_again():
    """The function that vLLM reads back on a CPU lacks `finalize_loading`, which vLLM asks for."""
    import torch

    from prefab.factory.engines import vllm_plugin

    class Loaded:
        class _artifacts:
            compiled_fn = staticmethod(lambda x: x)

    before = torch.compiler.load_compiled_function
    torch.compiler.load_compiled_function = lambda file: Loaded()
    try:
        vllm_plugin.register()
        vllm_plugin.register()  # vLLM may load a plugin twice
        loaded = torch.compiler.load_compiled_function("file")
        assert loaded._artifacts.compiled_fn.finalize_loading(None) is None
        assert loaded._artifacts.compiled_fn(3) == 3
    finally:
        torch.compiler.load_compiled_function = before


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_second_start_compiles_nothing(tmp_path):
    """On an empty cache. vLLM finds the plugin by the installed project's entry point."""
    from importlib.metadata import entry_points

    assert "prefab" in entry_points(group="vllm.general_plugins").names
    logs = []
    for start in ("first", "second"):
        log = tmp_path / f"{start}.log"
        engine = make(
            {
                "engine": "vllm",
                "model": "prefab-nano",
                "log_file": str(log),
                "env": {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
            },
            "local",
        )
        engine.mute()

        async def once(engine=engine):
            await engine.start()
            await engine.stop()

        asyncio.run(once())
        logs.append(log.read_text())
    assert "saved AOT compiled function" in logs[0] and "Directly load AOT" not in logs[0]
    assert "Directly load AOT compilation" in logs[1]
    assert "Compiling model again" not in logs[1]


def test_a_server_that_is_not_there_is_said_to_be():
    engine = make(
        {"engine": "vllm", "model": "m", "url": "http://127.0.0.1:13", "retries": 0}, "far"
    )
    with pytest.raises(EngineError, match="no vLLM server at http://127.0.0.1:13"):
        asyncio.run(engine.start())


def test_configuration_wants_a_model_or_an_address():
    with pytest.raises(ConfigError, match="name a `model`"):
        make({"engine": "vllm"}, "local")
    with pytest.raises(ConfigError, match="not both"):
        make({"engine": "vllm", "url": "http://a", "urls": ["http://b"]}, "local")


def test_ids_count_once_and_spellings_have_several():
    """A sentencepiece tokenizer: a space comes before the first word, and both spellings are one
    token."""
    words = {"A": [7], " A": [7], "\n": [1, 2], "\nA": [1, 2, 8], "\n A": [1, 2, 7]}

    async def tokenize(text):
        return words[text]

    read = IdRead(tokenize)
    asyncio.run(read.prepare(("A", " A")))
    assert read.fields(("A", " A"))["logprob_token_ids"] == [7, 8]
    entries = [
        {"token": "token_id:7", "logprob": -1.0},
        {"token": "token_id:7", "logprob": -1.0},
        {"token": "token_id:8", "logprob": float("nan")},
        {"token": "token_id:9", "logprob": 0.0},
    ]
    with pytest.raises(Malformed):  # id 8 has no number: what A has is not known
        read.parse(entries, ("A", " A"))
    entries[2]["logprob"] = -2.0
    found, exactness = read.parse(entries, ("A", " A"))
    assert found == {"A": pytest.approx(log(exp(-1.0) + exp(-2.0)))} and exactness == "exact"
    assert read.parse(entries[:1], ("A", " A")) == ({}, "exact")


CRITIQUE = ("None", "Fault", " None", " Fault")


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        # a byte-level tokenizer that has " Fault" whole, and Fault as two tokens
        ({"None": [4], " None": [5], "Fault": [6, 7], " Fault": [8]}, [4, 6, 5, 8]),
        # both words with a space begin with the space, which says nothing about either
        ({"None": [4], " None": [3, 4], "Fault": [6, 7], " Fault": [3, 6, 7]}, [4, 6]),
        # Fault begins as None does: only its spelling with a space is read
        ({"None": [4], " None": [5], "Fault": [4, 7], " Fault": [8]}, [4, 5, 8]),
    ],
)
def test_a_word_of_several_tokens_is_read_by_its_first_one_where_it_is_its_own(words, ids):
    async def tokenize(text):
        return [1, *words[text[1:]]] if len(text) > 1 and text[0] == "\n" else words.get(text, [1])

    read = IdRead(tokenize)
    asyncio.run(read.prepare(CRITIQUE, opening=True))
    assert read.fields(CRITIQUE)["logprob_token_ids"] == ids
    if 6 in ids:
        assert read.label_of("token_id:6", CRITIQUE) == "Fault"


def test_a_word_whose_first_token_is_not_its_own_is_refused():
    words = {"None": [4, 5], " None": [3, 4, 5], "Fault": [4, 7], " Fault": [3, 4, 7]}

    async def tokenize(text):
        return [1, *words[text[1:]]] if len(text) > 1 and text[0] == "\n" else words.get(text, [1])

    with pytest.raises(EngineError, match="more than one token"):
        asyncio.run(IdRead(tokenize).prepare(CRITIQUE, opening=True))
    with pytest.raises(EngineError, match="more than one token"):
        asyncio.run(IdRead(tokenize).prepare(CRITIQUE))


def test_a_prompts_calls_meet_one_replica_and_all_replicas_work():
    router, instructions = PrefixRouter(3), "Judge these answers. " * 60
    homes: dict[int, set[int]] = {}
    load = [0, 0, 0]
    for prompt in range(60):
        for principle in range(6):
            text = f"{instructions}{f'pair {prompt} ' * 80}under principle {principle}"
            at = router.pick([Message("user", text)], load, [0, 1, 2])
            load[at] += 1
            homes.setdefault(prompt, set()).add(at)
        load = [max(0, n - 2) for n in load]
    assert sum(len(at) == 1 for at in homes.values()) >= 45
    assert all(sum(at == {i} for at in homes.values()) >= 5 for i in range(3))
    assert router.pick([Message("user", "x")], [0, 0, 0], [2]) == 2


@pytest.mark.parametrize(
    "args", [["--api-server-count", "4"], ["--data-parallel-size=8"], ["--seed", "1"]]
)
def test_several_api_servers_are_started_by_the_command_that_can(args):
    config = VllmConfig(model="prefab-nano", args=args)
    words = command_line(VllmProcess(config, "prefab-nano", 1, "local", None))
    alone = args[0] == "--seed"
    start = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert words[1:4] == (start if alone else ["-m", "vllm.entrypoints.cli.main", "serve"])
    assert words[4] == "prefab-nano" and words[-len(args) :] == args
    assert ("--model" in words) == alone
