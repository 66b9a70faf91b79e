"""The longest row of a repeated column of a Parquet file, read from its repetition levels before it is decoded.

A list of a billion equal numbers takes a few bytes of a file, and nothing in its metadata tells in which row it is.
The levels (https://parquet.apache.org/docs/file-format/nestedencoding/) do: a row begins at each 0.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from embedstream.dataset.parquet_pages import Page

Read = Callable[[int, int], bytes]
"""So many bytes from an offset of the file, fewer at its end."""

_LENGTH_BYTES = 4
"""In front of the levels of a data page of the first kind."""

_STREAMED: frozenset[Any] = frozenset({"zstd", "gzip", "brotli"})
_WHOLE: dict[str, Any] = {"snappy": "snappy", "lz4": "lz4_raw", "lz4_raw": "lz4_raw"}


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
    plain = _decompressed(read, codec, dictionary)
    if plain is None:
        return None
    data = plain(dictionary.bytes)
    longest = at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
        longest, at = max(longest, size), at + _LENGTH_BYTES + size
    return longest


def _levels(read: Read, codec: str, page: Page) -> bytes | None:
    if page.levels >= 0:
        return read(page.at, min(page.levels, page.stored))
    plain = _decompressed(read, codec, page)
    return None if plain is None else plain(min(int.from_bytes(plain(_LENGTH_BYTES), "little"), page.bytes))


def _decompressed(read: Read, codec: Any, page: Page) -> Callable[[int], bytes] | None:
    """Reads the next bytes of a page, and no more of the file than that takes if the codec allows."""
    if codec == "uncompressed":
        return _Stored(read, page).read
    if codec in _STREAMED:
        return pa.CompressedInputStream(pa.PythonFile(_Stored(read, page), mode="r"), codec).read
    if codec in _WHOLE:
        try:
            return pa.BufferReader(pa.decompress(read(page.at, page.stored), page.bytes, _WHOLE[codec])).read
        except (pa.ArrowException, OSError):
            if codec == "lz4":  # of Hadoop, under the same name
                return None
            raise
    return None


class _Stored(io.RawIOBase):
    """A page as it lies in the file."""

    def __init__(self, read: Read, page: Page) -> None:
        super().__init__()
        self._read = read
        self._at, self._end = page.at, page.at + page.stored

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        left = self._end - self._at
        data = self._read(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


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
