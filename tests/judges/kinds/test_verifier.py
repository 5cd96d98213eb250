"""Verifiers: what is right, what is wrong, what cannot be decided, and programs that try to pass
without solving."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefab.factory.errors import ConfigError
from prefab.factory.keys import request_key
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.paths import IMPORT_ROOT
from prefab.factory.types import Completion, Message, Prompt, Request, Sample, Verdict
from prefab.factory.uses import ScoreUse
from prefab.judges import sandbox
from prefab.judges.base import NO_PRINCIPLE, RequestContext, Score
from prefab.judges.kinds import verifier
from prefab.judges.sandbox import timeout_worker

PROMPT = Prompt("p1", (Message("user", "What is six times seven?"),))
ADD = "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(-1, 1) == 0"
LIMITS = sandbox.Limits(timeout_s=1.5)


def config(check: str, reference=None, **more) -> verifier.VerifierConfig:
    return verifier.VerifierConfig(name="v", check=check, reference=reference, **more)


def score(config: verifier.VerifierConfig, text: str, prompt: Prompt = PROMPT) -> Score:
    """What a judge says of one answer, through request, check and parse."""
    found = verifier.check(json.loads(request(config, text, prompt).messages[-1].content))
    return parse(Completion(json.dumps(found), "stop"), config)


def request(
    config: verifier.VerifierConfig, text: str, prompt: Prompt = PROMPT, index: int = 0
) -> Request:
    sample, judge = Sample(prompt.id, index, text), verifier.VerifierJudge(config)
    return judge.request(prompt, sample, NO_PRINCIPLE, 0, 0, RequestContext())


def parse(completion: Completion, config: verifier.VerifierConfig) -> Score:
    return verifier.VerifierJudge(config).decode(None, completion)


def verdict(a: Score, b: Score) -> Verdict:
    return verifier.VerifierJudge(config("exact", "a")).verdict_of([a], [b], ())


@pytest.mark.parametrize(
    "text, right, wanted, more",
    [
        ("42", "42", 1.0, {}),
        ("  42\n", "42", 1.0, {}),
        ("42.", "42", 0.0, {}),
        ("Paris", "paris", 0.0, {}),
        ("PARIS ", ["paris", "Lutetia"], 1.0, {"ignore_case": True}),
        ("a  b", "a b", 0.0, {"ignore_space": False}),
        ("cafe\u0301", "caf\u00e9", 1.0, {}),
        ("I think\nAnswer: B", "B", 1.0, {"extract": r"Answer: (\w)"}),
        ("Answer: A. No, Answer: B", "B", 1.0, {"extract": r"Answer: (\w)"}),
        ("B", "B", 0.0, {"extract": r"Answer: (\w)"}),
    ],
)
def test_exact(text, right, wanted, more):
    assert score(config("exact", right, **more), text) == Score(wanted)


@pytest.mark.parametrize(
    "text, value",
    [
        ("It is 42.", 42),
        ("1,234.5", Fraction(2469, 2)),
        ("so 3/4", Fraction(3, 4)),
        ("12%", Fraction(3, 25)),
        ("5-3", 3),
        ("x = -3", -3),
        ("(\u22127)", -7),
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        ("-.5", Fraction(-1, 2)),
        ("$1,000,000", 10**6),
        ("1.5e-3", Fraction(3, 2000)),
        ("1/0", None),
        ("none at all", None),
        ("9" * 500, None),
        ("1e9999", 9999),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert verifier.number(text) == value


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back(value):
    assert verifier.number(f"first 17, then {value}") == value


@given(st.text(max_size=300))
def test_reading_a_number_never_raises(text):
    assert verifier.number(text) is None or isinstance(verifier.number(text), Fraction)


def test_numeric_within_tolerance():
    assert score(config("numeric", 1 / 3), "about 0.3333333").value == 1.0
    assert score(config("numeric", 1 / 3), "about 0.33333").value == 0.0
    assert score(config("numeric", 0, absolute=0.01), "0.009").value == 1.0
    assert score(config("numeric", 0), "0.009").value == 0.0
    assert score(config("numeric", "1/3", tolerance=0), "1/3").value == 1.0
    assert score(config("numeric", 42), "no idea").value == 0.0
    assert request(config("numeric", 42), "x", index=0) == request(
        config("numeric", "42"), "x", index=0
    )


def test_regex_and_one_that_would_never_end(monkeypatch):
    assert score(config("regex", r"\bforty-two\b"), "It is Forty-two.").value == 0.0
    assert (
        score(config("regex", r"\bforty-two\b", ignore_case=True), "It is Forty-two.").value == 1.0
    )
    assert score(config("regex", r"\d+", whole=True), "42 apples").value == 0.0
    with monkeypatch.context() as quick:
        quick.setattr(verifier, "PATTERN_TIMEOUT_S", 0.5)
        assert score(config("regex", r"^(a+)+$"), "a" * 60 + "!").value == 0.0
        assert score(config("exact", "x", extract=r"((?:a+)+)$"), "a" * 60 + "!").value == 0.0
        assert score(config("regex", r"\s+$"), " " * 7_000_000 + "x").value == 0.0
    assert score(config("regex", r"\d+"), "42").value == 1.0  # the next one is answered again


_SLOW_BLOCKS = re.compile(r"^(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^\1[ \t]*$", re.M | re.S)
FENCES = {
    "never closed": "```py\n" * 6000,
    "of two kinds": "```a\n~~~b\n" * 4000,
    "one long": "`" * 31_000 + "\n",
    "each longer than the last": "".join("`" * (3 + n) + "\n" for n in range(250)),
    "with blanks": ("```" + " " * 100 + "x\n") * 300,
    "on one line": "```" * 10_000,
    "closed": "```py\nx\n```\n" * 3000,
}


@pytest.mark.parametrize("name", FENCES)
def test_code_blocks_take_time_in_proportion_to_the_text(name):
    began = time.process_time()
    verifier.code_blocks(FENCES[name])
    verifier.code_blocks(FENCES[name] * 8)
    assert time.process_time() - began < 1.0


@given(st.lists(st.sampled_from([*"`~", "```", "~~~", "````", "\n", " ", "\t", "py", "x", "\r"])))
def test_code_blocks_are_those_of_the_pattern_that_was_slow(parts):
    text = "".join(parts)
    blocks = [(name.lower(), body) for _, name, body in _SLOW_BLOCKS.findall(text)]
    assert verifier.code_blocks(text) == blocks


SCHEMA = {
    "type": "object",
    "required": ["n"],
    "properties": {"n": {"type": "integer"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('{"n": 1}', 1.0),
        ('{"n": "1"}', 0.0),
        ('Here:\n```json\n{"n": 1}\n```\nDone.', 1.0),
        ('{"n": 1', 0.0),
        ("", 0.0),
        ('{"n": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ('{"n": 1, "m": 2}', 0.0),
        ("n: 1", 0.0),
    ],
)
def test_json_schema(text, wanted):
    assert score(config("json_schema", SCHEMA), text).value == wanted


def test_imports_do_not_count_into_the_time_of_an_answer(monkeypatch):
    """Else a right answer would be wrong on a machine that is so busy that imports take seconds."""
    limits = []
    line = timeout_worker._Helper.line
    monkeypatch.setattr(
        timeout_worker._Helper,
        "line",
        lambda self, limit_s: limits.append(limit_s) or line(self, limit_s),
    )
    job = {"do": "validate", "text": '{"n": 1}', "schema": SCHEMA}
    with ThreadPoolExecutor(1) as pool:  # a thread has a process of its own
        for _ in range(2):
            assert pool.submit(timeout_worker.ask, job, 50.0).result() == {"passed": 1, "total": 1}
    start_s = timeout_worker._START_S
    assert limits == [start_s, start_s, 50.0, 50.0]  # start, imports, twice an answer


@pytest.mark.slow
def test_a_schema_that_points_elsewhere_is_not_fetched(monkeypatch):
    asked = config("json_schema", {"$ref": "http://127.0.0.1:9/schema.json"})
    assert score(asked, "{}") == Score(None, reason="program")
    with monkeypatch.context() as quick:
        quick.setattr(verifier, "PATTERN_TIMEOUT_S", 0.5)
        never = config("json_schema", {"type": "string", "pattern": "^(a+)+$"})
        assert score(never, json.dumps("a" * 60 + "!")).value == 0.0
        unique = config("json_schema", {"type": "array", "uniqueItems": True})
        assert score(unique, json.dumps([{"n": [n]} for n in range(100_000)])).value == 0.0
    assert score(config("json_schema", True), "[" * 980 + "]" * 980).value == 1.0


@pytest.mark.parametrize(
    "more, told",
    [
        ({"check": "exact"}, "say what is right"),
        ({"check": "numeric", "reference": "forty"}, "not a number"),
        ({"check": "regex", "reference": "("}, "missing ."),
        ({"check": "json_schema", "reference": {"type": 7}}, "schema"),
        ({"check": "python", "reference": "def"}, "invalid syntax"),
        ({"check": "exact", "reference": 7}, "text"),
        ({"check": "exact", "reference": "a", "extract": "a"}, "group"),
        ({"check": "guess", "reference": "a"}, "exact"),
        ({"check": "exact", "reference": "a", "extract": "("}, "extract"),
        ({"check": "numeric", "reference": True}, "number"),
    ],
)
def test_mistakes_are_told(more, told):
    with pytest.raises(ValidationError, match=told):
        verifier.VerifierConfig(name="v", **more)


def test_references_by_prompt_and_their_mistakes(tmp_path):
    file = tmp_path / "references.jsonl"
    rows = [{"prompt": "p1", "reference": "42"}, {"prompt": "What is one?", "reference": "1"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    judge = config("exact", None, references=str(file))
    assert score(judge, "42").value == 1.0
    assert score(judge, "1", Prompt("zz", (Message("user", "What is one?"),))).value == 1.0
    assert score(judge, "1", Prompt("yy", (Message("user", "What is two?"),))) == Score(
        None, reason="program"
    )
    assert (
        score(
            config("exact", "2", references=str(file)),
            "2",
            Prompt("yy", (*PROMPT.messages[:0], Message("user", "What is two?"))),
        ).value
        == 1.0
    )
    file.write_text(
        '{"prompt": "p1", "reference": "1"}\n{"prompt": "p1", "reference": "2"}\n\nnonsense\n'
    )
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError) as caught:
        score(judge, "42")
    assert [p.line for p in caught.value.problems] == [2, 4]
    with pytest.raises(ConfigError, match="no such file"):
        score(config("exact", None, references=str(tmp_path / "none.jsonl")), "1")


def test_what_decides_is_the_identity_and_what_does_not_is_not():
    one = config("numeric", 42)
    assert verifier.identity(one) == verifier.identity(
        config("numeric", 43)
    )  # the reference is in the request
    assert verifier.identity(one) == verifier.identity(
        config("numeric", 42, weight=3.0, timeout_s=3, workers=9)
    )
    assert verifier.identity(one) != verifier.identity(config("numeric", 42, tolerance=0.1))
    assert verifier.identity(config("python", ADD)) != verifier.identity(
        config("python", ADD, memory_mb=64)
    )
    assert verifier.identity(one).startswith("verifier:") and verifier.Verifier(
        one
    ).identity == verifier.identity(one)
    a, b = (request(one, text, index=i) for i, text in enumerate(("1", "2")))
    assert request_key(a) != request_key(b) and request(one, "1", index=7) == a


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        '{"passed": 2, "total": 1}',
        '{"passed": -1, "total": 1}',
        '{"passed": 0, "total": 0}',
        '{"passed": "x", "total": 1}',
        "\x00",
    ],
)
def test_what_is_no_result_is_unscored(text):
    assert parse(Completion(text, "stop"), config("exact", "a")) == Score(None, reason="parse")


def test_verdicts():
    assert verdict(Score(1.0), Score(0.0)) == Verdict(1.0, "a", None, 1.0)
    assert verdict(Score(0.5), Score(0.75)) == Verdict(0.0, "b", None, 1.0)
    assert verdict(Score(0.0), Score(0.0)) == Verdict(0.5, "tie", None, 1.0, 1.0)
    unscored = verdict(Score(1.0), Score(None, reason="program"))
    assert unscored.p_a is None and unscored.winner is None and unscored.reason == "program"


def test_checks_are_kept_in_the_ledger(tmp_path):
    judge = config("python", ADD, timeout_s=5)
    texts = [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "def add(a, b): return 3",
        "no code",
    ]
    asks = [
        (
            request(judge, text, index=i),
            ScoreUse(1, "p1", i, "", "v"),
        )
        for i, text in enumerate(texts)
    ]

    async def run() -> tuple[list[float], int]:
        ledger, engine = Ledger.open(tmp_path), verifier.Verifier(judge)
        await engine.start()
        answers = await ledger.ask_many(asks, engine)
        await engine.stop()
        await engine.stop()
        await ledger.close()
        return [parse(a, judge).value for a in answers], ledger.stats.asked

    assert asyncio.run(run()) == ([1.0, pytest.approx(1 / 3), 0.0], 3)
    assert asyncio.run(run()) == ([1.0, pytest.approx(1 / 3), 0.0], 0)


SOLVED = {
    "plain": "def add(a, b):\n    return a + b",
    "chatter": "print('x' * 10**6)\nimport sys\nsys.stderr.write('y' * 10**6)\ndef add(a, b): return a + b",
    "thinks it over": "import time\ndef add(a, b):\n    time.sleep(0.05)\n    return a + b",
}


@pytest.mark.parametrize("name", SOLVED)
def test_a_solution_passes(name):
    found = sandbox.run_tests(ADD, SOLVED[name], LIMITS)
    assert (found["passed"], found["total"]) == (3, 3), found


UNSOLVED = {
    "wrong": "def add(a, b): return 99",
    "empty": "",
    "prose": "I would add the two numbers.",
    "garbage": "\x00\ud800 \u2603 =",
    "deep": "(" * 5000,
    "endless": "def add(a, b):\n    while True: pass",
    "endless at once": "while True: pass",
    "sleeps": "import time\ndef add(a, b): time.sleep(1000)",
    "deaf": "import signal, time\nfor n in range(1, 30):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
    "def add(a, b): time.sleep(1000)",
    "memory": "def add(a, b): return 'x' * 10**11",
    "memory at once": "x = [0] * 10**10",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit later": "import os\ndef add(a, b): os._exit(0)",
    "kills": "import os, signal\ndef add(a, b):\n  os.kill(os.getppid(), 9)\n  os.kill(-1, 9)",
    "says so": "print('{\"passed\": 3, \"total\": 3}')\nprint('OK')\nimport os\nfor fd in range(64):\n"
    '  try: os.write(fd, b\'{"passed": 3, "total": 3}\\n\')\n  except OSError: pass\ndef add(a, b): return 99',
    "equal to all": "class E:\n  def __eq__(s, o): return True\n  __ne__ = lambda s, o: False\n  __hash__ = None\n"
    "def add(a, b): return E()",
    "a number equal to all": "class E(int):\n  def __eq__(s, o): return True\ndef add(a, b): return E(99)",
    "patches": "import builtins, unittest\nbuiltins.AssertionError = ZeroDivisionError\nbuiltins.all = lambda x: True\n"
    "unittest.TestCase.assertEqual = lambda *a: None\nimport operator\noperator.eq = lambda a, b: True\n"
    "def add(a, b): return 99",
    "patches its host": "import __main__, sys\n__main__.encode = lambda v, o: True\n"
    "__main__.send.__code__ = (lambda sock, message: sock.sendall(b'\\0\\0\\0\\x10' "
    "+ b'{\"value\": true  }')).__code__\ndef add(a, b): return 99",
    "looks up the stack": "import sys\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n    for v in f.f_locals.values():\n"
    "      if isinstance(v, dict) and 'passed' in v: v['passed'] = 3\n    f = f.f_back\n  return 99",
    "raises": "def add(a, b): raise ModuleNotFoundError('tests')",
    "never the same": "import random\ndef add(a, b): return random.random()",
    "nan": "def add(a, b): return float('nan')",
    "huge": "def add(a, b): return 'x' * (9 << 20)",
    "calls back for ever": "def add(a, b):\n  while True: pass\n  yield",
}


@pytest.mark.parametrize("name", UNSOLVED)
def test_nothing_else_passes(name):
    found = sandbox.run_tests(
        "assert add(1, 2) == 3", UNSOLVED[name], sandbox.Limits(timeout_s=1.0, memory_mb=128)
    )
    assert found.get("passed") == 0 and found["total"] == 1, found


def test_what_the_jail_keeps_in(tmp_path):
    isolated, words = sandbox.isolation_status()
    if not isolated:
        pytest.skip(words)
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    code = f"""
import os, socket, tempfile
def told(work):
    try: return str(work())
    except OSError as error: return type(error).__name__ + ' ' + str(error.errno)
