from __future__ import annotations

import random
from collections.abc import Mapping

import pyarrow as pa
import pytest

from embedstream.errors import BlockError
from embedstream.queue.blocks import (
    MAX_BODY_BYTES,
    Block,
    Entry,
    Refusal,
    block_schema,
    content_sum,
    decode_block,
    encode_block,
)
from embedstream.queue.packing import Packer

REFUSAL = Refusal(7, None, "empty", "text is empty: give it one", '{"text": ""}')


def make_block(keep: tuple[str, ...] = (), texts: tuple[str, ...] = ("one", "zwei ✓", "")) -> Block:
    packer = Packer(3, keep)
    for row, text in enumerate(texts):
        kept = tuple(None if row == 1 else f"{name}-{row}" for name in keep)
        assert packer.add(row, f"id-{row}", text, len(text.encode()), kept) is None
    packer.refuse(REFUSAL)
    packer.skip()
    block = packer.finish()
    assert block is not None
    return block


def stored(entry: Entry) -> dict[bytes, bytes]:
    """The fields as Redis gives them back."""
    return {
        key.encode(): value if isinstance(value, bytes) else str(value).encode()
        for key, value in entry.fields().items()
    }


@pytest.mark.parametrize("keep", [(), ("lang", "year")])
def test_a_block_comes_back_from_its_entry_as_it_was(keep: tuple[str, ...]) -> None:
    block = make_block(keep)
    entry = encode_block(block)
    back = decode_block(stored(entry), keep)
    assert back.rows.equals(block.rows)
    assert (back.part, back.number, back.sum) == (3, 0, block.sum)
    assert (back.refused, back.skipped, back.total) == ((REFUSAL,), 1, 4)
    if keep:
        assert back.rows.column("year").to_pylist() == ["year-0", None, "year-2"]


def test_an_entry_counts_its_rows_and_bytes() -> None:
    entry = encode_block(make_block())
    assert (entry.rows, entry.refused_rows, entry.skipped) == (3, 1, 1)
    assert entry.text_bytes == len("onezwei ✓".encode())
    assert entry.size == len(entry.body) + len(entry.refused)


def test_a_block_of_refusals_alone_comes_back() -> None:
    packer = Packer(0)
    packer.refuse(REFUSAL)
    block = packer.finish()
    assert block is not None
    back = decode_block(stored(encode_block(block)), ())
    assert (back.rows.num_rows, back.refused, back.total) == (0, (REFUSAL,), 1)


def test_texts_travel_compressed() -> None:
    block = make_block(texts=("the same words " * 500,) * 20)
    assert len(encode_block(block).body) < 10_000


def test_equal_rows_have_equal_sums() -> None:
    assert make_block(("a",)).sum == make_block(("a",)).sum


@pytest.mark.parametrize(
    "other",
    [
        make_block(texts=("one", "zwei", "")),
        make_block(texts=("on", "ezwei ✓", "")),
        make_block(texts=("one", "zwei ✓")),
        make_block(("a",)),
    ],
)
def test_other_rows_have_another_sum(other: Block) -> None:
    assert other.sum != make_block().sum


def test_refusals_and_skipped_rows_belong_to_the_sum() -> None:
    rows = make_block().rows
    sums = {content_sum(rows, refused, skipped) for refused in ((), (REFUSAL,)) for skipped in (0, 1)}
    assert len(sums) == 4


def changed(changes: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes | None] = {**stored(encode_block(make_block())), **changes}
    return {key: value for key, value in fields.items() if value is not None}


def ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def not_utf8() -> bytes:
    rows = make_block().rows
    columns = [pa.array([b"\xff\xfe", b"a", b"b"]).view(pa.string()) if f.name == "text" else rows.column(f.name)
               for f in rows.schema]  # fmt: skip
    return ipc(pa.Table.from_arrays(columns, schema=rows.schema))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({field: None}, "lacks a field") for field in (b"v", b"part", b"block", b"rows", b"sum", b"body")],
        ({b"part": b"first"}, "no number"),
        ({b"skipped": b"x"}, "no number"),
        ({b"v": b"2"}, "format version 2, this worker reads 1: upgrade"),
        ({b"part": b"-1"}, "out of bounds"),
        ({b"block": b"-1"}, "out of bounds"),
        ({b"rows": b"-1"}, "out of bounds"),
        ({b"skipped": b"-1"}, "out of bounds"),
        ({b"sum": b"short"}, "out of bounds"),
        ({b"body": bytes(MAX_BODY_BYTES + 1)}, "out of bounds"),
        ({b"body": b""}, "block 3:0 cannot be read"),
        ({b"body": b"no Arrow at all"}, "cannot be read"),
        ({b"body": encode_block(make_block()).body[:-200]}, "cannot be read"),
        ({b"body": ipc(block_schema(()).empty_table())}, "cannot be read"),
        ({b"body": not_utf8()}, "cannot be read"),
        ({b"refused": b"{"}, "cannot be read"),
        ({b"refused": b'[{"row": "x"}]'}, "cannot be read"),
        ({b"body": encode_block(make_block(("lang",))).body}, "has columns .*, not those of its job"),
        ({b"body": ipc(pa.table({"text": ["a", "b", "c"]}))}, "has columns"),
        ({b"rows": b"2"}, "says 2 rows and has 3"),
    ],
)
def test_an_entry_that_is_no_block_is_refused(changes: Mapping[bytes, bytes | None], message: str) -> None:
    with pytest.raises(BlockError, match=message):
        decode_block(changed(changes), ())


def test_damaged_bytes_are_refused_or_harmless_and_nothing_else() -> None:
    fields, dice = stored(encode_block(make_block(("lang",)))), random.Random(1)
    refused = 0
    for _ in range(2000):
        body = bytearray(fields[b"body"])
        for _ in range(dice.randint(1, 4)):
            body[dice.randrange(len(body))] = dice.randrange(256)
        try:
            decode_block({**fields, b"body": bytes(body)}, ("lang",))
        except BlockError:
            refused += 1
    assert refused > 200
