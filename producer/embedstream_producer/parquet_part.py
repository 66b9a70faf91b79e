"""One Parquet file of a corpus, as blocks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.corpus.columns import ColumnReader
from embedstream.corpus.cutting import cut_part, enter_ids
from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.corpus.records import Outcome
from embedstream.dataset.parquet_rows import RowsRefused, rows_at_once
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, Refusal
from embedstream.records import PartContent

MAGIC = b"PAR1"

BATCH_ROWS = 1024
BATCH_BYTES = 8 * 1024 * 1024
"""Most rows judged at once, and about how many bytes of them."""


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
        self.content: PartContent | None = None
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
            self.content = _content(source, self._opens.piece_bytes)
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
            piece = None if self._opens.quick else self._opens.piece_bytes
            rows = rows_at_once(file, source, group, reader.columns, BATCH_ROWS, BATCH_BYTES, piece)
            # Threads take longer to share out a batch than to decode it.
            batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=reader.columns, use_threads=False)
            for batch in _gathered(batches):
                yield reader.judge(row, batch)
                row += batch.num_rows
                if on_position is not None and self.size is not None:
                    on_position(self.size * row // total)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[pq.ParquetFile, pa.NativeFile]]:
        try:
            with (
                self._opens.file() as source,
                # A piece of each column and nothing ahead: memory does not depend on the size of row groups.
                pq.ParquetFile(source, buffer_size=self._opens.piece_bytes, pre_buffer=False) as file,
            ):
                yield file, source
        except RowsRefused as error:
            raise InputError(f"{self.label}: {error}") from error
        except (pa.ArrowException, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"{self.label}: is damaged or no Parquet file ({first}): make or fetch it again"
            ) from error
        except OSError as error:
            raise self._opens.cannot_read(error) from error


def _content(source: pa.NativeFile, piece_bytes: int) -> PartContent:
    """All bytes of the file that is open, whatever its name means by now."""
    digest = hashlib.sha256()
    source.seek(0)
    while (piece := source.read_buffer(piece_bytes)).size:
        digest.update(piece)
    return PartContent(source.tell(), digest.hexdigest())


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
