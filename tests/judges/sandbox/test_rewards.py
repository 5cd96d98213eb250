"""Answers that try to pass tests without solving anything, or not to be counted as wrong."""

from __future__ import annotations

import pytest

from prefab.judges import sandbox

LIMITS = sandbox.Limits(timeout_s=1.0)

_OPERATORS = """add sub mul truediv floordiv mod pow matmul and or xor lshift rshift radd rsub rmul
rtruediv rfloordiv rmod rpow rand ror rxor divmod iadd isub eq ne lt le gt ge contains getitem"""
_CONVERSIONS = [
    "neg",
    "pos",
    "abs",
    "invert",
    "round",
    "trunc",
    "floor",
    "ceil",
    "int",
    "index",
    "len",
    "hash",
]
_METHODS = [
    "startswith",
    "endswith",
    "isdigit",
    "isalpha",
    "issubset",
    "issuperset",
    "isdisjoint",
    "is_integer",
]


def _cheat(operator: str, conversion: str, more: str = "") -> str:
    lines = [f"    def __{name}__(self, *a): {operator}" for name in _OPERATORS.split()]
    lines += [f"    def __{name}__(self, *a): {conversion}" for name in _CONVERSIONS]
    lines += [f"    def {name}(self, *a): return True" for name in _METHODS]
    lines += ["    def __float__(self): return 0.0", "    def __bool__(self): return BOOL"]
    text = "\n".join(["class E:", "    seen = None", *lines, more, "def f(*a): return E()"])
    return text.replace("BOOL", "False" if "0" in operator else "True")


