"""Every state that a crash or a power cut can leave of a small run, rebuilt from a record of what
the run did to the store's files.

A crash of the process leaves all operations up to some moment. After a power cut only what was
synced is sure: `drop` takes it alone; `names` keeps the new names of files whose contents were not
synced, as file systems do that write names before contents; `some` keeps an arbitrary part of what
was not synced.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.lab import Lab, committed

HEAD = struct.Struct("<cqqqq")
POWER = ("drop", "names", "some")


@dataclass(frozen=True)
class Operation:
    """C create, W write at `offset`, T set the size to `offset`, S sync, R rename to `path2`, U
    unlink, D make a folder, X remove one, M a mark."""

    kind: str
    path: str
    path2: str
    data: bytes
    offset: int


def read_record(file: Path) -> list[Operation]:
    raw, at, found = file.read_bytes(), 0, []
    while at < len(raw):
        kind, n, n2, size, offset = HEAD.unpack_from(raw, at)
        at += HEAD.size
        parts = raw[at : at + n], raw[at + n : at + n + n2], raw[at + n + n2 : at + n + n2 + size]
        at += n + n2 + size
        found.append(
            Operation(kind.decode(), parts[0].decode(), parts[1].decode(), parts[2], offset)
        )
    return found


def recorded(lab: Lab, command: tuple[str, ...], root: Path | None = None) -> list[Operation]:
    """What a command does to the files below `root` (the store, made anew)."""
    if root is None:
        lab.reset()
    record = lab.folder / "record"
    ended = lab.prefab(*command, shim={"root": str(root or lab.store), "record": str(record)})
    assert ended.code == 0, ended.err
    return [one for one in read_record(record) if root is None or one.kind != "M"]


@dataclass
class Inode:
    """A file's contents now, those that were synced, and what was done since."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[Operation] = field(default_factory=list)


def apply(data: bytearray, operation: Operation) -> None:
    if operation.kind == "T":
        if operation.offset < len(data):
            del data[operation.offset :]
        else:
            data += bytes(operation.offset - len(data))
        return
    end = operation.offset + len(operation.data)
    if len(data) < end:
        data += bytes(end - len(data))
    data[operation.offset : end] = operation.data


class Disk:
    """The files of a folder while operations are done to them."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.names: dict[str, Inode] = {}
        self.folders: set[str] = set()
        self.synced_names: dict[str, Inode] = {}

    def do(self, one: Operation) -> None:
        if one.kind == "C":
            self.names[one.path] = Inode()
        elif one.kind in "WT" and one.path in self.names:
            inode = self.names[one.path]
            apply(inode.data, one)
            inode.pending.append(one)
        elif one.kind == "S":
            self._sync(one.path)
        elif one.kind == "R":
            self._rename(one.path, one.path2)
        elif one.kind == "U":
            self.names.pop(one.path, None)
        elif one.kind == "D":
            self.folders.add(one.path)
        elif one.kind == "X":
            self.folders.discard(one.path)

    def _sync(self, path: str) -> None:
        """A sync of one file makes all earlier changes of names durable: one journal holds them."""
        if inode := self.names.get(path):
            inode.synced, inode.pending = bytes(inode.data), []
        self.synced_names = dict(self.names)

    def _rename(self, old: str, new: str) -> None:
        for name in [n for n in self.names if n == old or n.startswith(old + "/")]:
            self.names[new + name[len(old) :]] = self.names.pop(name)
        self.folders = {new + f[len(old) :] if f.startswith(old) else f for f in self.folders}

    def write(self, how: str, draw: random.Random) -> None:
        """Make the folder what a crash (`all`) or a power cut leaves."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in sorted(self.folders):
            Path(name).mkdir(parents=True, exist_ok=True)
        Path(self.root).mkdir(parents=True, exist_ok=True)
        synced = how == "drop" or (how == "some" and draw.random() < 0.5)
        for name, inode in (self.synced_names if synced else self.names).items():
            if name.endswith("-shm"):  # shared memory: made anew by the first who opens
                continue
            data = bytearray(inode.data if how == "all" else inode.synced)
            for one in inode.pending if how == "some" else ():
                if draw.random() < 0.5:
                    apply(data, one)
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(data)


def states(
    lab: Lab, operations: list[Operation], how: str, every: int = 1, seed: int = 0
) -> Iterator[tuple[str, set[str]]]:
    """Make each state in turn; its name, and the questions whose answers must be there: those that
    were committed when the run was told so."""
    disk, draw, sure = Disk(lab.store), random.Random(seed), set[str]()
    for number, one in enumerate(operations):
        disk.do(one)
        if one.kind == "M":
            if one.path == "after_commit":
                disk.write("all", draw)
                sure = set(committed(lab.store))
            continue
        if number % every == 0 or number == len(operations) - 1:
            disk.write(how, draw)
            yield (
                f"{how}: operation {number + 1} of {len(operations)} ({one.kind} {one.path})",
                sure,
            )


def check_state(lab: Lab, sure: set[str]) -> list[str]:
    """Open a state with the same command: nothing sure is lost, nothing on disk is asked again,
    and the store comes out as it should."""
    lab.control()
    try:
        before = committed(lab.store)
    except sqlite3.Error as error:
        return [f"the ledger cannot be read: {error}"]
    problems = []
    if lost := sure - before.keys():
        problems.append(f"{len(lost)} committed answers are lost")
    ended = lab.prefab("run", "pipeline.yaml", "-q")
    if ended.code != 0 or "Traceback" in ended.err:
        return [*problems, f"exit code {ended.code}: {ended.last}"]
    if again := set(lab.log()) & before.keys():
        problems.append(f"{len(again)} committed answers were asked again")
    if difference := lab.differences():
        problems.append(difference)
    return problems
