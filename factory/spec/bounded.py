"""Limits for everything that is read from a user's files: bytes of a file, of a line, of what a
compressed file unpacks to, rows and their values.

A file that is not what its name promises is refused in words: it never fills the memory, and
nothing waits for a pipe to which nobody writes.
"""

from __future__ import annotations

import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError, Problem

VARIABLE = "PREFAB_READ_LIMITS"
HOW = f"; {VARIABLE}=10 in the environment makes the limits of reading ten times as large"
MAX_DOCUMENT = 8 * 2**20  # bytes of a YAML file or a template
MAX_LIST = 512 * 2**20  # bytes of a file of lines that is read as a whole
MAX_JSON = 128 * 2**20  # bytes of a .json file, which is parsed as a whole
MAX_LINE = 32 * 2**20  # bytes of a line, or characters of a field
MAX_UNPACKED = 256 * 2**20  # bytes that a compressed file may always unpack to,
MAX_RATIO = 200  # and how many times its size where that is more
MAX_DIGITS = 300  # of a whole number in JSON
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def limit(most: int) -> int:
    """A limit as the environment variable PREFAB_READ_LIMITS scales it."""
    given = os.environ.get(VARIABLE) or "1"
    try:
        factor = float(given)
        if factor > 0:
            return int(most * max(factor, 0.001))
    except (ValueError, OverflowError):
        pass
    raise ConfigError(
        f"the environment variable {VARIABLE} is {given!r}: write a number such as 10"
    )


def mb(most: int) -> str:
    """A number of bytes in words."""
    return f"{most / 2**20:,.0f} MB" if most >= 2**20 else f"{most:,} bytes"


def open_regular(path: Path) -> BufferedReader:
    """The open file at a path.

    Raises:
        OSError: It cannot be opened.
        ConfigError: It is a pipe, a device or a socket.
    """
    # without O_NONBLOCK, opening a pipe waits until someone writes to it
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    what = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
    raise ConfigError([Problem(str(path), 0, 0, "", f"is {what}, not a file; copy it to a file")])


def too_long(path: Path, most: int, line: int = 0) -> ConfigError:
    """The refusal of a file (or of one of its lines) that is longer than a limit."""
    what = "a line" if line else "the file"
    message = f"{what} is longer than {mb(most)}{HOW}"
    return ConfigError([Problem(str(path), line, 1 if line else 0, "", message)])


def read_bytes(path: Path, most: int) -> bytes:
    """All bytes of a file. Raises: OSError; ConfigError where it is longer than `most` allows."""
    most = limit(most)
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise too_long(path, most)
    return data


def read_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises: ValueError that says what is wrong with it: not UTF-8, no JSON, nested too deeply, a
        number of too many digits, half a surrogate pair, or a field that is there twice.
    """
    try:
        words = text if isinstance(text, str) else text.decode("utf-8")
        value = parse_json(words)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    check_json(value, words)
    return value


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:  # more than a float holds
        raise ValueError(f"holds a number of {len(text):,} digits; at most {MAX_DIGITS}")
    return int(text)


parse_json = json.JSONDecoder(parse_int=_whole_number).decode


def check_json(value: Any, text: str) -> None:
    """What Python's parser accepts, and nothing else can hold or should.

    Args:
        value: The value of a JSON text.
        text: The text.

    Raises: ValueError for half a surrogate pair, or for a field of the object that is there twice.
    """
    if "\\u" in text and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is not valid Unicode") from None
    for name in value if isinstance(value, dict) else ():
        if text.count(f'"{name}"') > 1:
            return _check_names(text)


def _check_names(text: str) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the field {twice!r} is there twice")
        return found

    json.loads(text, object_pairs_hook=once)