CHEATS = {
    "zero": _cheat("return 0", "return 0"),
    "itself": _cheat("return self", "return 0"),
    "true": _cheat("return True", "return 1"),
    "itself, a list of itself": _cheat(
        "return self", "return 0", "    def __iter__(self): return iter([E(), E()])"
    ),
    "new zeros": _cheat("return E() if a else 0", "return 0"),
    "what it has seen": _cheat(
        "E.seen = a[0] if a and isinstance(a[0], (float, str)) else E.seen; return 0", "return 0"
    )
    + "\n_f = f\ndef f(*a): return E() if E.seen is None else E.seen",
}
CHEATS["no items, but three"] = _cheat(
    "return 0", "return 3", "    def __iter__(self): return iter([])"
)
FORMS = {
    "near": "assert abs(f() - 1.0) < 1e-6",
    "near, written as a range": "assert -1e-6 < f() - 1.0 < 1e-6",
    "near, squared": "assert (f() - 1.0) ** 2 < 1e-9",
    "near, relative": "assert abs(f() - 1.0) / 1.0 <= 1e-6 * 1.0",
    "near, from the other side": "assert abs(1.0 - f()) < 1e-6",
    "near, isclose": "import math\nassert math.isclose(f(), 1.0)",
    "near, isclose of a module that the tests did not import": "assert math.isclose(f(), 1.0)",
    "near, rounded": "assert round(f(), 3) == 1.0",
    "near, rounded difference": "assert round(f() - 1.0, 7) == 0",
    "near, all of a list": "assert all(abs(x - 1.0) < 1e-6 for x in f()) and list(f())",
    "near, two lists": "assert max(abs(a - b) for a, b in zip(f(), [1.0, 2.0])) < 1e-6",
    "near, all of a list of three": (
        "out = f()\nfor got, wanted in zip(out, [1.0, 2.0, 3.0]): assert got == wanted\n"
        "assert len(out) == 3"
    ),
    "near, all of three items": (
        "out = f()\nassert len(out) == 3 and all(got == i for i, got in enumerate(out))"
    ),
    "no difference": "assert f() - 1.0 == 0",
    "no difference, as a truth": "assert not f() - 1.0",
    "no difference of sets": "assert not f() - {1, 2} and not f() ^ {1, 2}",
    "no difference of sets, by length": "assert len(f() ^ {1, 2}) == 0",
    "quotient": "assert f() / 3.0 == 0 or f() // 3 == 1",
    "remainder": "assert f() % 7 == 0",
    "remainder, as a truth": "assert not f() % 2",
    "remainder, from divmod": "assert divmod(f(), 7)[1] == 0",
    "bits": "assert f() ^ 5 == 0",
    "bits set": "assert f() & 4 and f() | 2",
    "shifted": "assert f() << 1 == 0 or f() >> 1",
    "product": "assert f() * 3 == 0 or f() * 3 == 3",
    "sum": "assert f() + 1 == 0 or f() + 1 == 1",
    "its square": "assert f(2) * f(2) == 1",
    "its square, near": "assert abs(f(2) ** 2 - 2) < 1e-9",
    "its square, near, by a product": "assert abs(f(2) * f(2) - 2) < 1e-9",
    "equal": "assert f() == 1.0",
    "equal, from the other side": "assert 1.0 == f()",
    "not unequal": "assert not f() != 1.0",
    "one of": "assert f() in (1.0, 2.0)",
    "has an item": "assert 3 in f()",
    "has a part": "assert 'Hello' in f()",
    "has no item": "assert 3 not in f() and 5 in f()",
    "a bound": "assert f() >= 1.0 or f() <= 1.0",
    "a range": "assert 0.0 <= f() <= 2.0",
    "a range, from the other side": "assert 2.0 >= f()",
    "sorted": "assert f() <= [1, 2] or f() >= [1, 2]",
    "a type": "assert isinstance(f(), (int, float, str, list, dict, bool))",
    "starts with": "assert f().startswith('Hello')",
    "digits": "assert f().isdigit()",
    "a subset": "assert f().issubset({1, 2}) and f().issuperset({1})",
    "a whole number": "assert f().is_integer()",
    "the method of an operator": "assert f().__sub__(1.0) == 0 or f().__eq__(1.0)",
    "the operator module": "import operator\nassert not operator.sub(f(), 1.0)",
}
METHODS = {
    "assertAlmostEqual": "self.assertAlmostEqual(f(), 1.0)",
    "assertAlmostEqual, from the other side": "self.assertAlmostEqual(1.0, f())",
    "assertAlmostEqual, delta": "self.assertAlmostEqual(f(), 1.0, delta=1e-6)",
    "assertEqual": "self.assertEqual(f(), 1.0)",
    "assertTrue": "self.assertTrue(abs(f() - 1.0) < 1e-6)",
    "assertFalse": "self.assertFalse(f() - 1.0)",
    "assertLess": "self.assertLess(abs(f() - 1.0), 1e-6)",
    "assertGreaterEqual": "self.assertGreaterEqual(f(), 1.0)",
    "assertIn": "self.assertIn(3, f())",
    "assertCountEqual": "self.assertCountEqual(f(), [3, 1])",
    "assertListEqual": "self.assertListEqual(f(), [3, 1])",
    "assertSequenceEqual": "self.assertSequenceEqual(f(), [3, 1])",
    "assertIsInstance": "self.assertIsInstance(f(), float)",
}
SEQUENCES = {
    "twice": "assert abs(f() - 1.0) < 1e-6\nassert f() == 1.0",
    "learnt from an item": "assert 3.5 in f()\nassert f() == 3.5",
    "learnt from a comparison": "assert f() == 7.5\nassert f() < 7.5\nassert f() == 7.5",
    "learnt from a method": "assert f().startswith('Hello')\nassert f() == 'Hello'",
}


def _as_tests(forms: dict[str, str], methods: dict[str, str]) -> dict[str, str]:
    functions = {
        name: f"def test_{at}():\n    " + form.replace("\n", "\n    ")
        for at, (name, form) in enumerate(forms.items())
    }
    return functions | {
        name: f"import unittest\nclass T{at}(unittest.TestCase):\n    def test(self): {body}"
        for at, (name, body) in enumerate(methods.items())
    }


def test_an_answer_replaces_no_name_of_the_tests():
    """Not a helper, a constant or a module, whenever the tests import all of the answer's names."""
    tests = """
import math
from math import isclose
EPS = 1e-6
def near(a, b): return abs(a - b) < EPS
from solution import *
def test_helper(): assert near(f(), 2.0)
def test_constant(): assert abs(f() - 2.0) < EPS
def test_function(): assert isclose(f(), 2.0)
def test_module(): assert math.isclose(f(), 2.0)
def test_other_names(): assert g() == 3
"""
    names = "def {0}(*a): return True\n".format
    code = "".join(map(names, ("near", "isclose"))) + "EPS = 9\ndef g(): return 3\n"
    code += "class math:\n    isclose = lambda *a: True\ndef f(): return 1.0"
    found = sandbox.run_tests(tests, code, LIMITS)
    assert (found["passed"], found["total"]) == (1, 5), found


