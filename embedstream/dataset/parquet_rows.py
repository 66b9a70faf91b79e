"""How many rows of a Parquet file may be decoded at once, whatever it says of its pages, dictionaries and lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.dataset.parquet_lists import longest_row, longest_value
from embedstream.dataset.parquet_pages import LARGEST_PAGE_BYTES, LONGEST_HEADER_BYTES, Page, read_pages, values_at_once
from embedstream.settings import MIB
from embedstream.terminal import printable

COLUMN_BYTES = 32 * MIB
"""Most bytes that rows decoded at once may have in a column, however its values are spread and repeated."""

ROWS_BYTES = 128 * MIB
"""The same for all columns together."""

MOST_LIST_VALUES = 2**19
"""Values of a row's list: as many as a mebibyte of JSON can hold."""

PIECE_BYTES = 4096
"""Read of a quick file to find the header of a page, which lies a page behind the one before."""

USUAL_RATIO = 20
"""Where each look at a page costs a request, columns are taken at their footer's word if it says no more than this of
compression: texts shrink to a third or a tenth."""

_VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}
_OTHER_VALUE_BYTES = 8
"""Of a decoded value, by physical type; of a string what it takes beside its characters."""

_NAME_CHARACTERS = 60


class RowsRefused(Exception):
    """What a file asks for is too much, or makes no sense: a sentence that lacks the file's name."""


