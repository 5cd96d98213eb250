"""Near-duplicate texts: MinHash (`rensa`) proposes candidates; each is checked exactly.

Words are compared without case and punctuation. Similarity is the Jaccard similarity of the sets of
word pairs (for a text of one word: of the word). The 5-word shingles that are usual for web pages
are too long for answers of some tens of words, where one changed word changes a third of them. LSH
with 64 values in 16 bands of 4 proposes a pair of similarity s with probability 1 - (1 - s^4)^16:
99.98% at 0.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

NUM_PERM, BANDS, SEED = 64, 16, 1
TEXTS_AT_ONCE = 50_000  # texts that are tokenised together: limits the memory of polars
SHINGLES_AT_ONCE = 400_000  # shingles that are signed together: about what fits into a core's cache
CROWD = 128  # each row is compared with at most this many rows of a bucket
LEAST_ALIKE = (
    0.75  # share of the threshold: the estimate of a signature (deviation 0.05) may be too low
)
_ASCII = [chr(i) for i in range(128) if not chr(i).isalnum()]
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


@dataclass(slots=True)
class Words:
    """The words of all texts as 32-bit hashes; text i is `flat[offsets[i]:offsets[i + 1]]`."""

    flat: np.ndarray
    offsets: np.ndarray
    _sets: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def counts(self) -> np.ndarray:
        """The number of words of each text."""
        result: np.ndarray = self.offsets[1:] - self.offsets[:-1]
        return result

    def parts(self) -> Iterator[tuple[int, Words]]:
        """Yield (number of the first text, some texts) until all texts are done."""
        for start in range(0, len(self.counts), TEXTS_AT_ONCE):
            offsets = self.offsets[start : start + TEXTS_AT_ONCE + 1]
            yield start, Words(self.flat[offsets[0] : offsets[-1]], offsets - offsets[0])

    def shingles(self, text: int) -> frozenset[int]:
        """The word pairs of a text; cached."""
        found = self._sets.get(text)
        if found is None:
            some = self.flat[self.offsets[text] : self.offsets[text + 1]]
            found = self._sets[text] = frozenset(_pairs_of(some).tolist())
        return found

    def similarity(self, a: int, b: int) -> float:
        """The Jaccard similarity of two texts; 1 for two texts without words."""
        if a == b:
            return 1.0
        first, second = self.shingles(a), self.shingles(b)
        union = len(first | second)
        return len(first & second) / union if union else 1.0


def normalised(texts: pl.Series) -> pl.Series:
    """Texts as words separated by one space: no case, no punctuation."""
    return _split(texts).list.join(" ")


def _split(texts: pl.Series) -> pl.Series:
    """The words of each text. ASCII texts need no regular expressions, which is five times as
    fast.
    """
    import polars as pl

    ascii_only = texts.str.len_bytes() == texts.str.len_chars()
    plain = texts.str.replace_many(_ASCII, [" "] * len(_ASCII))
    if not ascii_only.all():
        other = texts.str.normalize("NFKC").str.replace_all(r"[^\p{L}\p{N}]+", " ")
        plain = pl.select(pl.when(ascii_only).then(plain).otherwise(other)).to_series()
    return (
        plain.str.to_lowercase().str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
    )


def words(texts: pl.Series) -> Words:
    """The words of all texts, hashed."""
    import numpy as np

    flats, counts = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        split = _split(texts.slice(start, TEXTS_AT_ONCE))
        counts.append(split.list.len().to_numpy().astype(np.int64))
        flats.append(split.explode(empty_as_null=False).hash(SEED).to_numpy().astype(np.uint32))
    return Words(
        np.concatenate(flats),
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
    )


def ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each n consecutive words within a text, and the number of that text."""
    import numpy as np

    total = len(words.flat) - n + 1
    if total <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = np.zeros(total, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(_ODD[0]) + _mixed(words.flat[i : i + total])
    text = np.repeat(np.arange(len(words.counts)), words.counts)
    whole = text[:total] == text[n - 1 :]
    return hashes[whole], text[:total][whole]


def wholes(words: Words) -> np.ndarray:
    """A 64-bit hash of all words of each text in their order; 0 for a text without words."""
    import numpy as np

    place = np.arange(len(words.flat)) - np.repeat(words.offsets[:-1], words.counts)
    spread = _mixed(words.flat) * (
        np.uint64(_ODD[0]) * (2 * place.astype(np.uint64) + np.uint64(1))
    )
    sums = np.concatenate([[np.uint64(0)], np.cumsum(spread, dtype=np.uint64)])
    result: np.ndarray = sums[words.offsets[1:]] - sums[words.offsets[:-1]]
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """32-bit hashes mixed into 64 bits."""
    import numpy as np

    wide = values.astype(np.uint64) * np.uint64(_ODD[1])
    return wide ^ (wide >> np.uint64(29))


def _pairs_of(some: np.ndarray) -> np.ndarray:
    import numpy as np

    if len(some) < 2:
        return _mixed(some)
    result: np.ndarray = _mixed(some[:-1]) * np.uint64(_ODD[0]) + _mixed(some[1:])
    return result


def _gathered(words: Words, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of documents, and the number of shingles of each. A document is a row of texts;
    equal shingles of different fields are different.

    Shapes: rows N x fields, numbers of texts.
    """
    import numpy as np

    parts, lengths = [], []
    for column in range(rows.shape[1]):
        texts = rows[:, column]
        count = words.counts[texts]
        starts = words.offsets[texts]
        ends = np.cumsum(count)
        index = np.repeat(starts - (ends - count), count) + np.arange(int(count.sum()))
        flat = _mixed(words.flat[index])
        last = np.zeros(len(flat), bool)
        last[ends[count > 0] - 1] = True
        following = np.where(last, np.uint64(0), np.roll(flat, -1))
        alone = np.repeat(count == 1, count)
        pairs = np.where(alone, flat, flat * np.uint64(_ODD[0]) + following)
        kept = ~last | alone
        parts.append((pairs * np.uint64(_ODD[2]) + np.uint64(column))[kept])
        lengths.append(np.where(count > 1, count - 1, count))
    return _interleaved(parts, lengths)


def _interleaved(
    parts: list[np.ndarray], lengths: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The shingles ordered by document, with its fields one after the other."""
    import numpy as np

    total = np.sum(lengths, axis=0)
    out = np.empty(int(total.sum()), np.uint64)
    begin = np.cumsum(total) - total
    for part, length in zip(parts, lengths, strict=True):
        ends = np.cumsum(length)
        out[np.repeat(begin - (ends - length), length) + np.arange(len(part))] = part
        begin = begin + length
    return out, total


def _signed(words: Words, rows: np.ndarray) -> Iterator[Any]:
    """Yield the MinHash signatures of documents, some at a time."""
    import numpy as np
    from rensa import RMinHash

    per_row = max(1, int(words.counts[rows].sum() // max(1, len(rows))))
    step = max(1, SHINGLES_AT_ONCE // per_row)
    for start in range(0, len(rows), step):
        flat, lengths = _gathered(words, rows[start : start + step])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
        yield RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, NUM_PERM, SEED)


def _with_mates(words: Words, rows: np.ndarray) -> np.ndarray:
    """The documents that share a band with another document.

    A pass from the front finds the later document of each pair, a pass from the back the earlier
    one. Most documents of most data share none and need no further comparison.
    """
    import numpy as np
    from rensa import RMinHashLSH

    matrices = list(_signed(words, rows))
    starts = np.cumsum([0, *(matrix.len() for matrix in matrices)]).tolist()
    flags = np.zeros(len(rows), bool)
    for order in (range(len(matrices)), reversed(range(len(matrices)))):
        index = RMinHashLSH(0.8, NUM_PERM, BANDS)
        for i in order:
            found = index.insert_matrix_and_query_duplicate_flags(matrices[i], starts[i])
            flags[starts[i] : starts[i + 1]] |= np.asarray(found, bool)
    return np.flatnonzero(flags)


def _families(words: Words) -> np.ndarray:
    """A number for each text, the same for texts that may be similar (directly or through other
    texts).
    """
    import numpy as np

    family = np.arange(len(words.counts))
    mates = _with_mates(words, family.reshape(-1, 1))
    first: dict[bytes, int] = {}

    def root(text: int) -> int:
        while family[text] != text:
            family[text] = text = family[family[text]]
        return text

    for text, bands in zip(
        mates.tolist(), _bands(_signatures(words, mates.reshape(-1, 1))), strict=True
    ):
        for band in bands:
            family[root(text)] = root(first.setdefault(band, text))
    for text in mates.tolist():
        family[text] = root(text)
    return family


def _candidates(words: Words, rows: np.ndarray) -> np.ndarray:
    """The documents whose texts are all in the same families as the texts of another document."""
    import numpy as np

    families = _families(words)[rows]
    _, group, sizes = np.unique(families, axis=0, return_inverse=True, return_counts=True)
    return np.flatnonzero(sizes[group.ravel()] > 1)


def _signatures(words: Words, rows: np.ndarray) -> np.ndarray:
    """The signatures of documents as an array. Shapes: rows x NUM_PERM."""
    import numpy as np

    parts = [np.array(matrix.to_rows(), np.uint32) for matrix in _signed(words, rows)]
    return np.concatenate([np.empty((0, NUM_PERM), np.uint32), *parts])


def _bands(signatures: np.ndarray) -> Iterator[list[bytes]]:
    """Yield the bands of each signature, each with its number in front."""
    width = NUM_PERM // BANDS * signatures.itemsize
    names = [bytes([band]) for band in range(BANDS)]
    for row in signatures:
        whole = row.tobytes()
        yield [name + whole[i * width : (i + 1) * width] for i, name in enumerate(names)]


@dataclass(slots=True)
class NearDuplicates:
    """Near-duplicates among documents.

    Attributes:
        of: For each near-duplicate the document that it resembles.
        cut_short: The number of documents that had too many candidates to compare them all, and no
            match among those that were compared.
    """

    of: dict[int, int]
    cut_short: int = 0


def near_duplicates(words: Words, rows: np.ndarray, threshold: float) -> NearDuplicates:
    """The documents in which every text has at least `threshold` similarity with the text of an
    earlier document.

    Without them no near-duplicates are left, and each of them resembles one that remains.
    Shapes: rows N x fields, numbers of texts.
    """

    def is_near(i: int, j: int) -> bool:
        return all(
            words.similarity(a, b) >= threshold
            for a, b in zip(rows[i].tolist(), rows[j].tolist(), strict=True)
        )

    return _matched(
        words,
        rows,
        _candidates(words, rows),
        is_near,
        threshold,
        lambda row: True,
        lambda row: True,
    )


def near_across(
    words: Words, texts: np.ndarray, held_out: Sequence[bool], threshold: float
) -> NearDuplicates:
    """The texts that are not held out, but are similar to one that is."""

    def is_near(i: int, j: int) -> bool:
        return words.similarity(int(texts[i]), int(texts[j])) >= threshold

    rows = texts.reshape(-1, 1)
    some = _with_mates(words, rows)
    return _matched(
        words,
        rows,
        some,
        is_near,
        threshold,
        lambda row: not held_out[row],
        lambda row: held_out[row],
    )


def _matched(
    words: Words,
    rows: np.ndarray,
    some: np.ndarray,
    is_near: Callable[[int, int], bool],
    threshold: float,
    asks: Callable[[int], bool],
    answers: Callable[[int], bool],
) -> NearDuplicates:
    """For each candidate row for which `asks` is true, the first similar row for which `answers` is
    true. A row with a match is no longer a match for others.
    """
    found = NearDuplicates({})
    signatures = _signatures(words, rows[some])
    bands = list(_bands(signatures))
    buckets: dict[bytes, list[int]] = {}
    for i in sorted(range(len(some)), key=lambda i: (not answers(int(some[i])), int(some[i]))):
        row, match = int(some[i]), None
        if asks(row):
            met = [there for band in bands[i] if (there := buckets.get(band))]
            near = (int(some[j]) for j in _alike(i, met, signatures, threshold))
            match = next((other for other in near if is_near(row, other)), None)
            found.cut_short += match is None and any(len(there) > CROWD for there in met)
        if match is not None:
            found.of[row] = match
        elif answers(row):
            for band in bands[i]:
                buckets.setdefault(band, []).append(i)
    return found


def _alike(i: int, met: list[list[int]], signatures: np.ndarray, threshold: float) -> list[int]:
    """The rows in the same buckets with a similar signature; cheaper than the exact check."""
    others = sorted(set().union(*(there[:CROWD] for there in met)))
    if len(others) < 8:
        return others
    alike = (signatures[others] == signatures[i]).mean(1) >= LEAST_ALIKE * threshold
    return [other for other, like in zip(others, alike.tolist(), strict=True) if like]
