"""A shard's error rows in a file of their own: Arrow IPC, whose name readers of a folder of Parquet pass over."""

from __future__ import annotations

from collections.abc import Iterator
from io import IOBase
from typing import cast

import pyarrow as pa

from embedstream.dataset.schema import errors_schema
from embedstream.queue.ipc_bounds import read_batch, read_schema
from embedstream.settings import MIB

BATCH_ROWS = 1024
"""Most rows of a batch: they become Python objects."""

BATCH_BYTES = 8 * MIB
"""About the most of a batch of several rows."""

MOST_BYTES = 32 * MIB
"""Of a batch: far above one error row, which travelled in a block."""

_MAGIC, _END = b"ARROW1\0\0", b"ARROW1"


def encode_errors(errors: pa.Table) -> pa.Buffer:
    """Rows in errors schema as an Arrow IPC file."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, errors_schema(), options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in errors.combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
            for piece in _bounded(batch):
                writer.write_batch(piece)
    return stream.getvalue()


def _bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if batch.nbytes <= BATCH_BYTES or batch.num_rows < 2:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _bounded(batch.slice(0, half))
    yield from _bounded(batch.slice(half))


def read_errors(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The rows of such a file, some at a time, in bounded memory.

    Raises:
        ValueError, pa.ArrowException, OSError: it is no such file, or cannot be read.
    """
    file.seek(max(0, file.size() - len(_END)))
    end = file.read()
    file.seek(0)
    if (file.read(len(_MAGIC)), end) != (_MAGIC, _END):
        raise ValueError("no whole Arrow IPC file")
    # The messages of a file are those of a stream; its list of them, at its end, is for reading at any place.
    messages = pa.ipc.MessageReader.open_stream(pa.PythonFile(cast("IOBase", _Bounded(file)), "r"))
    found, schema = read_schema(messages), errors_schema()
    if not found.equals(schema):
        raise ValueError(f"other columns than {', '.join(schema.names)}, or of other types")
    for message in messages:
        yield read_batch(message, schema, MOST_BYTES)


class _Bounded:
    """A file of which no more is read at once than a message may have, whatever it says of its length."""

    closed = False  # asked for by Arrow

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_BYTES:
            raise ValueError(f"a message of {size:,} bytes")
        return self._file.read(size)
