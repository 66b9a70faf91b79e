"""A queue of its own on any server, and short ways to run its steps."""

from __future__ import annotations

import itertools
import struct
import uuid
from collections.abc import Sequence
from typing import Any

import redis

from embedstream.jobs import JobSpec, JobState
from embedstream.keys import Keys, job_keys
from embedstream.outputs import Output
from embedstream.queue.blocks import Entry
from embedstream.queue.broker import Broker, Claimed
from embedstream.queue.steps import Answer, Code, CommitBlock, Lease
from embedstream.records import BlockRecord, ShardRecord
from lab.dataset import dense

BOUND = 1_000_000
HOUR_MS = 3_600_000
NO_EXPIRY = -1
"""What PTTL answers; a key that has gone since it was listed is -2."""


def make_entry(part: int, block: int, size: int = 100, rows: int = 10, variant: int = 0) -> Entry:
    """An entry as the steps see it; its body is no Arrow."""
    checksum = bytes([part + 1, block % 256, block // 256, variant, 1, 1, 1, 1])
    return Entry(part, block, rows, 0, 0, size, checksum, b"x" * size, b"")


def in_int8(range: int) -> Output:
    """A column of one number, from 0 to `range`."""
    return Output(name="tiny", kind="dense", dtype="int8", dim=1, ranges=struct.pack("<2f", 0, range))


def make_record(
    job: str, name: str, blocks: Sequence[tuple[int, int]], space: str = "space", range: int = 0, **changed: int
) -> ShardRecord:
    """A shard of 9 rows, 1 failure, 5 tokens computed as 8 for every block. `range`: of its column in int8; 0: none."""
    n = len(blocks)
    counters = {"rows": 9 * n, "failed": n, "skipped": 0, "truncated": 0, "tokens": 5 * n, "padded": 8 * n} | changed
    listed = tuple(BlockRecord(part, block, 9, 1, 0, "") for part, block in blocks)
    return ShardRecord(
        name=name,
        job=job,
        space=space,
        blocks=listed,
        rows=counters["rows"],
        failed=counters["failed"],
        skipped=counters["skipped"],
        truncated=counters["truncated"],
        tokens=counters["tokens"],
        padded=counters["padded"],
        outputs=(dense(3), dense(8, name="bits", dtype="ubinary"), *([in_int8(range)] if range else [])),
        dtype="float32",
        engine="hashing",
        worker="test",
    )


def to_commit(claimed: Claimed) -> CommitBlock:
    fields = claimed.fields
    return CommitBlock(int(fields[b"part"]), int(fields[b"block"]), fields[b"sum"], claimed.entry, len(fields[b"body"]))


class Lab:
    """One queue. Jobs differ by output."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.broker = Broker(client, f"q-{uuid.uuid4().hex[:12]}")
        self._names = itertools.count()

    @property
    def keys(self) -> Keys:
        return self.broker.keys

    def spec(self, output: str = "/out", parts: int = 1, model: str = "m") -> JobSpec:
        names = tuple(f"/corpus-{part}.jsonl" for part in range(parts))
        return JobSpec(queue=self.broker.queue, output=output, model=model, parts=names)

    def create(self, output: str = "/out", parts: int = 1) -> str:
        """A new job's id."""
        spec = self.spec(output, parts)
        assert self.broker.run(self.broker.create(spec)).code is Code.CREATED
        return spec.job

    def submit(self, job: str, part: int, block: int, size: int = 100, bound: int = BOUND, variant: int = 0) -> Answer:
        return self.broker.run(self.broker.submit(job, make_entry(part, block, size, variant=variant), bound))

    def fill(self, job: str, blocks: int, part: int = 0) -> None:
        """Submit a part's first blocks."""
        for block in range(blocks):
            assert self.submit(job, part, block).code is Code.OK

    def sealed_job(self, blocks: int, output: str = "/out") -> str:
        """A running job of one part."""
        job = self.create(output)
        self.fill(job, blocks)
        assert self.seal(job, 0, blocks).code is Code.OK
        return job

    def seal(self, job: str, part: int, blocks: int) -> Answer:
        return self.broker.run(self.broker.seal(job, part, blocks))

    def claim(self, job: str, consumer: str = "w1", count: int = 100) -> list[Claimed]:
        return self.broker.claim(consumer, [job], count, 0)

    def sweep(self, job: str, consumer: str = "w2", idle_ms: int = HOUR_MS, count: int = 100) -> list[Claimed]:
        return self.broker.sweep(consumer, job, idle_ms, count)

    def age(self, claimed: Sequence[Claimed], consumer: str = "w1") -> None:
        """Let a lease expire now: nobody has touched these entries for two hours."""
        for c in claimed:
            self.client.xclaim(c.stream, "workers", consumer, 0, [c.entry], idle=2 * HOUR_MS, justid=True)

    def commit(
        self, job: str, claimed: Sequence[Claimed], name: str = "", space: str = "space", range: int = 0
    ) -> Answer:
        blocks = [to_commit(c) for c in claimed]
        return self.commit_blocks(job, blocks, name, space, range)

    def commit_blocks(
        self,
        job: str,
        blocks: Sequence[CommitBlock],
        name: str = "",
        space: str = "space",
        range: int = 0,
        **changed: int,
    ) -> Answer:
        addresses = [(b.part, b.block) for b in blocks]
        record = make_record(job, name or f"s{next(self._names)}", addresses, space, range, **changed)
        return self.broker.run(self.broker.commit(record, blocks))

    def adopt(
        self, job: str, blocks: Sequence[tuple[int, int]], name: str = "", space: str = "space", range: int = 0
    ) -> Answer:
        """Commit a shard that was found in the output."""
        return self.commit_blocks(job, [CommitBlock(p, b, make_entry(p, b).sum) for p, b in blocks], name, space, range)

    def finalize(self, job: str, state: JobState = JobState.COMPLETED) -> Lease:
        lease = self.broker.run(self.broker.take_finalize(job, 0))
        assert lease is not None
        assert self.broker.run(self.broker.finalized(lease, state, HOUR_MS)).code is Code.OK
        return lease

    def cancelled_job(self, blocks: int = 0) -> str:
        """A job that was cancelled and finalized."""
        job = self.create()
        self.fill(job, blocks)
        assert self.broker.run(self.broker.cancel(job)).code is Code.OK
        self.finalize(job, JobState.CANCELLED)
        return job

    def state(self, job: str) -> JobState:
        return self.broker.status(job).state

    def queued_bytes(self) -> int:
        raw = self.client.get(self.keys.bytes)
        assert raw is None or isinstance(raw, bytes)
        assert raw != b"0"
        return int(raw or 0)

    def left_behind(self) -> list[str]:
        """What is wrong with the queue's keys: names that `Keys` does not know, and keys of ended jobs that stay."""
        keys, wrong = self.keys, []
        shared = {keys.jobs, keys.recent, keys.bytes, keys.finalize, keys.interactive, keys.workers, keys.pace}
        found: list[bytes] = list(self.client.scan_iter(f"{keys.prefix}:*", count=10_000))
        hashes = [key.decode() for key in found if key.decode().count(":") == 3 and b":job:" in key]
        named, ended = set(shared), {keys.recent}
        for key in hashes:
            job = key.rpartition(":")[2]
            raws: Any = self.client.hmget(key, "state", "parts")
            state, parts = raws
            mine = {*job_keys(keys, job, int(parts))}
            named |= mine | {keys.blocks(job)}
            if JobState(state.decode()).ended:
                ended |= mine
        for raw in found:
            key = raw.decode()
            if key not in named and not key.startswith((keys.worker(""), keys.reply(""), keys.caller(""))):
                wrong.append(f"{key}: not a key that keys.py names, or its job is gone")
            elif (key in ended or key not in named or key == keys.interactive) and self.client.pttl(key) == NO_EXPIRY:
                wrong.append(f"{key}: has no expiry")
        return wrong
