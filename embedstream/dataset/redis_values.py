"""A column of a dataset as bytes in the fields of hashes, and back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyarrow as pa


def to_fields(column: Any) -> list[bytes]:
    """What a hash holds of each row; numbers are little-endian, as Arrow has them.

    A vector: its numbers, as RedisVL reads them. A vector for each token: their numbers, one behind the other. Weights
    of tokens: all indices (uint32), then all weights. One number, or a string: as text.
    """
    type = column.type
    if pa.types.is_string(type):
        return [value.encode() for value in column.to_pylist()]
    if pa.types.is_floating(type):
        return [repr(value).encode() for value in column.to_pylist()]
    if pa.types.is_struct(type):
        halves = [to_fields(column.field(name)) for name in ("indices", "values")]
        return [indices + values for indices, values in zip(*halves, strict=True)]
    width = _row_bytes(type)
    if width:
        data = memoryview(_leaf(column) or b"")
        return [bytes(data[start : start + width]) for start in range(0, len(column) * width, width)]
    inner = column.flatten()
    width, data = _row_bytes(inner.type), memoryview(_leaf(inner) or b"")
    offsets = column.offsets.to_pylist()
    ends = [(offset - offsets[0]) * width for offset in offsets]
    return [bytes(data[start:end]) for start, end in pairwise(ends)]


def from_fields(values: list[bytes | None], type: Any) -> Any:
    """The column of this type that hashes hold. Raises `ValueError` for bytes that are none of it."""
    if pa.types.is_string(type):
        return pa.array(values, pa.binary()).cast(type)
    if pa.types.is_floating(type):
        return pa.array([float(value or b"nan") for value in values], type)
    whole = [value or b"" for value in values]
    if pa.types.is_struct(type):
        fields = [type.field(name) for name in ("indices", "values")]
        widths = [_row_bytes(field.type.value_type) for field in fields]
        counts = [_count(value, sum(widths)) for value in whole]
        halves = (
            [value[: widths[0] * count] for value, count in zip(whole, counts, strict=True)],
            [value[widths[0] * count :] for value, count in zip(whole, counts, strict=True)],
        )
        lists = [_lists(half, field.type) for half, field in zip(halves, fields, strict=True)]
        return pa.StructArray.from_arrays(lists, fields=list(type))
    width = _row_bytes(type)
    if not width:
        return _lists(whole, type)
    for value in whole:
        if len(value) != width:
            raise ValueError(f"a vector has {len(value)} bytes, not {width}")
    return _of_bytes(b"".join(whole), len(whole), type)


def _lists(values: list[bytes], type: Any) -> Any:
    width = _row_bytes(type.value_type)
    counts = [_count(value, width) for value in values]
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    inner = _of_bytes(b"".join(values), ends[-1], type.value_type)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner, type=type)


def _count(value: bytes, width: int) -> int:
    if len(value) % width:
        raise ValueError(f"a field has {len(value)} bytes, no multiple of {width}")
    return len(value) // width


def _of_bytes(data: bytes, rows: int, type: Any) -> Any:
    if not pa.types.is_fixed_size_list(type):
        return pa.Array.from_buffers(type, rows, [None, pa.py_buffer(data)])
    leaf = _of_bytes(data, rows * type.list_size, type.value_type)
    return pa.Array.from_buffers(type, rows, [None], children=[leaf])


def _row_bytes(type: Any) -> int:
    """Of a value; 0 for lists, whose values differ in length."""
    if pa.types.is_list(type):
        return 0
    if pa.types.is_fixed_size_list(type):
        return int(type.list_size) * _row_bytes(type.value_type)
    return int(type.bit_width) // 8


def _leaf(column: Any) -> memoryview | None:
    """The bytes of its numbers, from its first row on."""
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    buffer = column.buffers()[1]
    return None if buffer is None else memoryview(buffer)[column.offset * _row_bytes(column.type) :]
