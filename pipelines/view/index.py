"""The index of a run's preferences, from which the pages answer at a million of them: plain arrays
in the cache folder, made by `index_build.py` from the store and as easily thrown away.

A segment holds rows that were added together: a column a file (`p_chosen.npy`), sets of rows by
principle, judge, reason and tag (`facets.*`), and for each word the texts that have it (`words.*`);
a text is a prompt or an answer, and each row names its three. An overlay holds what can change of a
row: where it lies in the store, its marks and what people say, and the rows in each order of the
grid. `current.json` names the segments and the overlay that belong together, and the state of the
store that they show.
"""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefab.factory.keys import digest
from prefab.factory.paths import cache_folder
from prefab.factory.store import store
from prefab.pipelines.view.filters import OUTCOMES, RANGES, Filters, words_of

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
FORMAT = 3
CURRENT = "current.json"
DENSE = 32  # a set that has more than one of so many rows is stored as bits
FROM = 20_000  # preferences of a run; fewer are asked of the store itself
TRIES = 3  # to make an index of one state of the store
STEPS = 20  # bars of a histogram
PART = 1 << 16  # rows that are looked up together, so that temporary arrays stay small
# What each histogram shows: its column, its ends and its title.
HISTOGRAMS = {
    "p": ("p_chosen", 0.5, 1.0, "p_chosen"),
    "spread": ("spread", 0.0, 0.5, "spread of the readings"),
    "length": ("length", -400.0, 400.0, "preferred answer longer by, characters"),
}
_KEPT = 4  # masks of filters that were asked for last


def file_state(folder: Path) -> list[int]:
    """Changes when the store's file does; empty without a store."""
    try:
        stat = (folder / store.FILE).stat()
    except OSError:
        return []
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


