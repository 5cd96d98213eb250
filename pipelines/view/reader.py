"""Reading a store for the pages, while runs and other commands write to it.

DuckDB lets either one program write to a file or several read it. So the file is open only while
pages ask, and a quarter of a second longer; new answers of the ledger are added by a process of its
own, which ends. A run that wants the file meanwhile waits for at most a page's queries.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.ledger import db
from prefab.factory.store import store
from prefab.factory.store.shared import is_shared
from prefab.pipelines.store.catalogue import has_row_ids

if TYPE_CHECKING:
    import duckdb

IDLE_S = 0.25  # how long the file stays open after the last query
PATIENCE_S = 2.0  # how long a query waits while another program writes
LONGEST_S = 20.0  # after which a query is stopped
THREADS = 2
MEMORY_MB = 80  # what does not fit goes to files beside the store while the query runs
FILL = (
    "import sys; from prefab.factory.errors import PrefabError\n"
    "from prefab.pipelines.store.fill import fill\n"
    "try: sys.exit(3 if fill(sys.argv[1], row_ids=True).held else 0)\n"
    "except PrefabError as error: sys.exit(str(error))\n"
)
Row = dict[str, Any]
_NAMED = re.compile(r"\$(\w+)")


class FillingError(StoreError):
    """The store is being filled or rebuilt by another process."""


class StoreReader:
    """Questions to a store, from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filling: subprocess.Popen[str] | None = None
        self.problem = ""  # why the last filling failed
        self._lock = threading.RLock()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._timer: threading.Timer | None = None
        self._cached: dict[str, Any] = {}
        self._state: tuple[int, ...] = ()
        self._next_fill = 0.0
        self._kept = 0  # callers of `together`
        self._filling = self._filled = ""  # what the ledger held, as digests

    def rows(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Row]:
        """The rows of a query, each as a dictionary. Values are for `$name` in it.

        Raises: FillingError while the store is filled, ConfigError when the query takes too long.
        """
        try:
            return self._rows(sql, values)
        except store.MemoryLimitError:
            if self._kept:
                raise
            self.close()  # what other queries left in its memory goes
            return self._rows(sql, values)

    def _rows(self, sql: str, values: Mapping[str, Any] | None) -> list[Row]:
        with self._answer(sql, values) as result:
            names = [column[0] for column in result.description]
            return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def numbers(self, sql: str, values: Mapping[str, Any] | None = None) -> Any:
        """The only column of a query, as an array.

        Raises: As `rows`.
        """
        with self._answer(sql, values) as result:
            return next(iter(result.fetchnumpy().values()))

    @contextmanager
    def _answer(
        self, sql: str, values: Mapping[str, Any] | None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        with self._lock, self._opened() as con:
            stop = threading.Timer(LONGEST_S, con.interrupt)
            stop.start()
            try:
                with store.translate_errors(self.folder / store.FILE):
                    used = set(_NAMED.findall(sql))
                    named = {name: value for name, value in (values or {}).items() if name in used}
                    yield con.execute(sql, named)
            except duckdb.InterruptException as error:
                raise ConfigError(
                    f"the query was stopped after {LONGEST_S:.0f} s. Choose fewer rows with the filters"
                ) from error
            finally:
                stop.cancel()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Questions of one caller on one connection, so that they can share a temporary table."""
        with self._lock, self._opened():
            self._kept += 1
            try:
                yield
            finally:
                self._kept -= 1

    def value(self, sql: str, values: Mapping[str, Any] | None = None) -> Any:
        """The first value of the first row; None without rows."""
        rows = self.rows(sql, values)
        return next(iter(rows[0].values())) if rows else None

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that holds as long as the store's file is the same."""
        with self._lock:
            if self.state() != self._state:
                self._cached, self._state = {}, self.state()
            if name not in self._cached:
                self._cached[name] = make()
            return self._cached[name]

    def state(self) -> tuple[int, ...]:
        """Changes when the store's file does."""
        try:
            stat = (self.folder / store.FILE).stat()
        except OSError:
            return ()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    @contextmanager
    def ledger(self) -> Iterator[Any]:
        """A connection that reads the ledger."""
        with closing(db.connect(self.folder / db.FILE, readonly=True)) as con:
            yield con

    def catch_up(self) -> bool:
        """Begin to add the ledger's new answers, unless that was just done. True: it goes on."""
        from prefab.pipelines.store.fill import state_of

        with self._lock:
            if self.filling is None and time.monotonic() >= self._next_fill:
                current, ledger = state_of(self.folder)
                if current or ledger == self._filled:  # it is never current while it has notes
                    self._next_fill = time.monotonic() + 1.0
                else:
                    self._filling = ledger
                    self.close()
                    command = [sys.executable, "-c", FILL, str(self.folder)]
                    self.filling = subprocess.Popen(
                        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                    )
                    self._began = time.monotonic()
            if self.filling is not None and self.filling.poll() is not None:
                self._ended(self.filling)
            return self.filling is not None

    def _ended(self, process: subprocess.Popen[str]) -> None:
        """Take note of a filling that has ended. The next one begins after five times as long, so
        that a run that goes on is copied at a fifth of one core.
        """
        error = process.communicate()[1].strip()
        self.problem = error.splitlines()[-1] if process.returncode and error else ""
        self._filled = "" if process.returncode else self._filling
        self._next_fill = time.monotonic() + max(2.0, 5 * (time.monotonic() - self._began))
        self.filling = None

    @contextmanager
    def _opened(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if self._timer:
            self._timer.cancel()
        deadline = time.monotonic() + PATIENCE_S
        while (not self._kept and self.catch_up()) or self._con is None:
            if self.filling is None:
                try:
                    self._con = self._connect()
                    continue
                except store.HeldError:
                    pass
            if time.monotonic() > deadline:
                raise FillingError("new answers are being added to the store")
            time.sleep(0.03)
        try:
            yield self._con
        finally:
            self._timer = threading.Timer(IDLE_S, self.close)
            self._timer.daemon = True
            self._timer.start()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        if not (self.folder / store.FILE).exists():
            raise StoreError(self.problem or f"{self.folder / store.FILE}: no store here yet")
        con = store.read_only(self.folder, MEMORY_MB, THREADS)
        if is_shared(self.folder) and not has_row_ids(con):  # a filling copies them
            con.close()
            raise StoreError(self.problem) if self.problem else store.HeldError("no row ids yet")
        return con

    def close(self) -> None:
        """Close the file; the next query opens it again."""
        with self._lock:
            if self._con is not None:
                self._con.close()
                self._con = None

    def end(self) -> None:
        """Close the file for good, and wait for a filling that goes on."""
        if self._timer:
            self._timer.cancel()
        self.close()
        if self.filling is not None:
            self.filling.terminate()
            self.filling.wait()
