"""How shards are laid out in Parquet, and what their footers say."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.errors import OutputError, UsageError
from embedstream.jobs import FORMAT_VERSION, JobSpec, decode_spec, refuse_other_version
from embedstream.records import ShardRecord

FOOTER_KEY = "embedstream"
"""Key of the file's own metadata under which a shard says what it is."""

ROW_GROUP_BYTES = 100 * 1000 * 1000
"""Readers hold a row group at once; smaller ones cost size and speed."""

COMPRESSION_LEVEL = 1
"""zstd-3 is slower on vectors and no smaller."""


class Footer(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard file says of itself."""

    v: int = FORMAT_VERSION
    shard: ShardRecord
    """`bytes` and `sha256` are empty here: a file cannot hold its own hash."""
    spec: msgspec.Raw
    """The `JobSpec`."""

    def job_spec(self) -> JobSpec:
        return decode_spec(bytes(self.spec))


def encode_data(data: pa.Table, footer: Footer) -> pa.Buffer:
    """Rows in dataset schema as a Parquet file."""
    group_rows = max(1, int(ROW_GROUP_BYTES / max(1.0, data.nbytes / max(1, data.num_rows))))
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, data.schema, **_layout(data.schema)) as writer:
        writer.write_table(data, row_group_size=group_rows)
        writer.add_key_value_metadata({FOOTER_KEY: msgspec.json.encode(footer).decode()})
    return stream.getvalue()


def encode_pieces(groups: Iterable[pa.Table], schema: pa.Schema, footer: Footer) -> Iterator[bytes]:
    """The same in pieces; each of `groups` becomes a row group, and is held no longer than that takes."""
    pieces = _Pieces()
    with pq.ParquetWriter(pa.PythonFile(pieces, "w"), schema, **_layout(schema)) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            yield from pieces.take()
        writer.add_key_value_metadata({FOOTER_KEY: msgspec.json.encode(footer).decode()})
    yield from pieces.take()


def _layout(schema: pa.Schema) -> dict[str, Any]:
    """Options of a `ParquetWriter`. Vectors: no dictionary, and for float32 BYTE_STREAM_SPLIT (floats repeat in their
    high bytes, never whole); DuckDB does not read it for float16, and int8 is larger by it. Kept fields: a dictionary,
    as they often repeat. No statistics and no compression where values are as good as random.
    """
    types = {field.name: field.type for field in schema if pa.types.is_fixed_size_list(field.type)}
    vectors = list(types)
    leaves = [f"{name}.list.element" for name in vectors]
    split = [leaf for leaf, type in zip(leaves, types.values(), strict=True) if pa.types.is_float32(type.value_type)]
    random = {*vectors, "input_hash"}
    fixed = {"part", "row", "id", "chunk", "start", "end", "text", "n_tokens", "truncated"}
    zstd = [name for name in schema.names if name not in random] + leaves
    return {
        "use_dictionary": [name for name in schema.names if name not in fixed | random] + ["part", "chunk"],
        "use_byte_stream_split": split,
        "compression": {**dict.fromkeys(zstd, "zstd"), "input_hash": "none"},
        "compression_level": dict.fromkeys(zstd, COMPRESSION_LEVEL),
        "write_statistics": [name for name in schema.names if name not in random | {"text"}],
        "write_page_index": True,
    }


class _Pieces(io.RawIOBase):
    """A file that hands on what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces


def read_footer(file: pa.NativeFile, path: str) -> tuple[Footer, int]:
    """What a shard file says of itself, and how many rows it has. `path` names it in messages.

    Raises:
        OutputError: it is torn, or no shard of this version.
    """
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise OutputError(f"{path}: not a whole Parquet file ({error})") from error
    raw = (metadata.metadata or {}).get(FOOTER_KEY.encode())
    if raw is None:
        raise OutputError(f"{path}: a Parquet file, but not a shard of a dataset")
    refuse_other_version(raw, f"{path}: the shard", OutputError)
    try:
        footer = msgspec.json.decode(raw, type=Footer)
        footer.job_spec()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise OutputError(f"{path}: its footer cannot be read ({error})") from error
    return footer, metadata.num_rows
