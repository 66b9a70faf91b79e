"""Merging the small shards of a finished dataset into few large ones, ordered by part and row.

Groups of blocks are cut from the manifest alone, so that everybody cuts the same ones; each becomes one new shard, and
all of them may be written at the same time. Until the new manifest takes the place of the old one, at once, the old one
is true; what the new one does not list is removed after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import list_shard, manifest_digest, manifest_spec
from embedstream.dataset.roots import is_redis
from embedstream.dataset.sinks import open_sink
from embedstream.errors import OutputError, UsageError
from embedstream.jobs import JobState
from embedstream.lifecycle.opening import no_dataset
from embedstream.records import BlockRun, Manifest, ManifestShard, ShardRecord, errors_file, part_file
from embedstream.server.connection import mask
from embedstream_coordinator.merging import Group, write_group
from embedstream_producer.progress import WorkProgress

TARGET_BYTES = 192 * 1024 * 1024
"""Of a merged shard: large enough for readers, small enough to be held in memory while it is written."""

MOST_SHARE = 0.7
"""Of the number of shards that may be left, for merging to be worth it: what is merged is not merged again."""


def plan_groups(manifest: Manifest, target_bytes: int = TARGET_BYTES) -> tuple[Group, ...]:
    """How the manifest's shards are merged; a shard that would become itself again is in no group. Pure.

    Shards without blocks (of rows that were run again) stay as they are. No groups if shards would hardly become fewer.
    """
    runs = sorted(
        (run, shard.name, shard.bytes / sum(run.last - run.first + 1 for run in shard.blocks))
        for shard in manifest.shards
        for run in shard.blocks
    )
    cut: list[dict[str, list[BlockRun]]] = []
    room = 0.0
    for run, name, block_bytes in runs:
        first, last = run.first, run.last
        while first <= last:
            if room <= 0 or not cut:
                cut.append(defaultdict(list))
                room = float(target_bytes)
            fit = max(1, min(last - first + 1, int(room / max(block_bytes, 1e-9))))
            cut[-1][name].append(BlockRun(run.part, first, first + fit - 1))
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


def open_finished(output: str, roots: Sequence[str] = ()) -> tuple[FolderSink, Manifest]:
    """A dataset that can be compacted, written below `roots` alone if there are any.

    Raises:
        UsageError: it is not in files.
        OutputError: it is not finished, or cannot be read.
    """
    if is_redis(output):
        raise UsageError(f"{mask(output)}: an output in Redis has no shards to merge")
    manifest = open_sink(output, roots=roots).read_manifest()
    if manifest is None:
        raise no_dataset(output)
    if manifest.state != JobState.COMPLETED:
        raise OutputError(
            f"{mask(output)}: its job is {manifest.state}, and only a completed dataset can be compacted: "
            f"run the same embed-submit again"
        )
    sink = open_sink(output, msgspec.structs.replace(manifest_spec(manifest), output=output), roots=roots)
    assert isinstance(sink, FolderSink), "an output in files"
    return sink, manifest


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
    jobs = {manifest.job, *manifest.retries}
    names = [footer.shard.name for footer in sink.unlisted(manifest) if footer.shard.job in jobs]
    if names:
        sink.files.remove([each for name in names for each in (part_file(name), errors_file(name))])
    return len(names)


def compact(output: str, target_bytes: int = TARGET_BYTES, progress: WorkProgress | None = None) -> tuple[int, int]:
    """All of it, here and now; returns how many shards there were, and how many there are. Raises as the steps do."""
    sink, manifest = open_finished(output)
    before = len(manifest.shards)
    groups = plan_groups(manifest, target_bytes)
    if groups:
        merged = {name for group in groups for name in group.blocks}
        progress = progress or WorkProgress(quiet=True)
        progress.begin("merging", sum(shard.rows for shard in manifest.shards if shard.name in merged))
        written = [write_group(sink, manifest, each, progress.advance) for each in groups]
        manifest = replace_manifest(sink, manifest, groups, written)
    remove_unlisted(sink, manifest)
    return before, len(manifest.shards)


def _first_block(record: ShardRecord) -> tuple[int, int]:
    return record.blocks[0].part, record.blocks[0].block


def _counts(shards: Sequence[ManifestShard]) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows, error rows, and all blocks."""
    runs = [run for shard in shards for run in shard.blocks]
    blocks = sorted((run.part, block) for run in runs for block in range(run.first, run.last + 1))
    return sum(shard.rows for shard in shards), sum(shard.failed for shard in shards), blocks
