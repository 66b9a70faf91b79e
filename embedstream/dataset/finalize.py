"""The end of a job: its errors and its manifest are written. Doing it twice, or by two at once, is harmless."""

from __future__ import annotations

from collections.abc import Sequence

from embedstream.dataset.manifest import build_manifest
from embedstream.dataset.sink import Manifest, ShardRecord, Sink
from embedstream.jobs import JobState, JobStatus


def finalize(sink: Sink, status: JobStatus, shards: Sequence[ShardRecord], state: JobState, ended: float) -> Manifest:
    """Write the errors and the manifest of a job whose committed shards are `shards`; returns the manifest.

    `state` is how the job ends, `ended` when (Unix seconds, by the Redis server's clock). No shard is touched.
    A job that failed before its first shard writes nothing, unless a manifest lies there already.

    Raises:
        OutputError: the shards do not add up, one of them is missing, or the output cannot be written.
    """
    standing = sink.read_manifest()
    if standing is not None and standing.retries and _is_base(standing, status.job, shards):
        return standing  # what was added to this job's shards since then stays
    manifest = build_manifest(status, shards, state, ended)
    if shards or state is not JobState.FAILED or standing is not None:
        sink.finalize(manifest)
    return manifest


def _is_base(manifest: Manifest, job: str, shards: Sequence[ShardRecord]) -> bool:
    listed = {shard.name for shard in manifest.shards if shard.blocks}
    return manifest.job == job and listed == {shard.name for shard in shards}
