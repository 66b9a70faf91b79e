"""Where vectors go: one small interface, and the choice of sink by the scheme of the output."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import pyarrow as pa

from embedstream.dataset.address import SCHEMES, parse_address
from embedstream.dataset.schema import ErrorRow
from embedstream.errors import UsageError
from embedstream.jobs import JobSpec
from embedstream.objects import is_object, parse_object

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
    """`X` of `part-X.parquet` and `errors-X.parquet`; unique for ever."""
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


class Sink(Protocol):
    """One output. Every call may be repeated: writing the same thing twice is harmless."""

    output: str
    """Its canonical address, as in `JobSpec.output`."""

    def check(self) -> None:
        """Make the output ready and prove that it can be written. Raises `OutputError`."""

    def write_shard(self, content: ShardContent) -> ShardRecord:
        """Make a shard durable; returns its record with `bytes` and `checksum`. Raises `OutputError`."""

    def discard_shard(self, name: str) -> None:
        """Remove a shard that was refused whole (sinks without files keep it: its rows are overwritten)."""

    def find_shards(self, known: Container[str] = ()) -> Iterator[ShardRecord]:
        """This job's whole shards that lie in the output, listed or not, in name order (none for sinks without files),
        but for those `known` by name, which need not be read.

        Raises:
            SpecDiffers: rows of a job with another spec lie there.
        """

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of some shards whose files are not there (none for sinks without files). Raises `OutputError`."""

    def read_manifest(self) -> Manifest | None:
        """The manifest, if one was ever written."""

    def finalize(self, manifest: Manifest) -> None:
        """Write the errors of the manifest's shards, and the manifest, atomically."""

    def mend(self, manifest: Manifest) -> None:
        """Make good what a finalizer that died may have left undone after the manifest. Raises `OutputError`."""

    def block_sums(self) -> dict[tuple[int, int], str]:
        """What is known of the content of the manifest's blocks: `BlockRecord.sum` by part and block."""

    def keep_errors(self, manifest: Manifest, retried: Sequence[ShardRecord]) -> list[ManifestShard]:
        """Put those error rows of the manifest's shards that are not in `retried` into shards of their own.

        Raises:
            OutputError: they cannot be read or written, or are not as many as the manifest says.
        """

    def read(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The dataset's rows, shard by shard, in no promised order."""

    def read_errors(self) -> Iterator[ErrorRow]:
        """The rows that failed, as people read them, in the order of the corpus."""

    def describe(self) -> str:
        """One line of advice: how to read the vectors."""


def canonical_output(text: str) -> str:
    """The one spelling of an output, as in `JobSpec.output`: an absolute folder path, an S3 or a Redis URL.

    `s3://bucket/prefix`, for other stores than AWS' own `s3://bucket/prefix?endpoint_override=host:port&scheme=http`.
    `redis://host:port/db?prefix=docs:&ttl=86400` (also `rediss://`, `unix:///socket?db=0&prefix=docs:`), or
    `redis:?prefix=docs:` for the server that holds the queue. `ttl` is in seconds.

    Raises:
        UsageError: an unknown scheme, or a Redis URL that lacks its prefix or says something unknown.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//)|(redis):", text)
    if scheme is None:
        return _absolute(text)
    if is_object(text):
        return parse_object(text, "output").url
    if scheme[0].rstrip(":").lower() not in SCHEMES:
        raise UsageError(
            f"output {scheme[0]}//…: unknown scheme: give a folder, s3://bucket/prefix, or "
            f"redis://host:6379/0?prefix=docs: (-o)"
        )
    return parse_address(text).url


def open_sink(
    output: str, spec: JobSpec | None = None, queue_url: str | None = None, roots: Sequence[str] = ()
) -> Sink:
    """The sink of an output; nothing is touched before its first call.

    A folder is written below `roots` alone if there are any, whatever is swapped for a link there meanwhile.

    `spec` is needed for writing; without it a dataset that has its manifest can be read. `queue_url` is the server that
    `redis:?prefix=...` means.

    Raises:
        UsageError: as `canonical_output`; or no queue's server is known; or the job cannot be written there.
    """
    from embedstream.dataset.folder import FolderSink
    from embedstream.dataset.hashes import RedisSink

    canonical = canonical_output(output)
    if canonical.startswith("/") or is_object(canonical):
        return FolderSink(canonical, spec, roots)
    address = parse_address(canonical)
    server = address.server or queue_url
    if server is None:
        raise UsageError(f"output {output} means the queue's own server, and there is none: give --redis")
    return RedisSink(address, server, spec)


def _absolute(text: str) -> str:
    """Absolute and normalized. Links stay as they are named, save those that a `..` climbs out of."""
    if not text or "\0" in text:
        raise UsageError("the output is empty: give a folder, an S3 or a Redis URL (-o)")
    path = Path.cwd() / text
    if ".." in path.parts:
        climb = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:climb])), *path.parts[climb:])
    return os.path.normpath(path)
