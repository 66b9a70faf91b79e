"""The end of a job: its errors and its manifest are written. Doing it twice, or by two at once, is harmless."""

from __future__ import annotations

from collections.abc import Iterable

from embedstream.dataset.manifest import build_manifest
from embedstream.dataset.sink import Sink
from embedstream.jobs import JobState, JobStatus
from embedstream.records import Manifest, ShardRecord


def finalize(sink: Sink, status: JobStatus, shards: Iterable[ShardRecord], state: JobState, ended: float) -> Manifest:
    """Write the errors and the manifest of a job; returns the manifest.

    `shards` are those that were committed, in any order; each is looked at once, and none touched. `state` is how the
    job ends, `ended` when (Unix seconds, by the Redis server's clock). A job that failed before its first shard writes
    nothing, unless a manifest lies there already.

    Raises:
        OutputError: the shards do not add up, one of them is missing, or the output cannot be written.
    """
    standing = sink.read_manifest()
    manifest = build_manifest(status, shards, state, ended)
    if standing is not None and standing.retries and _is_base(standing, manifest):
        return standing  # what was added to this job's shards since then stays
    if manifest.shards or state is not JobState.FAILED or standing is not None:
        sink.finalize(manifest)
    return manifest


def _is_base(standing: Manifest, manifest: Manifest) -> bool:
    listed = {shard.name for shard in standing.shards if shard.blocks}
    return standing.job == manifest.job and listed == {shard.name for shard in manifest.shards}
