"""What embed-status says of a look: lines for people, objects for scripts. Asks nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from embedstream.jobs import JobState, JobStatus
from embedstream.lifecycle.watching import why_ended
from embedstream.queue.queues import QueueLook, is_stalled, rate_of, seconds_left
from embedstream.queue.workers import InHand, Rate, WorkerRecord, in_hand_of
from embedstream.server.connection import mask
from embedstream.terminal import counted
from embedstream_producer.report import duration, errors_of


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
    def progress(self) -> float | None:
        """Share of its rows that is done with, 0..1; None while more are being submitted."""
        status = self.status
        if not status.sealed:
            return None
        done = status.rows + status.failed + self.in_hand.rows
        return min(1.0, done / status.submitted) if status.submitted else 1.0

    @property
    def stalled(self) -> bool:
        return is_stalled(self.status, self.workers)

    @property
    def seconds_left(self) -> float | None:
        """For what is submitted; None if nobody works on it."""
        return seconds_left(self.status, self.workers)

    @property
    def shares(self) -> list[dict[str, Any]]:
        """Who wrote its rows, and who works on it now."""
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


def queue_lines(look: QueueLook, jobs: Sequence[JobLook]) -> Iterator[str]:
    """A queue for people. `jobs`: those of the look."""
    states = Counter(worker.state for worker in look.workers)
    others = "".join(f", {states[state]} {state}" for state in ("starting", "draining") if states[state])
    queued = _queued(look) if look.blocks else "nothing queued"
    yield f"queue {look.queue}: {counted(len(look.workers), 'worker')}{others}, {queued}"
    yield from (f"  {worker_line(worker)}" for worker in look.workers)
    for job in jobs:
        yield f"  {job_line(job)}"
        yield from (f"    {line}" for line in _trouble_lines(job))
    yield from (f"  job {job}  unreadable: {why}" for job, why in look.unreadable.items())


def worker_line(worker: WorkerRecord) -> str:
    """One worker."""
    rate = sum(worker.rates.values(), Rate())
    if worker.phase or not worker.engine:
        since = f"{worker.phase} for {worker.phase_seconds:.0f} s" if worker.phase else "not yet loaded"
        return f"worker {worker.name}  {worker.state}: {since}"
    return (
        f"worker {worker.name}  {worker.state}  {worker.engine} {worker.dtype} on {worker.device}  "
        f"{_speed(rate)}{worker.rows:,} rows, {worker.tokens:,} tokens committed"
    )


def job_line(look: JobLook) -> str:
    """One job in a listing."""
    status = look.status
    again = f" (run again by job {', '.join(each.job for each in look.retries)})" if look.retries else ""
    failed = f", {status.failed:,} FAILED{again}" if status.failed else ""
    verdict = f" ({status.verdict})" if status.verdict and not status.state.ended else ""
    note = f"  failed rows of job {status.spec.whole_job}" if status.spec.retry else ""
    note += "  stalled" if look.stalled else ""
    return (
        f"job {status.job}  {status.state}{verdict}{note}  {_written(status)}{failed}  "
        f"{'' if status.state.ended else _outlook(look)}{mask(status.spec.output)}"
    )


def job_lines(look: JobLook) -> Iterator[str]:
    """One job in full."""
    status, ended = look.status, look.status.state.ended
    yield job_line(look)
    yield f"  queue {status.spec.queue}, model {status.spec.model}"
    if not ended and look.in_hand.rows:
        yield f"  {look.in_hand.rows:,} more rows are computed and not yet written"
    yield f"  {_speed(look.rate)}padding {100 * status.padding:.1f} %, truncated {status.truncated:,}"
    yield f"  blocks {status.done:,} of {status.blocks:,}, tokens {status.tokens:,}"
    if status.failed:
        share = 100 * status.failed / max(1, status.rows + status.failed)
        where = f": see {errors_of(mask(status.spec.output))}" if ended else ""
        yield f"  {_rows(status.failed)} failed ({share:.2g} %){where}"
    for retry in look.retries:
        yield (
            f"  {retry.submitted:,} of its failed rows run again by job {retry.job}: {retry.state}, "
            f"{retry.rows:,} written, {retry.failed:,} failed"
        )
    for each in look.shares:
        speed = f", {each['rows_per_second']:,.0f} rows/s" if each["rows_per_second"] else ""
        yield f"  {100 * each['share']:5.1f} %  {each['name']}  {each['rows']:,} rows{speed}, {each['state']}"
    yield f"  took {duration(status.seconds)}" if ended else f"  {duration(status.seconds)} since its creation"
    why = why_ended(status)
    if why:
        yield f"  {why}"
    yield from (f"  {each}" for each in look.waits)
    yield from (f"  {line}" for line in _trouble_lines(look))
    if look.stalled and (advice := _stalled(look)):
        yield f"  {advice}"


def _queued(look: QueueLook) -> str:
    said = [
        f"{look.blocks:,} block{'' if look.blocks == 1 else 's'} queued ({look.claimed_blocks:,} in workers' hands)",
        f"the oldest for {duration(look.oldest_block_seconds)}",
    ]
    if look.refused_blocks:
        said.append(f"{counted(look.refused_blocks, 'block')} that no live worker accepts")
    if look.tokens and look.measured:
        said.append(f"about {duration(look.drain_seconds)} of work{'' if look.ready_workers else ' by one worker'}")
    elif look.tokens:
        said.append("how long they take is not known before the first commit")
    return ", ".join(said)


def _trouble_lines(look: JobLook) -> Iterator[str]:
    """What coordinators and workers have against it."""
    job = look.status.job
    yield from (f"{what}: {why}" for what, why in look.troubles.items())
    for why in sorted({worker.refused[job] for worker in look.workers if job in worker.refused}):
        yield f"refused by a worker: {why}"
    for why in sorted({worker.waits[job] for worker in look.workers if job in worker.waits}):
        yield f"a worker waits: {why}"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _speed(rate: Rate) -> str:
    return f"{rate.rows:,.0f} rows/s, {rate.tokens:,.0f} tokens/s, " if rate.tokens else ""


def _outlook(look: JobLook) -> str:
    progress = "" if look.progress is None else f"{100 * look.progress:.0f} %, "
    left = "" if look.seconds_left is None else f"{duration(look.seconds_left)} left, "
    return f"{progress}{left}".rstrip(", ") + ("  " if progress or left else "")


def _written(status: JobStatus) -> str:
    if status.sealed:
        return f"{status.rows:,} of {_rows(status.submitted)}"
    return f"{status.rows:,} of {status.submitted:,} or more rows" if status.submitted else "no row submitted yet"


def _stalled(look: JobLook) -> str:
    """What to do; empty if what it waits for says that already."""
    status = look.status
    if status.state is JobState.SUBMITTING and status.done >= status.blocks:
        if look.ingested:
            return "coordinators do not get on with its parts: see above, and their logs"
        return "its producer is gone: run the same embed-submit again, it goes on"
    return "" if look.waits else "no worker gets on with it: look at their logs"
