"""The block: consecutive chunks of one part, and how it travels in a stream entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import pyarrow as pa

from embedstream.errors import BlockError
from embedstream.jobs import FORMAT_VERSION, KeptType, other_version
from embedstream.queue.ipc_bounds import read_batch, read_schema
from embedstream.queue.kept import typed
from embedstream.settings import BLOCK_LIMITS, MIB

MAX_BODY_BYTES = 8 * MIB
"""Of the rows as they travel, and of the refusals beside them. No valid block comes near this."""
MAX_CONTENT_BYTES = 4 * MIB
"""Of the rows once decompressed: the fullest block that is ever cut (one row's text and kept fields, a mebibyte each,
or 256 rows with the longest ids) has two thirds of it."""
MAX_ROWS = 4 * BLOCK_LIMITS.chunks
"""Of a block, refused rows included: each takes a vector's memory in the worker, however short its text."""
MOST_BLOCKS = 2**26
"""Blocks of one part: its sums, 8 bytes each, end at the 512 MiB of a Redis string. The scripts refuse more."""
MOST_PARTS = 2**31
"""The dataset's `part` is an int32."""
MOST_INPUT_ROWS = 2**53
"""Rows of one part: what every reader of JSON can count to."""

BASE_FIELDS: tuple[pa.Field[Any], ...] = (
    pa.field("row", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("start", pa.int64()),
    pa.field("end", pa.int64()),
    pa.field("text_pair", pa.string()),
)

_NO_TYPES: Mapping[str, KeptType] = {}

_IPC_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def block_schema(keep: tuple[str, ...]) -> pa.Schema:
    """Columns of a block. Kept fields are nullable strings: a JSON string as it is, anything else as its JSON text.

    Their types do not show, so that the same rows give the same blocks in every format.
    """
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


def decode_block(
    fields: Mapping[bytes, bytes],
    keep: tuple[str, ...],
    parts: int = MOST_PARTS,
    types: Mapping[str, KeptType] = _NO_TYPES,
) -> Block:
    """Unpack and check a stream entry, from whomever it comes, in bounded memory. `parts`: how many the job has;
    `types`: which of its kept fields are not strings.

    Raises:
        BlockError: version, sizes, schema or content are not what they should be.
    """
    try:
        version = int(fields[b"v"])
        if version != FORMAT_VERSION:  # the other fields of another version may be others
            raise BlockError(other_version("block", version, "this worker"))
        part, number, count = int(fields[b"part"]), int(fields[b"block"]), int(fields[b"rows"])
        skipped = int(fields.get(b"skipped", b"0"))
        checksum = fields[b"sum"]
        body, refused_body = fields[b"body"], fields.get(b"refused", b"[]")
    except KeyError as error:
        raise BlockError(f"stream entry lacks a field: {error}") from error
    except ValueError as error:
        raise BlockError("stream entry has a field that is no number") from error
    if not (0 <= part < parts and 0 <= number < MOST_BLOCKS):
        raise BlockError(f"block {_shown(part)}:{_shown(number)} is out of bounds: its job has {parts} parts")
    name = f"block {part}:{number}"
    if not (0 <= count <= MAX_ROWS and 0 <= skipped < MOST_INPUT_ROWS and len(checksum) == 8):
        raise BlockError(f"{name} is out of bounds: {_shown(count)} rows, at most {MAX_ROWS} are allowed")
    if max(len(body), len(refused_body)) > MAX_BODY_BYTES:
        raise BlockError(f"{name} is out of bounds: more than {MAX_BODY_BYTES:,} bytes")
    try:
        batch = _read_rows(body, block_schema(keep), name)
        refused = msgspec.json.decode(refused_body, type=tuple[Refusal, ...])
        if batch.num_rows != count:
            raise BlockError(f"{name} says {count} rows and has {batch.num_rows}")
        if batch.num_rows + len(refused) > MAX_ROWS:
            raise BlockError(f"{name} has {len(refused)} refused rows beside {count} others, {MAX_ROWS} are allowed")
        _check_rows(batch, refused, name)
        _check_types(batch, types, name)
    except BlockError:
        raise
    except Exception as error:  # whatever Arrow and Python raise for what is none
        raise BlockError(f"{name} cannot be read: {_shown(error)}") from error
    return Block(part=part, number=number, rows=batch, sum=checksum, refused=refused, skipped=skipped)


def _read_rows(body: bytes, schema: pa.Schema, name: str) -> pa.RecordBatch:
    """The one record batch of an Arrow stream. Nothing is decompressed before schema and sizes are what they may be."""
    messages = pa.ipc.MessageReader.open_stream(body)
    found = read_schema(messages)
    if not found.equals(schema):
        raise BlockError(f"{name} has columns {_shown(found.names)}, not those of its job")
    # Of the job's own schema, not the found one: that may carry metadata of any kind.
    return read_batch(messages.read_next_message(), schema, MAX_CONTENT_BYTES)


def _check_rows(batch: pa.RecordBatch, refused: tuple[Refusal, ...], name: str) -> None:
    """Raise `BlockError` for what no producer says: rows twice or out of order, ids and texts beyond their bounds."""
    rows: list[int] = _list(batch, "row")
    chunks: list[int] = _list(batch, "chunk")
    places = list(zip(rows, chunks, strict=True))
    if any(before >= after for before, after in pairwise(places)):
        raise BlockError(f"{name} has rows twice or out of order")
    refused_rows = {refusal.row for refusal in refused}
    if len(refused_rows) < len(refused) or not refused_rows.isdisjoint(rows):
        raise BlockError(f"{name} has refused rows twice, or among the others")
    if min((*rows, *refused_rows, *chunks), default=0) < 0 or max((*rows, *refused_rows), default=0) >= MOST_INPUT_ROWS:
        raise BlockError(f"{name} has row or chunk numbers out of bounds")
    limits = BLOCK_LIMITS
    if max(_longest(batch, "id"), *(len(each.id or "") for each in refused), 0) > limits.longest_id_bytes:
        raise BlockError(f"{name} has an id of more than {limits.longest_id_bytes:,} bytes")
    if _longest(batch, "text") > limits.longest_text_bytes:
        raise BlockError(f"{name} has a text of more than {limits.longest_text_bytes:,} bytes")


def _check_types(batch: pa.RecordBatch, types: Mapping[str, KeptType], name: str) -> None:
    for field, type in types.items():
        try:
            typed(batch.column(field), type)
        except pa.ArrowInvalid as error:
            raise BlockError(f"{name} has a {_shown(field)} that does not fit its type, {type}") from error


def _list(batch: pa.RecordBatch, column: str) -> list[Any]:
    return batch.column(column).to_pylist()


def _longest(batch: pa.RecordBatch, column: str) -> int:
    """UTF-8 bytes of the longest value of a string column as it was read, that is without an offset of its own."""
    offsets = batch.column(column).buffers()[1]
    if not batch.num_rows or offsets is None:
        return 0
    ends = memoryview(offsets)[: 4 * (batch.num_rows + 1)].cast("i")  # the buffer may have any length beyond
    return max(end - start for start, end in pairwise(ends))


def _shown(value: object) -> str:
    """A value from outside, short enough for a message."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _encode_refused(refused: tuple[Refusal, ...]) -> bytes:
    return msgspec.json.encode(refused) if refused else b""


def _text_bytes(rows: pa.RecordBatch) -> int:
    buffer = rows.column("text").buffers()[2]
    return buffer.size if buffer is not None else 0
