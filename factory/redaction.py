"""Secrets: found in configuration and refused, and removed by value from everything that is printed
or kept.

Known secrets are the values of environment variables whose names say so, the keys that engines are
given, keys of the servers that are started here, and whatever was refused in a configuration.
Threat: a server that echoes its request puts the key into answers and error messages.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import orjson

REDACTED = "[redacted]"
LEAST = 8  # shorter values are words like "EMPTY" or "none", which stand in ordinary text
_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_.-])(?:key|api_?key|token|secret|password|passwd|credentials?|authorization)$"
    r"|^(?:apikey|accesstoken|authtoken|bearer)$"
)
# the forms of well-known services' keys
_KEY = re.compile(
    r"(?:Bearer |Basic )?(?:(?:sk|pk|rk|gsk|xai|hf|nvapi|glpat|r8|tgp|pplx|csk|fw|ghp|gho|ghu|ghs|ghr)"
    r"[-_](?=[\w-]*\d)[\w-]{16,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----.*)",
    re.S,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"--?[\w-]*(?:api-key|token|password|secret)(?:=|$)")
_USE = "is a secret, which would be kept in the store: "
_known: dict[bytes, None] = {}


def add_secret(value: str | None) -> None:
    """Remove this value from everything printed or kept from now on. Values that could be a word
    (shorter than 8 characters, or letters alone) are not taken.
    """
    value = (value or "").strip()
    if len(value) < LEAST or (value.isalpha() and len(value) < 20):
        return
    percent = quote(value, safe="")
    lower = re.sub(r"%..", lambda found: found[0].lower(), percent)
    for form in {value, unquote(value), percent, lower, value.replace("/", r"\/"), escape(value)}:
        _known.setdefault(form.encode("utf-8", "surrogatepass"))
    for longest in sorted(_known, key=len, reverse=True):  # one may contain another
        _known[longest] = _known.pop(longest)


def add_environment_secrets() -> None:
    """Take the environment's secrets: variables named like `*_API_KEY`, `*_TOKEN`, `*_PASSWORD`,
    with a value of at least 12 characters in which there is a digit and no space.
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and re.fullmatch(r"(?=\S*\d)[^\s/]\S{11,}", value):
            add_secret(value)


def redact(text: str) -> str:
    """The text without the known secrets."""
    for secret in _known:
        found = secret.decode("utf-8", "surrogatepass")
        if found in text:
            text = text.replace(found, REDACTED)
    return text


def redact_bytes(data: bytes) -> bytes:
    """A response's body without the known secrets; JSON that spells letters as escapes too."""
    if not _known:
        return data
    if rb"\u00" in data:
        with suppress(ValueError):
            data = orjson.dumps(orjson.loads(data))
    for secret in _known:
        if secret in data:
            data = data.replace(secret, REDACTED.encode())
    return data


def looks_like_key(text: str) -> bool:
    """Whether a text is nothing but a key of a known form."""
    return bool(_KEY.fullmatch(text.strip()))


def secrets_in(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the path of each secret in a configuration and what to do instead. The secrets found
    are added to the known ones, so that no message shows them.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            yield from secrets_in(part, (*path, str(name)))
    elif isinstance(value, list):
        if path[-1:] == ("args",):
            yield from _in_arguments(value, path)
        for index, part in enumerate(value):
            yield from secrets_in(part, (*path, index))
    elif isinstance(value, str) and (message := _why_secret(value, path)):
        yield path, message


def _in_arguments(words: list[Any], path: tuple[str | int, ...]) -> Iterator[tuple[Any, str]]:
    """Secrets among command-line arguments, which every user of the machine can read."""
    for index, word in enumerate(map(str, words)):
        if _OPTION.match(word):
            add_secret(word.partition("=")[2] or str(words[index + 1 : index + 2] or [""])[2:-2])
            yield (
                (*path, index),
                f"{word.partition('=')[0]} {_USE}leave it out (a server that is started here gets a "
                "key of its own; others' keys are named by `api_key_env`)",
            )


def _why_secret(value: str, path: tuple[str | int, ...]) -> str:
    """What is wrong with this text of a configuration; empty where it is no secret."""
    names = [part for part in path if isinstance(part, str)]
    name, within = (names or [""])[-1], set(names[:-1])
    if name == "api_key_env":
        return _why_no_variable(value)
    if "://" in value and (user := _user_part(value)):
        add_secret(user)
        return f"the URL's user part {_USE}remove it, and name the key's environment variable in `api_key_env`"
    if looks_like_key(value):
        add_secret(value)
        return f"this {_USE}put it into an environment variable, and name that in `api_key_env`"
    if "env" in within and _SECRET_NAME.search(name) and value:
        add_secret(value)
        return f"this {_USE}set {name} in your shell; the server gets this process's environment"
    if within & {"extra_body", "headers"} and _SECRET_NAME.search(name) and value:
        add_secret(value)
        return f"this {_USE}put it into an environment variable, and name that in `api_key_env`"
    return ""


def _why_no_variable(value: str) -> str:
    """Why a text is not the name of an environment variable, without the text: it may be a key."""
    long = len(value) >= 20 and any(map(str.isdigit, value)) and any(map(str.islower, value))
    if _VARIABLE.fullmatch(value) and not looks_like_key(value) and not long:
        return ""
    add_secret(value)
    return (
        "must be the name of an environment variable (such as OPENAI_API_KEY), not the key itself: "
        "put the key into a variable, and its name here"
    )


def _user_part(url: str) -> str:
    """The password of a URL, or its user where there is no password."""
    try:
        parts = urlsplit(url)
        user, password = parts.username or "", parts.password
    except ValueError:
        return ""
    if password:
        add_secret(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode())
    return password or user
