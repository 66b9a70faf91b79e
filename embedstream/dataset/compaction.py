"""Merging the small shards of a finished dataset into few large ones, ordered by part and row.

Groups of blocks are cut from the manifest alone, so that everybody cuts the same ones; each becomes one new shard, and
all of them may be written at the same time. Until the new manifest takes the place of the old one, at once, the old one
is true; what the new one does not list is removed after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from embedstream.connection import mask
from embedstream.dataset.folder import BATCH_ROWS, FolderSink, errors_file, part_file
from embedstream.dataset.manifest import list_shard, manifest_digest, manifest_spec
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.sink import BlockRecord, Manifest, ManifestShard, ShardContent, ShardRecord, open_sink
from embedstream.errors import OutputError, UsageError
from embedstream.jobs import JobState
from embedstream.roots import is_redis

TARGET_BYTES = 192 * 1024 * 1024
"""Of a merged shard: large enough for readers, small enough to be held in memory while it is written."""

MOST_SHARE = 0.7
"""Of the number of shards that may be left, for merging to be worth it: what is merged is not merged again."""


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of the dataset that become one shard."""

    name: str
    """Of the new shard; the same whoever writes it, and another for every manifest."""
    blocks: Mapping[str, tuple[tuple[int, int, int], ...]]
    """By shard that holds them now, as runs: (part, first, last)."""


def plan_groups(manifest: Manifest, target_bytes: int = TARGET_BYTES) -> tuple[Group, ...]:
    """How the manifest's shards are merged; a shard that would become itself again is in no group. Pure.

    Shards without blocks (of rows that were run again) stay as they are. No groups if shards would hardly become fewer.
    """
    runs = sorted(
        (run, shard.name, shard.bytes / sum(last - first + 1 for _, first, last in shard.blocks))
        for shard in manifest.shards
        for run in shard.blocks
    )
    cut: list[dict[str, list[tuple[int, int, int]]]] = []
    room = 0.0
    for (part, first, last), name, block_bytes in runs:
        while first <= last:
            if room <= 0 or not cut:
                cut.append(defaultdict(list))
                room = float(target_bytes)
            fit = max(1, min(last - first + 1, int(room / max(block_bytes, 1e-9))))
            cut[-1][name].append((part, first, first + fit - 1))
            room -= fit * block_bytes
            if first + fit <= last:
                room = 0.0
            first += fit
    if len(cut) > MOST_SHARE * sum(bool(shard.blocks) for shard in manifest.shards):
        return ()
    whole = {shard.name: shard.blocks for shard in manifest.shards}
    prefix = f"c{manifest_digest(manifest)}"
    return tuple(
        Group(f"{prefix}-{number}", {name: tuple(found) for name, found in blocks.items()})
        for number, blocks in enumerate(cut)
        if any(len(blocks) > 1 or tuple(found) != whole[name] for name, found in blocks.items())
    )


def open_finished(output: str) -> tuple[FolderSink, Manifest]:
    """A dataset that can be compacted.

    Raises:
        UsageError: it is not in files.
        OutputError: it is not finished, or cannot be read.
    """
    if is_redis(output):
        raise UsageError(f"{mask(output)}: an output in Redis has no shards to merge")
    manifest = open_sink(output).read_manifest()
    if manifest is None or manifest.state != JobState.COMPLETED:
        raise OutputError(f"{mask(output)}: no finished dataset, so there is nothing to merge: wait for its job")
    sink = open_sink(output, msgspec.structs.replace(manifest_spec(manifest), output=output))
    assert isinstance(sink, FolderSink), "an output in files"
    return sink, manifest


def write_group(sink: FolderSink, manifest: Manifest, group: Group) -> ShardRecord:
    """Write the group's shard; doing it twice writes the same. Raises `OutputError`."""
    listed = {shard.name: shard for shard in manifest.shards}
    rows: list[pa.RecordBatch] = []
    errors: list[pa.RecordBatch] = []
    blocks: list[BlockRecord] = []
    sources: list[ShardRecord] = []
    padded = 0
    for name, runs in group.blocks.items():
        source = sink.footer(part_file(name))[0].shard
        chosen = [block for block in source.blocks if _is_in(block, runs)]
        sources.append(source)
        blocks += chosen
        padded += _share(source, chosen)
        rows += _of_blocks(sink, part_file(name), source, runs, "rows")
        if listed[name].failed:
            errors += _of_blocks(sink, errors_file(name), source, runs, "failed")
    data = pa.Table.from_batches(
        rows, dataset_schema(manifest_spec(manifest), {manifest.outputs[0].name: sources[0].dim})
    )
    failed = pa.Table.from_batches(errors, errors_schema())
    if data.num_rows != sum(block.rows for block in blocks):
        raise OutputError(f"{mask(sink.output)}: shards hold other rows than their footers say: run embed-verify")
    record = msgspec.structs.replace(
        sources[0],
        name=group.name,
        job=manifest.job,
        blocks=tuple(sorted(blocks, key=lambda block: (block.part, block.block))),
        rows=data.num_rows,
        failed=failed.num_rows,
        skipped=sum(block.skipped for block in blocks),
        truncated=_sum(data, "truncated"),
        tokens=_sum(data, "n_tokens"),
        padded=padded,
        dtype="+".join(sorted({source.dtype for source in sources})),
        engine="+".join(sorted({source.engine for source in sources})),
        worker="",
        bytes=0,
        checksum="",
        errors_checksum="",
    )
    return sink.write_shard(ShardContent(record, data, failed))


