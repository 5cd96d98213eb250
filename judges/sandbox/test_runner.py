"""The tests' side of a Python test: enters the sandbox, runs the tests, and says which passed.

Threat: code that is rewarded for passing learns to pass without solving anything: `sys.exit(0)`, a
patched `unittest`, an object equal to everything, a printed "passed". So tests and answer share no
interpreter. The tests hold proxies for what the answer defines; arguments and results cross as
plain data, and only this side, which never runs a line of the answer, says what passed. The
answer's process has one socket, on which only answers to calls are read.

Run by `prefab.judges.sandbox` as a process of its own: a job as JSON on stdin, one JSON object on
stdout.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from prefab.judges.sandbox import isolation
from prefab.judges.sandbox.proxy import CandidateDied, Channel, NotSerializable, top_level

ALL_TESTS = 5  # all tests of an answer together may take so many times one test's limit
RUNNER_MB = 2048  # of address space for the tests, besides what the answer may take
START_S = 20.0  # for Python to start in the sandbox, which is nobody's fault


class Broken(Exception):
    """The tests cannot be run, whatever the answer is."""


def main() -> None:
    """Run one job, from stdin to stdout."""
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.write(out, json.dumps(examine(job)).encode())


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """The result of all tests: `passed` of `total`, or `broken` (the tests' fault) or
    `failed_to_run` (nobody's fault).
    """
    with open(os.path.join(os.path.dirname(__file__), "candidate.py"), encoding="utf-8") as file:
        job["candidate"] = file.read()
    try:
        isolation.prctl(isolation.DEATH_SIGNAL, signal.SIGKILL)
        isolation.open_group(job)
        if job["isolated"]:
            isolation.isolate(job)
    except OSError as error:
        return {"failed_to_run": f"no isolation: {error}"}
    try:
        tree = _OwnNames().visit(ast.parse(job["tests"], "tests"))
        names = names_of(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError, Broken) as error:
        return {"broken": f"{type(error).__name__}: {error}"[:500]}
    return supervise(job, tree, names)


class _OwnNames(ast.NodeTransformer):
    """Leaves out `from answer import *`: the answer's names are known to the tests without it, and
    with it they would replace the tests' own helpers, constants and imports.
    """

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        star = node.module in ("answer", "solution") and node.names[0].name == "*"
        return ast.copy_location(ast.Pass(), node) if star else node


def names_of(tree: ast.Module) -> list[str]:
    """The tests, in order: functions and methods named test..., else the asserts of the module,
    else all of it.

    Raises: Broken for tests that need what only pytest gives.
    """
    found = _tests_in(tree.body, "")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (
            node.name.startswith("Test") or "TestCase" in map(_last, node.bases)
        ):
            found += _tests_in(node.body, f"{node.name}.")
    found = found or [f"line {node.lineno}" for node in tree.body if isinstance(node, ast.Assert)]
    if not found and not any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) for node in tree.body
    ):
        raise Broken("there is no test in it: no function named test..., no assert, no call")
    return found or ["all"]


def _tests_in(body: list[ast.stmt], prefix: str) -> list[str]:
    """The functions named test... of a module, or of a class (whose methods take `self`)."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            _no_arguments(node, 1 if prefix else 0)
            found.append(prefix + node.name)
    return found


def _last(base: ast.expr) -> str:
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def _no_arguments(node: ast.FunctionDef, own: int) -> None:
    if len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults) > own:
        raise Broken(
            f"{node.name} wants arguments: fixtures and parameters of pytest are not known here"
        )


def supervise(job: dict[str, Any], tree: ast.Module, names: list[str]) -> dict[str, Any]:
    """Run the tests in a process that is replaced when the answer's process died or a test hung;
    the rest goes on in the new one.
    """
    results: dict[int, str] = {}
    total = len(names)
    end = time.monotonic() + ALL_TESTS * job["timeout_s"] + START_S
    while len(results) < total:
        first = len(results)
        if time.monotonic() > end - START_S:
            results |= dict.fromkeys(
                range(first, total), "no time was left: all tests together took too long"
            )
            break
        used = False
        for message in _runner(job, tree, first, end):
            if "used" in message:
                used = message["used"]
            elif "result" in message:
                results[len(results)] = message["result"]
                used = False
            elif "all" in message:
                results |= dict.fromkeys(range(first, total), message["all"])
            else:
                return message
        if used and len(results) < total:
            results[len(results)] = "the test did not end with what the answer gave"
        elif len(results) == first:
            return {
                "broken": "the process of the tests ended by itself, or hung in a call of its own"
            }
    failures = [f"{names[i]}: {why}" for i, why in sorted(results.items()) if why]
    return {"passed": total - len(failures), "total": total, "failures": failures[:5]}


def _runner(
    job: dict[str, Any], tree: ast.Module, first: int, end: float
) -> Iterator[dict[str, Any]]:
    """What a new process tells of the tests from `first` on; it is killed when silent for longer
    than a test may be.
    """
    read, write = os.pipe()

    def say(message: dict[str, Any]) -> None:
        os.write(write, json.dumps(message).encode() + b"\n")

    def tell() -> None:
        os.close(read)
        if not job["see_packages"]:
            isolation.limit_memory(RUNNER_MB + job["memory_mb"])
        run(job, tree, first, say)

    processes = [isolation.in_own_namespace(tell) if job["isolated"] else isolation.forked(tell)]
    os.close(write)
    text, silence = b"", START_S + job["timeout_s"]
    try:
        while select.select([read], [], [], max(0.0, min(silence, end - time.monotonic())))[0]:
            part = os.read(read, 65536)
            if not part:
                break
            *lines, text = (text + part).split(b"\n")
            for line in map(json.loads, lines):
                if "answer" in line:  # its Python starts now
                    processes += [] if job["isolated"] else [line["answer"]]
                else:
                    silence = job["timeout_s"] + 2.0
                    yield line
    finally:
        os.close(read)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        os.waitpid(processes[0], 0)


def run(
    job: dict[str, Any], tree: ast.Module, first: int, say: Callable[[dict[str, Any]], None]
) -> None:
    """Load the answer and the tests, then run the tests from `first` on; ends early when the
    answer's process is gone.

    A result is "" for passed, else why not. `used` says before each result whether anything of the
    answer's has been in the test's hands.
    """
    sock, process = isolation.start_answer(job)
    say({"answer": process})
    line = Channel(sock, partial(say, {"used": True}))
    line.set_alarm(START_S)
    try:
        line.greet()
        line.set_alarm(job["timeout_s"])
        namespace = _namespace(line, line.ask({"load": job["answer"]}), tree)
    except NotSerializable as error:
        return say({"failed_to_run": str(error)})
    except BaseException as error:
        if not line.greeted:
            return say({"failed_to_run": f"Python does not start in the sandbox: {error}"})
        return say({"all": f"the answer cannot be loaded: {_story(error)}"})
    for number, test in tests_of(tree, namespace, first):
        if line.used:
            line.used = False
            say({"used": False})
        line.set_alarm(job["timeout_s"])
        why = _outcome(test, line)
        line.set_alarm(0)
        if line.broken:
            return say({"broken": line.broken})
        if number >= first:
            say({"result": line.gone or why})
        elif line.gone:
            return say({"all": line.gone})
        if line.gone:
            return None
    return None


def _namespace(line: Channel, names: Any, tree: ast.Module) -> dict[str, Any]:
    """The tests' globals: `answer` (also by the name `solution`) and what it defines under no
    built-in name.
    """
    module = _Answer("answer")
    module.__dict__.update(_line=line, __all__=[str(name) for name in names])
    sys.modules["answer"] = sys.modules["solution"] = module
    attributes = _attributes(tree)
    found = {
        name: _standard_module(name, attributes.get(name)) or getattr(module, name)
        for name in module.__all__
        if not hasattr(builtins, name)
    }
    return {**found, "__name__": "tests", "answer": module}


def _attributes(tree: ast.Module) -> dict[str, set[str]]:
    """What the tests take from each name: `math.isclose` is {"math": {"isclose"}}."""
    used: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.setdefault(node.value.id, set()).add(node.attr)
    return used


def _standard_module(name: str, attributes: set[str] | None) -> types.ModuleType | None:
    """The standard module of that name, if it has all that the tests take from it: what `math` is
    is not for an answer to say, even when only the answer imports it.
    """
    if not attributes or name not in sys.stdlib_module_names:
        return None
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)
        if all(hasattr(module, attribute) for attribute in attributes):
            return module
    return None


