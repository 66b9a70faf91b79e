"""The sample blocks of `docs/protocol.md`, read and summed by what that page says."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import sample_blocks

from embedstream.queue.blocks import decode_block, encode_block

NAMES = sorted(sample_blocks.BLOCKS)
PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def described(name: str) -> Any:
    return json.loads((sample_blocks.FOLDER / f"{name}.json").read_text("utf-8"))


def compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def entry_of(name: str) -> dict[bytes, bytes]:
    """The stream entry as Redis gives it back."""
    entry = described(name)["entry"]
    fields = {key.encode(): str(value).encode() for key, value in entry.items()}
    fields[b"sum"] = bytes.fromhex(entry["sum"])
    fields[b"body"] = (sample_blocks.FOLDER / f"{name}.arrow").read_bytes()
    if "refused" in entry:
        fields[b"refused"] = compact(entry["refused"])
    return fields


@pytest.mark.parametrize("name", NAMES)
def test_any_reader_of_arrow_finds_the_rows_of_a_sample(name: str) -> None:
    with pa.ipc.open_stream(entry_of(name)[b"body"]) as reader:
        assert reader.read_all().to_pylist() == described(name)["rows"]


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_takes_a_sample_as_it_is_described(name: str) -> None:
    sample = described(name)
    block = decode_block(entry_of(name), tuple(sample["keep"]))
    assert sample_blocks.described(block, tuple(sample["keep"])) == sample


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_a_worker_takes_a_body_however_it_is_compressed(compression: Literal["lz4", "zstd"] | None) -> None:
    fields = entry_of("plain")
    with pa.ipc.open_stream(fields[b"body"]) as reader:
        rows = reader.read_next_batch()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(rows)
    assert decode_block({**fields, b"body": sink.getvalue().to_pybytes()}, ()).rows.equals(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_producer_still_makes_each_sample(name: str) -> None:
    block = sample_blocks.BLOCKS[name]()
    assert sample_blocks.described(block, sample_blocks.KEEP[name]) == described(name)
    assert encode_block(block).refused == entry_of(name).get(b"refused", b"")


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_a_sample_is_what_the_page_says(name: str) -> None:
    sample = described(name)
    digest = hashlib.blake2b(digest_size=8)
    for column in ("row", "id", "chunk", "text", "start", "end", "text_pair", *sample["keep"]):
        values = [row[column] for row in sample["rows"]]
        digest.update(_bitmap(values))
        if column in ("row", "start", "end"):
            digest.update(struct.pack(f"<{len(values)}q", *(value or 0 for value in values)))
        elif column == "chunk":
            digest.update(struct.pack(f"<{len(values)}i", *values))
        else:
            digest.update(_strings(values))
            digest.update(bytes(4 * (len(values) + 1)) if column == "text_pair" else b"")
    digest.update(compact(sample["entry"]["refused"]) if "refused" in sample["entry"] else b"")
    digest.update(str(sample["entry"].get("skipped", 0)).encode())
    assert digest.hexdigest() == sample["entry"]["sum"]


def test_the_page_lists_the_samples() -> None:
    page = PAGE.read_text("utf-8")
    assert all(f"| `{name}` |" in page for name in NAMES)
    assert {path.stem for path in sample_blocks.FOLDER.iterdir()} == set(NAMES)


def _bitmap(values: Sequence[object]) -> bytes:
    if None not in values:
        return b"\0"
    bits = sum(1 << at for at, value in enumerate(values) if value is not None)
    return bits.to_bytes((len(values) + 7) // 8, "little")


def _strings(values: Sequence[str | None]) -> bytes:
    encoded = [(value or "").encode() for value in values]
    offsets = [sum(map(len, encoded[:at])) for at in range(len(encoded) + 1)]
    return struct.pack(f"<{len(offsets)}i", *offsets) + b"".join(encoded)
