"""The atomic steps, described apart from the connection that runs them.

Each function of `Steps` builds one `Step`: a script with its keys and arguments, and how to read its answer. `Broker`
(synchronous) and `AsyncBroker` run them. Every step may be run twice: clients retry after lost replies.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from embedstream.errors import BrokerError
from embedstream.jobs import JobSpec, JobState
from embedstream.keys import RELEASED, Keys
from embedstream.outputs import encode_ranges
from embedstream.queue import scripts
from embedstream.queue.blocks import MOST_BLOCKS as MOST_BLOCKS
from embedstream.queue.blocks import Entry
from embedstream.records import PartContent, ShardRecord
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
    OTHER_RANGES = "OTHER_RANGES"  # the job's int8 columns have other ranges; detail: which, by `encode_ranges`
    UNKNOWN_JOB = "UNKNOWN_JOB"
    TAKEN = "TAKEN"
    NONE = "NONE"
    STALE = "STALE"  # another program holds the lease now
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


def make_step(
    script: str,
    parse: Callable[[Any], T],
    keys: Mapping[str, str],
    args: Mapping[str, Argument],
    more_keys: Iterable[str] = (),
    more_args: Iterable[Argument] = (),
) -> Step[T]:
    """A step, its keys and arguments named as its script names them.

    Raises:
        SignatureError: the script takes others, or in another order.
    """
    below, behind, signature = tuple(more_keys), tuple(more_args), scripts.load(script)
    signature.keys.check(script, tuple(keys), bool(below))
    signature.args.check(script, tuple(args), bool(behind))
    return Step(script, (*keys.values(), *below), (*args.values(), *behind), parse)


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
        return make_step(
            "create",
            _answer,
            {
                "job": keys.job(job),
                "jobs": keys.jobs,
                "stream": keys.blocks(job),
                "shards": keys.shards(job),
                "suspect": keys.suspect(job),
                "recent": keys.recent,
            },
            {
                "id": job,
                "spec": spec.encode(),
                "max_errors": max_errors,
                "parts": len(spec.parts),
                "space": spec.retry.space if spec.retry else "",
            },
        )

    def submit(self, job: str, entry: Entry, bound: int) -> Step[Answer]:
        """Add a part's next block: OK, DUPLICATE, GAP(next), FULL, CHANGED(block), ENDED(state), UNKNOWN_JOB."""
        keys = self.keys
        fields = [item for pair in entry.fields().items() for item in pair]
        rows = entry.rows + entry.refused_rows
        return make_step(
            "submit",
            _answer,
            {"job": keys.job(job), "stream": keys.blocks(job), "jobs": keys.jobs, "bytes": keys.bytes},
            {
                "part": entry.part,
                "block": entry.block,
                "size": entry.size,
                "bound": bound,
                "rows": rows,
                "sum": entry.sum,
            },
            more_args=fields,
        )

    def seal(self, job: str, part: int, blocks: int, content: PartContent | None = None) -> Step[Answer]:
        """Say how many blocks a part has, and what was read: OK, MISSING(next), CHANGED, ENDED(state), UNKNOWN_JOB."""
        read = "" if content is None else msgspec.json.encode(content)
        args: dict[str, Argument] = {"id": job, "part": part, "blocks": blocks, "content": read}
        return make_step("seal", _answer, self._job_keys(job), args)

    def renew(self, stream: str, consumer: str, entries: Sequence[str]) -> Step[list[str]]:
        """Reset the idle time of my entries; answers the ids that I no longer own."""
        return make_step("renew", _ids, {"stream": stream}, {"consumer": consumer}, more_args=entries)

    def release(self, stream: str, consumer: str, entries: Sequence[str], died: bool = False) -> Step[Answer]:
        """Hand entries back, claimable at once: OK. `died`: the consumer is dead or dying, and that is counted."""
        args: dict[str, Argument] = {"consumer": consumer, "nobody": RELEASED, "taken_back": 0 if died else 1}
        return make_step("release", _answer, {"stream": stream}, args, more_args=entries)

    def drop(self, job: str, blocks: Iterable[CommitBlock]) -> Step[Answer]:
        """Clear claimed entries whose blocks are done: OK."""
        keys = self.keys
        groups = [item for b in blocks for item in (b.part, b.block, b.entry, b.size)]
        named = {"job": keys.job(job), "stream": keys.blocks(job), "bytes": keys.bytes}
        return make_step("drop", _answer, named, {}, more_args=groups)

    def commit(
        self, record: ShardRecord, blocks: Iterable[CommitBlock], spec: bytes = b"", worked_ms: int = 0
    ) -> Step[Answer]:
        """Commit a durable shard, or adopt one found on disk (blocks without entries): COMMITTED, ALREADY,
        CONFLICT(blocks), CHANGED(blocks), DROPPED(state), OTHER_SPACE(space), OTHER_RANGES(ranges), UNKNOWN_JOB.

        `spec`: what the shard was made by, as it lay in Redis; if the job has another by now, that is DROPPED.
        `worked_ms`: how long the worker was at work for this shard, from which the queue's pace is known.
        """
        keys, job = self.keys, record.job
        groups = [item for b in blocks for item in (b.part, b.block, b.sum, b.entry, b.size)]
        r = record
        return make_step(
            "commit",
            _answer,
            {
                "job": keys.job(job),
                "stream": keys.blocks(job),
                "shards": keys.shards(job),
                "jobs": keys.jobs,
                "bytes": keys.bytes,
                "finalize": keys.finalize,
                "suspect": keys.suspect(job),
                "pace": keys.pace,
            },
            {
                "id": job,
                "name": r.name,
                "record": msgspec.json.encode(r),
                "space": r.space,
                "ranges": encode_ranges(r.outputs),
                "rows": r.rows,
                "failed": r.failed,
                "skipped": r.skipped,
                "truncated": r.truncated,
                "duplicates": r.duplicates,
                "reused": r.reused,
                "tokens": r.tokens,
                "padded": r.padded,
                "spec": spec,
                "worker": r.worker,
                "worked": worked_ms,
            },
            more_args=groups,
        )

    def calibrate(self, job: str, ranges: str) -> Step[Answer]:
        """Say what a job's int8 columns stand for, as `encode_ranges` has it, unless that is said: OK,
        OTHER_RANGES(ranges), ENDED(state), UNKNOWN_JOB."""
        return make_step("calibrate", _answer, {"job": self.keys.job(job)}, {"ranges": ranges})

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
        keys = {"job": self.keys.job(job), "suspect": self.keys.suspect(job)}
        return make_step("suspect", _answer, keys, {"what": what, "noted": ",".join(names)})

    def request(self, request: str, payload: bytes, wait_ms: int, most: int) -> Step[Answer]:
        """Put an interactive request on its stream: OK, BUSY."""
        keys = self.keys
        fields: tuple[Argument, ...] = ("v", 1, "request", request, "body", payload)
        named = {"interactive": keys.interactive, "caller": keys.caller(request)}
        return make_step("request", _answer, named, {"patience": wait_ms, "most": most}, more_args=fields)

    def reply(self, request: str, entry: str, payload: bytes, keep_ms: int) -> Step[Answer]:
        """Answer an interactive request: OK, GONE."""
        keys = self.keys
        named = {"interactive": keys.interactive, "caller": keys.caller(request), "reply": keys.reply(request)}
        return make_step("reply", _answer, named, {"entry": entry, "payload": payload, "keep": keep_ms})

    def cancel(
        self, job: str, verdict: JobState = JobState.CANCELLED, reason: str = "", grace_ms: int = 0
    ) -> Step[Answer]:
        """End a job early as cancelled or failed: OK, TOO_LATE(state), UNKNOWN_JOB.

        `grace_ms`: for so long workers may commit what they hold of it, before its manifest is written.
        """
        args: dict[str, Argument] = {
            "id": job,
            "verdict": verdict.value,
            "reason": reason,
            "grace": grace_ms,
            "nobody": RELEASED,
        }
        return make_step("cancel", _answer, self._job_keys(job), args)

    def forget(self, job: str, below: Sequence[str]) -> Step[Answer]:
        """Remove a damaged job and whatever lies `below` its hash: OK."""
        keys = self.keys
        named = {
            "job": keys.job(job),
            "jobs": keys.jobs,
            "bytes": keys.bytes,
            "finalize": keys.finalize,
            "recent": keys.recent,
            "ingest": keys.ingest,
        }
        return make_step("forget", _answer, named, {"id": job}, more_keys=below)

    def take_finalize(self, job: str, lease_ms: int) -> Step[Lease | None]:
        """Lease a job of the outbox; None if it is not there or leased. The same step again answers the same lease."""
        args: dict[str, Argument] = {"id": job, "lease": lease_ms, "name": uuid.uuid4().hex}
        keys = {"job": self.keys.job(job), "finalize": self.keys.finalize}
        return make_step("take_finalize", _lease(job), keys, args)

    def finalized(self, lease: Lease, state: JobState, ttl_ms: int, manifest: str = "") -> Step[Answer]:
        """Record that the manifest stands: OK, STALE, UNKNOWN_JOB.

        With the state `finalizing`: that it could not be written, and may be tried again `ttl_ms` later at most.
        """
        keys, job = self.keys, lease.job
        return make_step(
            "finalized",
            _answer,
            {
                "job": keys.job(job),
                "finalize": keys.finalize,
                "shards": keys.shards(job),
                "suspect": keys.suspect(job),
                "recent": keys.recent,
            },
            {
                "id": job,
                "epoch": lease.epoch,
                "state": state.value,
                "ended": lease.now,
                "ttl": ttl_ms,
                "manifest": manifest,
            },
        )

    def look(self, jobs: Sequence[str]) -> Step[list[Backlog]]:
        """What lies in the streams of these jobs; nothing for one whose stream is gone."""
        return make_step("look", _backlogs, {}, {"nobody": RELEASED}, more_keys=map(self.keys.blocks, jobs))

    def retire(self, stream: str, consumer: str) -> Step[Answer]:
        """Remove a consumer that has nothing pending: OK, PENDING."""
        return make_step("retire", _answer, {"stream": stream}, {"consumer": consumer})

    def _job_keys(self, job: str) -> dict[str, str]:
        keys = self.keys
        return {
            "job": keys.job(job),
            "stream": keys.blocks(job),
            "jobs": keys.jobs,
            "bytes": keys.bytes,
            "finalize": keys.finalize,
        }


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