class _Answer(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return top_level(self._line, name)


def tests_of(
    tree: ast.Module, namespace: dict[str, Any], first: int
) -> Iterator[tuple[int, Callable[[], str]]]:
    """Each test from `first` on with its number, as a function that gives "" or why it failed.

    What comes before a test in the module runs with it; what comes before asserts that are over
    runs again, under their numbers.
    """
    names = names_of(tree)
    if names == ["all"] or not names[0].startswith("line "):
        state = {"loaded": False}
        for number, name in enumerate(names[first:], first):
            yield number, partial(_call, tree, namespace, name, state)
        return
    asserts, at = [i for i, node in enumerate(tree.body) if isinstance(node, ast.Assert)], 0
    for number, index in enumerate(asserts):
        before = [node for node in tree.body[at:index] if not isinstance(node, ast.Assert)]
        at = index
        nodes = before if number < first else [*before, tree.body[index]]
        yield number, partial(_execute, nodes, namespace)


def _execute(nodes: list[ast.stmt], namespace: dict[str, Any]) -> str:
    exec(compile(ast.Module(nodes, []), "tests", "exec"), namespace)
    return ""


def _call(tree: ast.Module, namespace: dict[str, Any], name: str, state: dict[str, bool]) -> str:
    if not state["loaded"]:
        _execute(tree.body, namespace)
        state["loaded"] = True
    owner, _, method = name.partition(".")
    if name == "all":
        return ""
    if not method:
        namespace[owner]()
        return ""
    if not hasattr(namespace[owner], "assertEqual"):
        getattr(namespace[owner](), method)()
        return ""
    import unittest  # a third of the time that this process takes to start

    result = unittest.TestResult()
    namespace[owner](method).run(result)
    told = [text for _, text in (*result.failures, *result.errors, *result.skipped)]
    return told[0].strip().splitlines()[-1] if told else ""


def _outcome(test: Callable[[], str], line: Channel) -> str:
    try:
        return test()[:300]
    except (CandidateDied, NotSerializable):
        return ""
    except ImportError as error:
        missing = (error.name or "").partition(".")[
            0
        ]  # an import error that the answer raised has no name
        if isinstance(error, ModuleNotFoundError) and missing not in ("", "answer", "solution"):
            line.broken = f"the tests import {error.name}, which is not there (`packages: true` lets them see more)"
        return f"the answer lacks what the tests import: {error}"[:300]
    except BaseException as error:
        return _story(error)


def _story(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
