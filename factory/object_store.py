"""Files in an object store (S3), by the protocol of `SharedFiles`.

The server decides which of several processes creates or replaces an object (`If-None-Match: *` and
`If-Match`), and its clock gives the times. Credentials and the server's address come from the
environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...) or the machine's role.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.extras import missing_package
from prefab.factory.shared_files import FileVersion, LocalFiles, SharedFiles

T = TypeVar("T")
U = TypeVar("U")
TOGETHER = 16  # requests at once
METADATA = "169.254.169.254"  # where a machine asks for its role, without credentials
CHUNK_BYTES = 8 << 20  # of an object in memory
RETRY = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}


class ObjectStoreError(StoreError, OSError):
    """An object store could not be reached, or refused a request."""

    help = "AWS_ENDPOINT_URL names its server; the same command goes on with what is published"


def is_address(name: str) -> bool:
    """Whether this is meant as an address, and not as the path of a folder: `s3:/b` too."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", name) is not None


def files_at(address: str) -> SharedFiles:
    """The files at an address: `s3://BUCKET/FOLDER`, or the path of a folder.

    Raises: ConfigError for any other address, and where the package for S3 is missing.
    """
    if not is_address(address):
        return LocalFiles(Path(address))
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^/]+(?:/[^/]+)*)/?", address)
    if found is None:
        raise ConfigError(
            f"scale.shared: {address} is no address of an object store that Prefab reads. Write "
            "s3://BUCKET/FOLDER, or the path of a folder that all machines mount"
        )
    try:
        import obstore
    except ImportError:
        raise missing_package("obstore", f"scale.shared: {address}") from None
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options: Any = {"allow_http": True} if plain else {}
    bucket = obstore.store.S3Store(found[1], client_options=options, retry_config=RETRY)
    return ObjectFiles(bucket, found[1], found[2])


class ObjectFiles:
    """Files below a prefix of a bucket. Raises ObjectStoreError where a request fails."""

    def __init__(self, store: Any, bucket: str, prefix: str) -> None:
        """`store` is a store of obstore for the bucket."""
        self._store, self._bucket, self._prefix = store, bucket, prefix

    @property
    def address(self) -> str:
        """As s3://BUCKET/PREFIX."""
        return f"s3://{self._bucket}/{self._prefix}"

    def below(self, folder: str) -> ObjectFiles:
        """The files below a longer prefix."""
        return ObjectFiles(self._store, self._bucket, f"{self._prefix}/{folder}")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise ObjectStoreError(f"s3://{self._bucket}: there is no such bucket") from error
            if isinstance(error, FileNotFoundError):
                raise
            raise ObjectStoreError(f"{self.address}/{name}: {_reason(str(error))}") from error

    def names(self, folder: str = "", start: str = "") -> list[str]:
        """The names of the objects in a folder. Those that begin with `start` follow one another,
        so that no others are listed.
        """
        prefix = self._key(folder) if folder else self._prefix
        offset = f"{prefix}/{start}" if start else None
        found: list[str] = []
        with self._translated(folder):
            for page in self._store.list(prefix, offset=offset, chunk_size=1000):
                names = [one["path"].removeprefix(f"{prefix}/") for one in page]
                found += (n for n in names if n.startswith(start) and "/" not in n)
                if start and names and not names[-1].startswith(start):
                    break
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The content of an object."""
        with self._translated(name):
            return bytes(self._store.get(self._key(name)).bytes())

    def read_all(self, names: list[str]) -> list[bytes | None]:
        """The contents of many objects."""

        def read(name: str) -> bytes | None:
            try:
                return self.read(name)
            except FileNotFoundError:
                return None

        return together(read, names)

    def write(self, name: str, data: bytes) -> None:
        """Write an object, or replace it."""
        with self._translated(name):
            self._store.put(self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object where there is none (`If-None-Match: *`)."""
        from obstore.exceptions import AlreadyExistsError

        with self._translated(name):
            try:
                self._store.put(self._key(name), data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object."""
        with self._translated(name), suppress(FileNotFoundError):
            self._store.delete(self._key(name))

    def sizes(self, names: list[str]) -> list[int | None]:
        """The sizes of objects."""

        def size(name: str) -> int | None:
            found = self._head(name)
            return None if found is None else int(found["size"])

        return together(size, names)

    def version(self, name: str) -> FileVersion | None:
        """By the ETag of an object, with the time of the server."""
        found = self._head(name)
        if found is None:
            return None
        return FileVersion(found["e_tag"], found["last_modified"].timestamp())

    def _head(self, name: str) -> dict[str, Any] | None:
        with self._translated(name):
            try:
                found: dict[str, Any] = self._store.head(self._key(name))
            except FileNotFoundError:
                return None
        return found

    def renew(self, name: str, data: bytes, tag: str) -> str | None:
        """Write an object anew (`If-Match`). The ETag of the same content is the same, so that the
        content must differ each time.
        """
        from obstore.exceptions import PreconditionError

        with self._translated(name):
            try:
                found = self._store.put(self._key(name), data, mode={"e_tag": tag})
            except (PreconditionError, FileNotFoundError):
                return None
        new: str = found["e_tag"]
        return new

    def take_over(self, name: str, data: bytes, tag: str) -> bool:
        """Replace an object (`If-Match`)."""
        return self.renew(name, data, tag) is not None

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary file, which is uploaded at the end."""
        with tempfile.TemporaryDirectory(prefix="prefab-upload-") as folder:
            path = Path(folder) / "file"
            yield path
            with self._translated(name):
                self._store.put(self._key(name), path)

    def local_path(self, name: str, cache: Path) -> Path:
        """A copy of the object in `cache`, under its name, made anew."""
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with self._translated(name), open(part, "wb") as file:
                for chunk in self._store.get(self._key(name)).stream(CHUNK_BYTES):
                    file.write(chunk)
            os.replace(part, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)
        return path


def _reason(told: str) -> str:
    """What an error of obstore says in one line: the server's code and message, if it gave one."""
    found = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", told, re.DOTALL)
    if found:
        return f"{found[1]}: {found[2]}"
    if METADATA in told:
        return (
            "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a "
            "role"
        )
    return re.sub(r"\s+", " ", told.partition("Debug source")[0]).strip()


def together(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """`work` of each item, in their order, by several threads where there are several items."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(TOGETHER, len(items))) as pool:
        return list(pool.map(work, items))