def network(): return told(lambda: socket.create_connection(('127.0.0.1', 22), 1))
def write_outside(): return told(lambda: open({str(outside / "x")!r}, 'w'))
def write_big(): return told(lambda: open('/tmp/big', 'wb').write(b'x' * (20 << 20)))
def write_many(): return told(lambda: [open(f'/tmp/{{i}}', 'wb').write(b'x' * (4 << 20)) for i in range(20)])
def scratch():
    with tempfile.NamedTemporaryFile('w+') as file:
        file.write('kept'); file.seek(0)
        return file.read()
def others(): return [p for p in os.listdir('/proc') if p.isdigit()]
def forks():
    n = 0
    for _ in range(50):
        try:
            if os.fork() == 0:
                import time; time.sleep(5); os._exit(0)
            n += 1
        except OSError: pass
    return n
def environment(): return sorted(os.environ)
def user(): return os.getuid()
def files(): return os.listdir('/tmp')
"""
    tests = """
def test_network(): assert network().startswith(('OSError 101', 'ConnectionRefusedError'))
def test_outside(): assert write_outside() in ('OSError 30', 'PermissionError 13', 'FileNotFoundError 2')
def test_scratch(): assert scratch() == 'kept' and files() == []
def test_big(): assert write_big() == 'OSError 27'
def test_many(): assert write_many() == 'OSError 28'
def test_others(): assert others() == []
def test_forks(): assert forks() == PROCESSES - 1
def test_environment(): assert not [name for name in environment() if 'KEY' in name or name == 'HOME']
def test_user(): assert user() != 0
"""
    for processes in (1, 5):
        found = sandbox.run_tests(
            tests.replace("PROCESSES", str(processes)),
            code,
            sandbox.Limits(timeout_s=5, processes=processes),
        )
        assert found["passed"] == found["total"] == 9, found
    assert not list(outside.iterdir())


def test_no_process_is_left():
    code = (
        "import os, time, ctypes\nctypes.CDLL(None).prctl(1, 0)\nfor _ in range(3):\n  try:\n    if os.fork() == 0:\n"
        "      os.setsid()\n      time.sleep(777)\n  except OSError: pass\ndef add(a, b): time.sleep(777)"
    )
    if not sandbox.isolation_status()[0]:
        code = code.replace("range(3)", "range(0)")
    before = _descendants()
    found = sandbox.run_tests(
        "assert add(1, 2) == 3", code, sandbox.Limits(timeout_s=1.0, processes=4)
    )
    assert found["passed"] == 0
    end = time.monotonic() + 5
    while _descendants() - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not _descendants() - before


def _descendants() -> set[int]:
    """Processes of a user of the sandbox's, or that sleep in it."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"candidate" in (folder / "cmdline").read_bytes()
                or b"class Host" in (folder / "cmdline").read_bytes()
            ):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_with_limits_only(tmp_path):
    """As where no namespaces are to be had; in a process of its own, by an ordinary user."""
    code = f"""
import sys; sys.path.insert(0, {str(IMPORT_ROOT)!r})
from prefab.judges import sandbox
sandbox._known.append({{"isolated": False, "why": "none here", "says": "limits only"}})
quick = sandbox.Limits(timeout_s=1.0)
fork = "import os, time\\ndef add(a, b):\\n  if os.fork() == 0: time.sleep(99)\\n  return a + b"
for answer in ("def add(a, b): return a + b", "def add(a, b):\\n while True: pass", "import os\\nos._exit(0)", fork):
    print(sandbox.run_tests("assert add(1, 2) == 3", answer, quick)["passed"])
try: sandbox.run_tests("assert add(1, 2) == 3", "", quick, isolated=True)
except sandbox.NoSandbox as error: print(error)
"""
    python, user = sys.executable, {}
    if os.geteuid() == 0:
        python, user = "/usr/bin/python3", {"user": 54_321, "group": 54_321, "extra_groups": []}
    if not Path(python).exists():
        pytest.skip("no Python that an ordinary user may run")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/", **user)
    if "Permission" in done.stderr:
        pytest.skip("the project's folder is root's alone")
    assert done.stdout.split("\n")[:4] == ["1", "0", "0", "0"], done.stdout + done.stderr
    assert "isolation is required" in done.stdout