class Sets:
    """Sets of whole numbers below `size`, as `SetWriter` wrote them."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self.starts, self.counts = (np.load(f"{path}.{end}.npy") for end in ("starts", "counts"))
        self.bits = _mapped(Path(f"{path}.bits"), np.uint8)
        self.members = _mapped(Path(f"{path}.members"), np.int32)
        self.dense = self.counts * DENSE > size

    def union(self, numbers: Collection[int] | Array) -> Mask:
        """The members of any of these sets."""
        found = np.zeros(self.size, bool)
        picked = np.asarray(numbers, np.int64)
        for number in picked[self.dense[picked]]:
            start = self.starts[number]
            found |= np.unpackbits(
                self.bits[start : start + -(-self.size // 8)], count=self.size
            ).view(bool)
        few = picked[~self.dense[picked]]
        for part in np.array_split(few, 1 + len(few) // 20_000):
            found[_ranges(self.members, self.starts[part], self.counts[part])] = True
        return found


def _mapped(path: Path, kind: npt.DTypeLike) -> Array:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def _ranges(values: Array, starts: Array, counts: Array) -> Array:
    """The values of several ranges, one after another."""
    if len(starts) <= 64:
        parts = [values[s : s + n] for s, n in zip(starts, counts, strict=True)]
        return np.concatenate(parts) if parts else values[:0]
    ends = np.cumsum(counts)
    found: Array = values[np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)]
    return found


def _looked_up(table: Mask, column: Array) -> Mask:
    """`table[column]`, a part of the rows at a time."""
    found = np.empty(len(column), bool)
    for start in range(0, len(column), PART):
        found[start : start + PART] = table[column[start : start + PART]]
    return found


def _counted(column: Array, mask: Mask, n: int) -> list[int]:
    """How many rows of a mask have each of the values below `n`."""
    found = np.zeros(n, np.int64)
    for start in range(0, len(column), PART):
        part = slice(start, start + PART)
        found += np.bincount(column[part][mask[part]], minlength=n)[:n]
    return [int(count) for count in found]


class Segment:
    """Rows that were added together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._columns: dict[str, Array] = {}

    def column(self, name: str) -> Array:
        """A column of the rows."""
        if name not in self._columns:
            self._columns[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._columns[name]

    def __len__(self) -> int:
        return len(self.column("id"))

    @cached_property
    def names(self) -> list[tuple[str, ...]]:
        """What each set of rows is of: kind, and three names."""
        return [tuple(name) for name in json.loads((self.folder / "facets.json").read_text())]

    @cached_property
    def _facets(self) -> Sets:
        return Sets(self.folder / "facets", len(self))

    @cached_property
    def _words(self) -> tuple[mmap.mmap, Array, Sets]:
        with open(self.folder / "words.txt", "rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10)
        documents = int(np.load(self.folder / "documents.npy"))
        return text, ends, Sets(self.folder / "words", documents)

    def facet(self, kind: str, *names: str) -> Mask:
        """The rows of all sets of this kind that have these names; an empty one stands for any."""
        return self._facets.union(
            [
                number
                for number, name in enumerate(self.names)
                if name[0] == kind
                and all(a in ("", b) for a, b in zip(names, name[1:], strict=False))
            ]
        )

    def with_word(self, word: str) -> Mask:
        """The rows in whose prompt or answers a word has these letters in it."""
        text, ends, sets = self._words
        at = [found.start() for found in re.finditer(re.escape(word.encode()), text)]
        has = sets.union(np.unique(np.searchsorted(ends, at) - 1))
        has = np.append(has, False)  # where a text is missing: -1
        found = _looked_up(has, self.column("question"))
        for name in "ab":
            found |= _looked_up(has, self.column(name))
        return found


class PageIndex:
    """A run's preferences, as of one state of the store. Rows are numbered over all segments."""

    def __init__(self, folder: Path) -> None:
        current = json.loads((folder / CURRENT).read_text())
        if current["format"] != FORMAT:
            raise ValueError("an index of another version")
        self.state: list[int] = current["state"]
        self.at = (folder / CURRENT).stat().st_mtime
        self.segments = [Segment(folder / name) for name in current["segments"]]
        self._overlay = folder / current["overlay"]
        self.places: Array = np.load(self._overlay / "places.npy", mmap_mode="r")
        self.there: Mask = np.load(self._overlay / "there.npy", mmap_mode="r")
        self._columns: dict[str, Array] = {}
        self._orders: dict[str, Array] = {}
        self._masks: dict[Filters, Mask] = {}
        self._same: tuple[PageIndex, Array] | None = None
        self._lock = threading.RLock()

    def column(self, name: str) -> Array:
        """A column of all rows."""
        if name not in self._columns:
            parts = [segment.column(name) for segment in self.segments]
            self._columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._columns[name]

    def _from_segments(self, mask: Callable[[Segment], Mask]) -> Mask:
        return np.concatenate([mask(segment) for segment in self.segments])

    def matching(self, filters: Filters, others: Callable[[Filters], Mask]) -> Mask:
        """The rows that match all filters but the ranges.

        Args:
            filters: The filters.
            others: Gives the rows of filters that are not in the index, alone.
        """
        rest = filters.without(
            "run", "sort", *(f"{r}_{end}" for r in RANGES for end in ("min", "max"))
        )
        if filters.against:  # the other run's index may change
            return self._matching(rest, others)
        with self._lock:
            found = self._masks.pop(rest) if rest in self._masks else self._matching(rest, others)
            self._masks[rest] = found
            for old in list(self._masks)[:-_KEPT]:
                del self._masks[old]
            return found

    def _matching(self, filters: Filters, others: Callable[[Filters], Mask]) -> Mask:
        mask: Mask = self.there.copy()
        if filters.outcome:
            wanted = np.array([outcome in filters.outcome for outcome in OUTCOMES])
            mask &= _looked_up(wanted, self.column("outcome"))
        if filters.tag:
            mask &= self._from_segments(lambda s: s.facet("tag", filters.tag))
        if filters.mark:
            mask &= self._mark(filters.mark)
        if filters.people:
            mask &= self._people(filters.people)
        mask &= self._of_verdicts(filters, others)
        if filters.q:
            mask &= self._search(filters.q, others)
        if filters.against:
            mask &= others(Filters(against=filters.against, was=filters.was))
        return mask

    def _of_verdicts(self, filters: Filters, others: Callable[[Filters], Mask]) -> Mask:
        """As `filters._of_verdicts`, from sets where there are such."""
        names = (filters.principle, filters.judge)
        either = bool(filters.orders or filters.judges)
        if (filters.reason and either) or (filters.judges and any(names)):
            kept = ("principle", "judge", "reason", "orders", "judges")
            return others(Filters(**{name: getattr(filters, name) for name in kept}))
        mask = np.ones(len(self.places), bool)
        if filters.orders:
            differ = self._from_segments(lambda s: s.facet("differ", *names))
            mask &= ~differ if filters.orders == "agree" else differ
        if filters.judges:
            two = sorted(name.strip() for name in filters.judges.partition(",")[::2])
            mask &= self._from_segments(lambda s: s.facet("apart", *two))
        if filters.reason:
            mask &= self._from_segments(lambda s: s.facet("reason", *names, filters.reason))
        elif any(names) and not either:
            mask &= self._from_segments(lambda s: s.facet("asked", *names))
        return mask

    def _search(self, text: str, others: Callable[[Filters], Mask]) -> Mask:
        words = words_of(text)
        if not words:
            return others(Filters(q=text))
        mask: Mask = self.there.copy()
        for word in words:
            mask &= self._from_segments(lambda s, word=word: s.with_word(word))  # type: ignore[misc]
        return mask

    def _mark(self, rule: str) -> Mask:
        rules = json.loads((self._overlay / "marks.json").read_text())
        sets = Sets(self._overlay / "marks", len(self.places))
        return sets.union([rules.index(rule)] if rule in rules else [])

    def _people(self, how: str) -> Mask:
        said = np.load(self._overlay / "people.npy")
        sides = said * np.array([1, -1, 0, 0], np.int8)[self.column("outcome")]
        known = said > -2
        found: Mask = known & {"labelled": known, "agree": sides > 0, "disagree": sides < 0}[how]
        return found

    def inside(self, filters: Filters, *names: str) -> Mask | None:
        """The rows inside of these ranges; None where none is set."""
        mask: Mask | None = None
        for name in names:
            for end, compare in (("min", np.greater_equal), ("max", np.less_equal)):
                if (value := getattr(filters, f"{name}_{end}")) is not None:
                    found = compare(self.column(HISTOGRAMS[name][0]), value)
                    mask = found if mask is None else mask & found
        return mask

    def selected(self, filters: Filters, others: Callable[[Filters], Mask]) -> Mask:
        """The rows that match all filters."""
        mask, inside = self.matching(filters, others), self.inside(filters, *RANGES)
        return mask if inside is None else mask & inside

    def counts(self, mask: Mask) -> dict[str, int]:
        """How many rows of a mask have each outcome."""
        found = _counted(self.column("outcome"), mask, len(OUTCOMES))
        return dict(zip(OUTCOMES, found, strict=True))

    def histogram(self, name: str, mask: Mask) -> list[int]:
        """How many rows of a mask fall into each step."""
        return _counted(self.column(f"step-{name}"), mask, STEPS)

    def window(self, mask: Mask, sort: str, start: int, n: int) -> Array:
        """The rows from the `start`-th of a mask on, in this order; at most `n`."""
        if sort not in self._orders:
            self._orders[sort] = np.load(self._overlay / f"order-{sort}.npy", mmap_mode="r")
        order, found, seen = self._orders[sort], [], 0
        for low in range(0, len(order), PART):
            part = order[low : low + PART]
            rows = part[mask[part]]
            found.append(rows[max(0, start - seen) : max(0, start + n - seen)])
            seen += len(rows)
            if seen >= start + n:
                break
        return np.concatenate([*found, np.empty(0, np.int32)])

    def rows_at(self, places: Array) -> Mask:
        """The rows that lie at these places of the store."""
        return np.isin(self.places, places)

    @cached_property
    def _by_key(self) -> tuple[Array, Array]:
        keys = np.where(self.there, self.column("key"), 0)
        order = np.argsort(keys)
        return keys[order], order

    def same_in(self, other: PageIndex) -> Array:
        """For each row the row of another run that has the same prompt and the same two answers;
        -1: none has.
        """
        if (kept := self._same) and kept[0] is other:
            return kept[1]
        keys, order = other._by_key
        mine, at = self._by_key
        place = np.searchsorted(keys, mine)
        place[place == len(keys)] = 0
        found = np.empty(len(mine), np.int64)
        found[at] = np.where((keys[place] == mine) & (mine != 0), order[place], -1)
        found = np.where(self.there, found, -1)
        self._same = (other, found)
        return found

    def crossed(self, other: PageIndex) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
        """How many comparisons that another run has too went from one outcome to another there, and
        sums over groups of prompts of those that flip. Two equal texts are no comparison.
        """
        same, n = self.same_in(other), len(OUTCOMES)
        both = (same >= 0) & (self.column("identical") == 0)
        was = self.column("outcome")[both].astype(np.int64)
        now = other.column("outcome")[same[both]].astype(np.int64)
        counts = np.bincount(n * was + now, minlength=n * n).reshape(n, n).tolist()
        table = {
            name: dict(zip(OUTCOMES, row, strict=True))
            for name, row in zip(OUTCOMES, counts, strict=True)
        }
        group = np.unique(self.column("cluster")[both], return_inverse=True)[1]
        size = np.bincount(group)
        hits = np.bincount(group, weights=was + now == 1)  # a and b, or b and a
        sums = {
            "n": size.sum(),
            "hits": hits.sum(),
            "groups": len(size),
            "hits_hits": hits @ hits,
            "hits_n": hits @ size,
            "n_n": size @ size,
        }
        return table, {name: float(value) for name, value in sums.items()}


class Indexes:
    """The indexes of one store, each made and brought up to the store in the background, one at a
    time.
    """

    def __init__(self, folder: Path, smallest: int = FROM, out: Path | None = None) -> None:
        self.folder, self.smallest = folder, smallest
        self.out = out or cache_folder() / "view" / digest(str(folder.resolve()))[:16]
        self.problem = ""
        self._lock = threading.RLock()
        self._known: dict[int, PageIndex] = {}
        self._process: subprocess.Popen[str] | None = None
        self._began = self._next = 0.0
        self._failed: dict[int, tuple[list[int], int]] = {}

    def get(self, run: int, size: int) -> PageIndex | None:
        """The index of a run of this size: None while there is none, or none is needed. Where the
        store has changed since it was made, another one is begun.
        """
        if size < self.smallest:
            return None
        with self._lock:
            state = file_state(self.folder)
            known = self._known.get(run)
            if known is None or known.state != state:
                self._look(run)
                known = self._known.get(run)
            failed, times = self._failed.get(run, ([], 0))
            if (known is None or known.state != state) and not (failed == state and times >= TRIES):
                self._begin(run)
            return known

    def building(self) -> bool:
        """Whether an index is being made."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._ended()
            return self._process is not None

    def _look(self, run: int) -> None:
        """Take the index that lies in the cache folder, where it is another one."""
        folder = self.out / str(run)
        try:
            known = self._known.get(run)
            if known is None or (folder / CURRENT).stat().st_mtime != known.at:
                self._known[run] = PageIndex(folder)
        except (OSError, ValueError, KeyError):
            return  # there is none, or it is just being replaced

    def _begin(self, run: int) -> None:
        if self.building() or time.monotonic() < self._next:
            return
        self._run, self._state, self._began = run, file_state(self.folder), time.monotonic()
        words = ["-m", "prefab.pipelines.view.index_build", str(self.folder), str(run)]
        self._process = subprocess.Popen(
            [sys.executable, *words, str(self.out / str(run))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _ended(self) -> None:
        """Take note of a process that has ended. The next begins after as long a time again."""
        process = self._process
        assert process is not None
        told = process.communicate()[1].strip()
        self._next = time.monotonic() + min(30.0, time.monotonic() - self._began)
        self._process = None
        if process.returncode:
            failed, times = self._failed.get(self._run, ([], 0))
            self._failed[self._run] = (self._state, times + 1 if failed == self._state else 1)
            self.problem = told.splitlines()[-1] if told else f"ended with {process.returncode}"
        else:
            self.problem = ""
            self._look(self._run)

    def wait(self) -> None:
        """Until nothing is being made."""
        while self.building():
            time.sleep(0.05)

    def end(self) -> None:
        """Stop what is being made."""
        with self._lock:
            if self._process is not None:
                self._process.terminate()
                self._process.communicate()
                self._process = None
