"""Columns of Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def arrow_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """A column of strings, bytes, numbers, booleans or lists of them. It is made of buffers,
    because `pyarrow.array` imports pandas, which takes 0.2 to 0.4 s.
    """
    import numpy as np
    import pyarrow as pa

    n = len(values)
    there = np.fromiter((value is not None for value in values), bool, n)
    nulls = None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        numbers = [0 if value is None else value for value in values]
        data = np.array(numbers, dtype=kind.to_pandas_dtype())
        return pa.Array.from_buffers(kind, n, [nulls, pa.py_buffer(data)])
    if pa.types.is_boolean(kind):
        bits = np.packbits(np.fromiter(map(bool, values), bool, n), bitorder="little")
        return pa.Array.from_buffers(kind, n, [nulls, pa.py_buffer(bits)])
    starts = np.zeros(n + 1, dtype=np.int32)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        as_text = pa.types.is_string(kind)
        texts = [(value.encode() if as_text else value) if value else b"" for value in values]
        np.cumsum(np.fromiter(map(len, texts), np.int64, n), out=starts[1:])
        buffers = [nulls, pa.py_buffer(starts), pa.py_buffer(b"".join(texts))]
        return pa.Array.from_buffers(kind, n, buffers)
    lists = [value or () for value in values]
    np.cumsum(np.fromiter(map(len, lists), np.int64, n), out=starts[1:])
    items = arrow_array(list(chain.from_iterable(lists)), kind.value_type)
    return pa.Array.from_buffers(kind, n, [nulls, pa.py_buffer(starts)], children=[items])