@pytest.mark.parametrize(
    "cheat",
    [
        cheat if cheat == "what it has seen" else pytest.param(cheat, marks=pytest.mark.slow)
        for cheat in CHEATS
    ],
)
def test_no_object_passes_a_test_that_wants_plain_data(cheat):
    code = CHEATS[cheat] + "\nclass math:\n    isclose = staticmethod(lambda a, b: True)\n"
    tests = _as_tests(FORMS, METHODS)
    found = sandbox.run_tests("\n".join(tests.values()), code, LIMITS)
    assert found.get("total") == len(tests), found
    assert "cannot be loaded" not in str(found)
    if found.get("passed"):  # say which
        tests = {k: v for k, v in tests.items() if sandbox.run_tests(v, code, LIMITS).get("passed")}
        pytest.fail(str(sorted(tests)))
    for name, form in SEQUENCES.items():
        found = sandbox.run_tests(form, code, LIMITS)
        assert found.get("passed") == 0, (name, found)


CLASSES = """
import collections, enum
from dataclasses import dataclass
class Vector:
    def __init__(self, *xs): self.xs = list(xs)
    def __add__(self, o): return Vector(*[a + b for a, b in zip(self.xs, o.xs)])
    def __mul__(self, o):
        return Vector(*[x * o for x in self.xs]) if isinstance(o, int) else sum(a * b for a, b in zip(self.xs, o.xs))
    def __neg__(self): return self * -1
    def __abs__(self): return sum(x * x for x in self.xs) ** 0.5
    def __eq__(self, o): return self.xs == o.xs
    def __lt__(self, o): return abs(self) < abs(o)
    def __getitem__(self, i): return self.xs[i]
    def __len__(self): return len(self.xs)
    def __contains__(self, x): return x in self.xs
    def __bool__(self): return any(self.xs)
    def scale(self, k): return self * k
    @classmethod
    def zero(cls): return cls(0, 0)
class Trie:
    def __init__(self): self.words = set()
    def add(self, word): self.words.add(word)
    def __contains__(self, word): return word in self.words
    def startswith(self, part): return any(w.startswith(part) for w in self.words)
class Color(enum.Enum):
    RED = 1
    BLUE = 2
@dataclass
class Node:
    value: int
    next: object = None
def chain(*xs):
    node = None
    for x in reversed(xs): node = Node(x, node)
    return node
def squares():
    for i in range(4): yield i * i
def recent(): return collections.deque([1, 2], maxlen=2)
def ordered(): return {"b": 1, "a": 2}.keys()
def isdigit(text): return text in "0123456789"
def select(xs): return xs[0]
def middle(v, w): return Vector(*[(a + b) // 2 for a, b in zip(v.xs, w.xs)])
"""
HONEST = [
    "(Vector(1, 2) * 2).xs == [2, 4]",
    "Vector(1, 2) * 2 == Vector(2, 4)",
    "Vector(1, 2) * Vector(3, 4) == 11",
    "abs(Vector(3, 4)) == 5.0",
    "abs(Vector(3, 4) * 2) == 10.0",
    "abs(-Vector(3, 4) + Vector(3, 4)) == 0.0",
    "(Vector(1, 2) + Vector(3, 4))[1] == 6",
    "len(Vector(1, 2)) == 2 and 2 in Vector(1, 2) and 3 not in Vector(1, 2)",
    "not Vector(0, 0) and bool(Vector(1, 0))",
    "sorted([Vector(3, 4), Vector(1, 0)])[0] == Vector(1, 0)",
    "Vector(1, 2).scale(3) == Vector(3, 6) and Vector(1, 2).scale(3).xs == [3, 6]",
    "Vector.zero() + Vector(1, 2) == Vector(1, 2)",
    "middle(Vector(0, 0), Vector(2, 4)) == Vector(1, 2)",
    "Vector(1, 2).scale(2) * Vector(1, 1) == 6",
    "answer.Vector(1, 2) * 2 == Vector(2, 4)",
    "(t := Trie(), t.add('hello')) and 'hello' in t and 'x' not in t and t.startswith('he')",
    "Color.RED == Color.RED and Color.RED != Color.BLUE and Color['RED'].value == 1",
    "Color.RED is not None and isinstance(Color.RED, Color)",
    "chain(1, 2, 3).next.next.value == 3 and chain(1).next is None",
    "Node(3) == Node(3) and Node(3).value == 3",
    "list(squares()) == [0, 1, 4, 9] and 4 in squares() and 5 not in squares()",
    "list(recent()) == [1, 2] and len(recent()) == 2 and 2 in recent()",
    "'a' in ordered() and sorted(ordered()) == ['a', 'b']",
    "isdigit('7') and not isdigit('x') and select([4, 5]) == 4",
    "collections.Counter('aab')['a'] == 2",
]


