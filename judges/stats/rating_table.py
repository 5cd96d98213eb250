"""Ratings as counts of distinct rating patterns: a million items by five judges are a thousand
rows.

Every statistic of agreement depends on the items only through how often each pattern occurs, so its
cost is that of the patterns, and a bootstrap over items is a multinomial draw over their counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.integer[Any]]  # places in a list, -1 where missing
BoolArray = npt.NDArray[np.bool_]

# enough for the 2.5% quantiles to move by less than a tenth of the interval from seed to seed
RESAMPLES = 2000
_MOST_DRAWN = 200_000_000  # patterns x resamples: some ten seconds
_PIECE = 8_000_000  # numbers at a time
_MOST_CLUSTERS = 2000
_MOST_SMALL = 4096  # a scale of whole numbers up to this wide is encoded without sorting
_MOST_COUNTS = 50_000_000  # patterns x categories: 400 MB
_DENSE_KEYS = (
    1 << 22
)  # below this many possible patterns they are counted in an array, above by sorting


@dataclass(frozen=True, slots=True)
class Table:
    """Distinct patterns of ratings and how often each occurs. Items that nobody rated are left out.

    Shapes (P patterns, R raters, K categories, N items): `codes` P x R, -1 where missing (None when
    made of counts); `times` P; `values` K, the categories in order; `ratings_PK` how many raters
    gave each category; `pattern_of` N, each item's row, -1 for one that nobody rated.
    """

    codes: CodeArray | None
    times: FloatArray
    values: FloatArray
    ratings_PK: FloatArray | None
    n_raters: int
    pattern_of: CodeArray | None = None

    @property
    def known_codes(self) -> CodeArray:
        """`codes`. Raises: ValueError: the table was made of counts."""
        if self.codes is None:
            raise ValueError("the table was made of counts: who gave which rating is not known")
        return self.codes

    @property
    def known_counts(self) -> FloatArray:
        """`ratings_PK`. Raises: ValueError: there are too many distinct ratings to count each."""
        if self.ratings_PK is None:
            raise ValueError(
                f"{len(self.values)} distinct ratings are no categories: "
                "round them, or use interval alpha"
            )
        return self.ratings_PK


def group(ratings: FloatArray | Table, categories: Sequence[float] | None = None) -> Table:
    """The patterns of an items x raters array, NaN for missing. `categories` adds ones that nobody
    used.

    Raises:
        ValueError: not two-dimensional, infinite, or outside of `categories`.
    """
    if isinstance(ratings, Table):
        return ratings
    ratings = np.asarray(ratings, dtype=float)
    if ratings.ndim != 2:
        raise ValueError(f"ratings must be items x raters, not of shape {ratings.shape}")
    codes, values = _encode(ratings, categories)
    keys, base = _keys(codes, len(values) + 1)
    unique: CodeArray
    pattern_of: CodeArray
    times: npt.NDArray[Any]
    if keys is None:
        unique, pattern_of, times = np.unique(
            codes, axis=0, return_inverse=True, return_counts=True
        )
        pattern_of = pattern_of.reshape(-1)
    else:
        unique_keys, pattern_of, times = _count(keys, base ** codes.shape[1])
        unique = _decode(unique_keys, base, codes.shape[1])
    rated = (unique >= 0).any(axis=1) if unique.size else np.zeros(len(unique), dtype=bool)
    renumbered = np.where(rated, np.cumsum(rated) - 1, -1).astype(np.int32)
    unique, times = unique[rated].astype(np.int64), times[rated].astype(float)
    few = unique.shape[0] * len(values) <= _MOST_COUNTS
    counts = _category_counts(unique, len(values)) if few else None
    n_raters = int((unique >= 0).any(axis=0).sum()) if unique.size else 0
    return Table(unique, times, values, counts, n_raters, renumbered[pattern_of])


def group_counts(counts: FloatArray) -> Table:
    """The patterns of an items x categories array of how many raters gave each category.

    Raises:
        ValueError: not two-dimensional, or negative or broken counts.
    """
    counts = np.asarray(counts, dtype=float)
    if counts.ndim != 2:
        raise ValueError(f"counts must be items x categories, not of shape {counts.shape}")
    if not (
        np.isfinite(counts).all() and (counts >= 0).all() and (counts == np.floor(counts)).all()
    ):
        raise ValueError("counts must be whole numbers, 0 or more")
    counts = counts[counts.sum(axis=1) > 0]
    unique, times = np.unique(counts, axis=0, return_counts=True)
    n_raters = int(unique.sum(axis=1).max()) if len(unique) else 0
    return Table(
        None, times.astype(float), np.arange(counts.shape[1], dtype=float), unique, n_raters
    )


def resample(
    table: Table, n: int, seed: int, clusters: npt.NDArray[Any] | None = None
) -> FloatArray:
    """The patterns' counts in `n` resamples of the items, or of whole `clusters` of them. Shapes: n
    x P.
    """
    return np.concatenate([np.empty((0, len(table.times))), *draws(table, n, seed, clusters)])


def draws(
    table: Table, n: int, seed: int, clusters: npt.NDArray[Any] | None = None
) -> Iterator[FloatArray]:
    """The same in pieces of at most 64 MB; nothing where the patterns are so many that it would
    take minutes.

    `clusters` names each item's cluster (a prompt: answers to one are not independent). Over 2,000
    clusters are first put together at random into 2,000 groups, which changes nothing that is
    expected and bounds the work.
    Shapes: clusters N; each piece b x P.
    """
    p, rng = len(table.times), np.random.default_rng(seed)
    if p == 0 or p * n > _MOST_DRAWN:
        return
    step = max(1, _PIECE // p)
    if clusters is None:
        total = int(table.times.sum())
        shares = table.times / total
        for start in range(0, n, step):
            yield rng.multinomial(total, shares, size=min(step, n - start)).astype(float)
        return
    counts_CP = cluster_counts(table, clusters, rng)
    c = len(counts_CP)
    for start in range(0, n, step):
        yield (
            rng.multinomial(c, np.full(c, 1.0 / c), size=min(step, n - start)).astype(float)
            @ counts_CP
        )


def cluster_counts(
    table: Table, clusters: npt.NDArray[Any], rng: np.random.Generator
) -> FloatArray:
    """How often each pattern occurs in each cluster, or in each random group of clusters where they
    are many. Shapes: C x P.
    """
    if table.pattern_of is None or len(clusters) != len(table.pattern_of):
        raise ValueError(
            "clusters must name one cluster for each item of the ratings that the table was made of"
        )
    p = len(table.times)
    place = np.unique(np.asarray(clusters), return_inverse=True)[1]
    most = max(2, min(_MOST_CLUSTERS, _PIECE // p))
    if place.max() >= most:
        place = rng.permutation(int(place.max()) + 1)[place] % most
    rated = table.pattern_of >= 0
    used, place = np.unique(place[rated], return_inverse=True)
    counts = np.bincount(place * p + table.pattern_of[rated], minlength=len(used) * p)
    return counts.reshape(len(used), p).astype(float)


def category_weights(weights: str | FloatArray | None, values: FloatArray) -> FloatArray:
    """Agreement weights between categories: 1 on the diagonal. Shapes: K x K.

    `identity`, `linear`, `quadratic` (over the categories' values), `ordinal` (Gwet's, over their
    ranks), or a symmetric matrix of one's own.

    Raises: ValueError: an unknown name, or a matrix that is not K x K, symmetric, and 1 on its
        diagonal.
    """
    k = len(values)
    if weights is None or (isinstance(weights, str) and weights == "identity"):
        return np.eye(k)
    if isinstance(weights, str):
        distance = np.abs(values[:, None] - values[None, :])
        span = distance.max() if k > 1 else 1.0
        if weights == "linear":
            return 1.0 - distance / span
        if weights == "quadratic":
            return 1.0 - (distance / span) ** 2
        if weights == "ordinal":
            between = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) + 1.0
            pairs = between * (between - 1) / 2
            result: FloatArray = 1.0 - pairs / max(float(pairs.max()), 1.0)
            return result
        raise ValueError(
            f"unknown weights {weights!r}: identity, linear, quadratic, ordinal or a matrix"
        )
    matrix = np.asarray(weights, dtype=float)
    if (
        matrix.shape != (k, k)
        or not np.allclose(matrix, matrix.T)
        or not np.allclose(np.diag(matrix), 1.0)
    ):
        raise ValueError(
            f"weights must be a symmetric {k} x {k} matrix with 1 on its diagonal ({k} categories)"
        )
    return matrix


def _encode(
    ratings: FloatArray, categories: Sequence[float] | None
) -> tuple[CodeArray, FloatArray]:
    """Each rating's place among the categories, -1 where missing, and the categories in order."""
    low, high = (float(f.reduce(ratings, axis=None, initial=np.nan)) for f in (np.fmin, np.fmax))
    if np.isnan(low):
        values = np.unique(np.asarray(categories if categories is not None else [], dtype=float))
        return np.full(ratings.shape, -1, dtype=np.int32), values
    if not np.isfinite([low, high]).all():
        raise ValueError("ratings must be finite, or NaN for missing")
    shifted = _small_whole_numbers(ratings, low) if high - low < _MOST_SMALL else None
    used = np.asarray(
        np.unique(ratings[~np.isnan(ratings)])
        if shifted is None
        else np.flatnonzero(_tally(shifted)[1:]) + low,
        dtype=float,
    )
    values = used
    if categories is not None:
        values = np.unique(np.asarray(categories, dtype=float))
        if not np.isin(used, values).all():
            raise ValueError(
                f"ratings outside of the categories: {sorted(set(used.tolist()) - set(values.tolist()))}"
            )
    if shifted is None:
        codes = np.searchsorted(values, ratings).astype(np.int32)
        codes[np.isnan(ratings)] = -1
        return codes, values
    place = np.full(_MOST_SMALL + 1, -1, dtype=np.int16)
    place[(used - low).astype(np.int64) + 1] = np.searchsorted(values, used)
    return place[shifted], values


