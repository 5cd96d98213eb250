"""Which prompts are of which shard, and their files in the shared folder.

A prompt's shard depends on its text alone, so whoever asks the same question is in the same shard,
and each question is asked once without any coordination between shards.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from prefab.factory import keys
from prefab.factory.console import warn
from prefab.factory.errors import ConfigError, Problem, StoreError
from prefab.factory.ledger.records import split_of
from prefab.factory.shared_files import SharedFiles
from prefab.factory.store.shared import FORMAT, SharedFolder, name_of, read_json
from prefab.factory.tool_calls import stored_messages, stored_text
from prefab.factory.types import Message, Prompt
from prefab.pipelines.config.loader import ResolvedPipeline

BUFFER_BYTES = 64 << 20  # of prompts in memory before they are written to their shards' files
SPLIT = "split.json"
POSITIONS = 1 << 16  # by which the prompts of a shard can be divided further


def shard_of(messages: tuple[Message, ...], shards: int) -> int:
    """The shard of a prompt, from 0 to `shards` - 1."""
    return int(keys.prompt_id(messages)[:13], 16) * shards >> 52


def position_of(messages: tuple[Message, ...]) -> int:
    """Where a prompt is within its shard, from 0 to `POSITIONS` - 1; by its text alone."""
    return int(keys.prompt_id(messages)[13:17], 16)


@dataclass(frozen=True, slots=True)
class Part:
    """The prompts of a shard at the positions from `first` to `end` - 1: by default all."""

    shard: int
    first: int = 0
    end: int = POSITIONS

    @property
    def is_whole(self) -> bool:
        """Whether these are all prompts of the shard."""
        return (self.first, self.end) == (0, POSITIONS)

    @property
    def name(self) -> str:
        """How the part is called in the names of files."""
        whole = name_of(self.shard)
        return whole if self.is_whole else f"{whole}-{self.first}-{self.end}"

    def share_of(self, prompts: int) -> int:
        """About how many of the shard's prompts these are; at least one."""
        return max(1, round(prompts * (self.end - self.first) / POSITIONS))

    def split(self, n: int) -> list[Part]:
        """It, as at most `n` parts of the same size."""
        width = self.end - self.first
        ends = sorted({self.first + width * i // n for i in range(n + 1)})
        return [Part(self.shard, *pair) for pair in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class ShardedPrompts:
    """The prompts of one source by shard: the folder of their files in the shared folder, and by
    shard the number of prompts and the digest of the file. `malformed` rows of the source are in
    no shard.
    """

    folder: str
    counts: list[int]
    digests: list[str]
    malformed: int


def prompts_of(files: SharedFiles, folder: str, part: Part, local: Path) -> ShardPrompts:
    """The prompts of a shard, or of a part of it, from the shared folder. `local` is the folder of
    this machine's ledgers.
    """
    name = f"{folder}/{name_of(part.shard)}.jsonl"
    return ShardPrompts(files.local_path(name, local), part, f"{files.address}/{name}")


class ShardPrompts:
    """The prompts of one shard, or of a part of it, as a `PromptSource`."""

    def __init__(self, path: Path, part: Part, address: str) -> None:
        """`path` is the file on this machine, and `address` where it is from."""
        self.path, self.address = path, address
        self.part = None if part.is_whole else part
        self.n_malformed = 0
        self.problems: list[Problem] = []

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts, in the order of the source."""
        with open(self.path, "rb") as file:
            for line in file:
                name, messages, tags, group, split, rubric = orjson.loads(line)
                rubric = tuple((text, points) for text, points in rubric)
                said = stored_messages(messages)
                part = self.part
                if part is None or part.first <= position_of(said) < part.end:
                    yield Prompt(name, said, tuple(tags), group, split, rubric)

    def check(self, digest: str) -> None:
        """Raises: StoreError where the file is not the one with this digest."""
        if digest and _digest(self.path) != digest:
            raise StoreError(
                f"{self.address}: damaged, or not there. Remove its folder: the same command divides the "
                "prompts again"
            )

    def summary(self) -> str:
        """Nothing: what was malformed was told when the prompts were divided."""
        return ""


def shard_prompts(
    loaded: ResolvedPipeline, shared: SharedFolder, quiet: bool = True
) -> ShardedPrompts:
    """The pipeline's prompts by shard; divided now where this source was not before. A file of
    prompts that has changed (its size or time) is another source.

    Raises: ConfigError where the source cannot be read, has no prompt, or puts a group on two
    sides.
    """
    folder = f"prompts/{_signature(loaded, shared.shards)}"
    if (known := _read(shared.files, folder)) is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="prefab-prompts-") as temporary:
        made = Path(temporary)
        counts = _divide(loaded.prompts, made, shared.shards)
        digests = [_digest(made / f"{name_of(shard)}.jsonl") for shard in range(shared.shards)]
        for path in sorted(
            made.iterdir()
        ):  # another process may write the same, with these digests
            with shared.files.writing(f"{folder}/{path.name}") as part:
                shutil.copyfile(path, part)
    malformed = loaded.prompts.n_malformed
    told = {"format": FORMAT, "counts": counts, "digests": digests, "malformed": malformed}
    shared.files.write(f"{folder}/{SPLIT}", orjson.dumps(told))
    if malformed and not quiet:
        for problem in loaded.prompts.problems[:3]:
            warn(str(problem))
        warn(loaded.prompts.summary())
    return ShardedPrompts(folder, counts, digests, malformed)


def _signature(loaded: ResolvedPipeline, shards: int) -> str:
    """What tells sources apart: the configuration of the prompts, and the file's size and time."""
    path = loaded.prompts.path
    stat = path.stat() if path.is_file() else None
    of_file = [str(stat.st_size), str(stat.st_mtime_ns)] if stat else []
    return keys.digest(loaded.config.prompts.model_dump(mode="json"), of_file, shards)[:16]


def _read(files: SharedFiles, folder: str) -> ShardedPrompts | None:
    told = read_json(files, f"{folder}/{SPLIT}")
    if told is None:
        return None
    return ShardedPrompts(folder, told["counts"], told["digests"], told["malformed"])


def _divide(prompts: Any, folder: Path, shards: int) -> list[int]:
    """Write each prompt to its shard's file. Returns: the number of prompts by shard."""
    counts, waiting, size = [0] * shards, [list[bytes]() for _ in range(shards)], 0
    splits: dict[str, str] = {}
    for prompt in prompts:
        shard = shard_of(prompt.messages, shards)
        line = _line(_with_split(prompt, splits))
        counts[shard] += 1
        waiting[shard].append(line)
        size += len(line)
        if size > BUFFER_BYTES:
            _write(folder, waiting)
            size = 0
    _write(folder, waiting)
    return counts


def _with_split(prompt: Prompt, splits: dict[str, str]) -> Prompt:
    """The prompt with the split that its group has: the first one of a group stands."""
    if prompt.group is None:
        return prompt
    split = splits.setdefault(prompt.group, split_of(prompt))
    if prompt.split is not None and prompt.split != split:
        raise ConfigError(
            f"prompt {prompt.id}: split {prompt.split!r}, but the group {prompt.group!r} is "
            f"{split!r} before. What belongs together stays on one side: correct the prompts file"
        )
    return replace(prompt, split=split)


def _line(prompt: Prompt) -> bytes:
    messages = stored_text(prompt.messages)
    row = (prompt.id, messages, prompt.tags, prompt.group, prompt.split, prompt.rubric)
    return orjson.dumps(row) + b"\n"


def _write(folder: Path, waiting: list[list[bytes]]) -> None:
    for shard, lines in enumerate(waiting):
        if lines:
            with open(folder / f"{name_of(shard)}.jsonl", "ab") as file:
                file.writelines(lines)
            lines.clear()


def _digest(path: Path) -> str:
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
