"""One Parquet file of a corpus, as blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.blocks import Block, Refusal
from embedstream.errors import InputError
from embedstream.input.columns import NAME_CHARACTERS, ColumnReader
from embedstream.input.cutting import cut_part, enter_ids
from embedstream.input.duplicates import DuplicateIndex, Position
from embedstream.input.records import Outcome
from embedstream.jobs import JobSpec
from embedstream.terminal import printable
from embedstream_producer.parquet_pages import LARGEST_PAGE_BYTES, Page, read_pages, values_at_once

MAGIC = b"PAR1"

BATCH_ROWS = 1024
BATCH_BYTES = 8 * 1024 * 1024
"""Most rows judged at once, and about how many bytes of them."""

PIECE_BYTES = 4096
"""Read of a quick file to find the header of a page, which lies a page behind the one before."""

COLUMN_BYTES = 32 * 1024 * 1024
"""Most bytes that rows decoded at once may have in a column, however its values are spread and repeated."""

USUAL_RATIO = 20
"""Where each look at a page costs a request, columns are taken at their footer's word if it says no more than this of
compression: texts shrink to a third or a tenth."""


class RandomAccess(Protocol):
    """A file on a disk or in a bucket."""

    piece_bytes: int
    """What is well read at once."""
    quick: bool
    """Whether small reads cost next to nothing."""

    def file(self) -> pa.NativeFile: ...
    def check_unchanged(self) -> None: ...
    def cannot_read(self, error: OSError) -> InputError: ...


class ParquetPart:
    """A Parquet file. A row's number in the file is its place in the part."""

    def __init__(self, index: int, source: str, name: str, size: int, identity: object, opens: RandomAccess) -> None:
        """Raises `InputError`: it cannot be read, or has no rows."""
        self.index = index
        self.source = source
        self.name = name
        self.label = source
        self.size: int | None = size
        self.identity = identity
        self._opens = opens
        with self._opened() as (file, _):
            if not file.metadata.num_rows:
                raise InputError(f"{self.label}: has no records")

    def blocks(
        self,
        spec: JobSpec,
        duplicates: DuplicateIndex,
        on_refusal: Callable[[Refusal], None] | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> Iterator[Block]:
        """As `FilePart.blocks`; the row groups of the file do not show in them."""
        with self._opened() as (file, source):
            reader = ColumnReader(spec, file.schema_arrow, self.label)
            outcomes = self._judged(file, source, reader, on_position)
            yield from cut_part(self.index, outcomes, spec, duplicates, on_refusal)
        self._opens.check_unchanged()

    def ids(self, spec: JobSpec, duplicates: DuplicateIndex) -> Iterator[list[tuple[int, Position]]]:
        """As `FilePart.ids`."""
        with self._opened() as (file, source):
            reader = ColumnReader(spec, file.schema_arrow, self.label)
            yield from enter_ids(self.index, self._judged(file, source, reader, None), duplicates)
        self._opens.check_unchanged()

    def hint(self, spec: JobSpec) -> str | None:
        """A sentence of advice: the job keeps fields that are no columns.

        Raises:
            InputError: columns that the job needs are not there, or of a type that cannot be used.
        """
        with self._opened() as (file, _):
            absent = ColumnReader(spec, file.schema_arrow, self.label).absent
        if not absent:
            return None
        return f"{self.label}: has no column {' or '.join(absent)}, which --keep names"

    def _judged(
        self,
        file: pq.ParquetFile,
        source: pa.NativeFile,
        reader: ColumnReader,
        on_position: Callable[[int], None] | None,
    ) -> Iterator[Sequence[Outcome]]:
        row, total = 0, file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            rows = self._rows_at_once(file, source, group, reader.columns)
            # Threads take longer to share out a batch than to decode it.
            batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=reader.columns, use_threads=False)
            for batch in _gathered(batches):
                yield reader.judge(row, batch)
                row += batch.num_rows
                if on_position is not None and self.size is not None:
                    on_position(self.size * row // total)

    def _rows_at_once(self, file: pq.ParquetFile, source: pa.NativeFile, at: int, columns: Sequence[str]) -> int:
        """How many rows of a row group can be decoded at once. Raises `InputError` for a page that is too large."""
        group = file.metadata.row_group(at)
        each = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // each))
        leaves = [i for i in range(len(file.schema)) if file.schema.column(i).path.partition(".")[0] in columns]
        # Asking for a column of damaged metadata ends the process, unless it is a reader that asks: one of no rows.
        list(file.reader.iter_batches(0, row_groups=[at], column_indices=leaves, use_threads=False))
        for leaf in leaves:
            chunk = group.column(leaf)
            # Of a list, as many rows as have so many values on average.
            each = max(1, chunk.num_values // max(1, group.num_rows))
            rows = min(rows, max(1, values_at_once(self._pages(source, chunk), rows * each, COLUMN_BYTES) // each))
        return rows

    def _pages(self, source: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> list[Page]:
        """All of them, or only the dictionary where more would cost much.

        Raises:
            InputError: one is too large, or makes no sense.
        """
        column = printable(chunk.path_in_schema, NAME_CHARACTERS)
        usual = chunk.total_uncompressed_size <= USUAL_RATIO * chunk.total_compressed_size
        few = not self._opens.quick and usual and "DELTA_BYTE_ARRAY" not in chunk.encodings
        read = _by_pieces(source, PIECE_BYTES if few or self._opens.quick else self._opens.piece_bytes)
        pages = []
        try:
            for page in islice(read_pages(read, chunk), int(chunk.has_dictionary_page) if few else None):
                if page.bytes > LARGEST_PAGE_BYTES:
                    raise InputError(
                        f"{self.label}: column {column} has a page of {page.bytes:,} bytes, more than the "
                        f"{LARGEST_PAGE_BYTES:,} that are read at once: write the file again with smaller pages"
                    )
                pages.append(page)
        except ValueError as error:
            raise InputError(
                f"{self.label}: column {column} is damaged ({error}): make or fetch the file again"
            ) from error
        return pages

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[pq.ParquetFile, pa.NativeFile]]:
        try:
            with (
                self._opens.file() as source,
                # A piece of each column and nothing ahead: memory does not depend on the size of row groups.
                pq.ParquetFile(source, buffer_size=self._opens.piece_bytes, pre_buffer=False) as file,
            ):
                yield file, source
        except (pa.ArrowException, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"{self.label}: is damaged or no Parquet file ({first}): make or fetch it again"
            ) from error
        except OSError as error:
            raise self._opens.cannot_read(error) from error


def _by_pieces(source: Any, piece: int) -> Callable[[int, int], bytes]:
    """Reads at an offset of an Arrow file, out of the last piece read where it is in there."""
    begin, held = 0, b""

    def read(at: int, size: int) -> bytes:
        nonlocal begin, held
        if not begin <= at <= at + size <= begin + len(held):
            begin, held = at, source.read_at(max(size, piece), at)
        return held[at - begin : at - begin + size]

    return read


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in as few batches as the bounds on what is judged at once allow."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if any(pa.types.is_dictionary(type) for type in batch.schema.types):
            yield batch  # its bytes do not tell how long its values are
            continue
        if held and (rows + batch.num_rows > BATCH_ROWS or size + batch.nbytes > BATCH_BYTES):
            yield _joined(held)
            held, rows, size = [], 0, 0
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    [batch] = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return batch
