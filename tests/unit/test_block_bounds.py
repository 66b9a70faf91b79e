"""Blocks from a producer that nobody trusts: what they may hold, and what reading them may cost."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pytest

from embedstream.corpus.records import LONGEST_KEPT_BYTES
from embedstream.errors import BlockError
from embedstream.queue.blocks import (
    MAX_BODY_BYTES,
    MAX_CONTENT_BYTES,
    MAX_ROWS,
    Refusal,
    block_schema,
    decode_block,
    encode_block,
)
from embedstream.queue.ipc_bounds import buffer_sizes
from embedstream.queue.packing import Packer
from embedstream.settings import BLOCK_LIMITS, MIB


def body(table: pa.Table, compression: Literal["zstd", "lz4"] | None = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def table(
    rows: Sequence[int] = (0, 1, 2),
    chunks: Sequence[int] | None = None,
    ids: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
) -> pa.Table:
    count = len(rows)
    columns: list[Any] = [
        pa.array(rows, pa.int64()),
        pa.array(ids or [f"id-{i}" for i in range(count)], pa.string()),
        pa.array(chunks or [0] * count, pa.int32()),
        pa.array(texts or ["x"] * count, pa.string()),
        pa.nulls(count, pa.int64()),
        pa.nulls(count, pa.int64()),
        pa.nulls(count, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=block_schema(()))


def entry(content: pa.Table | bytes, rows: int | None = None, **changed: bytes) -> dict[bytes, bytes]:
    count = content.num_rows if isinstance(content, pa.Table) else rows
    packed = body(content) if isinstance(content, pa.Table) else content
    fields = {b"v": b"1", b"part": b"0", b"block": b"0", b"rows": str(count).encode(), b"sum": b"8 bytes."}
    return {**fields, b"body": packed, **{name.encode(): value for name, value in changed.items()}}


def refused(*rows: int, id: str | None = None) -> bytes:
    return msgspec.json.encode([Refusal(row, id, "empty_text", "text is empty", "{}") for row in rows])


@pytest.mark.parametrize("compression", ["zstd", "lz4", None])
def test_the_sizes_read_from_a_message_are_those_that_arrow_decompresses_to(
    compression: Literal["zstd", "lz4"] | None,
) -> None:
    rows = table(range(50), texts=["a text that is said again and again " * 9] * 50).to_batches()[0]
    messages = list(pa.ipc.MessageReader.open_stream(body(pa.Table.from_batches([rows]), compression)))
    made = pa.ipc.read_record_batch(messages[1], rows.schema)
    buffers = [buffer for column in made.columns for buffer in column.buffers()]
    sizes = buffer_sizes(messages[1])
    assert len(sizes) == len(buffers)
    for size, buffer in zip(sizes, buffers, strict=True):
        assert size == (buffer.size if buffer else 0)


def test_the_fullest_blocks_that_are_ever_cut_can_be_read() -> None:
    keep = ("kept",)
    packer = Packer(0, keep)
    longest = "\U0001f600" * (BLOCK_LIMITS.longest_text_bytes // 4)
    assert packer.add(0, "é" * 512, longest, 4 * len(longest), ("é" * (LONGEST_KEPT_BYTES // 2),)) is None
    wide = [packer.add(row, f"{row:0>1024}", "x", 1, ("\U0001f600" * 1022,)) for row in range(1, 257)]
    garbage = Packer(0, keep)
    original = "\x01" * 1000
    full = [garbage.refuse(Refusal(row, "\x01" * 1024, "c", "\\U0001f600" * 700, original)) for row in range(256)]
    blocks = [*filter(None, [*wide, packer.finish(), *full])]
    assert [block.total for block in blocks] == [1, 256, 256]
    for block in blocks:
        fields = encode_block(block).fields()
        stored = {name.encode(): v if isinstance(v, bytes) else str(v).encode() for name, v in fields.items()}
        assert decode_block(stored, keep).total == block.total


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (entry(table(texts=["x" * (BLOCK_LIMITS.longest_text_bytes + 1), "", ""])), "a text of more than 1,048,576"),
        (entry(table(ids=["a", "i" * 10 * MIB, "b"])), "once decompressed, at most 4,194,304"),
        (entry(table(ids=["a", "i" * 1025, "b"])), "an id of more than 1,024"),
        (entry(table(rows=(0, 1, 1))), "rows twice or out of order"),
        (entry(table(rows=(0, 2, 1))), "rows twice or out of order"),
        (entry(table(rows=(0, 0, 0), chunks=(0, 1, 1))), "rows twice or out of order"),
        (entry(table(rows=(-1, 0, 1))), "numbers out of bounds"),
        (entry(table(rows=(0, 1, 2**62))), "numbers out of bounds"),
        (entry(table(chunks=(-1, 0, 0))), "numbers out of bounds"),
        (entry(table(range(MAX_ROWS + 1))), f"{MAX_ROWS + 1} rows, at most {MAX_ROWS}"),
        (entry(table(range(MAX_ROWS)), refused=refused(MAX_ROWS)), "1 refused rows beside"),
        (entry(table(), refused=refused(1)), "refused rows twice, or among the others"),
        (entry(table(), refused=refused(7, 7)), "refused rows twice, or among the others"),
        (entry(table(), refused=refused(-7)), "numbers out of bounds"),
        (entry(table(), refused=refused(7, id="i" * 1025)), "an id of more than 1,024"),
        (entry(table(), refused=b"[" * 100_000), "cannot be read"),
        (entry(table(), refused=b'[{"x":' + b"[" * 100_000), "cannot be read"),
        (entry(table(), refused=b" " * (MAX_BODY_BYTES + 1)), "more than 8,388,608 bytes"),
        (entry(table(), part=b"1"), "block 1:0 is out of bounds: its job has 1 parts"),
        (entry(table(), block=str(2**26).encode()), "out of bounds"),
        (entry(table(), part=b"9" * 4000), "out of bounds"),
        (entry(table(), skipped=b"9" * 5000), "no number"),
    ],
)  # fmt: skip
def test_what_no_producer_says_is_refused(fields: dict[bytes, bytes], message: str) -> None:
    with pytest.raises(BlockError, match=message) as caught:
        decode_block(fields, (), parts=1)
    assert len(str(caught.value)) < 500


def test_chunks_of_one_row_are_in_order_and_welcome() -> None:
    assert decode_block(entry(table(rows=(0, 0, 1), chunks=(0, 1, 0))), ()).total == 3


def test_a_dictionary_where_the_rows_should_be_is_refused() -> None:
    foreign = pa.table({"row": pa.array(["a", "b"]).dictionary_encode()})
    with pytest.raises(BlockError, match="has columns"):
        decode_block(entry(body(foreign), 2), ())
    schema = pa.ipc.MessageReader.open_stream(body(table())).read_next_message()
    messages = list(pa.ipc.MessageReader.open_stream(body(foreign)))
    mixed = pa.BufferOutputStream()
    for message in (schema, *messages[1:]):
        message.serialize_to(mixed)
    with pytest.raises(BlockError, match="a dictionary message where the record batch should be"):
        decode_block(entry(mixed.getvalue().to_pybytes(), 2), ())


def test_metadata_of_a_schema_does_not_reach_the_rows() -> None:
    made = table().replace_schema_metadata({"pandas": "x" * 1000})
    assert decode_block(entry(made), ()).rows.schema.metadata is None


def with_stated_size(stated: int) -> bytes:
    """A block whose text says that it holds `stated` bytes once decompressed."""
    packed = bytearray(body(table(texts=["so many words " * 5000] * 3)))
    real = (3 * len("so many words " * 5000)).to_bytes(8, "little") + b"\x28\xb5\x2f\xfd"  # zstd's magic number
    assert packed.count(real) == 1
    at = packed.index(real)
    packed[at : at + 8] = stated.to_bytes(8, "little", signed=True)
    return bytes(packed)


@pytest.mark.parametrize("stated", [2**62, 2**40, MAX_CONTENT_BYTES + 1, -2, -(2**63)])
def test_a_block_that_states_more_than_it_may_hold_is_refused_unread(stated: int) -> None:
    with pytest.raises(BlockError, match=r"once decompressed|negative"):
        decode_block(entry(with_stated_size(stated), 3), ())


@pytest.mark.parametrize("stated", [0, 1, 3_000_000])
def test_a_block_that_states_a_size_that_is_not_its_own_is_refused(stated: int) -> None:
    with pytest.raises(BlockError, match="cannot be read"):
        decode_block(entry(with_stated_size(stated), 3), ())


PEAK = """
import resource, sys
import pyarrow as pa
from pathlib import Path
from embedstream.queue.blocks import decode_block
from embedstream.errors import BlockError

