"""The broker: runs the atomic steps, claims blocks, and answers questions about a queue."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import redis
import redis.asyncio
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from embedstream.errors import BrokerError, RecordDamaged, UsageError
from embedstream.failpoints import reach, reach_step
from embedstream.jobs import JobState, JobStatus
from embedstream.keys import GROUP, QUEUES, RELEASED, Keys, job_keys, job_of
from embedstream.queue import scripts
from embedstream.queue.job_record import parse_status, reading_job
from embedstream.queue.replacing import enlist, replacing
from embedstream.queue.steps import MOST_BLOCKS, PROMPT, CommitBlock, Step, Steps
from embedstream.queue.workers import WorkerRecord
from embedstream.records import PartContent
from embedstream.server.connection import REQUEST_TIMEOUT_SECONDS
from embedstream.server.foreign import leaving_out, names, reading

T = TypeVar("T")

Fields = dict[bytes, bytes]

PARTS_AT_ONCE = 1000
"""Parts asked for at once."""

KEYS_AT_ONCE = 500
"""Keys looked at by one command."""

SHARDS_AT_ONCE = 64
"""Records asked for at once: some hundred kilobytes."""


@dataclass(frozen=True)
class Claimed:
    """An entry that this consumer holds."""

    stream: str
    entry: str
    fields: Fields
    deliveries: int
    """1 at first; more means that earlier holders died with it."""


class Broker(Steps):
    """Synchronous broker of one queue over one client."""

    def __init__(self, client: redis.Redis, queue: str) -> None:
        super().__init__(queue)
        self.client = client
        # redis-py types its replies as unions over all its configurations; ours are bytes.
        self._raw: Any = client

    def of(self, queue: str) -> Broker:
        """The broker of another queue, over the same client."""
        return Broker(self.client, queue)

    def run(self, step: Step[T]) -> T:
        """Run a step.

        Raises:
            RecordDamaged: what lies under its keys makes no sense.
            redis.RedisError: as redis-py raises it.
        """
        script, count = scripts.load(step.script), len(step.keys)
        reach_step(step.script, "before")
        with _reading_keys(self.keys, step.keys):
            try:
                raw = self.client.evalsha(script.sha, count, *step.keys, *step.args)
            except NoScriptError:
                raw = self.client.eval(script.body, count, *step.keys, *step.args)
            reach_step(step.script, "after")
            return step.parse(raw)

    # Claiming

    def claim(self, consumer: str, jobs: Sequence[str], count: int, block_ms: int) -> list[Claimed]:
        """New blocks of `jobs`, at most `count` per job, waiting up to `block_ms` (0: not at all) for the first.

        Blocks that are done already (adopted meanwhile) are dropped and not returned. Entries that are no blocks are.

        Raises:
            RecordDamaged: the keys of one of the jobs are. Blocks of others may be in this consumer's hands by then.
        """
        if not jobs:
            return []
        streams = {self.keys.blocks(job): job for job in jobs}
        raw = self._read_group("claim", consumer, list(streams), count, block_ms)
        return self._keep_undone(streams, raw)

    def claim_requests(self, consumer: str, count: int, block_ms: int) -> list[Claimed]:
        """New interactive requests."""
        return self._read_group("claim_requests", consumer, [self.keys.interactive], count, block_ms)

    def sweep(self, consumer: str, job: str, idle_ms: int, count: int) -> list[Claimed]:
        """Blocks of a job whose lease expired or that were handed back, now this consumer's; done ones are dropped."""
        stream = self.keys.blocks(job)
        return self._keep_undone({stream: job}, self._auto_claim("sweep", stream, consumer, idle_ms, count))

    def sweep_requests(self, consumer: str, idle_ms: int, count: int) -> list[Claimed]:
        """Interactive requests whose worker died."""
        return self._auto_claim("sweep_requests", self.keys.interactive, consumer, idle_ms, count)

    def _read_group(self, step: str, consumer: str, streams: list[str], count: int, block_ms: int) -> list[Claimed]:
        reach(f"{step}.before")
        try:
            with _reading_keys(self.keys, streams):
                raw = self._raw.xreadgroup(
                    GROUP, consumer, dict.fromkeys(streams, ">"), count=count, block=block_ms or None
                )
        except ResponseError as error:
            if not _stream_gone(error):
                raise
            # A job ended between the listing and the read, or its stream was taken: others do not wait for it.
            alone = streams if len(streams) > 1 else []
            return [claimed for stream in alone for claimed in self._read_group(step, consumer, [stream], count, 0)]
        if raw:
            reach(f"{step}.after")
        return [
            Claimed(stream.decode(), entry.decode(), fields, 1)
            for stream, entries in raw or ()
            for entry, fields in entries
        ]

    def _auto_claim(self, step: str, stream: str, consumer: str, idle_ms: int, count: int) -> list[Claimed]:
        found: list[tuple[str, Fields]] = []
        cursor, deleted = "0-0", False
        reach(f"{step}.before")
        try:
            with _reading_keys(self.keys, [stream]):
                while len(found) < count:
                    raw = self._raw.xautoclaim(stream, GROUP, consumer, idle_ms, cursor, count=count - len(found))
                    cursor = raw[0].decode()
                    for entry, fields in raw[1]:
                        if entry is None or not fields:
                            deleted = True
                        else:
                            found.append((entry.decode(), fields))
                    if cursor == "0-0":
                        break
                if deleted:
                    self._acknowledge_deleted(stream, consumer)
        except ResponseError as error:
            if not _stream_gone(error):
                raise
            return []
        if not found:
            return []
        reach(f"{step}.after")
        with self._raw.pipeline(transaction=False) as pipe:
            for entry, _ in found:
                pipe.xpending_range(stream, GROUP, entry, entry, 1)
            pending = pipe.execute(raise_on_error=False)
        claimed: list[Claimed] = []
        for (entry, fields), rows in zip(found, pending, strict=True):
            if isinstance(rows, ResponseError) and _stream_gone(rows):
                return []
            if isinstance(rows, Exception):
                raise rows
            # Whoever claims an entry may say any count.
            deliveries = max(1, int(rows[0]["times_delivered"])) if rows else 1
            claimed.append(Claimed(stream, entry, fields, deliveries))
        return claimed

    def _acknowledge_deleted(self, stream: str, consumer: str) -> None:
        """Redis 6.2 keeps deleted entries pending and names no id: find them among this consumer's own."""
        for row in self._raw.xpending_range(stream, GROUP, "-", "+", 1000, consumername=consumer):
            entry = row["message_id"]
            if not self._raw.xrange(stream, entry, entry):
                self._raw.xack(stream, GROUP, entry)

    def _keep_undone(self, streams: Mapping[str, str], claimed: list[Claimed]) -> list[Claimed]:
        if not claimed:
            return []
        # What has no address cannot be done: it is the caller's to say what becomes of its job.
        addresses = [block_address(c.fields) for c in claimed]
        with self._raw.pipeline(transaction=False) as pipe:
            for c, address in zip(claimed, addresses, strict=True):
                if address is not None:
                    pipe.getbit(self.keys.done(streams[c.stream], address[0]), address[1])
            with _reading_keys(self.keys, list(streams)):
                done = iter(pipe.execute())
        kept: list[Claimed] = []
        for c, address in zip(claimed, addresses, strict=True):
            if address is not None and next(done):
                block = CommitBlock(*address, b"", c.entry, entry_size(c.fields))
                self.run(self.drop(streams[c.stream], [block]))
            else:
                kept.append(c)
        return kept

    def pending(self, stream: str, consumer: str) -> list[str]:
        """Ids of the entries that the consumer holds, without re-delivering them; none if this is no stream."""
        try:
            with _leaving_out(stream):
                rows = self._raw.xpending_range(stream, GROUP, "-", "+", 10_000, consumername=consumer)
                return [row["message_id"].decode() for row in rows]
        except ResponseError as error:
            if not _stream_gone(error):
                raise
        return []

    def suspected(self, job: str, part: int, block: int) -> tuple[int, ...]:
        """The chunks, by their place in the block, with which holders of the block died when they tried them alone.

        A note that makes no sense is none.
        """
        with leaving_out(f"{self.keys.suspect(job)}, the note {part}:{block}"):
            raw = self._raw.hget(self.keys.suspect(job), f"{part}:{block}")
            return tuple(map(int, raw.split(b","))) if raw else ()
        return ()

    def prompt_tries(self, job: str) -> tuple[str, ...]:
        """The workers that died of a job's prompt, the last of which may be trying it still; or `(PROVEN,)`.

        A note that makes no sense is none.
        """
        with leaving_out(f"{self.keys.suspect(job)}, the note of the prompt"):
            raw = self._raw.hget(self.keys.suspect(job), PROMPT)
            return tuple(raw.decode().split(",")) if raw else ()
        return ()

    def receive(self, key: str, seconds: float) -> bytes | None:
        """Take the first item of a list, waiting so long for one; None if none came."""
        item = self._raw.blpop([key], timeout=seconds)
        return None if item is None else item[1]

    def free_finalize(self, job: str) -> None:
        """Let a job of the outbox be taken at once: for when the finalizer that leased it is surely gone."""
        with _leaving_out(self.keys.finalize):
            self._raw.zadd(self.keys.finalize, {job: 0}, xx=True)

    # Questions

    def is_closing(self, job: str) -> bool:
        """Whether workers may still commit what they hold of a job that was cancelled. Raises `RecordDamaged`."""
        with reading_job(job):
            return int(self._raw.hget(self.keys.job(job), "closing") or 0) > 0

    def active_jobs(self) -> list[str]:
        """Jobs that still have blocks to do, oldest first."""
        return list(self.births())

    def births(self) -> dict[str, float]:
        """Jobs that still have blocks to do, oldest first, and when each was made (ms)."""
        made: dict[bytes, float] = {}
        with _leaving_out(self.keys.jobs):
            made = dict(self._raw.zrange(self.keys.jobs, 0, -1, withscores=True))
        return {name: made[name.encode()] for name in names(self.keys.jobs, made)}

    def recent_jobs(self) -> list[str]:
        """Ended jobs, newest first."""
        return self._listed(self.keys.recent, desc=True)

    def outbox(self) -> list[str]:
        """Jobs that wait to be finalized, or whose finalizer's lease runs."""
        return self._listed(self.keys.finalize)

    def unfinished(self) -> bool:
        """Whether any job of the queue is not ended yet."""
        return bool(self.births() or self.outbox())

    def backlog(self, job: str) -> int:
        """Blocks of a job that are queued or in a worker's hands."""
        with reading_job(job):
            return int(self._raw.xlen(self.keys.blocks(job)))

    def unclaimed(self, job: str) -> bool:
        """Whether no worker holds some of a job's blocks."""
        pending = self._raw.xpending(self.keys.blocks(job), GROUP)
        held: int = sum(owner["pending"] for owner in pending["consumers"] or () if owner["name"].decode() != RELEASED)
        return self.backlog(job) > held

    def is_awaited(self, request: str) -> bool:
        """Whether the caller of an interactive request still waits."""
        return bool(self._raw.exists(self.keys.caller(request)))

    def knows(self, job: str) -> bool:
        """Whether anything lies under the job's name, whatever it is."""
        return bool(self._raw.exists(self.keys.job(job)))

    def status(self, job: str) -> JobStatus:
        """Raises `JobUnknown`, `RecordDamaged`, `UsageError` for a spec of another version."""
        with self._raw.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.keys.job(job))
            pipe.time()
            with reading_job(job):
                raw, (seconds, micros) = pipe.execute()
        return parse_status(job, raw, seconds + micros / 1e6)

    def stored_spec(self, job: str) -> bytes:
        """A job's spec as it was created with; empty if there is no such job. Raises `RecordDamaged`."""
        with reading_job(job):
            return self._raw.hget(self.keys.job(job), "spec") or b""

    def ranges(self, job: str) -> str:
        """The ranges of a job's int8 columns, as `encode_ranges` gives them; empty before a worker has
        said them. Raises `RecordDamaged`."""
        with reading_job(job):
            return (self._raw.hget(self.keys.job(job), "ranges") or b"").decode()

    def prove_keys(self, job: str, parts: int) -> None:
        """Raise `RecordDamaged` if one of the keys that the job's blocks need is of another type."""
        keys = self.keys
        for first in range(0, max(1, parts), PARTS_AT_ONCE):
            with self._raw.pipeline(transaction=False) as pipe:
                pipe.xlen(keys.blocks(job))
                pipe.hexists(keys.shards(job), "")
                for part in range(first, min(parts, first + PARTS_AT_ONCE)):
                    pipe.getbit(keys.done(job, part), 0)
                    pipe.getrange(keys.sums(job, part), 0, 0)
                with reading_job(job):
                    pipe.execute()

    def is_damaged(self, job: str) -> bool:
        """Whether what lies in Redis about a job makes no sense. Raises `JobUnknown`."""
        try:
            self.prove_keys(job, len(self.status(job).spec.parts))
        except RecordDamaged:
            return True
        except UsageError:  # of another version
            pass
        return False

    def keys_below(self, job: str) -> list[str]:
        """All keys of a job but its hash, whatever lies under them."""
        pattern = _literal(f"{self.keys.job(job)}:") + "*"
        return names(pattern, self._raw.scan_iter(match=pattern, count=10_000))

    def unlink_job(self, job: str, parts: int) -> None:
        """Remove all that lies in Redis about a job."""
        self._raw.unlink(*job_keys(self.keys, job, parts), self.keys.blocks(job))

    def unlist(self, jobs: Sequence[str]) -> None:
        """Take jobs off the list of ended ones."""
        if jobs:
            replacing(self.client, self.keys.recent, "zset", lambda: self._raw.zrem(self.keys.recent, *jobs))

    def remove_orphans(self) -> int:
        """Remove keys of jobs that have no hash any more, and that would never expire; how many there were."""
        prefix, removed = self.keys.job(""), 0
        for key in list(self._raw.scan_iter(match=f"{_literal(prefix)}*:*", count=KEYS_AT_ONCE)):
            job = prefix.encode() + key.removeprefix(prefix.encode()).partition(b":")[0]
            if self._raw.ttl(key) == -1 and not self._raw.exists(job):
                removed += self._raw.unlink(key)
        return removed

    def state(self, job: str) -> JobState | None:
        """A job's state; None if there is no such job. Raises `RecordDamaged`."""
        with reading_job(job):
            raw = self._raw.hget(self.keys.job(job), "state")
            return None if raw is None else JobState(raw.decode())

    def next_block(self, job: str, part: int) -> int:
        """The number that the part's next block must have. Raises `RecordDamaged`."""
        with reading_job(job):
            return int(self._raw.hget(self.keys.job(job), f"next:{part}") or 0)

    def contents(self, job: str, parts: int) -> list[PartContent | None]:
        """What was read of each part, as it was sealed with; None for one of which that is not known."""
        with reading_job(job):
            raws = self._raw.hmget(self.keys.job(job), [f"content:{part}" for part in range(parts)]) if parts else []
        contents: list[PartContent | None] = [None] * parts
        for part, raw in enumerate(raws):
            with leaving_out(f"{self.keys.job(job)}, the content of part {part}"):
                contents[part] = msgspec.json.decode(raw, type=PartContent) if raw else None
        return contents

    def sums(self, job: str, part: int, first: int, count: int) -> bytes:
        """The 8-byte sums of `count` submitted blocks, fewer if there are not so many. Raises `RecordDamaged`."""
        with reading_job(job):
            raw: bytes = self._raw.getrange(self.keys.sums(job, part), first * 8, (first + count) * 8 - 1)
            return raw

    def shard_records(self, job: str) -> Iterator[bytes]:
        """The committed shards' records as JSON, by name; asked for in pieces, so that others are served meanwhile.

        Raises `BrokerError` for one that is gone by then, `RecordDamaged`.
        """
        listed = sorted(self.shard_names(job))
        for start in range(0, len(listed), SHARDS_AT_ONCE):
            with reading_job(job):
                records = self._raw.hmget(self.keys.shards(job), listed[start : start + SHARDS_AT_ONCE])
            if None in records:
                raise BrokerError(f"job {job}: records of shards vanish from Redis: run the same embed-submit again")
            yield from records

    def shard_names(self, job: str) -> frozenset[str]:
        """The committed shards. Raises `RecordDamaged`."""
        with reading_job(job):
            return frozenset(name.decode() for name in self._raw.hkeys(self.keys.shards(job)))

    def memory_bound(self, wanted: int) -> int:
        """The bound on queued bytes: `wanted`, or a quarter of the server's `maxmemory` if that is told and less."""
        try:
            most = int(self._raw.info("memory").get("maxmemory", 0))
        except ResponseError:  # forbidden to this user, or a server without INFO
            return wanted
        return min(wanted, most // 4) if most else wanted

    # Workers

    def heartbeat(self, record: WorkerRecord, expire_seconds: float) -> None:
        """Say that a worker lives."""
        now = self._now_ms()
        self._raw.set(self.keys.worker(record.name), msgspec.json.encode(record), px=int(expire_seconds * 1000))
        enlist(self.client, self.keys.workers, record.name, now, 86_400)
        enlist(self.client, QUEUES, self.queue, now // 1000, 86_400 * 30)

    def count_workers(self, expire_seconds: float) -> int:
        """How many workers of the queue gave a sign of life within so many seconds."""
        with _leaving_out(self.keys.workers):
            return int(self._raw.zcount(self.keys.workers, self._now_ms() - int(expire_seconds * 1000), "+inf"))
        return 0

    def leave(self, name: str) -> None:
        """Say that a worker is gone."""
        with self._raw.pipeline(transaction=False) as pipe:
            pipe.delete(self.keys.worker(name))
            pipe.zrem(self.keys.workers, name)
            with _leaving_out(self.keys.workers):
                pipe.execute()

    def is_alive(self, name: str) -> bool:
        """Whether a worker of this name has given a sign of life that still counts."""
        return bool(self._raw.exists(self.keys.worker(name)))

    def workers(self) -> list[WorkerRecord]:
        """The live workers of the queue; names of dead ones are forgotten."""
        listed = self._listed(self.keys.workers)
        if not listed:
            return []
        raws = self._raw.mget([self.keys.worker(name) for name in listed])
        live, dead = [], []
        for name, raw in zip(listed, raws, strict=True):
            if raw is None:
                dead.append(name)
            else:
                with _leaving_out(self.keys.worker(name)):
                    live.append(msgspec.json.decode(raw, type=WorkerRecord))
        horizon = self._now_ms() - 3_600_000
        if dead:
            self._raw.zremrangebyscore(self.keys.workers, "-inf", horizon)
        return live

    def announce(self) -> None:
        """Put the queue on the list of queues."""
        enlist(self.client, QUEUES, self.queue, self._now_ms() // 1000, 86_400 * 30)

    def queues(self) -> list[str]:
        """Queues with a sign of life in the last 30 days, but for those whose keys are forbidden to this user."""
        listed = self._listed(QUEUES, self._now_ms() // 1000 - 30 * 86_400, "+inf", byscore=True)
        with self._raw.pipeline(transaction=False) as pipe:
            for name in listed:
                pipe.exists(Keys(name).jobs)
            told = pipe.execute(raise_on_error=False)
        return [name for name, answer in zip(listed, told, strict=True) if not isinstance(answer, NoPermissionError)]

    def dead_consumers(self, job: str, living: Iterable[str]) -> list[str]:
        """Consumers of a job's stream that belong to no living worker and hold nothing."""
        return [name for name, holds in self._others(job, living).items() if not holds]

    def lost(self, job: str, living: Iterable[str]) -> dict[str, int]:
        """Consumers of a job's stream that belong to no living worker, and how many blocks each of them died with."""
        return {name: holds for name, holds in self._others(job, living).items() if holds}

    def _others(self, job: str, living: Iterable[str]) -> dict[str, int]:
        keep, stream = {*living, RELEASED}, self.keys.blocks(job)
        try:
            with _leaving_out(stream):
                found = {row["name"]: row["pending"] for row in self._raw.xinfo_consumers(stream, GROUP)}
                return {name: found[name.encode()] for name in names(stream, found) if name not in keep}
        except ResponseError as error:
            if not _stream_gone(error):
                raise
        return {}

    def _listed(self, key: str, *bounds: float | str, **options: bool) -> list[str]:
        """The names in a sorted set; none if it is of another type."""
        listed: list[bytes] = []
        with _leaving_out(key):
            listed = self._raw.zrange(key, *(bounds or (0, -1)), **options)
        return names(key, listed)

    def _now_ms(self) -> int:
        seconds, micros = self._raw.time()
        return int(seconds * 1000 + micros // 1000)


class AsyncBroker(Steps):
    """What an interactive request needs of a broker, over an asyncio client. A reply is waited for for some seconds."""

    def __init__(self, client: redis.asyncio.Redis, queue: str) -> None:
        super().__init__(queue)
        self._raw: Any = client
        self._unknown: set[str] = set()
        """Scripts that the server did not know. fakeredis closes a connection after each error, so that the script may
        get there only when the caller tries again."""

    async def run(self, step: Step[T]) -> T:
        """As `Broker.run`."""
        script, count = scripts.load(step.script), len(step.keys)
        reach_step(step.script, "before")
        with _reading_keys(self.keys, step.keys):
            try:
                if step.script in self._unknown:
                    raise NoScriptError
                raw = await _in_time(self._raw.evalsha(script.sha, count, *step.keys, *step.args))
            except NoScriptError:
                self._unknown.add(step.script)
                raw = await _in_time(self._raw.eval(script.body, count, *step.keys, *step.args))
            reach_step(step.script, "after")
            return step.parse(raw)

    async def receive(self, key: str, seconds: float) -> bytes | None:
        """As `Broker.receive`."""
        item = await _in_time(self._raw.blpop([key], timeout=seconds))
        return None if item is None else item[1]


async def _in_time(reply: Awaitable[Any]) -> Any:
    """Raises `redis.TimeoutError`."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            return await reply
    except TimeoutError as error:
        raise redis.TimeoutError(f"no reply in {REQUEST_TIMEOUT_SECONDS:g} s") from error


def _reading_keys(keys: Keys, named: Sequence[str]) -> AbstractContextManager[None]:
    """`reading` for a command on these keys, of which the first is what it is about."""
    job = job_of(keys, named[0])
    return reading_job(job) if job else reading(named[0], _REMOVE)


def _leaving_out(key: str) -> AbstractContextManager[None, bool]:
    return leaving_out(key, _REMOVE)


_REMOVE = "remove this key"


def _literal(text: str) -> str:
    """A text as a pattern that matches itself."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


def block_address(fields: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    """Part and block of a stream entry; None if it has none, so that nobody can ever commit it."""
    try:
        part, block = int(fields[b"part"]), int(fields[b"block"])
    except (KeyError, ValueError):
        return None
    return (part, block) if part >= 0 and 0 <= block < MOST_BLOCKS else None


def entry_size(fields: Mapping[bytes, bytes]) -> int:
    """What an entry counts against the queue's bound: as `Entry.size` of the block that was submitted."""
    return len(fields.get(b"body", b"")) + len(fields.get(b"refused", b""))


def _stream_gone(error: ResponseError) -> bool:
    """Whether the stream or its group vanished: its job ended, or Redis was emptied."""
    text = str(error)
    # The last is fakeredis', where Redis says NOGROUP.
    return text.startswith(("NOGROUP", "UNBLOCKED")) or "no such key" in text or "requires the key to exist" in text
