"""Regular expressions and JSON schemas on texts that are not trusted, in a process with a time
limit.

A regular expression that backtracks without end stops the whole of Python and cannot be
interrupted; a schema's `pattern` is one too. So each thread has a process for them, which is
replaced when it takes too long.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import threading
from typing import Any

from prefab.factory.paths import IMPORT_ROOT
from prefab.judges.sandbox import isolation

_START = f"import sys; sys.path.insert(0, {str(IMPORT_ROOT)!r}); from prefab.judges.sandbox import timeout_worker; timeout_worker.serve()"
_START_S = 60.0
MEMORY_MB = 4096  # of address space
_mine = threading.local()


class _Helper:
    """The process of one thread; it ends when its pipe closes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.line(_START_S)  # it says when it is ready
        self.can_validate = False

    def send(self, job: dict[str, Any]) -> None:
        self.stdin.write(json.dumps(job).encode() + b"\n")
        self.stdin.flush()

    def prepare(self, job: dict[str, Any]) -> None:
        """Import what the job needs: it is not the answer's fault if that takes long."""
        if job["do"] == "validate" and not self.can_validate:
            self.send({"do": "validate", "text": "1", "schema": {"type": "integer"}})
            self.line(_START_S)
            self.can_validate = True

    def line(self, timeout_s: float) -> bytes:
        """Its next line. Raises: TimeoutError, or EOFError when it has ended."""
        if not select.select([self.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        line = self.stdout.readline()  # it writes a line at once
        if not line:
            raise EOFError
        return line

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


def ask(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The result of the job: `error` when the pattern or schema is at fault, `late` when it took
    too long on this text or ended its process, which is the text's fault: else an answer could
    choose not to be scored.

    Raises: NoSandbox when no process could be started.
    """
    from prefab.judges.sandbox import NoSandbox

    try:
        _mine.helper = getattr(_mine, "helper", None) or _Helper()
        _mine.helper.prepare(job)
    except (OSError, EOFError, TimeoutError) as error:
        _mine.helper = None
        raise NoSandbox(f"no process could be started: {error}") from error
    try:
        _mine.helper.send(job)
        return dict(json.loads(_mine.helper.line(timeout_s)))
    except TimeoutError:
        _mine.helper = None
        return {"late": f"the check of this answer took longer than {timeout_s:g} s"}
    except (OSError, EOFError):
        _mine.helper = None
        return {"late": "the check of this answer ended its process"}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One job: `match` and `validate` give `passed` of `total`, `extract` what it `found` (None:
    nothing).
    """
    if job["do"] == "validate":
        try:
            value = json.loads(job["text"], parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            return {"passed": 0, "total": 1, "why": f"not JSON: {error}"[:300]}
        return _validate(value, job["schema"])
    if job["do"] == "extract":
        found = None
        for found in re.finditer(job["pattern"], job["text"]):
            pass
        return {"found": None if found is None else found.group(1) or ""}
    pattern = re.compile(job["pattern"], re.IGNORECASE if job["ignore_case"] else 0)
    match = pattern.fullmatch if job["whole"] else pattern.search
    return {"passed": int(match(job["text"]) is not None), "total": 1}


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _validate(value: Any, schema: Any) -> dict[str, Any]:
    """Validate by JSON Schema: the draft that `$schema` names, else 2020-12. References outside of
    the schema are not fetched.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator = validator_for(schema, Draft202012Validator)(schema, registry=Registry())
    try:
        first = next(iter(validator.iter_errors(value)), None)
    except Unresolvable as error:
        return {"error": f"the schema refers to {error.ref}, which is not in it"}
    except RecursionError:
        return {"passed": 0, "total": 1, "why": "nested too deep"}
    if first is None:
        return {"passed": 1, "total": 1}
    return {"passed": 0, "total": 1, "why": f"{first.json_path}: {first.message}"[:300]}


def serve() -> None:
    """Jobs from stdin, a line each, until it closes."""
    isolation.limit_memory(MEMORY_MB)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        try:
            result = work(json.loads(line))
        except (MemoryError, RecursionError, ArithmeticError) as error:
            result = {"late": f"{type(error).__name__} in the check of this answer"}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
