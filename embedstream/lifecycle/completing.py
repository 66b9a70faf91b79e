"""The end of a job: its errors and its manifest are written. Doing it twice, or by two at once, is harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedstream.dataset.manifest import build_manifest, manifest_spec
from embedstream.dataset.sink import Sink
from embedstream.jobs import JobSpec, JobState, JobStatus, differing_field
from embedstream.records import Manifest, PartContent, ShardRecord


def finalize(
    sink: Sink,
    status: JobStatus,
    shards: Iterable[ShardRecord],
    state: JobState,
    ended: float,
    contents: Sequence[PartContent | None] = (),
) -> Manifest:
    """Write the errors and the manifest of a job; returns the manifest.

    `shards` are those that were committed, in any order; each is looked at once, and none touched. `state` is how the
    job ends, `ended` when (Unix seconds, by the Redis server's clock). `contents`: what was read of each part, as far
    as that is known. A job that failed before its first shard writes nothing, unless a manifest lies there already. One
    that says that the job is completed stays as it is: another finalizer was first, or Redis has gone back to an
    earlier state of the job. Shards that were committed since then hold rows twice, and are removed.

    Raises:
        OutputError: the shards do not add up, one of them is missing, or the output cannot be written.
    """
    standing = sink.read_manifest()
    if standing is not None and is_finished(standing, status.spec):
        listed = {shard.name for shard in standing.shards}
        for shard in shards:
            if shard.name not in listed:
                sink.discard_shard(shard.name)
        # Not written again: meanwhile a compaction or a job over failed rows may have put a newer one in its place.
        sink.mend(standing)
        return standing
    manifest = build_manifest(status, shards, state, ended, contents)
    if standing is not None and standing.retries and _is_base(standing, manifest):
        return standing  # what was added to this job's shards since then stays
    if manifest.shards or state is not JobState.FAILED or standing is not None:
        sink.finalize(manifest)
    return manifest


def is_finished(manifest: Manifest | None, spec: JobSpec) -> bool:
    """Whether a manifest says that this very job is completed, or that a newer generation has taken its place: it
    outranks what Redis says."""
    if manifest is None:
        return False
    if spec.job in manifest.before:
        return True  # of an older generation: Redis has gone back to an earlier state
    if spec.retry is not None:
        return spec.job in manifest.retries
    if spec.updates:
        return manifest.state == JobState.COMPLETED and manifest.job == spec.job
    return manifest.state == JobState.COMPLETED and differing_field(manifest_spec(manifest), spec) is None


def _is_base(standing: Manifest, manifest: Manifest) -> bool:
    listed = {shard.name for shard in standing.shards if shard.blocks}
    return standing.job == manifest.job and listed == {shard.name for shard in manifest.shards}
