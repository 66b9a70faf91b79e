"""Parquet files of a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.dataset.parquet_rows import rows_at_once
from embedstream.records import PartContent
from embedstream_producer.sources import Source, sum_of
from embedstream_producer.tables import BATCH_BYTES, BATCH_ROWS, TablePart, gathered

MAGIC = b"PAR1"


class ParquetTable:
    """A Parquet file whose footer is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.bytes = source.file()
        # A piece of each column and nothing ahead: memory does not depend on the size of row groups.
        self.parquet = pq.ParquetFile(self.bytes, buffer_size=source.piece_bytes, pre_buffer=False)
        self.schema = self.parquet.schema_arrow
        self._rows = self.parquet.metadata.num_rows
        self._read = 0

    @property
    def empty(self) -> bool:
        return self._rows == 0

    @property
    def position(self) -> int:
        return (self.source.size or 0) * self._read // max(1, self._rows)

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for group in range(self.parquet.metadata.num_row_groups):
            for batch in gathered(_batches(self, group, list(columns))):
                self._read += batch.num_rows
                yield batch

    def content(self) -> PartContent:
        return sum_of(self.bytes, self.source)

    def close(self) -> None:
        self.parquet.close()
        self.bytes.close()
        self.source.close()


class ParquetPart(TablePart):
    """A Parquet file; row groups do not show in blocks."""

    what = "Parquet file"
    open = ParquetTable


def _batches(opened: ParquetTable, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a row group."""
    file, source, done = opened.parquet, opened.source, 0
    piece = None if source.quick else source.piece_bytes
    patch = None if source.patches is None else source.patches.__setitem__
    for trusting in (True, False):
        rows = rows_at_once(
            file, opened.bytes, group, columns, BATCH_ROWS, BATCH_BYTES, piece, patch, trusting=trusting
        )
        left = done
        try:
            # Threads take longer to share out a batch than to decode it.
            for batch in file.iter_batches(
                batch_size=rows,
                row_groups=[group],
                columns=columns,
                use_threads=False,
            ):
                new = batch.slice(left)
                left -= batch.num_rows - new.num_rows
                done += new.num_rows
                if new.num_rows:
                    yield new
        except OSError as error:
            # Pages that were not looked at, as each look costs a request, may have headers that Arrow does not read.
            if source.quick or not trusting or "page header" not in str(error):
                raise
        else:
            return
