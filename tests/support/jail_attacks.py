"""Runs the programs of `jail_attack_programs.py` in the verifier's jail.

`python jail_attacks.py ROOT OUTSIDE [LEVEL]` runs them all, for the test that does so as an
ordinary user, and prints a JSON object: `isolation`, `attacks` from name to what became of it,
among them "an honest program", which must work.
"""

from __future__ import annotations

import ast
import json
import os
import pty
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = Path(__file__).with_name("jail_attack_programs.py").read_text(encoding="utf-8")
ATTACKS = [
    node.name
    for node in ast.parse(PROGRAMS).body
    if isinstance(node, ast.FunctionDef) and node.name not in ("call", "can")
]
HONEST = """
import os, pathlib, shutil, signal, tempfile, threading
def f():
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "a").write_text("text")
    shutil.copy2(folder / "a", folder / "b")
    os.replace(folder / "b", folder / "c")
    signal.signal(signal.SIGUSR1, lambda *a: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    return sorted(os.listdir(folder))
"""
ENDED = "the answer's process ended"


@contextmanager
def prepared(outside: Path) -> Iterator[str]:
    """A folder with files and sockets that an attack looks for, and a terminal, whose name is
    given.
    """
    outside.chmod(0o777)
    for name, mode in (("private", 0o600), ("public", 0o644)):
        (outside / name).write_text("secret")
        (outside / name).chmod(mode)
    sockets = [socket.socket(socket.AF_UNIX, kind) for kind in (1, 2, 1)]
    main, other = pty.openpty()
    try:
        for sock, name in zip(sockets, ("socket", "datagrams", ""), strict=True):
            sock.bind(str(outside / name) if name else f"\0{outside}")
            if name:
                (outside / name).chmod(0o777)
        for sock in sockets[::2]:
            sock.listen(64)
        terminal = os.ttyname(other)
        os.chmod(terminal, 0o666)
        yield terminal
    finally:
        for sock in sockets:
            sock.close()
        os.close(main)
        os.close(other)


def outcome(name: str, outside: Path, terminal: str) -> str:
    """What became of an attack: "held", or what the test said."""
    from prefab.judges import sandbox

    code = f"{PROGRAMS}\nOUTSIDE, TERMINAL, attack = {str(outside)!r}, {terminal!r}, {name}\n"
    limits = sandbox.Limits(timeout_s=5, memory_mb=128)
    found = sandbox.run_tests("assert attack() is False", code, limits)
    if found.get("passed") == 1:
        return "held"
    said = str(found.get("failures"))
    no_file = "a_file" in name and "FileNotFoundError" in said
    killed = name == "calls_of_32_bit_programs" and ENDED in said
    return "held" if killed or no_file or "PermissionError" in said else f"got through: {found}"


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from prefab.judges import sandbox

    folder = Path(sys.argv[2])
    if len(sys.argv) > 3:  # as on a machine that has nothing stricter
        sandbox._LEVELS = [
            level for level in sandbox._LEVELS if level[0] == set(sys.argv[3].split())
        ]
    with prepared(folder) as terminal:
        attacks = {name: outcome(name, folder, terminal) for name in ATTACKS}
    honest = sandbox.run_tests("assert f() == ['a', 'c']", HONEST, sandbox.Limits(timeout_s=5))
    attacks["an honest program"] = "held" if honest.get("passed") == 1 else str(honest)
    print(json.dumps({"isolation": sandbox.isolation_status(), "attacks": attacks}))
