"""What a queue must be after any steps, in plain Python: the oracle of the broker's state machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from embedstream.jobs import JobState
from embedstream.keys import RELEASED
from embedstream.queue.steps import Answer, Code, CommitBlock

Address = tuple[int, int]  # (part, block)


@dataclass
class Pending:
    owner: str
    deliveries: int
    expired: bool = False


@dataclass
class JobModel:
    """One job. `entries` and `pending` are of its present life only."""

    parts: int
    other: bool = False  # whether it was made by the other spec
    state: JobState = JobState.SUBMITTING
    verdict: str = ""
    space: str = ""
    ranges: str = ""
    epoch: int = 0
    leased: bool = False
    closing: int = 0  # blocks in hands when it was cancelled, less those that were committed since
    graced: bool = False  # whether finalizers wait for them
    added: int = 0
    submitted: int = 0
    next: list[int] = field(default_factory=list)
    sealed: dict[int, int] = field(default_factory=dict)
    sums: dict[Address, bytes] = field(default_factory=dict)
    done: set[Address] = field(default_factory=set)
    shards: set[str] = field(default_factory=set)
    suspects: set[Address] = field(default_factory=set)
    entries: dict[str, tuple[Address, int]] = field(default_factory=dict)  # in order of entry ids
    undelivered: list[str] = field(default_factory=list)
    pending: dict[str, Pending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.next = [0] * self.parts

    @property
    def open(self) -> bool:
        return self.state in (JobState.SUBMITTING, JobState.RUNNING)

    @property
    def finalizing(self) -> bool:
        return self.state is JobState.FINALIZING

    @property
    def ended(self) -> bool:
        return self.state.ended

    @property
    def queued(self) -> int:
        return sum(size for _, size in self.entries.values())

    def known_length(self, part: int) -> int:
        return max((block + 1 for p, block in self.sums if p == part), default=0)

    def queue(self, entry: str, part: int, block: int, size: int) -> None:
        self.entries[entry] = ((part, block), size)
        self.undelivered.append(entry)

    def clear(self, entry: str) -> None:
        self.entries.pop(entry, None)
        self.pending.pop(entry, None)

    def claim(self, consumer: str, count: int) -> list[str]:
        """Entries that the consumer must get: the next ones, save those that are done."""
        taken, self.undelivered = self.undelivered[:count], self.undelivered[count:]
        for entry in taken:
            self.pending[entry] = Pending(consumer, 1)
        return self.keep_undone(taken)

    def sweep(self, consumer: str, count: int) -> list[tuple[str, int]]:
        """Entries with their deliveries that the consumer must get."""
        taken = [entry for entry in self.entries if entry in self.pending and self.pending[entry].expired][:count]
        for entry in taken:
            self.pending[entry] = Pending(consumer, self.pending[entry].deliveries + 1)
        return [(entry, self.pending[entry].deliveries) for entry in self.keep_undone(taken)]

    def keep_undone(self, taken: list[str]) -> list[str]:
        kept = [entry for entry in taken if self.entries[entry][0] not in self.done]
        for entry in set(taken) - set(kept):
            self.clear(entry)
        return kept

    def expire(self, consumer: str) -> list[str]:
        """Entries of the consumer whose lease ends now."""
        mine = [entry for entry, p in self.pending.items() if p.owner == consumer]
        for entry in mine:
            self.pending[entry].expired = True
        return mine

    def end(self, verdict: str) -> None:
        self.state, self.verdict, self.leased = JobState.FINALIZING, verdict, False
        self.entries, self.undelivered, self.pending = {}, [], {}

    def finish_if_done(self) -> None:
        if self.state is JobState.RUNNING and self.done >= self.corpus():
            self.end("")

    def corpus(self) -> set[Address]:
        return {(part, block) for part, blocks in self.sealed.items() for block in range(blocks)}


class QueueModel:
    """All jobs of one queue by number; a job that Redis does not know is not there."""

    def __init__(self) -> None:
        self.jobs: dict[int, JobModel] = {}

    def create(self, n: int, parts: int, other: bool) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            self.jobs[n] = JobModel(parts)
            return Answer(Code.CREATED)
        ended_early = job.state in (JobState.CANCELLED, JobState.FAILED)
        if other is not job.other:
            if job.done or not ended_early:
                return Answer(Code.DIFFERS)
            self.jobs[n] = JobModel(parts, other)
            return Answer(Code.CREATED)
        if not ended_early:
            return Answer(Code.EXISTS, detail=job.state)
        job.state, job.verdict, job.epoch = JobState.SUBMITTING, "", job.epoch + 1
        job.next, job.sealed, job.added, job.submitted, job.suspects = [0] * parts, {}, 0, 0, set()
        return Answer(Code.REOPENED)

    def submit(self, n: int, part: int, block: int, sum: bytes, size: int, rows: int, bound: int) -> Answer:
        """On OK the caller queues the entry under the id that Redis gave it."""
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if not job.open:
            return Answer(Code.ENDED, detail=job.state)
        if job.sums.get((part, block), sum) != sum:
            return Answer(Code.CHANGED)
        if block < job.next[part]:
            return Answer(Code.DUPLICATE)
        if part in job.sealed:
            return Answer(Code.CHANGED)
        if block > job.next[part]:
            return Answer(Code.GAP, number=job.next[part])
        if (part, block) not in job.done:
            total, sharing = self.queued(), [other for other in self.jobs.values() if other.open]
            if total and total + size > bound:
                return Answer(Code.FULL)
            if job.queued and len(sharing) > 1 and job.queued + size > bound / len(sharing):
                return Answer(Code.FULL)
        job.sums[part, block] = sum
        job.next[part] += 1
        job.added += 1
        job.submitted += rows
        return Answer(Code.OK)

    def queued(self) -> int:
        return sum(job.queued for job in self.jobs.values())

    def seal(self, n: int, part: int, blocks: int) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if part in job.sealed:
            return Answer(Code.OK if job.sealed[part] == blocks else Code.CHANGED)
        if job.state is not JobState.SUBMITTING:
            return Answer(Code.ENDED, detail=job.state)
        if job.next[part] < blocks:
            return Answer(Code.MISSING, number=job.next[part])
        if job.next[part] > blocks or job.known_length(part) > blocks:
            return Answer(Code.CHANGED)
        job.sealed[part] = blocks
        if len(job.sealed) == job.parts:
            job.state = JobState.RUNNING
            job.finish_if_done()
        return Answer(Code.OK)

    def calibrate(self, n: int, ranges: str) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if job.ranges:
            return Answer(Code.OK) if job.ranges == ranges else Answer(Code.OTHER_RANGES, detail=job.ranges)
        if not job.open and not job.closing > 0:
            return Answer(Code.ENDED, detail=job.state)
        job.ranges = ranges
        return Answer(Code.OK)

    def commit(self, n: int, name: str, blocks: Sequence[CommitBlock], space: str, ranges: str) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if name in job.shards:
            return Answer(Code.ALREADY)
        if not job.open and not job.closing > 0:
            return Answer(Code.DROPPED, detail=job.state)
        if job.space and job.space != space:
            return Answer(Code.OTHER_SPACE, detail=job.space)
        if ranges and job.ranges and job.ranges != ranges:
            return Answer(Code.OTHER_RANGES, detail=job.ranges)
        conflict = [b for b in blocks if (b.part, b.block) in job.done]
        if conflict:
            for b in conflict:
                job.clear(b.entry)
            return Answer(Code.CONFLICT, blocks=tuple((b.part, b.block) for b in conflict))
        changed = tuple((b.part, b.block) for b in blocks if not self.fits(job, b))
        if changed:
            return Answer(Code.CHANGED, blocks=changed)
        for b in blocks:
            job.clear(b.entry)
            job.done.add((b.part, b.block))
            job.suspects.discard((b.part, b.block))
            job.sums[b.part, b.block] = b.sum
        job.shards.add(name)
        job.space, job.ranges = space, ranges or job.ranges
        if job.closing:
            job.closing -= sum(b.entry != "" for b in blocks)
            job.graced = job.graced and job.closing > 0
        job.finish_if_done()
        return Answer(Code.COMMITTED)

    def fits(self, job: JobModel, b: CommitBlock) -> bool:
        return b.block < job.sealed.get(b.part, b.block + 1) and job.sums.get((b.part, b.block), b.sum) == b.sum

    def renew(self, n: int, consumer: str, entries: Sequence[str]) -> list[str]:
        """The entries that the consumer must learn to have lost."""
        job, lost = self.jobs.get(n), []
        for entry in entries:
            pending = job.pending.get(entry) if job else None
            if pending is None or pending.owner != consumer:
                lost.append(entry)
            else:
                pending.expired = False
        return lost

    def release(self, n: int, consumer: str, entries: Sequence[str], died: bool) -> None:
        job = self.jobs.get(n)
        for entry in entries:
            pending = job.pending.get(entry) if job else None
            if job and pending and pending.owner == consumer:
                job.pending[entry] = Pending(RELEASED, max(0, pending.deliveries - (not died)), expired=True)

    def drop(self, n: int, blocks: Sequence[CommitBlock]) -> None:
        job = self.jobs.get(n)
        for b in blocks:
            if job and (b.part, b.block) in job.done:
                job.clear(b.entry)

    def cancel(self, n: int, verdict: JobState, grace_ms: int) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if job.open:
            held = sum(p.owner != RELEASED for p in job.pending.values()) if grace_ms else 0
            job.end(verdict)
            job.closing, job.graced = held, held > 0
            return Answer(Code.OK)
        return Answer(Code.OK) if job.verdict == verdict else Answer(Code.TOO_LATE, detail=job.state)

    def take(self, n: int, lease_ms: int) -> bool:
        """Whether the job can be leased."""
        job = self.jobs.get(n)
        if job is None or not job.finalizing or job.leased or job.graced:
            return False
        job.closing = 0
        job.epoch += 1
        job.leased = lease_ms > 0
        return True

    def finalized(self, n: int, epoch: int, state: JobState) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if job.epoch != epoch:
            return Answer(Code.STALE)
        if job.state is state:
            return Answer(Code.OK)
        if not job.finalizing:
            return Answer(Code.STALE)
        job.state = state
        return Answer(Code.OK)

    def suspect(self, n: int, part: int, block: int) -> Answer:
        job = self.jobs.get(n)
        if job is None:
            return Answer(Code.UNKNOWN_JOB)
        if not job.open:
            return Answer(Code.ENDED, detail=job.state)
        job.suspects.add((part, block))
        return Answer(Code.OK)

    def retire(self, n: int, consumer: str) -> Answer:
        job = self.jobs.get(n)
        owns = job is not None and any(p.owner == consumer for p in job.pending.values())
        return Answer(Code.PENDING if owns else Code.OK)
