"""Files and arguments that somebody hostile, or nobody in particular, could have written.

Each is given to one command. Whatever is in them, the command ends with one of the exit codes of
users' mistakes (or of success), within 10 seconds of CPU and 700 MB, without a traceback and
without writing a control character to the terminal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.torture.kills import Result
from tests.torture.lab import CONSTITUTION, Lab

CPU_S, MEMORY_MB, WAIT_S = 10.0, 700, 40
ESCAPES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]")
EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\u2066\x9b31m[red]x[/blue]"
CHECK, RUN = ("check", "pipeline.yaml"), ("run", "pipeline.yaml", "-q")
SCRIPTED = ("--set", "engines.local={engine: scripted}", "--set", "budget.unscored=1.0")


@dataclass(frozen=True)
class Case:
    """`write` puts something into a fresh project; `command` meets it. Exit code 2 is a mistake
    that was named."""

    write: Callable[[Path], object]
    command: tuple[str, ...] = CHECK
    codes: tuple[int, ...] = (2,)


def text(name: str, content: str | bytes, *command: str, codes: tuple[int, ...] = (2,)) -> Case:
    """A file with this content."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return Case(lambda folder: (folder / name).write_bytes(data), command or CHECK, codes)


def constitution(codes: tuple[int, ...] = (2,), **fields: object) -> Case:
    """The small constitution with other fields; those of its principle begin with `p_`."""
    principle = {**CONSTITUTION["principles"][0]}  # type: ignore[dict-item]
    principle |= {name[2:]: v for name, v in fields.items() if name.startswith("p_")}
    top = {name: v for name, v in fields.items() if not name.startswith("p_")}

    def write(folder: Path) -> None:
        whole = {**CONSTITUTION, "principles": [principle], **top}
        (folder / "small.yaml").write_text(yaml.safe_dump(whole))

    return Case(write, codes=codes)


def prompts(content: str | bytes, codes: tuple[int, ...] = (2,)) -> Case:
    return text("prompts.jsonl", content, *RUN, *SCRIPTED, codes=codes)


def row(codes: tuple[int, ...] = (0, 2), **fields: object) -> Case:
    """One row of a prompts file, run by the scripted engine."""
    line = json.dumps({"prompt": "What?", **fields}) + "\n"
    return text("prompts.jsonl", line, *RUN, *SCRIPTED, codes=codes)


def template(source: str, codes: tuple[int, ...] = (2,)) -> Case:
    """A judge's template of the user's own."""

    def write(folder: Path) -> None:
        text = source if "block user" in source else f"{{% block user %}}{source}{{% endblock %}}"
        (folder / "mine.jinja").write_text(text)
        pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
        pipeline["panel"]["judges"][0]["template"] = "mine.jinja"
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))

    return Case(write, CHECK, codes)


def link(name: str, to: str, *command: str) -> Case:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return Case(write, command or CHECK)


def fifo(name: str, *command: str) -> Case:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return Case(write, command or CHECK)


def folder(name: str) -> Case:
    def write(where: Path) -> None:
        (where / name).unlink(missing_ok=True)
        (where / name).mkdir()

    return Case(write)


def command(*words: str, codes: tuple[int, ...] = (2,)) -> Case:
    return Case(lambda folder: None, words, codes)


def query(sql: str, codes: tuple[int, ...] = (2,)) -> Case:
    """A query over a finished store."""
    return Case(finished, ("sql", sql), codes)


def finished(folder: Path) -> None:
    """A store with a finished run is there already."""
    assert (folder / "store" / "prefab.duckdb").exists()


def damaged(name: str, content: bytes, *command: str, codes: tuple[int, ...] = (0, 1, 2)) -> Case:
    """A file of the store replaced."""
    return Case(lambda folder: (folder / "store" / name).write_bytes(content), command, codes)


