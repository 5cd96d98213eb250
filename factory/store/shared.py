"""A store that many processes fill: the files of its shared folder.

The prompts are divided into shards, and each shard is an ordinary run with a ledger of its own on
the disk of the machine that works on it. The shared folder holds what is published of them:

    shards.json                  the format, and the number of shards, which never changes
    prompts/DIGEST/00017.jsonl   the prompts of a source by shard
    runs/000001.json             the runs, with the same numbers in each shard
    segments/00017/              the ledger of a shard as Parquet files, each with a manifest
    tables/samples/00017-ID.parquet   the rows of a shard
    head.json                    calibrations and labels, which all shards need
    states/00017.json            how far a shard is, and which files hold its rows
    places/00017                 where a shard was worked on last
    ledger.sqlite, prefab.duckdb the catalogue: labels, evaluations, and views of the tables

In the place of the folder there may be an object store. Then the catalogue is in a folder of the
driver's machine, beside copies of the tables, the states and the runs.

Files are written under another name and renamed, so that a reader sees a whole file or none.
"""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.keys import canonical, digest
from prefab.factory.ledger.records import Deciding
from prefab.factory.shared_files import LocalFiles, SharedFiles

FORMAT = 1
MARKER = "shards.json"
HEAD = "head.json"
# Tables of the store that are views over the shards' files: their rows belong to one prompt, and so
# to one shard. What else shards have is small, and copied into the catalogue.
VIEWED = (
    *("prompts", "samples", "critiques", "scores", "steps", "rankings", "verdicts"),
    *("strengths", "calls", "preferences"),
)
COPIED = ("models", "failures", "evals")


def is_shared(folder: Path) -> bool:
    """Whether the store in this folder is one that many processes fill."""
    return (folder / MARKER).exists()


def refuse_shards(folder: Path) -> None:
    """Raises: ConfigError for a store in shards, whose answers are not in one ledger."""
    if is_shared(folder):
        raise ConfigError(
            f"{folder}: this store is in shards (docs/scale.md), and this command needs all answers "
            f"in one ledger. Make an ordinary store of it: prefab store merge {shlex.quote(str(folder))} NEW"
        )


def read_json(files: SharedFiles, name: str) -> Any:
    """The content of a JSON file of the shared folder; None where there is none.

    Raises: StoreError when it is damaged or of a newer version.
    """
    return read_all_json(files, [name])[0]


def read_all_json(files: SharedFiles, names: list[str]) -> list[Any]:
    """As `read_json`, of many files."""
    found = zip(names, files.read_all(names), strict=True)
    return [None if data is None else _parsed(files, name, data) for name, data in found]


def _parsed(files: SharedFiles, name: str, data: bytes) -> Any:
    try:
        value = orjson.loads(data)
    except ValueError as error:
        raise StoreError(f"{files.address}/{name}: damaged ({error})") from error
    if isinstance(value, dict) and value.get("format", FORMAT) > FORMAT:
        raise StoreError(
            f"{files.address}/{name}: written by a newer version of Prefab (format "
            f"{value['format']}; this one reads up to {FORMAT}). Use the same version on all machines"
        )
    return value


@dataclass(slots=True)
class ShardState:
    """What is known of a shard. `runs` has by run number the state (done, stopped, set_aside), the
    digest of its prompts, and the counts. `tables` has by table the file of its rows and its size
    in bytes; `head` is what the shards' common facts were when they were made (`write_head`), and
    `waiting` how many prompts waited for calls.
    """

    shard: int
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, tuple[str, int]] = field(default_factory=dict)
    head: str = ""
    waiting: int = 0


