"""What the pages of a Parquet file hold once decompressed, read before anything is decompressed.

Arrow allocates what a page says of itself, and repeats a value of a dictionary in every row that names it, so a few
kilobytes can ask for gigabytes. pyarrow shows no pages and takes no bound, hence this reading of their headers
(`PageHeader` in parquet.thrift, https://parquet.apache.org/docs/file-format/; in Thrift's compact protocol).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import pyarrow.parquet as pq

LARGEST_PAGE_BYTES = 512 * 1024 * 1024
"""pyarrow writes the texts of 1,024 rows into a page, however long they are: books fit, bombs do not."""

LONGEST_HEADER_BYTES = 16 * 1024 * 1024
"""As Arrow has it: statistics repeat values."""

_FIRST_READ = 1024

_DEEPEST = 4
"""Structs in structs; statistics are the third."""

_BYTES, _STORED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of PageHeader
_VALUES = 1  # field of the headers of both kinds of data pages
_LEVELS = 6  # field of that of the second kind
_ENCODING = {_DATA: 2, _DATA_V2: 4}  # field of each of them
_STATISTICS = {_DATA: 5, _DATA_V2: 8}  # the same
_INDEX_HEADER_BYTES = 15
_DELTA_BYTE_ARRAY = 7  # of Encoding: each value begins with a piece of the one before


Patches: TypeAlias = tuple[tuple[int, bytes], ...]
"""Offsets in a file, and what is to stand there."""


class Page(NamedTuple):
    """One page of a column."""

    values: int
    """Nulls included; 0 of a dictionary."""
    bytes: int
    """Once decompressed."""
    shared: bool
    """Whether many values may stand for the same bytes of it, so that only each of them is no longer than the page."""
    at: int = 0
    """Where it begins in the file, after its header."""
    stored: int = 0
    """Its bytes there."""
    levels: int = -1
    """Of a data page of the second kind, bytes of the repetition levels with which it begins, never compressed."""
    header: int = 0
    """Bytes of its header."""
    patches: Patches = ()
    """Of a header that Arrow does not read: what must stand where in the file, so that it reads the page."""


def read_pages(read: Callable[[int, int], bytes], chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column in a row group. `read` gives so many bytes from an offset, fewer at the file's end.

    Raises:
        ValueError: what is there cannot be a page.
    """
    at = chunk.data_page_offset
    if 0 < (dictionary := chunk.dictionary_page_offset or 0) < at:
        at = dictionary
    end, left = at + chunk.total_compressed_size, chunk.num_values
    while at < end and left > 0:
        header, size = _header(read, at, end)
        stored, held = header.numbers.get(_STORED, -1), header.numbers.get(_BYTES, -1)
        if stored < 0 or held < 0:
            raise ValueError("a page of no size")
        values, shared, levels = 0, _DICTIONARY in header.structs, -1
        for kind in _ENCODING.keys() & header.structs.keys():
            data = header.structs[kind].numbers
            values = max(0, data.get(_VALUES, 0))
            shared = data.get(_ENCODING[kind]) == _DELTA_BYTE_ARRAY
            levels = data.get(_LEVELS, 0) if kind == _DATA_V2 else -1
        patches = _without_statistics(read, at, size, header) if size > LONGEST_HEADER_BYTES else ()
        yield Page(values, held, shared, at + size, stored, levels, size, patches)
        left -= values
        at += size + stored


def values_at_once(pages: Sequence[Page], most: int, bound: int) -> int:
    """How many consecutive values, at most `most`, lie in pages of `bound` bytes together and are no longer themselves,
    wherever one begins to read; 1 if not even one does.
    """
    most = min(most, bound // max([1, *(page.bytes for page in pages if page.shared)]))
    data = [page for page in pages if page.values > 0]
    while most > 1 and _widest(data, most) > bound:
        most //= 2
    return max(1, most)


def _widest(pages: Sequence[Page], values: int) -> int:
    """The most bytes that the pages of so many consecutive values have."""
    widest = held = covered = end = 0
    for page in pages:
        # From the last value of this page on.
        while end < len(pages) and covered < page.values - 1 + values:
            held, covered, end = held + pages[end].bytes, covered + pages[end].values, end + 1
        widest = max(widest, held)
        held, covered = held - page.bytes, covered - page.values
    return widest


class _Fields(NamedTuple):
    """What a struct holds, by the numbers of its fields; strings are passed over."""

    numbers: dict[int, int]
    structs: dict[int, _Fields]
    spans: dict[int, tuple[int, int]]
    """Where structs begin, with the byte that says so, and where they end."""


def _header(read: Callable[[int, int], bytes], at: int, end: int) -> tuple[_Fields, int]:
    """The header at an offset, and how many bytes it has."""
    size = _FIRST_READ
    while True:
        size = min(size, end - at)
        data = read(at, size)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < size or size == end - at or size > LONGEST_HEADER_BYTES:
                raise ValueError("a page without a whole header") from None
            size *= 16


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[_Fields, int]:
    """A struct, and where it ends. Raises `IndexError` if that is not in the data."""
    found, field = _Fields({}, {}, {}), 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        match head & 15:
            case 1 | 2:  # true and false, in the type itself
                pass
            case 3:
                at += 1
            case 4 | 5 | 6:
                found.numbers[field], at = _number(data, at)
            case 7:
                at += 8
            case 8:
                size, at = _varint(data, at)
                at += size
            case 12 if depth < _DEEPEST:
                begin = at - 1
                found.structs[field], at = _struct(data, at, depth + 1)
                found.spans[field] = begin, at
            case kind:
                raise ValueError(f"a field of type {kind} in a page's header")
    return found, at + 1


def _without_statistics(read: Callable[[int, int], bytes], at: int, size: int, header: _Fields) -> Patches:
    """A page of an index, which readers pass over, in place of most of the header; behind it what is needed of it.

    Statistics are the last field of what tells of data, so that no field's number depends on them.
    """
    for kind in _STATISTICS.keys() & header.structs.keys():
        span = header.structs[kind].spans.get(_STATISTICS[kind])
        if span is not None:
            whole = read(at, size)
            short = whole[: span[0]] + whole[span[1] :]
            gap = size - len(short) - _INDEX_HEADER_BYTES
            index = (
                b"\x15\x02" + 2 * (b"\x15" + bytes(gap * 2 >> 7 * i & 127 | 128 * (i < 4) for i in range(5))) + b"\0"
            )
            return (at, index), (at + size - len(short), short)
    return ()


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end in a page's header")
