"""Writing one merged shard: the rows of its blocks are held once, and let go as they are written, by row groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.error_files import encode_errors
from embedstream.dataset.folder import BATCH_ROWS, FolderSink
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.parquet import ROW_GROUP_BYTES, Footer, encode_pieces
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.errors import OutputError
from embedstream.records import BlockRecord, BlockRuns, Manifest, ShardRecord, errors_file, part_file
from embedstream.server.connection import mask
from embedstream.settings import MIB

LEAST_HELD_BYTES = 256 * MIB
HELD_RATIO = 8
"""What a group's rows may take in memory: that, and so many times the bytes of their files. Vectors hardly shrink on
a disk, texts to a third or a tenth; a few kilobytes that become gigabytes are none that a worker wrote."""

Place = tuple[int, int]
"""Part and block."""


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of the dataset that become one shard."""

    name: str
    """Of the new shard; the same whoever writes it, and another for every manifest."""
    blocks: Mapping[str, BlockRuns]
    """By shard that holds them now."""


def write_group(
    sink: FolderSink, manifest: Manifest, group: Group, on_rows: Callable[[float], None] = lambda _: None
) -> ShardRecord:
    """Write the group's shard; doing it twice writes the same. Raises `OutputError`.

    `on_rows`: called with how many more rows are done with; one that is read and not yet written is a half.
    """
    listed = {shard.name: shard for shard in manifest.shards}
    room = _Room(LEAST_HELD_BYTES + HELD_RATIO * sum(listed[name].bytes for name in group.blocks), sink.output)
    data, errors = _Rows("rows", room, on_rows), _Rows("failed", room)
    blocks: list[BlockRecord] = []
    sources: list[ShardRecord] = []
    duplicates = reused = padded = 0
    for name, runs in group.blocks.items():
        source = sink.footer(part_file(name))[0].shard
        chosen = [block for block in source.blocks if _is_in(block, runs)]
        sources.append(source)
        blocks += chosen
        duplicates += _share(source.duplicates, source, chosen)
        reused += _share(source.reused, source, chosen)
        padded += _share(source.padded, source, chosen)
        data.read(sink.batches(part_file(name), None, BATCH_ROWS), source, runs)
        if listed[name].failed:
            errors.read(sink.errors(name), source, runs)
    if data.count != sum(block.rows for block in blocks):
        raise OutputError(f"{mask(sink.output)}: shards hold other rows than their footers say: run embed-verify")
    spec = manifest_spec(manifest)
    record = msgspec.structs.replace(
        sources[0],
        name=group.name,
        job=manifest.job,
        outputs=manifest.outputs,
        blocks=tuple(sorted(blocks, key=lambda block: (block.part, block.block))),
        rows=data.count,
        failed=errors.count,
        skipped=sum(block.skipped for block in blocks),
        truncated=data.sum("truncated"),
        duplicates=duplicates,
        reused=reused,
        tokens=data.sum("n_tokens"),
        padded=padded,
        dtype="+".join(sorted({source.dtype for source in sources})),
        engine="+".join(sorted({source.engine for source in sources})),
        worker="",
        bytes=0,
        sha256="",
        errors_sha256="",
    )
    if errors.count:
        table = pa.Table.from_batches([piece for some in errors.groups() for piece in some], errors_schema())
        _, sha256 = sink.files.write(errors_file(group.name), [encode_errors(table)])
        record = msgspec.structs.replace(record, errors_sha256=sha256)
    footer = Footer(shard=record, spec=msgspec.Raw(spec.encode()))
    schema = dataset_schema(spec, manifest.outputs)
    tables = (pa.Table.from_batches(each, schema) for each in data.groups())
    size, sha256 = sink.files.write(part_file(group.name), encode_pieces(tables, schema, footer))
    return msgspec.structs.replace(record, bytes=size, sha256=sha256)


class _Room:
    """What the rows of a group may take in memory."""

    def __init__(self, most: int, output: str) -> None:
        self._most = self._left = most
        self._output = output

    def take(self, size: int) -> None:
        """Raises `OutputError` when there is no more."""
        self._left -= size
        if self._left < 0:
            raise OutputError(
                f"{mask(self._output)}: the rows of one merged shard have more than {self._most:,} bytes once "
                f"decompressed: leave this dataset as it is, or merge into smaller shards (--shard-mib)"
            )


class _Rows:
    """The rows or error rows of some blocks, read shard by shard, to be written in the order of the corpus."""

    def __init__(self, counted_as: str, room: _Room, on_rows: Callable[[float], None] = lambda _: None) -> None:
        self._counted_as = counted_as
        self._on_rows = on_rows
        self._room = room
        self._pieces: dict[Place, list[pa.RecordBatch]] = defaultdict(list)
        self.count = 0

    def read(self, batches: Iterable[pa.RecordBatch], source: ShardRecord, runs: BlockRuns) -> None:
        """Take those blocks' rows out of a shard's: they lie in the order of its blocks, as many of each as it says."""
        spans: list[tuple[Place, int, int]] = []
        at = 0
        for block in sorted(source.blocks, key=lambda block: (block.part, block.block)):
            size = getattr(block, self._counted_as)
            if _is_in(block, runs) and size:
                spans.append(((block.part, block.block), at, at + size))
            at += size
        start = 0
        for batch in batches:
            end = start + batch.num_rows
            cuts = [
                (place, max(first, start) - start, min(last, end) - start)
                for place, first, last in spans
                if first < end and last > start
            ]
            self._take(batch, cuts)
            start = end

    def _take(self, batch: pa.RecordBatch, cuts: list[tuple[Place, int, int]]) -> None:
        wanted = sum(high - low for _, low, high in cuts)
        if wanted < batch.num_rows:
            # A copy, so that the rest of the batch is not held with it: a shard may have few rows of many groups.
            batch = batch.take(pa.array([row for _, low, high in cuts for row in range(low, high)], pa.int64()))
        self._room.take(batch.nbytes if wanted else 0)
        at = 0
        for place, low, high in cuts:
            self._pieces[place].append(batch.slice(at, high - low))
            at += high - low
        self.count += wanted
        self._on_rows(wanted / 2)

    def sum(self, column: str) -> int:
        """Over all rows."""
        return sum(pc.sum(piece.column(column)).as_py() for pieces in self._pieces.values() for piece in pieces)

    def groups(self) -> Iterator[list[pa.RecordBatch]]:
        """All of them once, a row group at a time."""
        group: list[pa.RecordBatch] = []
        size = 0
        for place in sorted(self._pieces):
            for piece in self._pieces.pop(place):
                group.append(piece)
                size += piece.nbytes
                self._on_rows(piece.num_rows / 2)
            if size >= ROW_GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def _is_in(block: BlockRecord, runs: BlockRuns) -> bool:
    return any(run.part == block.part and run.first <= block.block <= run.last for run in runs)


def _share(whole: int, source: ShardRecord, chosen: Sequence[BlockRecord]) -> int:
    """What of a shard's sum counts for some of its blocks; the shares of all of them add up to the whole."""
    count, wanted = len(source.blocks), set(chosen)
    ends = [whole * at // count for at in range(count + 1)]
    return sum(ends[at + 1] - ends[at] for at, block in enumerate(source.blocks) if block in wanted)
