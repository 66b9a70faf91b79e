"""The block: consecutive chunks of one part, and how it travels in a stream entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa

from embedstream.errors import BlockError
from embedstream.jobs import FORMAT_VERSION

MAX_BODY_BYTES = 16 * 1024 * 1024
"""No valid block comes near this, kept fields included."""

BASE_FIELDS: tuple[pa.Field[Any], ...] = (
    pa.field("row", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("start", pa.int64()),
    pa.field("end", pa.int64()),
    pa.field("text_pair", pa.string()),
)

_IPC_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def block_schema(keep: tuple[str, ...]) -> pa.Schema:
    """Columns of a block. Kept fields are nullable strings: a JSON string as it is, anything else as its JSON text."""
    return pa.schema([*BASE_FIELDS, *(pa.field(name, pa.string()) for name in keep)])


class Refusal(msgspec.Struct, frozen=True):
    """An input row that cannot be embedded. It travels with its block, so it is counted in the same atomic step."""

    row: int
    """Position in the part: line number - 1 for files."""
    id: str | None
    code: str
    message: str
    original: str
    """The original line, cut at a bound."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one part: the good ones as a RecordBatch, the refused ones beside it."""

    part: int
    number: int
    rows: pa.RecordBatch
    sum: bytes
    """`content_sum` as its producer computed it: tells whether a corpus changed between two runs."""
    refused: tuple[Refusal, ...] = ()
    skipped: int = 0

    @property
    def total(self) -> int:
        """Rows that must come out of this block: written or as errors."""
        return self.rows.num_rows + len(self.refused)

    @property
    def span(self) -> tuple[int, int] | None:
        """Its first and last row; None for one in which all rows were skipped."""
        ends = [refusal.row for refusal in (*self.refused[:1], *self.refused[-1:])]
        if self.rows.num_rows:
            row = self.rows.column("row")
            ends += [row[0].as_py(), row[-1].as_py()]
        return (min(ends), max(ends)) if ends else None


def content_sum(rows: pa.RecordBatch, refused: tuple[Refusal, ...], skipped: int) -> bytes:
    """8 bytes over the uncompressed content of freshly built columns: equal for equal rows, whatever the compressor."""
    digest = hashlib.blake2b(digest_size=8)
    for column in rows.columns:
        for buffer in column.buffers():
            digest.update(b"\0" if buffer is None else memoryview(buffer))
    digest.update(_encode_refused(refused))
    digest.update(str(skipped).encode())
    return digest.digest()


class Entry(msgspec.Struct, frozen=True):
    """The fields of one stream entry."""

    part: int
    block: int
    rows: int
    refused_rows: int
    skipped: int
    text_bytes: int
    """UTF-8 bytes of text, for the window's token estimate."""
    sum: bytes
    body: bytes
    refused: bytes

    @property
    def size(self) -> int:
        """What counts against the queue's bound."""
        return len(self.body) + len(self.refused)

    def fields(self) -> dict[str, bytes | int]:
        fields: dict[str, bytes | int] = {
            "v": FORMAT_VERSION,
            "part": self.part,
            "block": self.block,
            "rows": self.rows,
            "bytes": self.text_bytes,
            "sum": self.sum,
            "body": self.body,
        }
        if self.refused_rows:
            fields["refused"] = self.refused
        if self.skipped:
            fields["skipped"] = self.skipped
        return fields


def encode_block(block: Block) -> Entry:
    """Pack a block for its stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.rows.schema, options=_IPC_OPTIONS) as writer:
        writer.write_batch(block.rows)
    return Entry(
        part=block.part,
        block=block.number,
        rows=block.rows.num_rows,
        refused_rows=len(block.refused),
        skipped=block.skipped,
        text_bytes=_text_bytes(block.rows),
        sum=block.sum,
        body=sink.getvalue().to_pybytes(),
        refused=_encode_refused(block.refused),
    )


def decode_block(fields: Mapping[bytes, bytes], keep: tuple[str, ...]) -> Block:
    """Unpack and check a stream entry.

    Raises:
        BlockError: version, sizes, schema or content are not what they should be.
    """
    try:
        version = int(fields[b"v"])
        part, number, count = int(fields[b"part"]), int(fields[b"block"]), int(fields[b"rows"])
        skipped = int(fields.get(b"skipped", b"0"))
        checksum = fields[b"sum"]
        body = fields[b"body"]
    except (KeyError, ValueError) as error:
        raise BlockError(f"stream entry lacks a field: {error}") from error
    if version != FORMAT_VERSION:
        raise BlockError(
            f"block has format version {version}, this worker reads {FORMAT_VERSION}: upgrade the older side"
        )
    if part < 0 or number < 0 or count < 0 or skipped < 0 or len(checksum) != 8 or len(body) > MAX_BODY_BYTES:
        raise BlockError(f"block {part}:{number} is out of bounds")
    try:
        with pa.ipc.open_stream(body) as reader:
            batch = reader.read_next_batch()
        batch.validate(full=True)
        names = batch.schema.names
        refused = msgspec.json.decode(fields.get(b"refused", b"[]"), type=tuple[Refusal, ...])
    except (pa.ArrowException, OSError, EOFError, StopIteration, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise BlockError(f"block {part}:{number} cannot be read: {error}") from error
    if not batch.schema.equals(block_schema(keep)):
        raise BlockError(f"block {part}:{number} has columns {names}, not those of its job")
    if batch.num_rows != count:
        raise BlockError(f"block {part}:{number} says {count} rows and has {batch.num_rows}")
    return Block(part=part, number=number, rows=batch, sum=checksum, refused=refused, skipped=skipped)


def _encode_refused(refused: tuple[Refusal, ...]) -> bytes:
    return msgspec.json.encode(refused) if refused else b""


def _text_bytes(rows: pa.RecordBatch) -> int:
    buffer = rows.column("text").buffers()[2]
    return buffer.size if buffer is not None else 0