def replace_manifest(
    sink: FolderSink, manifest: Manifest, groups: Sequence[Group], written: Sequence[ShardRecord]
) -> Manifest:
    """Write the manifest that lists the new shards in place of those they were made of.

    Raises:
        OutputError: the shards do not add up, or another manifest was written meanwhile; nothing has changed then.
    """
    standing = sink.read_manifest()
    if standing is None or manifest_digest(standing) != manifest_digest(manifest):
        raise OutputError(f"{mask(sink.output)}: another run wrote a manifest meanwhile: run the same command again")
    merged = {name for group in groups for name in group.blocks}
    kept = [shard for shard in manifest.shards if shard.name not in merged]
    added = [list_shard(record) for record in sorted(written, key=_first_block)]
    if _counts([*kept, *added]) != _counts(manifest.shards):
        raise OutputError(f"{mask(sink.output)}: merged shards do not add up to what they were made of")
    new = msgspec.structs.replace(manifest, shards=(*added, *kept))
    sink.finalize(new)
    return new


def remove_unlisted(sink: FolderSink, manifest: Manifest) -> int:
    """Remove shards of the dataset's jobs that its manifest does not list; returns how many. Raises `OutputError`."""
    listed = {part_file(shard.name) for shard in manifest.shards}
    jobs = {manifest.job, *manifest.retries}
    names = []
    for file in sink.files.names():
        if file.startswith("part-") and file.endswith(".parquet") and file not in listed:
            shard = sink.footer(file)[0].shard
            if shard.job in jobs and part_file(shard.name) == file:
                names.append(shard.name)
    if names:
        sink.files.remove([each for name in names for each in (part_file(name), errors_file(name))])
    return len(names)


def compact(output: str, target_bytes: int = TARGET_BYTES) -> tuple[int, int]:
    """All of it, here and now; returns how many shards there were, and how many there are. Raises as the steps do."""
    sink, manifest = open_finished(output)
    before = len(manifest.shards)
    groups = plan_groups(manifest, target_bytes)
    if groups:
        manifest = replace_manifest(sink, manifest, groups, [write_group(sink, manifest, each) for each in groups])
    remove_unlisted(sink, manifest)
    return before, len(manifest.shards)


def _is_in(block: BlockRecord, runs: Sequence[tuple[int, int, int]]) -> bool:
    return any(part == block.part and first <= block.block <= last for part, first, last in runs)


def _of_blocks(
    sink: FolderSink, file: str, source: ShardRecord, runs: Sequence[tuple[int, int, int]], count: str
) -> Iterator[pa.RecordBatch]:
    """The rows of some blocks: a shard's rows lie in the order of its blocks, as many of each as its footer says."""
    spans: list[tuple[int, int]] = []
    at = 0
    for block in sorted(source.blocks, key=lambda block: (block.part, block.block)):
        size = getattr(block, count)
        if _is_in(block, runs) and size:
            if spans and spans[-1][1] == at:
                spans[-1] = (spans[-1][0], at + size)
            else:
                spans.append((at, at + size))
        at += size
    start = 0
    for batch in sink.batches(file, None, BATCH_ROWS):
        end = start + batch.num_rows
        for first, last in spans:
            low, high = max(first, start), min(last, end)
            if low < high:
                yield batch.slice(low - start, high - low)
        start = end


def _share(source: ShardRecord, chosen: Sequence[BlockRecord]) -> int:
    """A shard's padded tokens for some of its blocks; the shares of all of them add up to the whole."""
    count, wanted = len(source.blocks), set(chosen)
    ends = [source.padded * at // count for at in range(count + 1)]
    return sum(ends[at + 1] - ends[at] for at, block in enumerate(source.blocks) if block in wanted)


def _first_block(record: ShardRecord) -> tuple[int, int]:
    return record.blocks[0].part, record.blocks[0].block


def _sum(table: pa.Table, column: str) -> int:
    return sum(int(chunk.to_numpy(zero_copy_only=False).sum()) for chunk in table.column(column).chunks)


def _counts(shards: Sequence[ManifestShard]) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows, error rows, and all blocks."""
    blocks = sorted((p, b) for shard in shards for p, first, last in shard.blocks for b in range(first, last + 1))
    return sum(shard.rows for shard in shards), sum(shard.failed for shard in shards), blocks