def _small_whole_numbers(ratings: FloatArray, low: float) -> npt.NDArray[np.int16] | None:
    """The ratings minus `low` plus 1, 0 where missing; None when one of them is not whole. In
    cache-sized pieces.
    """
    shifted = np.empty(ratings.shape, dtype=np.int16)
    for start in range(0, len(ratings), 1 << 14):
        piece = ratings[start : start + (1 << 14)] - (low - 1.0)
        np.nan_to_num(piece, copy=False, nan=0.0)
        out = shifted[start : start + (1 << 14)]
        out[...] = piece
        if (out != piece).any():
            return None
    return shifted


def _tally(shifted: npt.NDArray[np.int16]) -> CodeArray:
    step = 1 << 14
    counts = np.zeros(_MOST_SMALL + 1, dtype=np.int64)
    for i in range(0, len(shifted), step):
        counts += np.bincount(shifted[i : i + step].ravel(), minlength=_MOST_SMALL + 1)
    return counts


def _keys(codes: CodeArray, base: int) -> tuple[npt.NDArray[np.int64] | None, int]:
    """Each row as one integer in base `base`, or None where 62 bits do not hold it."""
    if codes.shape[1] * np.log2(max(base, 2)) >= 62:
        return None, base
    powers = (base ** np.arange(codes.shape[1] - 1, -1, -1, dtype=np.int64)).astype(np.int64)
    keys = np.full(len(codes), powers.sum(), dtype=np.int64)
    for start in range(0, len(codes), 1 << 14):
        keys[start : start + (1 << 14)] += (
            codes[start : start + (1 << 14)].astype(np.int64) @ powers
        )
    return keys, base


def _count(keys: npt.NDArray[np.int64], possible: int) -> tuple[CodeArray, CodeArray, CodeArray]:
    if possible > _DENSE_KEYS:
        return np.unique(keys, return_inverse=True, return_counts=True)
    counts = np.bincount(keys, minlength=possible)
    unique = np.flatnonzero(counts)
    place = np.zeros(possible, dtype=np.int32)
    place[unique] = np.arange(len(unique))
    return unique, place[keys], counts[unique]


def _decode(keys: CodeArray, base: int, n_raters: int) -> CodeArray:
    codes = np.empty((len(keys), n_raters), dtype=np.int64)
    for column in range(n_raters - 1, -1, -1):
        keys, codes[:, column] = np.divmod(keys, base)
    return codes - 1


def _category_counts(codes: CodeArray, k: int) -> FloatArray:
    counts = np.zeros((len(codes), k))
    for column in codes.T:
        rows = np.flatnonzero(column >= 0)
        counts[rows, column[rows]] += 1.0
    return counts