fields = {b"v": b"1", b"part": b"0", b"block": b"0", b"rows": b"1", b"sum": b"8 bytes."}
warm = Path(sys.argv[1]).read_bytes()
decode_block({**fields, b"rows": b"3", b"body": warm}, ())
bomb = Path(sys.argv[2]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_block({**fields, b"body": bomb}, ())
except BlockError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.holds("Bounded")
def test_a_decompression_bomb_is_an_error_and_takes_no_memory(tmp_path: Path) -> None:
    small, bomb = tmp_path / "small", tmp_path / "bomb"
    small.write_bytes(body(table()))
    bomb.write_bytes(body(table((0,), texts=["\0" * 512 * MIB])))
    assert bomb.stat().st_size < 128 * 1024
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), small, bomb], capture_output=True, text=True, check=True
    )
    kib, _, message = done.stdout.partition(" ")
    assert "holds 536,87" in message
    assert int(kib) < 8 * 1024, f"{kib} KiB more"


def test_a_message_of_a_type_that_arrow_would_not_verify_is_not_read() -> None:
    packed = bytearray(body(table()))
    header_type = packed.index(b"\x01", 24)  # 1: a schema
    packed[header_type] = 110
    with pytest.raises(BlockError, match="begins with a message of type unknown"):
        decode_block(entry(bytes(packed), 3), ())


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_number_changed_anywhere_in_a_body_is_refused_or_harmless(compression: Literal["zstd"] | None) -> None:
    whole, refused = body(table(), compression), 0
    for at in range(0, len(whole) - 8, 8):
        number = int.from_bytes(whole[at : at + 8], "little")
        for changed in (number + 1, number - 1, number ^ 2**62):
            packed = (changed % 2**64).to_bytes(8, "little")
            try:
                decode_block(entry(whole[:at] + packed + whole[at + 8 :], rows=3), ())
            except BlockError:
                refused += 1
    assert refused > 100
