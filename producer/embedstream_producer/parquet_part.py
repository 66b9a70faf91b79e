"""One Parquet file of a corpus, as blocks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.corpus.columns import ColumnReader, kept_types
from embedstream.corpus.records import Outcome
from embedstream.dataset.parquet_rows import RowsRefused, rows_at_once
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.records import PartContent
from embedstream_producer.sources import Source, SourcePart

BATCH_ROWS = 1024
BATCH_BYTES = 8 * 1024 * 1024
"""Most rows judged at once, and about how many bytes of them."""


class _OpenFile:
    """A Parquet file whose footer is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.bytes = source.file()
        # A piece of each column and nothing ahead: memory does not depend on the size of row groups.
        self.parquet = pq.ParquetFile(self.bytes, buffer_size=source.piece_bytes, pre_buffer=False)

    def close(self) -> None:
        self.parquet.close()
        self.bytes.close()
        self.source.close()


class ParquetPart(SourcePart[_OpenFile]):
    """A Parquet file. A row's number in the file is its place in the part; row groups do not show in blocks."""

    @property
    def empty(self) -> bool:
        return self._open().parquet.metadata.num_rows == 0

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        opened = self._take()
        with contextlib.closing(opened), self._explained(opened.source):
            if opened.parquet.metadata.num_rows:
                reader = ColumnReader(spec, opened.parquet.schema_arrow, self.label, self.index)
                yield from self._judged(opened, reader, on_position)
            content = _content(opened)
        opened.source.check_unchanged()
        self.content = content

    def hint(self, spec: JobSpec) -> str | None:
        opened = self._open()
        if self.empty:
            return None
        with self._explained(opened.source):
            lacking = ColumnReader(spec, opened.parquet.schema_arrow, self.label).lacking
            self.kept_types = kept_types(opened.parquet.schema_arrow, spec.keep)
        if lacking and self.index == 0:
            raise InputError(lacking)
        return lacking or None

    def _judged(
        self, opened: _OpenFile, reader: ColumnReader, on_position: Callable[[int], None] | None
    ) -> Iterator[Sequence[Outcome]]:
        row, total = 0, opened.parquet.metadata.num_rows
        for group in range(opened.parquet.metadata.num_row_groups):
            for batch in _gathered(_batches(opened, group, reader.columns)):
                yield reader.judge(row, batch)
                row += batch.num_rows
                if on_position is not None and self.size is not None:
                    on_position(self.size * row // total)

    def _begin(self, source: Source) -> _OpenFile:
        try:
            with self._explained(source):
                return _OpenFile(source)
        except InputError:
            source.close()
            raise

    @contextlib.contextmanager
    def _explained(self, source: Source) -> Iterator[None]:
        try:
            yield
        except RowsRefused as error:
            raise InputError(f"{self.label}: {error}") from error
        except (pa.ArrowException, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"{self.label}: is damaged or no Parquet file ({first}): make or fetch it again"
            ) from error
        except OSError as error:
            raise source.cannot_read(error) from error


def _batches(opened: _OpenFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
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
                columns=None if columns is None else list(columns),
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


def _content(opened: _OpenFile) -> PartContent:
    """All bytes of the file that is open as they lie there, whatever its name means by now."""
    digest, file = hashlib.sha256(), opened.bytes
    if opened.source.patches:
        opened.source.patches.clear()
    file.seek(0)
    while (piece := file.read_buffer(opened.source.piece_bytes)).size:
        digest.update(piece)
    return PartContent(file.tell(), digest.hexdigest())


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