def nested(depth: int, left: str, right: str, middle: str = "1") -> str:
    return left * depth + middle + right * depth


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)
JSON_ROW = '{"prompt": "x", "id": %s}\n'
CASES: dict[str, Case] = {
    # YAML
    "YAML: aliases that grow": text("small.yaml", BOMB),
    "YAML: 100,000 nested lists": text("small.yaml", nested(100_000, "[", "]")),
    "YAML: 5,000 nested maps": text("small.yaml", "".join(" " * i + "a:\n" for i in range(5000))),
    "YAML: one scalar of 20 MB": text("small.yaml", "id: " + "x" * 20_000_000),
    "YAML: quoted scalar of 20 MB": text("small.yaml", 'id: "' + "x " * 10_000_000 + '"'),
    "YAML: 2 MB of empty lines in a scalar": text("small.yaml", 'id: "' + "\n" * 2_000_000 + '"'),
    "YAML: Python object": text("small.yaml", "!!python/object/apply:os.system ['touch owned']"),
    "YAML: number of 5,000 digits": text("small.yaml", "id: x\nweight: " + "9" * 5000),
    "YAML: base 60": text("small.yaml", "id: 1:30:30"),
    "YAML: NUL": text("small.yaml", b"id: a\0b\n"),
    "YAML: not UTF-8": text("small.yaml", b"id: \xff\xfe\xff\n"),
    "YAML: UTF-16": text("small.yaml", "id: x\n".encode("utf-16"), codes=(0, 2)),
    "YAML: empty": text("small.yaml", ""),
    "YAML: two documents": text("small.yaml", "id: a\n---\nid: b\n"),
    "YAML: a list": text("small.yaml", "- a\n- b\n"),
    "YAML: recursive alias": text("small.yaml", "&a\nid: *a\n"),
    "YAML: a key that is a list": text("small.yaml", "? [a, b]\n: 1\n"),
    "YAML: 20,000 keys": text("small.yaml", "".join(f"k{i}: 1\n" for i in range(20_000))),
    "YAML: merge of itself": text("small.yaml", "a: &a {<<: *a}\n"),
    "YAML: control characters": text("small.yaml", f"id: x\n{json.dumps(EVIL)}: 1\n"),
    "pipeline: /etc/shadow": link("pipeline.yaml", "/etc/shadow"),
    "pipeline: /dev/zero": link("pipeline.yaml", "/dev/zero"),
    "pipeline: FIFO": fifo("pipeline.yaml"),
    "pipeline: a folder": folder("pipeline.yaml"),
    "pipeline: loop of links": link("pipeline.yaml", "pipeline.yaml"),
    "pipeline: name with escapes": command("check", f"{EVIL}.yaml".replace("/", "")),
    # constitutions
    "constitution: /dev/zero": link("small.yaml", "/dev/zero"),
    "constitution: FIFO": fifo("small.yaml"),
    "constitution: id with escapes": constitution(id=EVIL),
    "constitution: principle's id with escapes": constitution(p_id=EVIL),
    "constitution: id with half a surrogate": text("small.yaml", 'id: "\\ud800"\ntitle: x\n'),
    "constitution: id is a path": constitution((0, 2), id="../../../etc/x"),
    "constitution: id of 100,000 characters": constitution((0, 2), id="x" * 100_000),
    "constitution: weight NaN": constitution(p_weight=float("nan")),
    "constitution: weight infinite": constitution(p_weight=float("inf")),
    "constitution: weight negative": constitution(p_weight=-1.0),
    "constitution: weight 1e308": constitution((0, 2), p_weight=1e308),
    "constitution: no principles": constitution(principles=[]),
    "constitution: principles are a map": constitution(principles={"a": 1}),
    "constitution: principle is null": constitution(principles=[None]),
    "constitution: 3,000 principles": constitution(
        (0, 2),
        principles=[{**CONSTITUTION["principles"][0], "id": f"p{i}"} for i in range(3000)],  # type: ignore[dict-item]
    ),
    "constitution: text with escapes": constitution((0, 2), title=EVIL, p_compare=EVIL),
    # templates
    "template: divides by zero": template("{{ 1/0 }}"),
    "template: huge power": template("{{ 10**(10**8) }}"),
    "template: doubling": template(
        "{% set x = namespace(v='x') %}{% for i in range(40) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}"
    ),
    "template: nested loops": template(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "template: repeats a text": template("{{ 'x' * 10**10 }}"),
    "template: includes a file": template("{% include '/etc/passwd' %}"),
    "template: includes itself": template("{% include 'mine.jinja' %}"),
    "template: imports": template("{% import 'x' as y %}{{ y }}"),
    "template: unknown filter": template("{{ prompt | nothing }}"),
    "template: random": template("{{ [1, 2, 3] | random }}"),
    "template: subclasses": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: attribute by filter": template("{{ '' | attr('__class__') }}"),
    "template: format string": template("{{ '{0.__class__}'.format(prompt) }}"),
    "template: globals": template("{{ cycler.__init__.__globals__ }}"),
    "template: recursion": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "template: 20,000 nested parentheses": template("{{ " + nested(20_000, "(", ")") + " }}"),
    "template: not closed": template("{% for a in prompt %}"),
    "template: lipsum": template("{{ lipsum(n=100000) }}"),
    "template: names nothing": template("{{ nothing.at.all }}"),
    "template: range of a billion": template("{{ range(10**9) | list | length }}"),
    "template: /dev/zero": Case(
        lambda folder: (
            template("x").write(folder),
            (folder / "mine.jinja").unlink(),
            (folder / "mine.jinja").symlink_to("/dev/zero"),
        )
    ),
    # prompts
    "prompts: /dev/zero": link("prompts.jsonl", "/dev/zero", *RUN),
    "prompts: FIFO": fifo("prompts.jsonl", *RUN),
    "prompts: empty": prompts(""),
    "prompts: binary": prompts(bytes(range(256)) * 40),
    "prompts: 100,000 nested lists": prompts(nested(100_000, "[", "]") + "\n"),
    "prompts: number of 5,000 digits": prompts(JSON_ROW % ("9" * 5000), codes=(0, 2)),
    "prompts: one line of 60 MB": prompts('{"prompt": "' + "x" * 60_000_000 + '"}\n'),
    "prompts: half a surrogate": row(prompt="\ud800"),
    "prompts: id is half a surrogate": row(id="\ud800"),
    "prompts: id with escapes": row(id=EVIL),
    "prompts: tag with half a surrogate": row(tags=["\udfff"]),
    "prompts: NaN": text("prompts.jsonl", '{"prompt": NaN}\n', *RUN, *SCRIPTED, codes=(0, 2)),
    "prompts: NUL": row(prompt="a\0b"),
    "prompts: text with escapes": row(prompt=EVIL),
    "prompts: null": row(prompt=None),
    "prompts: a number": row(prompt=7),
    "prompts: 2,000 turns": row(
        prompt=[{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(2001)]
    ),
    "prompts: role with escapes": row(prompt=[{"role": EVIL, "content": "x"}]),
    "prompts: unknown column": row(**{EVIL: 1}),
    "prompts: not Parquet": Case(
        lambda folder: (
            (folder / "prompts.parquet").write_bytes(b"PAR1" + b"\xff" * 300 + b"PAR1"),
            _set(folder, "prompts", {"source": "prompts.parquet"}),
        ),
        (*RUN, *SCRIPTED),
    ),
    "prompts: not gzip": Case(
        lambda folder: (
            (folder / "prompts.jsonl.gz").write_bytes(b"\x1f\x8b" + b"\xff" * 300),
            _set(folder, "prompts", {"source": "prompts.jsonl.gz"}),
        ),
        (*RUN, *SCRIPTED),
    ),
    "prompts: a dataset's folder with nonsense": Case(
        lambda folder: (
            (folder / "data").mkdir(),
            (folder / "data" / "dataset_info.json").write_text("[" * 9000),
            (folder / "data" / "state.json").write_text(
                '{"_data_files": [{"filename": "../../x"}]}'
            ),
            _set(folder, "prompts", {"source": "data"}),
        ),
        (*RUN, *SCRIPTED),
    ),
    # arguments and queries
    "set: nested": command("check", "pipeline.yaml", "--set", "a=" + nested(50_000, "[", "]")),
    "set: escapes": command("check", "pipeline.yaml", "--set", f"{EVIL}=1"),
    "set: dunder": command("check", "pipeline.yaml", "--set", "__class__.__init__=1"),
    "sql: writes a file": query("COPY (SELECT 1) TO 'store/ledger.sqlite'"),
    "sql: reads a file": query("SELECT * FROM read_text('/etc/passwd')"),
    "sql: attaches": query("ATTACH 'x.db'"),
    "sql: installs": query("INSTALL httpfs"),
    "sql: two statements": query("SELECT 1; DROP TABLE calls"),
    "sql: deletes": query("DELETE FROM calls"),
    "sql: escapes in a value": query("SELECT chr(27) || '[2J' || chr(8238) || chr(155)", (0,)),
    "sql: escapes in a column's name": query('SELECT 1 AS "\x1b[2J\u202e"', (0, 2)),
    "sql: rich markup": query("SELECT '[/nothing] [bold]x'", (0,)),
    "sql: escapes in the query": query(f"SELEC {EVIL}"),
    "sql: 100,000 nested parentheses": query("SELECT " + nested(100_000, "(", ")")),
    "sql: a row of 50 MB": query("SELECT length(repeat('x', 50000000))", (0, 2)),
    "sql: environment": query("SELECT getenv('HOME')"),
    # files of the store
    "store: prefab.duckdb is empty": damaged("prefab.duckdb", b"", *RUN, codes=(0,)),
    "store: prefab.duckdb of 8 kB": damaged("prefab.duckdb", bytes(8192), *RUN, codes=(0,)),
    "store: prefab.duckdb is SQLite's": damaged(
        "prefab.duckdb", b"SQLite format 3\0" + bytes(5000), *RUN
    ),
    "store: DuckDB's WAL is nonsense": damaged(
        "prefab.duckdb.wal", b"\xff" * 4096, *RUN, codes=(0,)
    ),
    "store: the ledger is empty": damaged("ledger.sqlite", b"", *RUN),
    "store: the ledger is text": damaged("ledger.sqlite", b"hello\n" * 1000, *RUN, codes=(1, 2)),
    "store: the ledger is zeros": damaged("ledger.sqlite", bytes(8192), *RUN, codes=(1, 2)),
}


def _set(folder: Path, name: str, value: object) -> None:
    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    pipeline[name] = value
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))


