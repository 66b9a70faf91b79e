"""The atomic steps, described apart from the connection that runs them.

Each function of `Steps` builds one `Step`: a script with its keys and arguments, and how to read its answer. `Broker`
(synchronous) and `AsyncBroker` run them. Every step may be run twice: clients retry after lost replies.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from embedstream.errors import BrokerError
from embedstream.jobs import JobSpec, JobState
from embedstream.keys import RELEASED, Keys
from embedstream.queue.blocks import MOST_BLOCKS as MOST_BLOCKS
from embedstream.queue.blocks import Entry
from embedstream.records import ShardRecord
from embedstream.server.foreign import reading

T = TypeVar("T")

Argument = str | bytes | int | float

PROMPT, PROVEN = "prompt", "proven"
"""Of the notes about what workers died of: the field of a job's prompt, and its value once one has survived it."""


class Code(enum.StrEnum):
    """What steps answer."""

    OK = "OK"
    CREATED = "CREATED"
    REOPENED = "REOPENED"  # a cancelled or failed job goes on
    EXISTS = "EXISTS"  # detail: its state
    DIFFERS = "DIFFERS"  # the output has another spec; detail: that spec
    DUPLICATE = "DUPLICATE"  # the block is below the part's next
    GAP = "GAP"  # the block is above the part's next; number: the next
    MISSING = "MISSING"  # fewer blocks than the seal says; number: the next
    FULL = "FULL"  # the queue holds as many bytes as it may
    CHANGED = "CHANGED"  # another content stands under this block's number; blocks says which
    ENDED = "ENDED"  # the job takes no more; detail: its state
    COMMITTED = "COMMITTED"
    ALREADY = "ALREADY"  # this very shard is recorded
    CONFLICT = "CONFLICT"  # others committed some of its blocks first; blocks says which
    DROPPED = "DROPPED"  # the job has ended, or another took its place; detail: its state, or `replaced`
    OTHER_SPACE = "OTHER_SPACE"  # the job's vectors are of another space; detail: which
    UNKNOWN_JOB = "UNKNOWN_JOB"
    TAKEN = "TAKEN"
    NONE = "NONE"
    STALE = "STALE"  # somebody else holds the lease now
    TOO_LATE = "TOO_LATE"  # detail: the job's state
    PENDING = "PENDING"
    BUSY = "BUSY"  # too many interactive requests wait
    GONE = "GONE"  # the caller has left


@dataclass(frozen=True)
class Answer:
    """What a step said. Which fields are set depends on the code."""

    code: Code
    detail: str = ""
    number: int = 0
    blocks: tuple[tuple[int, int], ...] = ()  # (part, block)

    @property
    def state(self) -> JobState:
        """The state that `EXISTS`, `ENDED`, `DROPPED` and `TOO_LATE` name. Raises `RecordDamaged` if it is none."""
        with reading("the job's state in Redis", "end the job with embed-cancel"):
            return JobState(self.detail)


@dataclass(frozen=True)
class Lease:
    """A finalize lease: a job that nobody else may say is finalized, unless it is leased again."""

    job: str
    epoch: int
    now: int
    """Redis time of the taking, in ms: the end time that goes into the manifest."""
    verdict: str
    """`cancelled` or `failed` for a job that was ended early, else empty."""


@dataclass(frozen=True)
class Step(Generic[T]):
    """One run of one script."""

    script: str
    keys: tuple[str, ...]
    args: tuple[Argument, ...]
    parse: Callable[[Any], T]


@dataclass(frozen=True)
class CommitBlock:
    """One block of a shard to commit; no entry when the shard is adopted."""

    part: int
    block: int
    sum: bytes
    entry: str = ""
    size: int = 0


@dataclass(frozen=True)
class Backlog:
    """What lies in one job's stream."""

    blocks: int
    claimed: int
    """Those of them that are in workers' hands."""
    oldest_ms: int
    """When the oldest was added, in Redis ms; 0 if there is none."""


