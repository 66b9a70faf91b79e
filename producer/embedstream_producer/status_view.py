"""What embed-status says of a look: lines for people, objects for scripts. Asks Redis nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    yield queue_line(look, jobs)
    for job in jobs:
        yield f"  {job_line(job)}"
        yield from (f"    {line}" for line in trouble_lines(job))
    yield from (f"  job {job}  unreadable: {why}" for job, why in look.unreadable.items())
    yield from (f"  {worker_line(worker, jobs)}" for worker in look.workers)


def queue_line(look: QueueLook, jobs: Sequence[JobLook]) -> str:
    """What lies in a queue and who serves it."""
    states = Counter(worker.state for worker in look.workers)
    others = "".join(f", {states[state]} {state}" for state in ("starting", "draining") if states[state])
    queued = _queued(look, jobs) if look.blocks else "nothing queued"
    return f"queue {look.queue}: {counted(len(look.workers), 'worker')}{others}, {queued}"


def worker_line(worker: WorkerRecord, jobs: Sequence[JobLook]) -> str:
    """One worker, and how fast it gets on with these jobs."""
    rate = speed_of(worker, jobs)
    if worker.phase or not worker.engine:
        since = f"{worker.phase} for {worker.phase_seconds:.0f} s" if worker.phase else "not yet loaded"
        return f"worker {worker.name}  {worker.state}: {since}"
    return (
        f"worker {worker.name}  {worker.state}  {worker.engine} {worker.dtype} on {worker.device}  "
        f"{_speed(rate)}{worker.rows:,} rows, {worker.tokens:,} tokens committed"
    )


def speed_of(worker: WorkerRecord, jobs: Iterable[JobLook]) -> Rate:
    """How fast it gets on with those of these jobs that have not ended: their rates add up to that of their workers."""
    open_jobs = [job.status.job for job in jobs if not job.status.state.ended]
    return sum((worker.rates.get(job, Rate()) for job in open_jobs), Rate())


def job_line(look: JobLook) -> str:
    """One job in a listing."""
    status = look.status
    again = f" (run again by job {', '.join(each.job for each in look.retries)})" if look.retries else ""
    failed = f", {status.failed:,} FAILED{again}" if status.failed else ""
    verdict = f" ({status.verdict})" if status.verdict and not status.state.ended else ""
    note = f"  failed rows of job {status.spec.whole_job}" if status.spec.retry else ""
    note += "  stalled" if look.stalled else ""
    return (
        f"job {status.job}  {status.state}{verdict}{note}  {_rows(look)}{failed}  "
        f"{'' if status.state.ended else _outlook(look)}{mask(status.spec.output)}"
    )


def job_lines(look: JobLook) -> Iterator[str]:
    """One job in full."""
    status, ended = look.status, look.status.state.ended
    yield job_line(look)
    yield f"  queue {status.spec.queue}, model {status.spec.model}"
    if not ended and look.in_hand.rows:
        yield f"  {counted(look.in_hand.rows, 'more row')} computed and not yet written"
    yield f"  {_speed(look.rate)}padding {100 * status.padding:.1f} %, truncated {status.truncated:,}"
    yield f"  blocks {status.done:,} of {status.blocks:,}, tokens {status.tokens:,}"
    if status.failed:
        yield f"  {failures(look)}"
    yield from (f"  {retry_line(retry)}" for retry in look.retries)
    for each in look.shares:
        speed = f", {each['rows_per_second']:,.0f} rows/s" if each["rows_per_second"] else ""
        yield f"  {100 * each['share']:5.1f} %  {each['name']}  {each['rows']:,} rows{speed}, {each['state']}"
    yield f"  took {duration(status.seconds)}" if ended else f"  {duration(status.seconds)} since its creation"
    why = why_ended(status)
    if why:
        yield f"  {why}"
    yield from (f"  {each}" for each in notes_of(look))


def failures(look: JobLook) -> str:
    """How many rows failed, and where they are listed."""
    status = look.status
    share = 100 * status.failed / max(1, status.rows + status.failed)
    where = f": see {errors_of(mask(status.spec.output))}" if status.state.ended else ""
    return f"{counted(status.failed, 'row')} failed ({share:.2g} %){where}"


def retry_line(retry: JobStatus) -> str:
    """The job that runs failed rows again, or did."""
    return (
        f"{retry.submitted:,} of its failed rows run again by job {retry.job}: {retry.state}, "
        f"{retry.rows:,} written, {retry.failed:,} failed"
    )


def notes_of(look: JobLook) -> list[str]:
    """What a job waits for, what is against it, and what to do."""
    advice = _stalled(look) if look.stalled else ""
    return [*look.waits, *trouble_lines(look), *([advice] if advice else [])]


def percent(share: float) -> str:
    """100 only once all is done."""
    return f"{math.floor(100 * share + 1e-9)} %"


def _queued(look: QueueLook, jobs: Sequence[JobLook]) -> str:
    said = [
        f"{counted(look.blocks, 'block')} queued ({look.claimed_blocks:,} in workers' hands)",
        f"the oldest for {duration(look.oldest_block_seconds)}",
    ]
    if look.refused_blocks:
        said.append(f"{counted(look.refused_blocks, 'block')} that no live worker accepts")
    # Once workers get on with jobs, these say how long each takes: no second estimate contradicts them.
    if look.tokens and all(job.status.state.ended or job.seconds_left is None for job in jobs):
        if look.measured:
            said.append(f"about {duration(look.drain_seconds)} of work{'' if look.ready_workers else ' by one worker'}")
        else:
            said.append("how long they take is not known before the first commit")
    return ", ".join(said)


def trouble_lines(look: JobLook) -> Iterator[str]:
    """What coordinators and workers have against it."""
    job = look.status.job
    yield from (f"{what}: {why}" for what, why in look.troubles.items())
    for why in sorted({worker.refused[job] for worker in look.workers if job in worker.refused}):
        yield f"refused by a worker: {why}"
    for why in sorted({worker.waits[job] for worker in look.workers if job in worker.waits}):
        yield f"a worker waits: {why}"


def _speed(rate: Rate) -> str:
    return f"{rate.rows:,.0f} rows/s, {rate.tokens:,.0f} tokens/s, " if rate.tokens else ""


def _outlook(look: JobLook) -> str:
    progress = "" if look.progress is None else f"{percent(look.progress)}, "
    left = "" if look.seconds_left is None else f"{duration(look.seconds_left)} left, "
    return f"{progress}{left}".rstrip(", ") + ("  " if progress or left else "")


def _rows(look: JobLook) -> str:
    """Those that are written, of an open job also those that are computed, and how many there are."""
    status = look.status
    done = status.rows if status.state.ended else look.done
    if status.sealed:
        return f"{done:,} of {counted(status.submitted, 'row')}"
    return f"{done:,} of {status.submitted:,} or more rows" if status.submitted else "no row submitted yet"


def _stalled(look: JobLook) -> str:
    """What to do; empty if what it waits for says that already."""
    status = look.status
    if status.state is JobState.SUBMITTING and status.done >= status.blocks:
        if look.ingested:
            return "coordinators do not get on with its parts: see above, and their logs"
        return "its producer is gone: run the same embed-submit again, it goes on"
    return "" if look.waits else "no worker gets on with it: look at their logs"
