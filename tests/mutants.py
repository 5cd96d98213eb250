"""Mutation tests: change one place of the code that data and training stand on, and see whether
the nearest tests fail.

`python -m tests.mutants` takes the named changes of `mutants.yaml`, then a seeded sample of all
changes of `changes`. A change that no test notices is printed. One that cannot be noticed is listed
in `mutants.yaml` with the reason. The exit status is 1 when a named change lives, or when more than
a tenth of a file's sample does and is not listed. `--out FILE` adds the counts of each file to a
JSON file.

Each change is made in a copy of the tree, and its tests run in a fork of a process that has
imported the libraries; the tools mutmut and cosmic-ray start Python once a change, which here takes
longer than most tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import datetime
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".yaml")
LIVING = 0.1  # of a file's sample, at most
LIBRARIES = (
    *("numpy", "scipy.stats", "polars", "duckdb", "pyarrow.parquet", "orjson", "pydantic", "typer"),
    *("rich.console", "jinja2", "aiohttp", "uvloop", "yaml", "pytest", "hypothesis", "rensa"),
    *("torch", "transformers", "accelerate", "datasets", "trl", "evalica", "safetensors.torch"),
)
# What is mutated, and the tests that are nearest to it.
NEAREST = {
    "factory/keys.py": ("factory/test_keys.py",),
    "factory/decision.py": ("judges/stats/test_aggregate.py", "judges/test_panel.py"),
    "factory/ledger/ledger.py": ("factory/ledger/test_ledger.py", "factory/ledger/test_claims.py"),
    "factory/ledger/db.py": (
        "factory/ledger/test_db.py",
        "factory/ledger/test_ledger.py",
        "factory/ledger/test_claims.py",
        "factory/ledger/test_verify.py",
        "factory/ledger/test_migrations.py",
    ),
    "judges/panel.py": ("judges/test_panel.py",),
    "judges/base.py": (
        "judges/test_base.py",
        "factory/test_label_text.py",
        "judges/test_kinds.py",
        "judges/test_other_packages.py",
        "pipelines/run/test_panel_kinds.py",
    ),
    "judges/kinds/pairwise.py": ("factory/test_label_text.py", "judges/test_kinds.py"),
    "pipelines/store/verdicts.py": (
        "pipelines/store/test_verdicts.py",
        "pipelines/store/test_store.py",
        "pipelines/run/test_recipes.py",
        "pipelines/run/test_panel_kinds.py",
    ),
    "trainers/offline/losses.py": ("trainers/offline/test_losses.py",),
    "trainers/rl/policy_gradient.py": ("trainers/rl/test_policy_gradient.py",),
    "trainers/rl/ppo.py": ("trainers/rl/test_ppo.py",),
    "trainers/rl/grpo.py": ("trainers/rl/test_grpo.py",),
    "trainers/rl/loop.py": ("trainers/rl/test_ppo.py", "trainers/rl/test_grpo.py"),
    "pipelines/store/export/base.py": (
        "pipelines/store/test_export.py",
        "pipelines/store/test_export_layouts.py",
    ),
    "pipelines/store/export/files.py": (
        "pipelines/store/test_export_files.py",
        "pipelines/store/test_export.py",
    ),
    "pipelines/store/export/layouts.py": ("pipelines/store/test_export_layouts.py",),
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
    ast.Add: ast.Sub,
    ast.Mult: ast.Div,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
}
SWAPS |= {new: old for old, new in SWAPS.items()} | {ast.FloorDiv: ast.Mult}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Change:
    """One place of a file, as text before and after; `text` is the whole file before."""

    file: str
    text: bytes = field(repr=False)
    start: int
    end: int
    new: str
    tests: tuple[str, ...]

    def source(self) -> bytes:
        """The whole file with the change."""
        return self.text[: self.start] + self.new.encode() + self.text[self.end :]

    def place(self) -> dict[str, str]:
        """The changed lines before and after, as `mutants.yaml` lists them."""
        text = self.text
        first = text.rfind(b"\n", 0, self.start) + 1
        last = text.find(b"\n", self.end)
        old = text[first:last].decode()
        new = (text[first : self.start] + self.new.encode() + text[self.end : last]).decode()
        return {"file": self.file, "old": " ".join(old.split()), "new": " ".join(new.split())}

    def __str__(self) -> str:
        line = self.text[: self.start].count(b"\n") + 1
        place = self.place()
        return f"{self.file}:{line}\n  - {place['old']}\n  + {place['new']}"


def variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node."""
    fresh: Any = copy.deepcopy(node)
    match node:
        case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str()) | ast.JoinedStr()):
            pass  # a path
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            swapped = SWAPS[type(op)]()
            if isinstance(node, ast.Compare):
                fresh.ops = [swapped]
            else:
                fresh.op = swapped
            yield fresh
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield fresh.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 1.5 + 0.1)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            fresh.func.id = NAMES[name]
            yield fresh
        case ast.Return(value=ast.expr()) if ast.unparse(node) != "return None":
            yield "return None"
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign():
            yield "pass"
        case ast.IfExp():
            fresh.body, fresh.orelse = fresh.orelse, fresh.body
            yield fresh


def places(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be changed: no annotations, decorators, strings, or what only an error's
    message needs, and no default of an argument `_`, which is never read.
    """
    for name, below in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if name == "defaults" and [arg.arg for arg in tree.args[-1:]] == ["_"]:  # type: ignore[attr-defined]
            continue
        for node in below if isinstance(below, list) else [below]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.Raise | ast.JoinedStr):
                yield node
                yield from places(node)


def changes(file: str) -> list[Change]:
    """All changes of a file."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in places(ast.parse(source)):
        tests: list[ast.AST | str] = list(variants(node)) if hasattr(node, "lineno") else []
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Name):
            condition = node.test
            tests, node = [ast.UnaryOp(ast.Not(), condition)], condition
        for new in tests:
            text = new if isinstance(new, str) else ast.unparse(new)
            if not isinstance(new, str | ast.Constant):
                text = f"({text})"
            start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            found.append(Change(file, source, start, end, text, NEAREST[file]))
    return found


