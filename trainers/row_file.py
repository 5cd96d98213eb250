"""Rows of training data in a temporary file, so that memory does not grow with their number."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

Row = dict[str, Any]


class RowFile:
    """Rows in the order in which they were added. The file has no name: when the process ends,
    however it does, its space is free. TMPDIR says where it lies.
    """

    def __init__(self) -> None:
        # open as long as the rows live
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, row: Row) -> None:
        """Add a row. Raises: OSError, as of a full disk."""
        self._file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
        self._ends.append(self._file.tell())

    def cut(self, length: int) -> None:
        """Forget all rows but the first `length`."""
        del self._ends[length:]
        self._file.seek(self._ends[-1] if self._ends else 0)
        self._file.truncate()

    def get(self, number: int) -> Row:
        """The row with this number."""
        start = self._ends[number - 1] if number else 0
        self._file.flush()
        written = os.pread(self._file.fileno(), self._ends[number] - start, start)
        row: Row = pickle.loads(written)  # of a file that only this process can open
        return row


class StoredRows(Sequence[Row]):
    """Some rows of a RowFile, each with the weight that it has after all were read."""

    def __init__(self, file: RowFile, numbers: Sequence[int], weights: Sequence[float]) -> None:
        """`numbers` are those of the rows, `weights` of all rows of the file."""
        self._file, self._numbers, self._weights = file, numbers, weights

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self._file, self._numbers[index], self._weights)
        return self._row(self._numbers[index])

    def take(self, indices: Sequence[int]) -> StoredRows:
        """The rows at these places."""
        numbers = array("q", (self._numbers[i] for i in indices))
        return StoredRows(self._file, numbers, self._weights)

    def _row(self, number: int) -> Row:
        return {**self._file.get(number), "weight": self._weights[number]}
