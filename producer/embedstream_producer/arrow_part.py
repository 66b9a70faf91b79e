"""Arrow IPC of a corpus: streams, as `datasets` saves them, and files (Feather)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import IOBase
from typing import cast

import pyarrow as pa

from embedstream.errors import InputError
from embedstream.records import PartContent
from embedstream_producer.plain import PlainStream
from embedstream_producer.sources import Source, rest_of, sum_of
from embedstream_producer.tables import TablePart, sliced

MAGIC = b"ARROW1"
"""Of a file. What lies between it and the footer only the footer tells."""

STREAM_MAGIC = b"\xff\xff\xff\xff"
"""With what each message of a stream begins."""


class ArrowTable:
    """A stream or a file whose schema is read. Of its batches one is held at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._plain: PlainStream | None = None
        self._file: pa.NativeFile | None = None
        self._read = self._count = 0
        if source.starts_with(MAGIC):
            self._file = source.file()
            reader = pa.ipc.open_file(self._file)
            self.schema, self._count = reader.schema, reader.num_record_batches
            self._batches: Iterator[pa.RecordBatch] = map(reader.get_batch, range(self._count))
        else:
            if source.plain.head.startswith(MAGIC):
                raise InputError(
                    f"{source.label}: is an Arrow file: name the file itself, as only Arrow streams can be read from a "
                    f"pipe or compressed"
                )
            self._plain = source.plain
            stream = pa.ipc.open_stream(pa.PythonFile(cast("IOBase", _Whole(self._plain)), mode="r"))
            self.schema, self._batches = stream.schema, iter(stream)
        self._first = self._next()

    @property
    def empty(self) -> bool:
        return self._first is None

    @property
    def position(self) -> int:
        if self._plain is not None:
            return self._plain.position
        return (self.source.size or 0) * self._read // max(1, self._count)

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        heads = [name if name in self.schema.names else name.partition(".")[0] for name in columns]
        batch = self._first
        while batch is not None:
            # Offsets of a file that is damaged lead anywhere.
            batch.validate(full=True)
            yield from sliced(batch.select(list(dict.fromkeys(heads))))
            batch = self._next()

    def content(self) -> PartContent:
        if self._file is not None:
            return sum_of(self._file, self.source)
        assert self._plain is not None
        return rest_of(self._plain, self.source)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self.source.close()

    def _next(self) -> pa.RecordBatch | None:
        for batch in self._batches:
            self._read += 1
            if batch.num_rows:
                return batch
        return None


class _Whole:
    """Reads as many bytes as are asked for, if there are so many: pipes give what they have."""

    closed = False

    def __init__(self, plain: PlainStream) -> None:
        self._plain = plain

    def read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size and (piece := self._plain.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class ArrowPart(TablePart):
    """An Arrow IPC file or stream."""

    what = "Arrow file or stream"
    open = ArrowTable
