"""What embed-status says of coordinators, and of what they have to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from embedstream.jobs import JobState, JobStatus
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import (
    Compaction,
    compacted,
    compactions,
    coordinators,
    is_ingested,
    troubles,
    unsealed_parts,
)
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import mask
from embedstream.server.foreign import leaving_out
from embedstream_producer.server_side import without_coordinator


def waits_for(broker: Broker, status: JobStatus, workers: Sequence[WorkerRecord], url: str) -> str:
    """What a job waits for a coordinator to do; empty if nothing. `url`: of Redis."""
    if status.state is JobState.SUBMITTING and is_ingested(broker, status.job):
        left = len(unsealed_parts(broker, status.job, len(status.spec.parts)))
        read = f"coordinators have read {len(status.spec.parts) - left} of {len(status.spec.parts)} parts"
        return without_coordinator(broker, status.spec, url) or read
    if status.state is JobState.FINALIZING and not workers and not coordinators(broker):
        return "its manifest waits for a worker or a coordinator: start one, or run the same embed-submit again"
    return ""


def troubles_of(broker: Broker, status: JobStatus) -> dict[str, str]:
    """What coordinators cannot do for an open job at present, and why."""
    return {} if status.state.ended else troubles(broker, status.job)


def fleet_lines(nowhere: Broker) -> Iterator[str]:
    """Coordinators, and datasets whose shards are being merged."""
    for coordinator in coordinators(nowhere):
        yield f"coordinator {coordinator.name}  {coordinator.processes} process(es)"
    for wanted in compactions(nowhere):
        yield _compaction_line(wanted, _written(nowhere, wanted))


def fleet_object(nowhere: Broker) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "coordinators": [msgspec.to_builtins(each) for each in coordinators(nowhere)],
        "compactions": [_compaction_object(each, _written(nowhere, each)) for each in compactions(nowhere)],
    }


def _written(nowhere: Broker, wanted: Compaction) -> dict[str, str]:
    with leaving_out(f"compaction {wanted.id}"):
        return compacted(nowhere, wanted)
    return {}


def _compaction_object(wanted: Compaction, there: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": wanted.id,
        "output": mask(wanted.output),
        "shards": len(wanted.groups),
        "written": sum(shard in there for shard in wanted.groups),
        "trouble": there.get("trouble", ""),
    }


def _compaction_line(wanted: Compaction, there: Mapping[str, str]) -> str:
    told = _compaction_object(wanted, there)
    line = f"compaction {told['id']}  {told['written']} of {told['shards']} shards written  {told['output']}"
    return f"{line}  {told['trouble']}".rstrip()
