"""Starting `prefab view`: its port, its browser, its end."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefab.factory.errors import ConfigError
from prefab.factory.extras import missing_package
from prefab.factory.ledger import db
from prefab.pipelines.view.jobs import Jobs
from prefab.pipelines.view.pages import View
from prefab.pipelines.view.reader import FillingError, StoreReader

PORT = 7323


def view(
    store: str | Path = "store",
    port: int = PORT,
    browser: bool = True,
    annotator: str = "",
    tell: Callable[[str], None] = print,
) -> None:
    """Show a store in the browser until Ctrl-C.

    Args:
        store: The store. A run may be filling it.
        port: The port on the loopback interface; 0: any that is free.
        browser: Also open the browser. Without one that can be opened, only the address is told.
        annotator: The name under which labels are recorded; default: the login name.
        tell: Called with the address.

    Raises:
        ConfigError: There is no store, the port is in use, or starlette is not installed.
        StoreError: The store is of a newer version, or damaged.
    """
    try:
        import uvicorn

        from prefab.pipelines.view.app import make_app, new_token
    except ImportError as error:
        raise missing_package(error.name, "`prefab view`") from error

    share_memory_of_threads()
    reader = opened(Path(store))
    jobs = Jobs()
    pages = View(reader, jobs, annotator)
    try:
        with listening(port) as listener:
            bound, token = listener.getsockname()[1], new_token()
            address = f"http://127.0.0.1:{bound}/?token={token}"
            app = make_app(pages, token, bound)
            server = uvicorn.Server(
                uvicorn.Config(
                    app, log_level="warning", access_log=False, server_header=False, lifespan="off"
                )
            )
            with ending_on_sigterm():
                tell(address)
                if browser and can_open_browser():
                    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
                server.run([listener])
    finally:
        pages.end()


def share_memory_of_threads() -> None:
    """Let glibc keep freed memory once, not once a thread: with the many threads that answer
    requests that is 20 MB. Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what the server started is ended too. uvicorn sends
    itself the signal again after its end, whose default would end this process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def opened(folder: Path) -> StoreReader:
    """The store's reader, once it was seen that the store can be read or is being filled.

    Raises: ConfigError without a store, StoreError for one that cannot be read.
    """
    if not (folder / db.FILE).exists():
        raise ConfigError(
            f"{folder}: no store here (ledger.sqlite is missing). Name a store (`prefab view DIR`), or make "
            "one with `prefab run`"
        )
    from prefab.pipelines.store.fill import refuse_without_row_ids

    refuse_without_row_ids(folder)
    reader = StoreReader(folder)
    try:
        reader.rows("SELECT 1")
    except FillingError:
        pass  # its pages say so until it is filled
    except BaseException:
        reader.end()
        raise
    return reader


def listening(port: int) -> socket.socket:
    """A socket that listens on the loopback interface.

    Raises: ConfigError when the port is in use or may not be used.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        listener.close()
        used = getattr(error, "errno", None) == errno.EADDRINUSE
        why = "is in use, perhaps by another `prefab view`" if used else f"cannot be used ({error})"
        raise ConfigError(f"port {port} {why}. Choose another with --port, or 0 for any") from error
    return listener


def can_open_browser() -> bool:
    """Whether there is a screen to open a browser on."""
    if sys.platform in ("darwin", "win32") or os.environ.get("BROWSER"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
