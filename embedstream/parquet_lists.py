"""The longest row of a repeated column of a Parquet file, read from its repetition levels before it is decoded.

A list of a billion equal numbers takes a few bytes of a file, and nothing in its metadata tells in which row it is.
The levels (https://parquet.apache.org/docs/file-format/nestedencoding/) do: a row begins at each 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from embedstream.parquet_pages import Page

Read = Callable[[int, int], bytes]
"""So many bytes from an offset of the file, fewer at its end."""

_LENGTH_BYTES = 4
"""In front of the levels of a data page of the first kind."""

_STREAMED = frozenset({"zstd", "gzip", "brotli"})
_WHOLE = frozenset({"snappy", "lz4_raw"})


def longest_row(read: Read, codec: str, pages: Iterable[Page], highest: int) -> int | None:
    """Most values of a row; None for a codec that is not known. `highest`: the column's highest repetition level.

    Raises:
        ValueError: what is there cannot be levels.
        pa.ArrowException, OSError: it cannot be decompressed, or read.
    """
    longest = run = 0
    for page in pages:
        if not page.values:
            continue
        levels = _levels(read, codec, page)
        if levels is None:
            return None
        found = _rows(levels, page.values, highest.bit_length())
        if found is None:
            run += page.values
        else:
            lead, inner, run_on = found
            longest, run = max(longest, run + lead, inner), run_on
    return max(longest, run)


def longest_value(read: Read, codec: str, dictionary: Page) -> int | None:
    """Bytes of the longest string in a dictionary; None for a codec that is not known. Raises as `longest_row`."""
    data = _head(read, codec, dictionary, dictionary.bytes)
    if data is None:
        return None
    longest = at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
        longest, at = max(longest, size), at + _LENGTH_BYTES + size
    return longest


def _levels(read: Read, codec: str, page: Page) -> bytes | None:
    if page.levels >= 0:
        return read(page.at, min(page.levels, page.stored))
    length = _head(read, codec, page, _LENGTH_BYTES)
    if length is None:
        return None
    data = _head(read, codec, page, _LENGTH_BYTES + min(int.from_bytes(length, "little"), page.bytes))
    return None if data is None else data[_LENGTH_BYTES:]


def _head(read: Read, codec: str, page: Page, size: int) -> bytes | None:
    """The first bytes of a page once decompressed."""
    stored = read(page.at, page.stored)
    if codec == "uncompressed":
        return stored[:size]
    if codec in _STREAMED:
        with pa.CompressedInputStream(pa.BufferReader(stored), codec) as stream:
            return bytes(stream.read(size))
    if codec in _WHOLE:
        known = cast(Literal["snappy"], codec)
        return bytes(memoryview(pa.decompress(stored, page.bytes, known))[:size])
    return None


@lru_cache(maxsize=64)
def _rows(levels: bytes, values: int, width: int) -> tuple[int, int, int] | None:
    """Of a page: values before its first row begins, those of the longest row within, and those of its last row.

    None if no row begins in it. Pages of rows of one length are alike, hence the cache.
    """
    at = place = inner = 0
    first = last = -1
    while place < values:
        header, at = _varint(levels, at)
        starts: Any
        if header & 1:
            size = (header >> 1) * width
            count = min((header >> 1) * 8, values - place)
            bits = np.unpackbits(np.frombuffer(levels, np.uint8, size, at), bitorder="little")[: count * width]
            starts = place + np.flatnonzero(~bits.reshape(count, width).any(axis=1))
            at += size
        else:
            size, count = (width + 7) // 8, min(header >> 1, values - place)
            starts = (place, place + count - 1) if not any(levels[at : at + size]) else ()
            at += size
        if count == 0:
            raise ValueError("repetition levels of no length")
        if len(starts):
            if first < 0:
                first = int(starts[0])
            else:
                inner = max(inner, int(starts[0]) - last)
            inner = max(inner, 1 if not header & 1 else int(np.diff(starts).max(initial=1)))
            last = int(starts[-1])
        place += count
    return None if first < 0 else (first, inner, values - last)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("repetition levels without an end")
