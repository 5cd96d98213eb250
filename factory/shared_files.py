"""Files that several machines share, in a folder that all of them mount.

A name is a path relative to that folder, such as `runs/000001.json`. Every file is written whole:
a reader sees all of it or none. Of several processes that create one file, one gets it.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefab.factory.errors import StoreError


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells two contents of a file apart, and when it was written, in seconds by the clock of
    whoever keeps the files (clocks of machines differ).
    """

    tag: str
    at: float


class SharedFiles(Protocol):
    """Files by name. Where something cannot be read or written, an OSError is raised."""

    @property
    def address(self) -> str:
        """How a person writes where they are."""

    def below(self, folder: str) -> SharedFiles:
        """The files below a folder."""

    def names(self, folder: str = "", start: str = "") -> list[str]:
        """The names, within a folder, of the files in it that begin with `start`; sorted."""

    def read(self, name: str) -> bytes:
        """The content of a file. Raises: FileNotFoundError."""

    def read_all(self, names: list[str]) -> list[bytes | None]:
        """The contents of many files; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it; it is there after a crash, too."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file where there is none. Returns: whether this call made it."""

    def remove(self, name: str) -> None:
        """Remove a file; nothing where there is none."""

    def sizes(self, names: list[str]) -> list[int | None]:
        """The sizes of files in bytes; None where there is none."""

    def version(self, name: str) -> FileVersion | None:
        """The version of a file; None where there is none."""

    def renew(self, name: str, data: bytes, tag: str) -> str | None:
        """Give a file a new time (its content may become `data`), where its version is still this
        one. Returns: its new tag; None where it has another version, or is gone.
        """

    def take_over(self, name: str, data: bytes, tag: str) -> bool:
        """Replace a file where its version is still this one. Of several processes one does.
        Returns: whether this call did.
        """

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A path of this machine to write to; at the end of the context it becomes the file."""

    def local_path(self, name: str, cache: Path) -> Path:
        """Where this machine can read the file: it may be copied to `cache`. There is nothing where
        there is no such file.
        """


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that others see all of it or none, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class LocalFiles:
    """Files of a folder that is mounted, by `SharedFiles`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.folder)

    def below(self, folder: str) -> LocalFiles:
        """The files of a folder below."""
        return LocalFiles(self.folder / folder)

    def names(self, folder: str = "", start: str = "") -> list[str]:
        """The names of the files in a folder; those that are being written are left out."""
        with suppress(FileNotFoundError), os.scandir(self.folder / folder) as found:
            names = (one.name for one in found if one.is_file())
            return sorted(n for n in names if n.startswith(start) and not n.startswith("."))
        return []

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.folder / name).read_bytes()

    def read_all(self, names: list[str]) -> list[bytes | None]:
        """The contents of many files."""
        found: list[bytes | None] = []
        for name in names:
            try:
                found.append(self.read(name))
            except FileNotFoundError:
                found.append(None)
        return found

    def write(self, name: str, data: bytes) -> None:
        """Write a file under another name, and rename it."""
        write_whole(self.folder / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file under another name, and make a hard link to it.

        Raises: StoreError where the file system has no hard links.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(path)
        part.write_bytes(data)
        try:
            return _link(part, path)
        finally:
            part.unlink()

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)

    def sizes(self, names: list[str]) -> list[int | None]:
        """The sizes of files."""
        found: list[int | None] = []
        for name in names:
            try:
                found.append((self.folder / name).stat().st_size)
            except OSError:
                found.append(None)
        return found

    def version(self, name: str) -> FileVersion | None:
        """By the inode and the time of a file."""
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return None
        return FileVersion(_tag(found), found.st_mtime)

    def renew(self, name: str, data: bytes, tag: str) -> str | None:
        """Set the time of a file; its content stays."""
        path = self.folder / name
        try:
            if _tag(path.stat()) != tag:
                return None
            os.utime(path)
            return _tag(path.stat())
        except FileNotFoundError:
            return None

    def take_over(self, name: str, data: bytes, tag: str) -> bool:
        """Rename the file away, which one process can do, and create another one."""
        path = self.folder / name
        away = _beside(path)
        try:
            path.rename(away)
        except FileNotFoundError:  # another process was first, and may have its own file there
            return False
        try:
            if _tag(away.stat()) != tag:  # another process has just made it, or renewed it
                _link(away, path)
                return False
        finally:
            away.unlink()
        return self.create(name, data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path in the same folder, which is renamed at the end."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(path)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def local_path(self, name: str, cache: Path) -> Path:
        """The file itself."""
        return self.folder / name


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _tag(stat: os.stat_result) -> str:
    return f"{stat.st_ino}-{stat.st_mtime_ns}"


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name, where there is none of it. Returns: whether this call did.

    Raises: StoreError where the file system has no hard links.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise StoreError(
            f"{path.parent}: its file system makes no hard links ({error.strerror}), by which one of "
            "several processes gets a file. Name a folder on NFS, Lustre or a local disk"
        ) from error
    return True