def hostile(lab: Lab, names: list[str]) -> Iterator[Result]:
    """Each case in a fresh copy of the finished project."""
    fresh = lab.folder.with_name("fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(lab.folder, fresh)
    for name in names:
        shutil.rmtree(lab.folder)
        shutil.copytree(fresh, lab.folder)
        yield Result(name, one_case(lab, CASES[name]))


def one_case(lab: Lab, case: Case) -> list[str]:
    case.write(lab.folder)
    lab.control()
    ended = lab.prefab(*case.command, timeout_s=WAIT_S, address_space=6 << 30)
    said = ended.out + ended.err
    problems = []
    if ended.code is None:
        problems.append(f"still running after {WAIT_S} s")
    elif ended.code not in case.codes:
        problems.append(f"exit code {ended.code}, not {case.codes}: {ended.last!a}")
    if "Traceback" in said:
        problems.append(f"a traceback: {ended.last!a}")
    if ended.cpu_s > CPU_S:
        problems.append(f"{ended.cpu_s} s of CPU")
    if ended.peak_mb > MEMORY_MB:
        problems.append(f"{ended.peak_mb} MB of memory")
    if found := ESCAPES.search(said):
        problems.append(f"{found[0]!a} reaches the terminal")
    if "root:" in said or (lab.folder / "owned").exists():
        problems.append("it did what it was told")
    return problems
