"""What is recorded of shards and datasets: in footers, in Redis, in manifests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pyarrow as pa

ShardName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z_-]{1,64}\Z")]
"""Names become file names, wherever records and manifests come from."""


class BlockRecord(msgspec.Struct, frozen=True):
    """One block as a shard holds it."""

    part: int
    block: int
    rows: int
    """Rows written."""
    failed: int
    """Error rows: refused by the producer, or failed in the worker."""
    skipped: int
    sum: str
    """`Block.sum()` in hex."""


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard holds: written into its footer, committed to Redis, listed by the manifest."""

    name: ShardName
    """`X` of `part-X.parquet` and `_errors-X.arrow`; unique for ever."""
    job: str
    space: str
    blocks: tuple[BlockRecord, ...]
    rows: int
    failed: int
    skipped: int
    truncated: int
    tokens: int
    padded: int
    """Tokens that the model computed, padding included."""
    dim: int
    dtype: str
    """Precision of the computation: float32, bfloat16."""
    normalized: bool
    engine: str
    worker: str
    prompt: str = ""
    """What entered the model in front of every text; `input_hash` is over both."""
    bytes: int = 0
    """Size of the data file; 0 until it is written."""
    checksum: str = ""
    """`sha256:<hex>` of the data file; empty until it is written, and for sinks without files."""
    errors_checksum: str = ""
    """The same of the file of error rows; empty if no row failed."""


@dataclass(frozen=True)
class ShardContent:
    """What a worker hands to a sink: rows in dataset schema, error rows in errors schema (see `schema`), any order."""

    record: ShardRecord
    data: pa.Table
    errors: pa.Table


BlockRuns = tuple[tuple[int, int, int], ...]
"""Consecutive blocks: (part, first, last)."""

NO_BLOCKS = msgspec.Raw(b"[]")


class ManifestShard(msgspec.Struct, frozen=True):
    """A shard as the manifest lists it. Its blocks stay JSON in memory: as tuples they take ten times as much, and a
    billion chunks have millions of them."""

    name: ShardName
    rows: int
    failed: int
    bytes: int
    checksum: str
    dtype: str
    runs: msgspec.Raw = msgspec.field(name="blocks")
    """`BlockRuns` as compact JSON."""
    errors_checksum: str = ""
    """Of the file of error rows; empty if there is none."""

    @property
    def blocks(self) -> BlockRuns:
        """Decoded at each look."""
        return msgspec.json.decode(self.runs, type=BlockRuns)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What readers trust. A file that it does not list does not exist for them."""

    v: int
    job: str
    state: str
    """completed, failed or cancelled; the last two may be partial."""
    partial: bool
    """Whether blocks are missing."""
    spec: msgspec.Raw
    """The `JobSpec`, without credentials in its output."""
    space: str
    prompt: str = ""
    """What entered the model in front of every text; part of the space."""
    outputs: tuple[ManifestOutput, ...]
    parts: tuple[ManifestPart, ...]
    rows: int
    failed: int
    skipped: int
    truncated: int
    tokens: int
    padded: int
    created: float
    ended: float
    """Unix seconds, by the Redis server's clock."""
    engines: tuple[str, ...]
    shards: tuple[ManifestShard, ...]
    retries: tuple[str, ...] = ()
    """Jobs over failed rows whose shards, listed without blocks, were added; the times are of the job over all rows."""


class ManifestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One vector column, resolved: what the model really gave."""

    name: str
    kind: str
    dtype: str
    dim: int
    normalized: bool


class ManifestPart(msgspec.Struct, frozen=True):
    """One input."""

    source: str
    blocks: int
    """Blocks in the part; -1 if the job ended before that was known."""
    rows: int
    failed: int
