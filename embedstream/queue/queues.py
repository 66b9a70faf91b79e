"""One look at a queue: what lies in it, who works on it, and how long that will take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from embedstream.errors import EmbedstreamError, JobUnknown, RecordDamaged
from embedstream.jobs import JobSpec, JobStatus, decode_spec
from embedstream.queue.broker import Broker
from embedstream.queue.job_record import counter, parse_status, reading_job
from embedstream.queue.workers import Rate, WorkerRecord, in_hand_of
from embedstream.server.foreign import answered, leaving_out

GUESSED_TOKENS_PER_SECOND = 1000.0
"""What a worker is taken to do before any was measured: a small model on few cores. The first commits correct it.
For an autoscaler, which needs a number to start a first worker; people are told that it is not known."""

GUESSED_TOKENS_PER_BYTE = 0.5
"""Tokens in a queued byte before any was measured: English, four characters a token, compressed to a half."""


class QueueLook(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at a queue found. Blocks in workers' hands count as queued until they are committed."""

    queue: str
    now: float
    """Redis seconds."""
    bytes: int
    blocks: int
    claimed_blocks: int
    """Those of them that are in workers' hands."""
    refused_blocks: int
    """Those of them that nobody here takes: their jobs cannot be read by this version, or every ready worker refuses
    them. More workers of the same kind would not help, so they count as no work in `tokens`."""
    oldest_block_seconds: float
    """Age of the oldest queued block; 0 if there is none."""
    tokens: float
    """Estimate of the queued tokens, refused blocks left out: bytes, and what bytes came to in recent commits."""
    worker_tokens_per_second: float
    """What one worker does: measured over recent commits, by any worker; a guess before the first."""
    measured: bool
    """Whether it was measured. If not, `drain_seconds` is a guess, too."""
    jobs: list[JobStatus]
    """Jobs that have not ended, oldest first, then some that have, newest first."""
    unreadable: dict[str, str]
    """Jobs that are of another format version, or damaged in Redis, and what is to be done."""
    workers: list[WorkerRecord]

    @property
    def ready_workers(self) -> int:
        return sum(worker.state == "ready" for worker in self.workers)

    @property
    def drain_seconds(self) -> float:
        """How long the ready workers need for what is queued; without any, how long one would need."""
        return self.tokens / (self.worker_tokens_per_second * max(1, self.ready_workers))


def look_at_queue(broker: Broker, ended: int = 0) -> QueueLook:
    """`ended`: how many ended jobs are looked at as well. Raises `redis.RedisError`."""
    client: Any = broker.client
    active = broker.active_jobs()
    ids = dict.fromkeys([*active, *broker.outbox(), *(broker.recent_jobs()[:ended] if ended else ())])
    streams = broker.run(broker.look(active)) if active else []
    workers = broker.workers()
    oldest = min((stream.oldest_ms for stream in streams if stream.oldest_ms), default=0)
    with client.pipeline(transaction=False) as pipe:
        for job in ids:
            pipe.hgetall(broker.keys.job(job))
        pipe.get(broker.keys.bytes)
        pipe.hmget(broker.keys.pace, "tokens", "bytes", "ms")
        pipe.time()
        *hashes, queued, pace, (seconds, micros) = pipe.execute(raise_on_error=False)
    now = seconds + micros / 1e6
    jobs, unreadable = [], {}
    refused, refused_bytes = _refused_by_all(workers), 0
    for job, reply in zip(ids, hashes, strict=True):
        raw: dict[bytes, bytes] = {}
        try:
            with reading_job(job):
                raw = answered(reply)
            jobs.append(parse_status(job, raw, now))
        except JobUnknown:
            continue  # it expired
        except RecordDamaged as error:
            unreadable[job] = str(error)
            refused.add(job)
        except EmbedstreamError as error:
            ending = raw.get(b"verdict", b"").decode(errors="replace")
            unreadable[job] = (
                f"{ending} already, and its manifest waits for somebody who can read it: {error}"
                if ending
                else str(error)
            )
            refused.add(job)
        if job in refused:
            refused_bytes += _queued_bytes(raw)
    queued_bytes, tokens, size, ms = 0, 0, 0, 0
    with leaving_out(broker.keys.bytes):
        queued_bytes = counter(answered(queued))
    with leaving_out(broker.keys.pace):
        tokens, size, ms = map(counter, answered(pace))
    measured = bool(tokens and ms)
    return QueueLook(
        queue=broker.queue,
        now=now,
        bytes=queued_bytes,
        blocks=sum(stream.blocks for stream in streams),
        claimed_blocks=sum(stream.claimed for stream in streams),
        refused_blocks=sum(stream.blocks for job, stream in zip(active, streams, strict=True) if job in refused),
        oldest_block_seconds=max(0.0, now - oldest / 1000) if oldest else 0.0,
        tokens=max(0, queued_bytes - refused_bytes) * (tokens / size if tokens and size else GUESSED_TOKENS_PER_BYTE),
        worker_tokens_per_second=1000 * tokens / ms if measured else GUESSED_TOKENS_PER_SECOND,
        measured=measured,
        jobs=jobs,
        unreadable=unreadable,
        workers=workers,
    )


def find_retries(broker: Broker, status: JobStatus) -> list[JobStatus]:
    """The jobs of the queue that run this one's failed rows again, or did. Raises `redis.RedisError`."""
    ids = list(dict.fromkeys([*broker.active_jobs(), *broker.outbox(), *broker.recent_jobs()]))
    with broker.client.pipeline(transaction=False) as pipe:
        for job in ids:
            pipe.hget(broker.keys.job(job), "spec")
        specs = pipe.execute(raise_on_error=False)
    found = []
    for job, reply in zip(ids, specs, strict=True):
        # No retry that could be shown: it expired, or is unreadable.
        with contextlib.suppress(EmbedstreamError), reading_job(job):
            raw: bytes | None = answered(reply)
            if raw is not None and is_retry_of(decode_spec(raw), status):
                found.append(broker.status(job))
    return found


def is_retry_of(spec: JobSpec, status: JobStatus) -> bool:
    """Whether a job of this spec runs the failed rows of that job again."""
    return spec.retry is not None and status.spec.retry is None and spec.whole_job == status.job


def _refused_by_all(workers: Iterable[WorkerRecord]) -> set[str]:
    """Jobs that no ready worker will ever take; none if there is no ready worker that could say so."""
    ready = [set(worker.refused) for worker in workers if worker.state == "ready"]
    return set.intersection(*ready) if ready else set()


def _queued_bytes(raw: Mapping[bytes, bytes]) -> int:
    """Of a job's hash, which may be damaged."""
    try:
        return counter(raw.get(b"queued"))
    except ValueError:
        return 0


def rate_of(job: str, workers: Iterable[WorkerRecord]) -> Rate:
    """How fast live workers get on with a job, by what they say."""
    return sum((worker.rates.get(job, Rate()) for worker in workers), Rate())


def is_stalled(status: JobStatus, workers: Iterable[WorkerRecord]) -> bool:
    """Whether nothing has moved a job for a minute: no commit, no new block, and no worker computes for it."""
    return status.stalled and rate_of(status.job, workers).tokens == 0


def seconds_left(status: JobStatus, workers: Iterable[WorkerRecord]) -> float | None:
    """Until all rows submitted so far are embedded; None if nobody works on them."""
    if status.state.ended:
        return 0.0
    workers = list(workers)
    rate = rate_of(status.job, workers).rows
    in_hand = in_hand_of(status.job, workers, status.workers).rows
    left = status.submitted - status.rows - status.failed - in_hand
    return max(0, left) / rate if rate > 0 else None
