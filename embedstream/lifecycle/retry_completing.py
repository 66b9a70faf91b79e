"""The end of a job over failed rows: its shards are added to the manifest of the dataset.

Until the new manifest takes the place of the old one, at once, the old one is true: a failed row is an error. From then
on the row is in the dataset, or an error by its newest message. No shard is touched: what is left of older errors goes
into new shards, and the older ones are listed without theirs, whose files are removed last.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from embedstream.dataset.manifest import in_order, list_shard, manifest_digest
from embedstream.dataset.sink import Sink
from embedstream.errors import OutputError
from embedstream.jobs import JobState, JobStatus
from embedstream.records import NO_BLOCKS, Manifest, ManifestShard, ShardRecord


def finalize_retry(sink: Sink, status: JobStatus, shards: Sequence[ShardRecord]) -> Manifest | None:
    """Add a job's committed shards to the dataset; returns the new manifest. Doing it twice is harmless.

    None, with nothing written, if the manifest there is another than the one that the job began with.

    Raises:
        OutputError: the shards do not fit the dataset, or it cannot be written.
    """
    manifest, retry = sink.read_manifest(), status.spec.retry
    if manifest is None or retry is None:
        return None
    if status.job not in manifest.retries:
        if manifest_digest(manifest) != retry.manifest:
            return None
        for shard in shards:
            if shard.space != manifest.space:
                raise OutputError(
                    f"job {status.job}: shard {shard.name} is of space {shard.space}, not {manifest.space}"
                )
            if not shard.has(manifest.rows, manifest.outputs):
                raise OutputError(f"job {status.job}: shard {shard.name} has other columns than the dataset")
        try:
            kept = sink.keep_errors(manifest, shards) if shards else []
        except OutputError:
            standing = sink.read_manifest()
            if standing is None or status.job not in standing.retries:
                raise
            manifest = standing  # somebody else was faster, and has removed the older error rows
        else:
            manifest = merged(manifest, status.job, shards, kept)
    sink.finalize(manifest)
    return manifest


def merged(manifest: Manifest, job: str, shards: Sequence[ShardRecord], kept: Sequence[ManifestShard]) -> Manifest:
    """The manifest with the shards of a job over failed rows; `kept` are those that hold the other error rows."""
    shards = sorted(shards, key=lambda shard: shard.name)
    older = [msgspec.structs.replace(s, errors=None) for s in manifest.shards] if shards else manifest.shards
    added = [msgspec.structs.replace(list_shard(s), runs=NO_BLOCKS) for s in shards]
    by_part = [0] * len(manifest.parts)
    for shard in shards:
        for block in shard.blocks:
            by_part[block.part] += block.rows
    rows = sum(by_part)
    return msgspec.structs.replace(
        manifest,
        state=JobState.COMPLETED if manifest.rows + rows else JobState.FAILED,
        parts=tuple(
            msgspec.structs.replace(part, rows=part.rows + n, failed=part.failed - n)
            for part, n in zip(manifest.parts, by_part, strict=True)
        ),
        rows=manifest.rows + rows,
        failed=manifest.failed - rows,
        outputs=manifest.outputs if manifest.rows else next((s.outputs for s in shards if s.rows), manifest.outputs),
        truncated=manifest.truncated + sum(s.truncated for s in shards),
        duplicates=manifest.duplicates + sum(s.duplicates for s in shards),
        reused=manifest.reused + sum(s.reused for s in shards),
        tokens=manifest.tokens + sum(s.tokens for s in shards),
        padded=manifest.padded + sum(s.padded for s in shards),
        recipes=in_order((*manifest.recipes, *(s.recipe for s in shards if s.recipe is not None))),
        engines=tuple(sorted({*manifest.engines, *(s.engine for s in shards)})),
        shards=(*older, *kept, *added),
        retries=(*manifest.retries, job),
    )
