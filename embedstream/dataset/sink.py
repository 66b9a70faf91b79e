"""Where vectors go: one small interface. `sinks` chooses one by its address."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from embedstream.dataset.schema import ErrorRow
from embedstream.records import Manifest, ManifestShard, ShardContent, ShardRecord


class Sink(Protocol):
    """One output. Every call may be repeated: writing the same thing twice is harmless."""

    output: str
    """Its canonical address, as in `JobSpec.output`."""

    def check(self) -> None:
        """Make the output ready and prove that it can be written. Raises `OutputError`."""

    def write_shard(self, content: ShardContent) -> ShardRecord:
        """Make a shard durable; returns its record with `bytes` and `sha256`. Raises `OutputError`."""

    def discard_shard(self, name: str) -> None:
        """Remove a shard that was refused whole (sinks without files keep it: its rows are overwritten)."""

    def find_shards(self, known: Container[str] = ()) -> Iterator[ShardRecord]:
        """This job's whole shards that lie in the output, listed or not, in name order, but for those `known` by name,
        which need not be read.

        Raises:
            SpecDiffers: rows of a job with another spec lie there.
        """

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
