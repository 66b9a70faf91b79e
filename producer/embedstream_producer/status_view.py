"""What embed-status says of a look: lines for people. Asks Redis nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from embedstream.api.looks import JobLook
from embedstream.jobs import JobState, JobStatus
from embedstream.lifecycle.watching import why_ended
from embedstream.queue.queues import QueueLook
from embedstream.queue.workers import Rate, WorkerRecord
from embedstream.server.connection import mask
from embedstream.terminal import counted, duration
from embedstream_producer.report import errors_of


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
    computed = f"padding {100 * status.padding:.1f} %, truncated {status.truncated:,}, duplicates {status.duplicates:,}"
    yield f"  {_speed(look.rate)}{computed}"
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