class Steps:
    """Builds the steps of one queue."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.keys = Keys(queue)

    def create(self, spec: JobSpec, max_errors: str = "") -> Step[Answer]:
        """Make a job, find it, or reopen it: CREATED, REOPENED, EXISTS(state), DIFFERS(spec).

        A job of another spec that was cancelled or failed before it had a row is forgotten: CREATED.
        """
        keys, job = self.keys, spec.job
        return Step(
            "create",
            (keys.job(job), keys.jobs, keys.blocks(job), keys.shards(job), keys.suspect(job), keys.recent),
            (job, spec.encode(), max_errors, len(spec.parts), spec.retry.space if spec.retry else ""),
            _answer,
        )

    def submit(self, job: str, entry: Entry, bound: int) -> Step[Answer]:
        """Add a part's next block: OK, DUPLICATE, GAP(next), FULL, CHANGED(block), ENDED(state), UNKNOWN_JOB."""
        keys = self.keys
        fields = [item for pair in entry.fields().items() for item in pair]
        rows = entry.rows + entry.refused_rows
        return Step(
            "submit",
            (keys.job(job), keys.blocks(job), keys.jobs, keys.bytes),
            (entry.part, entry.block, entry.size, bound, rows, entry.sum, *fields),
            _answer,
        )

    def seal(self, job: str, part: int, blocks: int) -> Step[Answer]:
        """Say how many blocks a part has: OK, MISSING(next), CHANGED, ENDED(state), UNKNOWN_JOB."""
        return Step("seal", self._job_keys(job), (job, part, blocks), _answer)

    def renew(self, stream: str, consumer: str, entries: Sequence[str]) -> Step[list[str]]:
        """Reset the idle time of my entries; answers the ids that I no longer own."""
        return Step("renew", (stream,), (consumer, *entries), _ids)

    def release(self, stream: str, consumer: str, entries: Sequence[str], died: bool = False) -> Step[Answer]:
        """Hand entries back, claimable at once: OK. `died`: the consumer is dead or dying, and that is counted."""
        return Step("release", (stream,), (consumer, RELEASED, 0 if died else 1, *entries), _answer)

    def drop(self, job: str, blocks: Iterable[CommitBlock]) -> Step[Answer]:
        """Clear claimed entries whose blocks are done: OK."""
        keys = self.keys
        args = [item for b in blocks for item in (b.part, b.block, b.entry, b.size)]
        return Step("drop", (keys.job(job), keys.blocks(job), keys.bytes), tuple(args), _answer)

    def commit(
        self, record: ShardRecord, blocks: Iterable[CommitBlock], spec: JobSpec | None = None, worked_ms: int = 0
    ) -> Step[Answer]:
        """Commit a durable shard, or adopt one found on disk (blocks without entries): COMMITTED, ALREADY,
        CONFLICT(blocks), CHANGED(blocks), DROPPED(state), OTHER_SPACE(space), UNKNOWN_JOB.

        `spec`: what the shard was made by; if the job has another by now, that is DROPPED. `worked_ms`: how long the
        worker was at work for this shard, from which the queue's pace is known.
        """
        keys, job = self.keys, record.job
        groups = [item for b in blocks for item in (b.part, b.block, b.sum, b.entry, b.size)]
        r = record
        return Step(
            "commit",
            (
                keys.job(job),
                keys.blocks(job),
                keys.shards(job),
                keys.jobs,
                keys.bytes,
                keys.finalize,
                keys.suspect(job),
                keys.pace,
            ),
            (
                job,
                r.name,
                msgspec.json.encode(r),
                r.space,
                r.rows,
                r.failed,
                r.skipped,
                r.truncated,
                r.tokens,
                r.padded,
                spec.encode() if spec else "",
                r.worker,
                worked_ms,
                *groups,
            ),
            _answer,
        )

    def suspect(self, job: str, part: int, block: int, chunks: Sequence[int]) -> Step[Answer]:
        """Note the chunks, by their place in the block, that killed their holders: OK, ENDED(state), UNKNOWN_JOB.

        The last of them is the one that is about to be tried alone.
        """
        return self._note(job, f"{part}:{block}", map(str, chunks))

    def suspect_prompt(self, job: str, workers: Sequence[str]) -> Step[Answer]:
        """Note the workers that died of a job's prompt: OK, ENDED(state), UNKNOWN_JOB.

        The last of them is the one that is about to try it. `(PROVEN,)`: a worker has survived it.
        """
        return self._note(job, PROMPT, workers)

    def _note(self, job: str, what: str, names: Iterable[str]) -> Step[Answer]:
        return Step("suspect", (self.keys.job(job), self.keys.suspect(job)), (what, ",".join(names)), _answer)

    def request(self, request: str, payload: bytes, wait_ms: int, most: int) -> Step[Answer]:
        """Put an interactive request on its stream: OK, BUSY."""
        keys = self.keys
        fields: tuple[Argument, ...] = ("v", 1, "request", request, "body", payload)
        return Step("request", (keys.interactive, keys.caller(request)), (wait_ms, most, *fields), _answer)

    def reply(self, request: str, entry: str, payload: bytes, keep_ms: int) -> Step[Answer]:
        """Answer an interactive request: OK, GONE."""
        keys = self.keys
        return Step(
            "reply", (keys.interactive, keys.caller(request), keys.reply(request)), (entry, payload, keep_ms), _answer
        )

    def cancel(self, job: str, verdict: JobState = JobState.CANCELLED, reason: str = "") -> Step[Answer]:
        """End a job early as cancelled or failed: OK, TOO_LATE(state), UNKNOWN_JOB."""
        return Step("cancel", self._job_keys(job), (job, verdict.value, reason), _answer)

    def forget(self, job: str, below: Sequence[str]) -> Step[Answer]:
        """Remove a damaged job and whatever lies `below` its hash: OK."""
        keys = self.keys
        shared = (keys.jobs, keys.bytes, keys.finalize, keys.recent, keys.ingest)
        return Step("forget", (keys.job(job), *shared, *below), (job,), _answer)

    def take_finalize(self, job: str, lease_ms: int) -> Step[Lease | None]:
        """Lease a job of the outbox; None if it is not there or leased. The same step again answers the same lease."""
        args = (job, lease_ms, uuid.uuid4().hex)
        return Step("take_finalize", (self.keys.job(job), self.keys.finalize), args, _lease(job))

    def finalized(self, lease: Lease, state: JobState, ttl_ms: int, manifest: str = "") -> Step[Answer]:
        """Record that the manifest stands: OK, STALE, UNKNOWN_JOB.

        With the state `finalizing`: that it could not be written, and may be tried again `ttl_ms` later at most.
        """
        keys, job = self.keys, lease.job
        return Step(
            "finalized",
            (keys.job(job), keys.finalize, keys.shards(job), keys.suspect(job), keys.recent),
            (job, lease.epoch, state.value, lease.now, ttl_ms, manifest),
            _answer,
        )

    def look(self, jobs: Sequence[str]) -> Step[list[Backlog]]:
        """What lies in the streams of these jobs; nothing for one whose stream is gone."""
        return Step("look", tuple(self.keys.blocks(job) for job in jobs), (RELEASED,), _backlogs)

    def retire(self, stream: str, consumer: str) -> Step[Answer]:
        """Remove a consumer that has nothing pending: OK, PENDING."""
        return Step("retire", (stream,), (consumer,), _answer)

    def _job_keys(self, job: str) -> tuple[str, ...]:
        keys = self.keys
        return (keys.job(job), keys.blocks(job), keys.jobs, keys.bytes, keys.finalize)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _answer(raw: Any) -> Answer:
    try:
        code, rest = Code(_text(raw[0])), raw[1:]
    except (TypeError, IndexError, ValueError) as error:
        raise BrokerError(f"Redis answered {raw!r}, which no step answers: is another version at work?") from error
    match code:
        case Code.GAP | Code.MISSING:
            return Answer(code, number=int(rest[0]))
        case Code.CONFLICT:
            return Answer(code, blocks=_pairs(rest))
        case Code.CHANGED:
            return Answer(code, blocks=_pairs(rest), number=int(rest[-1]))
        case _:
            return Answer(code, detail=_text(rest[0]) if rest else "")


def _pairs(values: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(values[i]), int(values[i + 1])) for i in range(0, len(values) - 1, 2))


def _backlogs(raw: Any) -> list[Backlog]:
    return [Backlog(int(blocks), int(claimed), int(oldest)) for blocks, claimed, oldest in raw]


def _ids(raw: Any) -> list[str]:
    return [_text(value) for value in raw]


def _lease(job: str) -> Callable[[Any], Lease | None]:
    def parse(raw: Any) -> Lease | None:
        if _text(raw[0]) == Code.NONE:
            return None
        return Lease(job=job, epoch=int(raw[1]), now=int(raw[2]), verdict=_text(raw[3]))

    return parse
