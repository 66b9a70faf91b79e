"""Arrow messages from whomever they come, read in bounded memory: what their buffers hold is known beforehand.

Arrow allocates what a compressed buffer says of itself, so a few hundred bytes can ask for terabytes. pyarrow shows
neither the list of buffers nor takes a bound, hence this reading of the message's own Flatbuffers metadata
(`Message.fbs`, https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc).
"""

from __future__ import annotations

import struct

import pyarrow as pa

_HEADER = 2  # fields of table Message, by their order in Message.fbs
_BUFFERS, _COMPRESSION = 2, 3  # fields of table RecordBatch
_BUFFER_BYTES = 16  # struct Buffer: offset and length, int64 each
_PREFIX_BYTES = 8  # before each compressed buffer: its length once decompressed; -1: it is not compressed after all
_NOT_COMPRESSED = -1


def read_schema(messages: pa.ipc.MessageReader) -> pa.Schema:
    """The schema that messages begin with. Raises `ValueError`, `OSError`, `pa.ArrowException`."""
    first = next(iter(messages), None)
    # Arrow verifies only messages of the types that it knows, and reads any as a schema.
    if first is None or first.type != "schema":
        raise ValueError(f"begins with {'nothing' if first is None else f'a message of type {first.type}'}, no schema")
    return pa.ipc.read_schema(first)


def read_batch(message: pa.ipc.Message, schema: pa.Schema, most_bytes: int) -> pa.RecordBatch:
    """A record batch of a known schema, whose content is looked at, too. `most_bytes`: of it, once decompressed.

    Raises:
        ValueError, pa.ArrowException: it is none, or holds more.
    """
    content = sum(buffer_sizes(message))
    if content > most_bytes:
        raise ValueError(f"holds {content:,} bytes once decompressed, at most {most_bytes:,} are allowed")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    return batch


def buffer_sizes(message: pa.ipc.Message) -> list[int]:
    """Bytes of each buffer of a record batch message once it is decompressed.

    Raises:
        ValueError: the message is not a record batch, or says what cannot be.
    """
    if message.type != "record batch":
        raise ValueError(f"a {message.type} message where the record batch should be")
    metadata, body = bytes(message.metadata), message.body
    held = memoryview(b"" if body is None else body)
    try:
        batch = _pointee(metadata, _field(metadata, _pointee(metadata, 0), _HEADER))
        buffers = _pointee(metadata, _field(metadata, batch, _BUFFERS))
        compressed = _slot(metadata, batch, _COMPRESSION) != 0
        (count,) = struct.unpack_from("<I", metadata, buffers)
        if count * _BUFFER_BYTES > len(metadata):
            raise ValueError("a list of buffers that is longer than the message")
        sizes = []
        for i in range(count):
            offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + i * _BUFFER_BYTES)
            if offset < 0 or length < 0 or offset + length > len(held):
                raise ValueError("a buffer that lies outside of the message")
            size = length
            if compressed and length:
                (size,) = struct.unpack_from("<q", held[offset : offset + length])
                size = length - _PREFIX_BYTES if size == _NOT_COMPRESSED else size
                if size < 0:
                    raise ValueError("a buffer of negative length")
            sizes.append(size)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"damaged metadata ({error})") from error
    return sizes


def _pointee(data: bytes, at: int) -> int:
    """Where the offset at `at` leads: forward, as Flatbuffers have it."""
    (offset,) = struct.unpack_from("<I", data, at)
    return at + int(offset)


def _field(data: bytes, table: int, number: int) -> int:
    """Where a table's field lies. Raises `ValueError` if the table has no such field."""
    slot = _slot(data, table, number)
    if not slot:
        raise ValueError("metadata that lacks a field")
    return table + slot


def _slot(data: bytes, table: int, number: int) -> int:
    """The field's place in its table; 0 if it is not there."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - int(back)
    if vtable < 0:
        raise ValueError("metadata that points before its beginning")
    (size,) = struct.unpack_from("<H", data, vtable)
    at = 4 + 2 * number
    return int(struct.unpack_from("<H", data, vtable + at)[0]) if at + 2 <= size else 0