def test_objects_of_the_answers_are_tested_as_before():
    tests = "\n".join(f"assert {test}" for test in HONEST)
    found = sandbox.run_tests(tests, CLASSES, sandbox.Limits(timeout_s=10))
    assert found["passed"] == len(HONEST), found


EVASIONS = {
    "a huge power of ten": (
        "from decimal import Decimal\ndef f(): return Decimal('1E+999999999')",
        "int(f()) == 3",
    ),
    "a huge power of ten, by a fraction": (
        "from decimal import Decimal\ndef f(): return Decimal('1E+999999999')",
        "f() == Fraction(1, 3)",
    ),
    "a huge text for a pattern": ("def f(): return 'a' * 7_000_000", "re.search(r'a*a*b', f())"),
    "a huge text for a comparison of lines": (
        "def f(): return '\\n'.join(str(i * 7919 % 5003) for i in range(60_000))",
        "list(difflib.ndiff(f().splitlines(), ['x'] * 5000)) == []",
    ),
    "many small lists": (
        "def f(): return [[] for _ in range(900_000)]",
        "sorted(map(str, f())) == f() or g(f())",
    ),
    "deep lists": (
        "def f():\n  x = []\n  for _ in range(700): x = [x]\n  return x\ndef g(x): return 1",
        "g([[[[f()]]]] * 3) == 3",
    ),
    "more than can be sent back": (
        "def f(): return 'a' * 8_000_000\ndef g(x): return 1",
        "g([f(), f()]) == 3",
    ),
    "a number for a range": ("def f(): return 10**18", "sum(range(f())) == 3"),
    "a number for a power": ("def f(): return 10**9", "3 ** f() == 3"),
    "a number for a text": ("def f(): return 10**12", "'x' * f() == 'x'"),
    "a generator without an end": (
        "def f():\n  while True: yield 1",
        "3 in f()",
    ),
    "a callback with a huge number": ("def f(g): return g(10**9)", "f(lambda x: 3 ** x) == 3"),
    "an error with a huge text": ("def f(): raise ValueError('a' * 8_000_000)", "f() == 3"),
    "many names": (
        "for i in range(200_000): globals()[f'x{i}'] = 0\ndef f(): return 0",
        "f() == 3",
    ),
    "many small lists, not as data is sent": (
        "import socket, struct\n_r = b'{\"value\": [' + b'[],' * 2_700_000 + b'0]}'\ndef f():\n"
        "  line = socket.socket(fileno=3)\n  line.sendall(struct.pack('>I', len(_r)) + _r)\n"
        "  line.detach()\n  return 0",
        "f() == 3",
    ),
    "a large name in the module": ("x = b'a' * 8_000_000\ndef f(): return 0", "f() == 3"),
}
LONG = (
    "a huge text for a pattern",
    "a huge text for a comparison of lines",
    "a callback with a huge number",
    "many small lists, not as data is sent",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in EVASIONS],
)
def test_no_answer_chooses_to_be_unscored(name):
    """A wrong answer is wrong, whatever it does to the process of the tests, and others go on."""
    code, test = EVASIONS[name]
    tests = f"import re, difflib\nfrom fractions import Fraction\nassert {test}\nassert f != 0"
    found = sandbox.run_tests(tests, code, sandbox.Limits(timeout_s=1.0))
    assert (found.get("passed"), found.get("total")) == (int(name not in AT_ONCE), 2), found


AT_ONCE = ("many names", "a large name in the module")


def test_what_runs_between_asserts_runs_again_within_the_limits():
    """The answer leaves in it, so that a new process has to run it for the asserts that follow."""
    tests = "assert g() == 1\nx = f()\nassert x == 3\nassert g() == 2\nassert g() == 1"
    code = "import os\ndef f(): os._exit(0)\ndef g(): return 1"
    found = sandbox.run_tests(tests, code, sandbox.Limits(timeout_s=1.0))
    assert (found.get("passed"), found.get("total")) == (1, 4), found
