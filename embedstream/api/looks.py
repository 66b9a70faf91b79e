"""Looks at jobs and queues: what is known of them at one moment, for commands, pages and scripts (as JSON objects)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from embedstream.api.client import find_queue, start_command
from embedstream.errors import BrokerError, RecordDamaged, UsageError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.handing_over import without_coordinator
from embedstream.lifecycle.watching import lost_blocks
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
from embedstream.queue.queues import (
    QueueLook,
    find_retries,
    is_retry_of,
    is_stalled,
    look_at_queue,
    rate_of,
    seconds_left,
)
from embedstream.queue.workers import InHand, Rate, WorkerRecord, in_hand_of
from embedstream.server.connection import mask
from embedstream.server.foreign import leaving_out

MOST_ENDED = 10
"""Ended jobs of a queue in the listing, the newest."""


@dataclass(frozen=True)
class JobLook:
    """A job and the live workers of its queue."""

    status: JobStatus
    workers: Sequence[WorkerRecord]
    waits: Sequence[str] = ()
    """What it waits for, as far as that is known."""
    retries: Sequence[JobStatus] = ()
    """The jobs that run its failed rows again, or did."""
    troubles: Mapping[str, str] = field(default_factory=dict)
    """What coordinators cannot do for it at present, and why."""
    ingested: bool = False
    """Whether coordinators are to read its parts."""

    @property
    def in_hand(self) -> InHand:
        """What is computed and not yet written."""
        return in_hand_of(self.status.job, self.workers, self.status.workers)

    @property
    def rate(self) -> Rate:
        """Per second: lately, or over all its time if it has ended."""
        status = self.status
        if status.state.ended:
            return Rate(status.rows / max(status.seconds, 0.001), status.tokens / max(status.seconds, 0.001))
        return rate_of(status.job, self.workers)

    @property
    def done(self) -> int:
        """Rows that are written, failed, or computed and not yet written."""
        status = self.status
        in_hand = 0 if status.state.ended else self.in_hand.rows
        return min(status.submitted, status.rows + status.failed + in_hand)

    @property
    def progress(self) -> float | None:
        """Share of its rows that is done with, 0..1; None while more are being submitted."""
        status = self.status
        if not status.sealed:
            return None
        return self.done / status.submitted if status.submitted else 1.0

    @property
    def stalled(self) -> bool:
        return is_stalled(self.status, self.workers)

    @property
    def seconds_left(self) -> float | None:
        """For what is submitted; None if no worker works on it."""
        return seconds_left(self.status, self.workers)

    @property
    def shares(self) -> list[dict[str, Any]]:
        """The workers that wrote its rows, and those that work on it now."""
        status, alive = self.status, {worker.name: worker for worker in self.workers}
        rates = (
            {} if status.state.ended else {w.name: w.rates[status.job] for w in self.workers if status.job in w.rates}
        )
        working = {*rates, *(name for name, worker in alive.items() if status.job in worker.in_hand)}
        names = sorted({*status.workers, *working}, key=lambda name: (-status.workers.get(name, 0), name))
        found = []
        for name in names:
            rows = status.workers.get(name, 0)
            found.append(
                {
                    "name": name,
                    "rows": rows,
                    "share": round(rows / status.rows, 4) if status.rows else 0.0,
                    "state": alive[name].state if name in alive else "gone",
                    "rows_per_second": round(rates.get(name, Rate()).rows, 3),
                }
            )
        return found


def look_at_job(nowhere: Broker, job: str, queue: str | None, url: str) -> JobLook:
    """One job; `queue`: on this one only. `url`: of Redis, for what is said of commands.

    Raises:
        JobUnknown: there is none.
        RecordDamaged: this version cannot read it.
    """
    broker = nowhere.of(find_queue(nowhere, job, queue))
    workers = broker.workers()
    try:
        status = broker.status(job)
    except (BrokerError, UsageError) as error:
        raise RecordDamaged(f"job {job} on queue {broker.queue}: {error}") from error
    waits = [] if status.state.ended else _waits(broker, status, workers, url)
    return JobLook(
        status,
        workers,
        waits,
        retries=find_retries(broker, status) if status.failed and status.state.ended else [],
        troubles=troubles_of(broker, status),
        ingested=is_ingested(broker, job),
    )


def look_at_jobs(broker: Broker) -> tuple[QueueLook, list[JobLook]]:
    """A queue, and its jobs: those that have not ended, and some that have."""
    look = look_at_queue(broker, MOST_ENDED)
    jobs = [
        JobLook(
            status,
            look.workers,
            retries=[each for each in look.jobs if is_retry_of(each.spec, status)],
            troubles=troubles_of(broker, status),
        )
        for status in look.jobs
    ]
    return look, jobs


def _waits(broker: Broker, status: JobStatus, workers: Sequence[WorkerRecord], url: str) -> list[str]:
    """What an open job waits for, as far as that is known."""
    idle = status.state is not JobState.FINALIZING and status.done < status.blocks and not workers
    waits = [
        waits_for(broker, status, workers, url),
        without_worker(broker, status.spec, url) if idle else "",
        lost_blocks(broker, status.job, workers),
    ]
    return [each for each in waits if each]


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


def without_worker(broker: Broker, spec: JobSpec, url: str) -> str:
    """What to say when no worker serves the queue."""
    others = [
        f"{queue} ({len(live)})"
        for queue in broker.queues()
        if queue != spec.queue and (live := broker.of(queue).workers())
    ]
    served = f"queues with workers: {', '.join(others)}" if others else "no queue has one"
    return (
        f"waiting for a worker on queue {spec.queue} ({served}): "
        f"start one with {start_command(spec.model, url, spec.queue)}"
    )


def job_object(look: JobLook) -> dict[str, Any]:
    """A job for scripts."""
    status = look.status
    shown: dict[str, Any] = msgspec.to_builtins(status)
    del shown["manifest"]
    shown["spec"]["output"] = mask(status.spec.output)
    left = look.seconds_left
    return {
        **shown,
        "seconds": round(status.seconds, 3),
        "padding": round(status.padding, 4),
        "stalled": look.stalled,
        "progress": None if look.progress is None else round(look.progress, 4),
        "rows_in_hand": look.in_hand.rows,
        "rows_per_second": round(look.rate.rows, 3),
        "tokens_per_second": round(look.rate.tokens, 3),
        "seconds_left": None if left is None else round(left, 3),
        "waits_for": "; ".join(look.waits),
        "retries": [
            {"job": each.job, "state": each.state.value, "rows": each.rows, "failed": each.failed}
            for each in look.retries
        ],
        "troubles": dict(look.troubles),
        "workers": look.shares,
    }


def queue_object(look: QueueLook, jobs: Sequence[JobLook]) -> dict[str, Any]:
    """A queue for scripts. `jobs`: those of the look."""
    return {
        "queue": look.queue,
        "blocks": look.blocks,
        "claimed_blocks": look.claimed_blocks,
        "refused_blocks": look.refused_blocks,
        "bytes": look.bytes,
        "oldest_block_seconds": round(look.oldest_block_seconds, 3),
        "tokens": round(look.tokens),
        "worker_tokens_per_second": round(look.worker_tokens_per_second, 3) if look.measured else None,
        "drain_seconds": round(look.drain_seconds, 3) if look.measured or not look.tokens else None,
        "jobs": [job_object(job) for job in jobs],
        "unreadable_jobs": look.unreadable,
        "workers": [worker_object(worker) for worker in look.workers],
    }


def worker_object(worker: WorkerRecord) -> dict[str, Any]:
    """A worker for scripts."""
    return {**msgspec.to_builtins(worker), "roots": [mask(root) for root in worker.roots]}


def fleet_object(nowhere: Broker) -> dict[str, Any]:
    """Coordinators and mergers for scripts."""
    return {
        "coordinators": [msgspec.to_builtins(each) for each in coordinators(nowhere)],
        "compactions": [compaction_object(each, written(nowhere, each)) for each in compactions(nowhere)],
    }


def written(nowhere: Broker, wanted: Compaction) -> dict[str, str]:
    with leaving_out(f"compaction {wanted.id}"):
        return compacted(nowhere, wanted)
    return {}


def compaction_object(wanted: Compaction, there: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": wanted.id,
        "output": mask(wanted.output),
        "shards": len(wanted.groups),
        "written": sum(shard in there for shard in wanted.groups),
        "trouble": there.get("trouble", ""),
    }
