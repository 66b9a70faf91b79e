"""What embed-status shows: one job, or all queues with their jobs and workers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from embedstream.broker import Broker
from embedstream.client import find_queue
from embedstream.connection import connect, explaining, mask
from embedstream.errors import JobUnknown
from embedstream.jobs import JobState, JobStatus
from embedstream.preflight import check
from embedstream.terminal import echo, echo_json, printable
from embedstream.troubles import patiently
from embedstream.watching import lost_blocks, why_ended
from embedstream.workers import WorkerRecord
from embedstream_producer.report import duration

WATCH_SECONDS = 1.0

MOST_ENDED = 10
"""Ended jobs of a queue in the listing, the newest."""


def show_status(job: str | None, redis_url: str, watch: bool, as_json: bool) -> None:
    """Print one look at a job, or at all queues; with `watch` a look every second, until the job has ended."""
    client = connect(redis_url)
    check(connect(redis_url, retries=0), redis_url)
    try:
        with explaining(redis_url):
            nowhere = Broker(client, "")

            def look() -> tuple[str | dict[str, Any], bool]:
                """What is to be shown, and whether there is nothing more to come."""
                if job is None:
                    return fleet_object(nowhere) if as_json else "\n".join(map(printable, fleet_lines(nowhere))), False
                broker = Broker(client, find_queue(nowhere, job))
                status = broker.status(job)
                lines = job_lines(status, waits_for(broker, status))
                return job_object(status) if as_json else "\n".join(map(printable, lines)), status.state.ended

            while True:
                shown, ended = patiently(look, _say, mask(redis_url)) if watch else look()
                if watch and not as_json and sys.stdout.isatty():
                    click.clear()
                if isinstance(shown, str):
                    echo(shown)
                else:
                    echo_json(msgspec.json.encode(shown))
                if not watch or ended:
                    return
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(notice: str) -> None:
    if notice:
        click.echo(notice, err=True)


def job_object(status: JobStatus) -> dict[str, Any]:
    """A job for scripts."""
    shown: dict[str, Any] = msgspec.to_builtins(status)
    del shown["manifest"]
    shown["spec"]["output"] = mask(status.spec.output)
    return {
        **shown,
        "seconds": round(status.seconds, 3),
        "padding": round(status.padding, 4),
        "stalled": status.stalled,
    }


def fleet_object(broker: Broker) -> dict[str, Any]:
    """All queues for scripts."""
    return {
        "queues": [
            {
                "queue": each.queue,
                "jobs": [job_object(status) for status in jobs_of(each)],
                "workers": [worker_object(worker) for worker in each.workers()],
            }
            for each in queues_of(broker)
        ]
    }


def worker_object(worker: WorkerRecord) -> dict[str, Any]:
    """A worker for scripts."""
    return {**msgspec.to_builtins(worker), "roots": [mask(root) for root in worker.roots]}


def queues_of(broker: Broker) -> list[Broker]:
    """A broker for every queue known."""
    return [Broker(broker.client, queue) for queue in broker.queues()]


def jobs_of(broker: Broker) -> Iterator[JobStatus]:
    """Open jobs, those to be finalized, and the last ones that ended."""
    ids = [*broker.active_jobs(), *broker.outbox(), *broker.recent_jobs()[:MOST_ENDED]]
    for job in dict.fromkeys(ids):
        try:
            yield broker.status(job)
        except JobUnknown:
            continue  # it expired


def fleet_lines(broker: Broker) -> Iterator[str]:
    """All queues for people."""
    queues = queues_of(broker)
    if not queues:
        yield "no queue: neither job nor worker was here in the last 30 days"
    for each in queues:
        workers = each.workers()
        yield f"queue {each.queue}: {len(workers)} worker(s)"
        yield from (f"  {worker_line(worker)}" for worker in workers)
        yield from (f"  {job_line(status)}" for status in jobs_of(each))


def worker_line(worker: WorkerRecord) -> str:
    """One worker."""
    return (
        f"worker {worker.name}  {worker.state}  {worker.engine} {worker.dtype} on {worker.device}  "
        f"{worker.rows:,} rows, {worker.tokens:,} tokens committed"
    )


def job_line(status: JobStatus) -> str:
    """One job in a listing."""
    failed = f", {status.failed:,} FAILED" if status.failed else ""
    note = "  stalled" if status.stalled else ""
    return (
        f"job {status.job}  {status.state}{note}  {status.rows:,} of {_total(status)} rows{failed}  "
        f"{mask(status.spec.output)}"
    )


def waits_for(broker: Broker, status: JobStatus) -> str:
    """What an open job waits for, if it is known."""
    return "" if status.ended is not None else lost_blocks(broker, status.job, broker.workers())


def job_lines(status: JobStatus, waits: str = "") -> Iterator[str]:
    """One job in full, and what it waits for."""
    yield job_line(status)
    yield f"  queue {status.spec.queue}, model {status.spec.model}"
    yield (
        f"  blocks {status.done:,} of {status.blocks:,}, tokens {status.tokens:,}, "
        f"padding {100 * status.padding:.1f} %, truncated {status.truncated:,}"
    )
    yield (
        f"  {duration(status.seconds)} since its creation"
        if status.ended is None
        else f"  took {duration(status.seconds)}"
    )
    why = why_ended(status)
    if why:
        yield f"  {why}"
    if waits:
        yield f"  {waits}"
    if status.stalled:
        yield f"  {_stalled(status)}"


def _total(status: JobStatus) -> str:
    return f"{status.submitted:,}" if status.sealed else f"{status.submitted:,} or more"


def _stalled(status: JobStatus) -> str:
    if status.state is JobState.SUBMITTING and status.done >= status.blocks:
        return "its producer is gone: run the same embed-submit again, it goes on"
    return "no worker commits to it: look whether one is alive (embed-status) and at its log"
