"""Runs the programs of `jail_attack_programs.py` in the verifier's jail.

`python jail_attacks.py ROOT OUTSIDE` runs them all, for the test that does so as an ordinary user,
and prints a JSON object: `isolation`, and `attacks` from name to what became of it.
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
    killed = name == "calls_of_32_bit_programs" and ENDED in str(found.get("failures"))
    return "held" if killed else f"got through: {found}"


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from prefab.judges import sandbox

    folder = Path(sys.argv[2])
    with prepared(folder) as terminal:
        attacks = {name: outcome(name, folder, terminal) for name in ATTACKS}
    print(json.dumps({"isolation": sandbox.isolation_status(), "attacks": attacks}))