def named(row: dict[str, Any]) -> Change:
    """A change that `mutants.yaml` names. Raises: ValueError where its text is not there once."""
    source = (ROOT / row["file"]).read_bytes()
    old = row["old"].encode()
    if source.count(old) != 1:
        raise ValueError(f"{row['file']}: {source.count(old)} times, not once: {row['old']}")
    start = source.index(old)
    return Change(row["file"], source, start, start + len(old), row["new"], tuple(row["tests"]))


def sample(file: str, count: int, seed: int) -> list[Change]:
    """So many changes of a file, in its order."""
    every = changes(file)
    drawn = random.Random(seed).sample(range(len(every)), min(count, len(every)))
    return [every[i] for i in sorted(drawn)]


@dataclass
class Copy:
    """A copy of the tree in which one change at a time is made."""

    folder: Path

    def __post_init__(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name, follow_symlinks=False)

    def start(self, tests: tuple[str, ...], change: Change | None = None) -> int:
        """Fork a process that runs tests with the change. Its id."""
        if change is not None:
            (self.folder / change.file).write_bytes(change.source())
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                status = self._run(tests, change is None)
            finally:
                os._exit(status)
        return pid

    def _run(self, tests: tuple[str, ...], unchanged: bool) -> int:
        import pytest

        os.setsid()
        output = os.open(self.folder / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(self.folder)
        sys.path[:] = [str(self.folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(self.folder)
        if not unchanged:  # what it compiles now must not be found later
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "prefab")]:
            del sys.modules[name]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests, "-m"]
        status = int(pytest.main([*words, "not slow"]))
        if status:
            return status
        status = int(pytest.main([*words, "slow"]))  # what the quick ones do not notice
        return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status

    def restore(self, change: Change) -> None:
        """Undo a change."""
        (self.folder / change.file).write_bytes(change.text)


def wait(pid: int, limit_s: float) -> bool:
    """Whether tests passed; not where they took longer than `limit_s`, or were killed."""
    ended = os.pidfd_open(pid)
    done = bool(select.select([ended], [], [], limit_s)[0])
    os.close(ended)
    for kill in (os.killpg, os.kill):  # what it started, and itself if it had no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0 and done


def durations(tree: Copy, every: set[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    """The seconds of each list of tests without a change. Raises: SystemExit where one fails."""
    found = {}
    for tests in sorted(every):
        began = time.monotonic()
        if not wait(tree.start(tests), 1800):
            raise SystemExit(f"fails unchanged: {' '.join(tests)}\n" + output(tree))
        found[tests] = time.monotonic() - began
        print(f"unchanged in {found[tests]:.0f} s: {' '.join(tests)}", flush=True)
    return found


def output(tree: Copy) -> str:
    """The end of what the last tests wrote."""
    return (tree.folder / "output").read_text(errors="replace")[-3000:]


def living(tree: Copy, some: list[Change], verbose: bool = False) -> list[Change]:
    """The changes that their tests do not notice."""
    paths = {change.tests: tuple(f"tests/{test}" for test in change.tests) for change in some}
    usual = durations(tree, set(paths.values()))
    found = []
    for number, change in enumerate(some, 1):
        tests = paths[change.tests]
        passed = wait(tree.start(tests, change), 60 + 3 * usual[tests])
        tree.restore(change)
        if passed:
            found.append(change)
        if passed or verbose:
            print(f"{'LIVES' if passed else 'killed'} {number}/{len(some)} {change}", flush=True)
    return found


def commit() -> str:
    """The commit of the tree, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--abbrev=8", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def add_counts(out: Path, counts: dict[str, dict[str, Any]]) -> None:
    """Add the counts of files to a JSON file; those of other files stay."""
    known = json.loads(out.read_text()) if out.exists() else {}
    today = {"date": datetime.date.today().isoformat(), "commit": commit()}
    known |= {name: today | found for name, found in counts.items()}
    out.write_text(json.dumps({name: known[name] for name in sorted(known)}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="files to change; left out: all of NEAREST")
    parser.add_argument("--count", type=int, default=25, help="changes that are drawn of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("named", "drawn"), help="one of the two parts")
    parser.add_argument("--verbose", action="store_true", help="print killed changes, too")
    parser.add_argument("--out", type=Path, help="a JSON file; the counts are added to it")
    return parser.parse_args()


def main() -> int:
    """See the module."""
    args = arguments()
    table = yaml.safe_load(TABLE.read_text())
    listed = [{name: row[name] for name in ("file", "old", "new")} for row in table["equivalent"]]
    for library in LIBRARIES:
        importlib.import_module(library)
    some = {}
    if args.only != "drawn" and not args.files:
        some["named"] = [named(row) for row in table["named"]]
    if args.only != "named":
        some |= {file: sample(file, args.count, args.seed) for file in args.files or NEAREST}
    counts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="prefab-mutants-") as folder:
        tree = Copy(Path(folder))
        for name, drawn in some.items():
            tried = [change for change in drawn if change.place() not in listed]
            left = living(tree, tried, args.verbose)
            counts[name] = {"tried": len(tried), "equivalent": len(drawn) - len(tried)}
            counts[name] |= {"live": len(left), "seed": args.seed}
            print(f"{name}: {len(left)} of {len(tried)} live", flush=True)
    if args.out:
        add_counts(args.out, counts)
    return int(any(row["live"] > LIVING * row["tried"] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
