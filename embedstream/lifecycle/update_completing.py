"""The end of a job that updates a dataset: a new generation takes the place of the one that it began with.

Until the new manifest takes the place of the old one, at once, the old generation is whole and true; its files are
removed after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from embedstream.dataset.changes import write_changes
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import build_manifest, in_order, manifest_digest
from embedstream.dataset.sink import Sink
from embedstream.jobs import JobState, JobStatus
from embedstream.records import Manifest, PartContent, ShardRecord


def finalize_update(
    sink: Sink, status: JobStatus, shards: Sequence[ShardRecord], ended: float, contents: Sequence[PartContent | None]
) -> Manifest | None:
    """Put a job's shards in place of the dataset that it began with; returns the new manifest. Doing it twice is
    harmless.

    None, with nothing written, if the manifest there is another than the one that the job began with.

    Raises:
        OutputError: the shards do not add up, one of them is missing, or the output cannot be written.
    """
    standing, update = sink.read_manifest(), status.spec.update
    if standing is None or update is None:
        return None
    if status.job in (standing.job, *standing.before):
        sink.mend(standing)
        return standing
    if manifest_digest(standing) != update.manifest:
        return None
    assert isinstance(sink, FolderSink), "refused before the job was made"
    manifest = build_manifest(status, shards, JobState.COMPLETED, ended, contents)
    reused = manifest.reused > 0
    manifest = msgspec.structs.replace(
        manifest,
        recipes=in_order((*manifest.recipes, *(standing.recipes if reused else ()))),
        engines=tuple(sorted({*manifest.engines, *(standing.engines if reused else ())})),
        generation=standing.generation + 1,
        before=(*standing.before, standing.job, *standing.retries),
    )
    manifest = msgspec.structs.replace(manifest, changes=(*standing.changes, write_changes(sink, standing, manifest)))
    sink.finalize(manifest)
    return manifest
