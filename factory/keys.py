"""Keys and ids: what makes two questions the same question, and two texts the same text.

A key is the first half of SHA-256 of canonical JSON (RFC 8785) of everything that decides an
answer. `SCHEMA` is part of it: changing what a key is made of is a decision (raise `SCHEMA`,
replace the golden keys), never an accident.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.paths import cache_folder
from prefab.factory.types import Message, Request, Sampling

SCHEMA = 1
# RFC 8785 numbers are IEEE doubles: above this, two integers would have the same text
MAX_EXACT_INT = 2**53 - 1
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
# configuration, tokenizer, chat template
WORDS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# files that a training run leaves in a model's folder; they do not change what the model answers
NOT_THE_MODEL = (
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state.pth",
    "training.json",
)
_KNOWN_KWARGS: dict[str, bytes] = {}


def canonical(obj: Any) -> bytes:
    """Canonical JSON of `obj`: equal values give equal bytes on every machine.

    Raises: ValueError for NaN, infinities, lone surrogates, integers beyond 2**53 - 1 and types
    JSON does not have.
    Source: RFC 8785 (JSON Canonicalization Scheme).
    """
    return _text(obj).encode()


def _text(obj: Any) -> str:
    if obj is None or isinstance(obj, bool):
        return {None: "null", True: "true", False: "false"}[obj]
    if isinstance(obj, str):
        return _string(obj).decode()
    if isinstance(obj, int):
        if abs(obj) > MAX_EXACT_INT:
            raise ValueError(f"{obj} has no exact JSON number (at most 2**53 - 1)")
        return str(int(obj))
    if isinstance(obj, float):
        return _number(obj)
    if isinstance(obj, Mapping):
        if any(not isinstance(name, str) for name in obj):
            raise ValueError("keys of a JSON object must be text")
        names = sorted(obj, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{_text(name)}:{_text(obj[name])}" for name in names) + "}"
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return "[" + ",".join(map(_text, obj)) + "]"
    raise ValueError(f"{type(obj).__name__} is not a JSON type")


def _number(x: float) -> str:
    """ECMAScript's shortest text of a double, which RFC 8785 prescribes (`1.0` is `1`, `1e-07` is
    `1e-7`).
    """
    if x != x or x in (float("inf"), float("-inf")):
        raise ValueError(f"{x} is not a JSON number")
    if x == 0:
        return "0"
    sign, digit_tuple, exponent = Decimal(repr(x)).as_tuple()
    all_digits = "".join(map(str, digit_tuple))
    digits = all_digits.rstrip("0")
    point = len(all_digits) + int(exponent)
    minus = "-" if sign else ""
    if len(digits) <= point <= 21:
        return minus + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{minus}{digits[0]}{fraction}e{point - 1:+d}"


def _string(text: str) -> bytes:
    try:
        return orjson.dumps(text)
    except TypeError as error:
        raise ValueError(f"text with a lone surrogate cannot be asked: {text[:80]!a}") from error


def request_bytes(request: Request) -> bytes:
    """The canonical JSON that is digested. Equal to `canonical(request_object(request))`, and
    faster.

    Raises: ValueError as `canonical` does.
    """
    try:
        messages = orjson.dumps(
            [
                {"content": m.content, "more": m.more, "role": m.role}
                if m.more
                else {"content": m.content, "role": m.role}
                for m in request.messages
            ]
        )
    except TypeError as error:
        raise ValueError(
            "a message holds a lone surrogate or something that is not text"
        ) from error
    kwargs = _kwargs(request.template_kwargs) if request.template_kwargs else b"{}"
    repeat = b"[%s]" % b",".join(b"%d" % int(i) for i in request.repeat)
    return (
        b'{"labels":%s,"messages":%s,"model":%s,"repeat":%s,"sampling":%s,"template_kwargs":%s,"v":%d}'
        % (
            _labels(request.labels),
            messages,
            _model(request.model),
            repeat,
            _sampling(request.sampling),
            kwargs,
            SCHEMA,
        )
    )


def request_object(request: Request) -> dict[str, Any]:
    """What a key is made of, as plain JSON values. A test compares `request_bytes` with it."""
    return {
        "v": SCHEMA,
        "model": request.model,
        "labels": list(request.labels),
        "messages": [
            {"role": m.role, "content": m.content} | ({"more": m.more} if m.more else {})
            for m in request.messages
        ],
        "template_kwargs": dict(request.template_kwargs),
        "sampling": sampling_object(request.sampling),
        "repeat": [int(i) for i in request.repeat],
    }


def sampling_object(s: Sampling) -> dict[str, Any]:
    """Every field of a sampling with its type fixed, so that `temperature: 1` and `1.0` are one
    question.
    """
    return {
        "max_tokens": int(s.max_tokens),
        "temperature": float(s.temperature),
        "top_p": float(s.top_p),
        "top_k": int(s.top_k),
        "min_p": float(s.min_p),
        "frequency_penalty": float(s.frequency_penalty),
        "presence_penalty": float(s.presence_penalty),
        "repetition_penalty": float(s.repetition_penalty),
        "stop": list(s.stop),
        "seed": None if s.seed is None else int(s.seed),
    }


@lru_cache(maxsize=256)
def _sampling(sampling: Sampling) -> bytes:
    return canonical(sampling_object(sampling))


@lru_cache(maxsize=256)
def _labels(labels: tuple[str, ...]) -> bytes:
    return canonical(labels)


def _kwargs(kwargs: tuple[tuple[str, Any], ...]) -> bytes:
    # by its text: 1, 1.0 and True are equal in Python but are different questions, and a value may
    # be unhashable
    text = repr(kwargs)
    if text not in _KNOWN_KWARGS:
        if len(_KNOWN_KWARGS) >= 256:
            _KNOWN_KWARGS.clear()
        _KNOWN_KWARGS[text] = canonical(dict(kwargs))
    return _KNOWN_KWARGS[text]


@lru_cache(maxsize=64)
def _model(model: str) -> bytes:
    return _string(model)


def key_of(request_json: bytes) -> bytes:
    """The 16-byte key of a question given as its canonical JSON."""
    return hashlib.sha256(request_json).digest()[:16]


def request_key(request: Request) -> bytes:
    """The 16-byte key under which an answer to this request is kept and found again."""
    return key_of(request_bytes(request))


def derived_seed(key: bytes) -> int:
    """The seed (0 .. 2**31 - 1) sent with a request at temperature above 0. It depends on what is
    asked alone, not on when.
    """
    return int.from_bytes(key[:4], "big") >> 1


def digest(*parts: Any) -> str:
    """A content id of 32 hex digits. Equal parts give equal ids; `("ab", "c")` and `("a", "bc")`
    give different ones.
    """
    if {str}.issuperset(map(type, parts)):  # the same bytes as below, faster
        try:
            return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]
        except TypeError as error:
            raise ValueError("text with a lone surrogate has no id") from error
    return hashlib.sha256(canonical(parts)).hexdigest()[:32]


def prompt_id(messages: Sequence[Message]) -> str:
    """The id of a conversation: a digest of its roles, texts and tool calls."""
    parts = ((m.role, m.content, *filter(None, [m.more])) for m in messages)
    return digest("prompt", *(part for turn in parts for part in turn))


def split_of(
    group_or_text: str, proportions: tuple[float, float, float] = (0.9, 0.05, 0.05)
) -> str:
    """train, val or test, as a function of the text alone: all prompts of a group are in one
    split.
    """
    place = int(digest("split", group_or_text)[:13], 16) / 16**13
    train, val, _ = proportions
    return "train" if place < train else "val" if place < train + val else "test"


def model_identity(path: str, dtype: str = "", revision: str = "", adapter: str = "") -> str:
    """Which model this is, independent of its address: `folder:<digest>` for a local folder, else
    the declared name and revision.

    A folder's digest covers weights, configuration, tokenizer, chat template, dtype and adapter.
    The hub's blob names stand for file contents where there are some; other files are digested once
    (`PREFAB_CACHE`, else `~/.cache/prefab`, remembers by path, size, mtime and inode).
    """
    folder = Path(path)
    if not folder.is_dir():
        return "name:" + canonical([path, revision, dtype, adapter]).decode()
    # `Path("")` is the working directory, which has nothing to do with the model
    tuned = _folder_files(Path(adapter)) if adapter and Path(adapter).is_dir() else adapter or []
    parts = [dtype, _folder_files(folder), tuned]
    return "folder:" + digest(*map(_text, parts))


def _folder_files(folder: Path) -> list[list[str]]:
    files = sorted(
        f for f in folder.iterdir() if f.suffix in WEIGHTS + WORDS and f.name not in NOT_THE_MODEL
    )
    return [[f.name, _file_digest(f)] for f in files if f.is_file()]


def _file_digest(file: Path) -> str:
    real = file.resolve()
    if file.is_symlink() and real.parent.name == "blobs":
        return real.name
    stat = real.stat()
    place = f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    cache_file = cache_folder() / "digests.json"
    known = _read_cache(cache_file)
    if place not in known:
        with real.open("rb") as handle:
            known[place] = hashlib.file_digest(handle, "sha256").hexdigest()
        if stat.st_size > 1 << 20:  # smaller files are digested faster than remembered
            _write_cache(cache_file, known)
    return known[place]


def _read_cache(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


def _write_cache(file: Path, known: dict[str, str]) -> None:
    """Replace the cache file in one step. A cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known))
        fresh.replace(file)
    except OSError:
        pass


def rubric_id(rubric: tuple[tuple[str, float], ...]) -> str:
    """The name of a prompt's own rubric in a use: 16 hex digits of its digest. An edited rubric
    gets another name, so earlier uses keep the rubric that they were asked with.
    """
    return digest("rubric", [list(line) for line in rubric])[:16]