BROKEN = {
    "syntax": "assert add(1,",
    "nothing": "x = 1",
    "import": "import no_such_module\nassert add(1, 2) == 3",
    "hangs": "while True: pass\nassert add(1, 2) == 3",
    "leaves": "import os\nos._exit(0)\nassert add(1, 2) == 3",
    "crosses": "assert add(open('/dev/null'), 2) == 3",
    "fixture": "def test_add(tmp_path): assert add(1, 2) == 3",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tests_are_nobodys_fault(name):
    found = sandbox.run_tests(BROKEN[name], SOLVED["plain"], sandbox.Limits(timeout_s=1.0))
    assert "broken" in found and "passed" not in found, found


def test_broken_tests_are_unscored():
    judge = config("python", "assert add(1, 2) == 3\nimport no_such_module\nassert add(1, 2) == 4")
    assert score(judge, SOLVED["plain"]) == Score(None, reason="program")
    assert score(config("python", ADD, partial=False), "def add(a, b): return 3").value == 0.0


RICH = """
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __add__(self, other): return Point(self.x + other.x)
    def __len__(self): return self.x
class Mine(ValueError): pass
def bad(): raise Mine('no')
def each(f, xs): return [f(x) for x in xs]
def count():
    yield from (1, 2)
K = (1, {2: {3}}, b'x', 1j, -(10**30), None, [frozenset({1})])
"""
TESTS = """
import unittest
import answer
from answer import K, Mine, Point, each
from fractions import Fraction
def test_data(): assert K == (1, {2: {3}}, b'x', 1j, -(10**30), None, [frozenset({1})]) and type(K[1]) is dict
def test_functions_cross(): assert each(lambda x: Fraction(x, 2), [1, 2]) == [Fraction(1, 2), 1]
def test_objects():
    p = Point(3)
    assert p.x == 3 and p + Point(4) == Point(7) and p != Point(4) and isinstance(p, Point) and len(p) == 3
    p.x = 5
    assert p.x == 5 and not p == 5
def test_errors():
    try: bad()
    except Mine as error: assert str(error) == 'no'
    else: raise AssertionError
    try: bad()
    except ValueError: pass
def test_generators(): assert list(count()) == [1, 2] and list(answer.count()) == [1, 2]
def test_this_one_fails(): assert each(str, [1]) == [1]
class TestMore(unittest.TestCase):
    def setUp(self): self.p = Point(1)
    def test_raises(self):
        with self.assertRaises(Mine): bad()
        self.assertEqual(self.p.x, 1)
    def test_this_one_fails_too(self): self.assertEqual(self.p.x, 2)
"""


def test_objects_errors_functions_and_generators_cross():
    found = sandbox.run_tests(TESTS, RICH, sandbox.Limits(timeout_s=5))
    assert (found["passed"], found["total"], len(found["failures"])) == (6, 8, 2), found


def test_an_answer_that_dies_in_one_test_is_tried_on_the_others():
    code = "import os\ndef add(a, b):\n    if a == 2: os._exit(1)\n    return a + b"
    assert sandbox.run_tests(ADD, code, LIMITS)["passed"] == 2


def test_the_answer_does_not_see_the_tests():
    """Not in its memory, its arguments or its environment: a reference cannot be looked up."""
    code = (
        "import gc, sys\ndef look():\n    known = repr(sys.argv) + ''.join(repr(o)[:5000] for o in gc.get_objects())\n"
        "    return 'SECRET' in known.replace('\\'SEC' + 'RET\\'', '')"
    )
    found = sandbox.run_tests(
        "SECRET = 'the SECRET is 42'\nassert look() is False", code, sandbox.Limits(timeout_s=10)
    )
    assert found["passed"] == 1, found


def test_many_at_once():
    with ThreadPoolExecutor(4) as pool:
        work = [
            pool.submit(sandbox.run_tests, ADD, SOLVED["plain"], sandbox.Limits(timeout_s=10))
            for _ in range(8)
        ]
        assert [future.result()["passed"] for future in work] == [3] * 8


@settings(deadline=None, max_examples=25)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    )
)
def test_plain_data_crosses_unchanged(value):
    from prefab.judges.sandbox import candidate

    sent = json.loads(json.dumps(candidate.encode(value, None)))
    back = candidate.decode(sent, None)
    assert back == value and repr(back) == repr(value)