def rows_at_once(
    file: pq.ParquetFile,
    source: pa.NativeFile,
    at: int,
    columns: Sequence[str] | None,
    most_rows: int,
    most_bytes: int,
    quick_piece: int | None,
    patch: Callable[[int, bytes], None] | None = None,
    *,
    trusting: bool = True,
    most_list_values: int = MOST_LIST_VALUES,
) -> int:
    """How many rows of row group `at` can be decoded at once, at most `most_rows`, and about `most_bytes` of them.

    `columns`: those that are read; None: all. `quick_piece`: bytes that are well read at once where each read costs a
    request; None where small reads cost next to nothing. `patch`: makes the file give these bytes at this offset, in
    place of headers that Arrow does not read; None: they are refused. `trusting`: columns are taken at their footer's
    word where a look at them costs a request. `most_list_values`: of a row's list, whatever the bounds on bytes say.

    Raises:
        RowsRefused: a page, or a list of one row, is too large; or there is no sense in them.
        pa.ArrowException, OSError: the file is damaged, or cannot be read.
    """
    group = file.metadata.row_group(at)
    rows = max(1, min(most_rows, most_bytes // max(1, group.total_byte_size // max(1, group.num_rows))))
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    leaves = [i for i, path in enumerate(paths) if columns is None or _is_in(path, columns)]
    # Asking for a column of damaged metadata ends the process, unless it is a reader that asks: one of no rows.
    list(file.reader.iter_batches(0, row_groups=[at], column_indices=leaves, use_threads=False))
    bound = min(COLUMN_BYTES, ROWS_BYTES // max(1, len(leaves)))
    for leaf in leaves:
        column = _Column(
            source, file.schema.column(leaf), group.column(leaf), quick_piece, patch, trusting, most_list_values
        )
        try:
            rows = min(rows, column.rows_at_once(rows, group.num_rows, bound))
        except ValueError as error:
            if isinstance(error, pa.ArrowException):
                raise
            raise RowsRefused(f"column {column.name} is damaged ({error}): make or fetch the file again") from error
    return rows


def _is_in(path: str, columns: Sequence[str]) -> bool:
    """Whether a leaf belongs to one of the columns, whose names may have dots."""
    return any(path == name or path.startswith(f"{name}.") for name in columns)


class _Column:
    """A column of a row group."""

    def __init__(
        self,
        source: Any,
        schema: Any,
        chunk: pq.ColumnChunkMetaData,
        quick_piece: int | None,
        patch: Callable[[int, bytes], None] | None,
        trusting: bool,
        most_list_values: int,
    ) -> None:
        self._most_list_values = most_list_values
        self.name = printable(chunk.path_in_schema, _NAME_CHARACTERS)
        self._highest: int = schema.max_repetition_level
        self._chunk = chunk
        self._patch = patch
        self._width = _VALUE_BYTES.get(chunk.physical_type, _OTHER_VALUE_BYTES)
        held = max(chunk.total_uncompressed_size, self._width * chunk.num_values if self._highest else 0)
        usual = held <= USUAL_RATIO * chunk.total_compressed_size
        self._trusted = trusting and quick_piece is not None and usual and "DELTA_BYTE_ARRAY" not in chunk.encodings
        piece = PIECE_BYTES if self._trusted or quick_piece is None else quick_piece
        self._read = _by_pieces(source, piece)

    def rows_at_once(self, rows: int, group_rows: int, bound: int) -> int:
        """At most `rows`. Raises `RowsRefused`, `ValueError`, and what Arrow raises."""
        pages = self._pages(self._trusted)
        if not self._highest:
            return values_at_once(pages, rows, bound)
        if self._trusted and not pages:
            return rows
        values = rows + max(0, self._chunk.num_values - group_rows)
        if values_at_once(pages, values, bound) >= values and values * self._width <= bound:
            return rows  # even if one row had all that the others have no need of
        return self._lists_at_once(rows, group_rows, bound)

    def _lists_at_once(self, rows: int, group_rows: int, bound: int) -> int:
        pages, codec = self._pages(False), self._chunk.compression.lower()
        longest = longest_row(self._read, codec, pages, self._highest)
        if longest is None:
            longest = max(1, self._chunk.num_values - group_rows + 1)
        if longest > self._most_list_values:
            raise RowsRefused(
                f"column {self.name} has a row of {longest:,} values, more than the {self._most_list_values:,} that "
                f"are read at once: leave the column out, or split the row"
            )
        if longest > MOST_LIST_VALUES:
            # One row may have more than the bound; its pages may begin and end in its neighbours.
            fits = max(1, min(rows, bound // (longest * self._width)))
            rows, bound = fits, 3 * fits * longest * self._width
        if self._chunk.physical_type == "BYTE_ARRAY":
            pages = [self._by_longest_value(codec, page) for page in pages]
        fits = min(values_at_once(pages, rows * max(1, longest), bound), bound // self._width)
        if fits < longest:
            raise RowsRefused(
                f"column {self.name} has a row of {longest:,} values that may have more than {bound:,} bytes: leave "
                f"the column out, split the row, or write the file without a dictionary for it"
            )
        return fits // max(1, longest)

    def _by_longest_value(self, codec: str, page: Page) -> Page:
        if page.values or not page.shared:
            return page
        longest = longest_value(self._read, codec, page) if page.bytes <= _DICTIONARY_BYTES else None
        return page if longest is None else page._replace(bytes=longest)

    def _pages(self, few: bool) -> list[Page]:
        """All of them, or only the dictionary. Raises `RowsRefused` for one that is too large, `ValueError`."""
        pages = []
        for page in islice(read_pages(self._read, self._chunk), int(self._chunk.has_dictionary_page) if few else None):
            if page.patches and self._patch is not None:
                for place, data in page.patches:
                    self._patch(place, data)
            elif page.header > LONGEST_HEADER_BYTES:
                raise RowsRefused(
                    f"column {self.name} has a page header of {page.header:,} bytes, more than the "
                    f"{LONGEST_HEADER_BYTES:,} that Arrow reads, as statistics repeat long values: write the file "
                    f"again without statistics of pages, or shorten the values"
                )
            if page.bytes > LARGEST_PAGE_BYTES:
                raise RowsRefused(
                    f"column {self.name} has a page of {page.bytes:,} bytes, more than the {LARGEST_PAGE_BYTES:,} that "
                    f"are read at once: write the file again with smaller pages"
                )
            pages.append(page)
        return pages


_DICTIONARY_BYTES = 16 * MIB
"""In a larger one no value is looked for: each counts as long as the page."""


def _by_pieces(source: Any, piece: int) -> Callable[[int, int], bytes]:
    """Reads at an offset of an Arrow file, out of the last piece read where it is in there."""
    begin, held = 0, b""

    def read(at: int, size: int) -> bytes:
        nonlocal begin, held
        if not begin <= at <= at + size <= begin + len(held):
            begin, held = at, source.read_at(max(size, piece), at)
        return held[at - begin : at - begin + size]

    return read