class SharedFolder:
    """The shared folder of a store. `shards` is the number of shards."""

    def __init__(self, folder: Path, files: SharedFiles | None = None) -> None:
        """`files` are those of an object store; left out, those of the folder.

        Raises: StoreError when there is no such store, or it is of a newer version.
        """
        self.folder = folder
        self.is_remote = files is not None
        self.files: SharedFiles = files or LocalFiles(folder)
        found = read_json(self.files, MARKER)
        if found is None:
            raise StoreError(
                f"{self.files.address}: {MARKER} is missing, so this is no store in shards"
            )
        self.shards: int = found["shards"]
        self.id: str = found["id"]
        self.copy_of: str = found.get("copy_of", "")  # the address of which the folder is a copy

    @classmethod
    def create(cls, folder: Path, shards: int, files: SharedFiles | None = None) -> SharedFolder:
        """The shared folder, made with this number of shards where there is none.

        Raises: StoreError when there is a store of another kind, or the copy of another one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not is_shared(folder) and (folder / "ledger.sqlite").exists():
            raise StoreError(
                f"{folder}: this store was filled by `prefab run` without shards. Name another "
                "folder with --set scale.shared=FOLDER"
            )
        value = {"format": FORMAT, "shards": shards, "id": uuid.uuid4().hex[:12]}
        to = files or LocalFiles(folder)
        to.create(MARKER, orjson.dumps(value))
        made = cls(folder, files)
        if not made.is_remote and made.copy_of:
            raise StoreError(
                f"{folder}: the copy of a store at {made.copy_of}. Set scale.shared={made.copy_of}"
            )
        if made.is_remote:
            made._check_remote()
        return made

    def _check_remote(self) -> None:
        """Raises: StoreError where the object store lets two processes create one file, or the
        folder of this machine belongs to another store.
        """
        if self.files.create(MARKER, self.files.read(MARKER)):
            raise StoreError(
                f"{self.files.address}: its server ignores `If-None-Match: *`, by which one of several "
                "processes gets a file. Use a server that knows it, or a folder that is mounted"
            )
        ours = read_json(LocalFiles(self.folder), MARKER)
        if ours is not None and ours["id"] != self.id:
            raise StoreError(
                f"{self.folder}: has the rows of another run over shards. Name another folder with "
                "--set store=FOLDER"
            )

    def update_copy(self) -> None:
        """Copy from an object store what the catalogue needs: the rows of all shards, their states,
        and the runs. Only what is new is copied. Where the files are in the folder, nothing.

        Raises: OSError.
        """
        if not self.is_remote:
            return
        here = LocalFiles(self.folder)
        self._copy_tables(here)
        if not is_shared(self.folder):
            marker = {"format": FORMAT, "shards": self.shards, "id": self.id}
            here.write(MARKER, orjson.dumps({**marker, "copy_of": self.files.address}))
        copy = SharedFolder(self.folder)
        old = {state.shard: state.tables for state in copy.states()}
        folders = ("runs", "starts", "states")
        names = [HEAD, *(f"{folder}/{name}" for folder in folders for name in self._json(folder))]
        found = zip(names, self.files.read_all(names), here.read_all(names), strict=True)
        for name, data, known in found:
            if data is not None and data != known:  # the same again would make the catalogue anew
                here.write(name, data)
        for state in copy.states():
            copy.drop_rows(state.shard, [state.tables, old.get(state.shard, {})])

    def _copy_tables(self, here: LocalFiles) -> None:
        """Copy the files of rows that are not there, or not whole."""
        states = self.states()
        names = [f"tables/{table}/{name}" for s in states for table, (name, _) in s.tables.items()]
        sizes = [size for state in states for _, size in state.tables.values()]
        found = zip(names, sizes, here.sizes(names), strict=True)
        wanted = [name for name, size, there in found if size != there]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self.files.local_path(name, self.folder), wanted))

    def segments(self, shard: int) -> SharedFiles:
        """The files of a shard's published ledger."""
        return self.files.below(f"segments/{name_of(shard)}")

    def state(self, shard: int) -> ShardState:
        """What is known of a shard. Raises: StoreError."""
        return self.states_of([shard])[0]

    def states_of(self, shards: Iterable[int]) -> list[ShardState]:
        """What is known of these shards. Raises: StoreError."""
        names = {shard: f"states/{name_of(shard)}.json" for shard in shards}
        states = []
        for shard, found in zip(names, read_all_json(self.files, [*names.values()]), strict=True):
            if found is None:
                states.append(ShardState(shard))
                continue
            tables = {table: (name, size) for table, (name, size) in found["tables"].items()}
            state = ShardState(shard, found["runs"], tables, found["head"], found["waiting"])
            states.append(state)
        return states

    def write_state(self, state: ShardState) -> None:
        """Replace what is known of a shard."""
        value = {**asdict(state), "format": FORMAT}
        self.files.write(f"states/{name_of(state.shard)}.json", orjson.dumps(value))

    def states(self) -> list[ShardState]:
        """What is known of each shard that was worked on."""
        return self.states_of(int(name.removesuffix(".json")) for name in self._json("states"))

    def _json(self, folder: str) -> list[str]:
        """The names of the JSON files of a folder."""
        return [name for name in self.files.names(folder) if name.endswith(".json")]

    def states_digest(self) -> str:
        """A digest of the states, by name, size and time: they are replaced, never changed."""
        found = []
        for name in self._json("states"):
            stat = (self.folder / "states" / name).stat()
            found.append([name, stat.st_size, str(stat.st_mtime_ns), str(stat.st_ino)])
        return digest(found, self._json("runs"))

    def rows_files(self, state: ShardState) -> dict[str, Path]:
        """By table, the files of a shard's rows; nothing where one is missing or damaged, so that
        the shard's rows must be made anew.
        """
        if not self.has_rows(state):
            return {}
        folder = self.folder / "tables"
        return {table: folder / table / name for table, (name, _) in state.tables.items()}

    def has_rows(self, state: ShardState) -> bool:
        """Whether a shard has rows, in files that have their sizes."""
        names = [f"tables/{table}/{name}" for table, (name, _) in state.tables.items()]
        return bool(names) and self.files.sizes(names) == [n for _, n in state.tables.values()]

    def place(self, part: str) -> str:
        """Where a shard, or a part of one, was worked on last; empty where it was not."""
        try:
            return self.files.read(f"places/{part}").decode()
        except OSError:
            return ""

    def write_place(self, part: str, place: str) -> None:
        """Record where it is worked on."""
        if self.place(part) != place:
            self.files.write(f"places/{part}", place.encode())

    def drop_rows(self, shard: int, kept: Sequence[Mapping[str, tuple[str, int]]]) -> None:
        """Remove the files of a shard's rows but those that are `kept`: the newest, and those that
        a reader may have open.
        """
        names = {name for tables in kept for name, _ in tables.values()}
        for table in (*VIEWED, *COPIED):
            for name in self.files.names(f"tables/{table}", f"{name_of(shard)}-"):
                if name not in names:
                    self.files.remove(f"tables/{table}/{name}")

    def write_head(self, evals: Sequence[str], labels: Sequence[str]) -> None:
        """Publish what all shards need of the catalogue's own ledger: calibrations and people's
        labels, as JSON texts.
        """
        value = {"format": FORMAT, "evals": list(evals), "human_labels": list(labels)}
        data = orjson.dumps(value)
        if data != self._head():
            self.files.write(HEAD, data)

    def read_head(self) -> dict[str, list[str]]:
        """What `write_head` wrote: by table, JSON texts."""
        value = orjson.loads(self._head() or b"{}")
        return {table: value.get(table, []) for table in ("evals", "human_labels")}

    def head_digest(self) -> str:
        """What tells two states of it apart; empty where there is nothing."""
        head = self.read_head()
        return digest(head) if any(head.values()) else ""

    def _head(self) -> bytes:
        return self.files.read_all([HEAD])[0] or b""

    def runs(self) -> list[dict[str, Any]]:
        """The runs in the order of their numbers, each with id, name, version, config, texts, at
        and starts.
        """
        names = [f"runs/{name}" for name in self._json("runs")]
        return [value for value in read_all_json(self.files, names) if value is not None]

    def begin_run(
        self, name: str, config: dict[str, Any], texts: dict[str, str], deciding: Deciding
    ) -> dict[str, Any]:
        """The run with this name, texts and configuration, as far as it decides: found, or
        recorded as the name's next version. `resumed` says which.
        """
        while True:
            known = self.runs()
            wanted = canonical(deciding(config))
            for run in reversed(known):
                same = (run["name"], run["texts"]) == (name, texts)
                if same and canonical(deciding(run["config"])) == wanted:
                    return {**run, "resumed": True}
            version = 1 + max((run["version"] for run in known if run["name"] == name), default=0)
            run = {
                "format": FORMAT,
                "id": len(known) + 1,
                "name": name,
                "version": version,
                "config": config,
                "texts": texts,
                "at": time.time(),
            }
            if self.files.create(f"runs/{run['id']:06d}.json", orjson.dumps(run)):
                return {**run, "resumed": False}

    def start_run(self, run: int) -> None:
        """Record that a run was started, unless it was the last one to be started."""
        while True:
            known = self._json("starts")
            if known and read_json(self.files, f"starts/{known[-1]}")["run"] == run:
                return
            value = orjson.dumps({"format": FORMAT, "run": run, "at": time.time()})
            if self.files.create(f"starts/{len(known) + 1:06d}.json", value):
                return

    def starts(self) -> Sequence[tuple[int, float]]:
        """The starts of runs in their order: number of the run, and time."""
        names = [f"starts/{name}" for name in self._json("starts")]
        return [(value["run"], value["at"]) for value in read_all_json(self.files, names) if value]


def name_of(shard: int) -> str:
    """How a shard is called in the names of files."""
    return f"{shard:05d}"
