"""The broker's state machine without its rules: each step on Redis and on the model, and what must hold after it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec
import redis
from hypothesis.stateful import RuleBasedStateMachine, invariant

from embedstream.jobs import MOVES, JobSpec, JobState
from embedstream.keys import job_keys
from embedstream.outputs import encode_ranges
from embedstream.queue.broker import Claimed
from embedstream.queue.steps import Answer, Code, CommitBlock, Lease, Step
from lab.broker import HOUR_MS, Lab, in_int8, make_entry, make_record
from lab.broker_model import JobModel, QueueModel


class BrokerSteps(RuleBasedStateMachine):
    """Runs steps on Redis and on the model, and holds one against the other. Job 0 has one part, job 1 has two."""

    client: redis.Redis
    met: ClassVar[Counter[tuple[str, Code]]]

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab(self.client)
        self.broker = self.lab.broker
        self.specs: list[JobSpec] = [self.lab.spec(f"/out-{n}", parts=n + 1) for n in range(2)]
        self.ids = [spec.job for spec in self.specs]
        self.model = QueueModel()
        self.held: dict[str, list[tuple[int, Claimed]]] = {"w1": [], "w2": [], "w3": []}  # what consumers remember
        self.leases: list[tuple[int, Lease]] = []
        self.sent: list[Callable[[], object]] = []
        self.seen: dict[int, JobState] = {}
        self.names = itertools.count()

    # Running steps

    def send(self, run: Callable[[], object], twice: bool) -> None:
        """Run now, perhaps repeat at once as after a lost reply, and remember for a late repetition."""
        run()
        if twice:
            run()
        self.sent.append(run)

    def expect(self, step: Step[Answer], expected: Answer) -> None:
        answer = self.broker.run(step)
        assert (answer.code, answer.blocks) == (expected.code, expected.blocks), (step.script, answer, expected)
        if expected.detail:
            assert answer.detail == expected.detail
        if expected.code in (Code.GAP, Code.MISSING):
            assert answer.number == expected.number
        self.met[step.script, answer.code] += 1

    def job(self, n: int) -> JobModel | None:
        return self.model.jobs.get(n)

    def id(self, n: int) -> str:
        return self.ids[n]

    def create_now(self, n: int, other: bool) -> None:
        other = other and n in self.model.jobs  # a job's own spec is always the first
        spec = msgspec.structs.replace(self.specs[n], model="other") if other else self.specs[n]
        expected = self.model.create(n, n + 1, other)
        if expected.code is not Code.EXISTS:
            self.let_a_millisecond_pass()
        self.expect(self.broker.create(spec), expected)
        if expected.code is Code.CREATED:
            epoch: Any = self.client.hget(self.lab.keys.job(spec.job), "epoch")
            assert all(lease.epoch < int(epoch) + 1 for of, lease in self.leases if of == n)
            self.model.jobs[n].epoch = int(epoch)

    def submit_now(self, n: int, part: int, block: int, variant: int, size: int, bound: int) -> None:
        entry = make_entry(part, block, size, variant=variant)
        expected = self.model.submit(n, part, block, entry.sum, size, entry.rows, bound)
        self.expect(self.broker.submit(self.id(n), entry, bound), expected)
        job = self.job(n)
        if job is not None and expected.code is Code.OK and (part, block) not in job.done:
            raw: Any = self.client.xrevrange(self.lab.keys.blocks(self.id(n)), count=1)
            job.queue(raw[0][0].decode(), part, block, size)

    def seal_now(self, n: int, part: int, blocks: int) -> None:
        self.expect(self.broker.seal(self.id(n), part, blocks), self.model.seal(n, part, blocks))

    def calibrate_now(self, n: int, range: int) -> None:
        ranges = encode_ranges([in_int8(range)])
        self.expect(self.broker.calibrate(self.id(n), ranges), self.model.calibrate(n, ranges))

    def commit_now(self, n: int, name: str, blocks: Sequence[CommitBlock], space: str, range: int) -> None:
        record = make_record(self.id(n), name, [(b.part, b.block) for b in blocks], space, range)
        expected = self.model.commit(n, name, blocks, space, encode_ranges(record.outputs))
        self.expect(self.broker.commit(record, blocks), expected)

    def renew_now(self, n: int, consumer: str, entries: Sequence[str]) -> None:
        lost = self.broker.run(self.broker.renew(self.lab.keys.blocks(self.id(n)), consumer, entries))
        assert lost == self.model.renew(n, consumer, entries)

    def release_now(self, n: int, consumer: str, entries: Sequence[str], died: bool) -> None:
        self.model.release(n, consumer, entries, died)
        self.expect(self.broker.release(self.lab.keys.blocks(self.id(n)), consumer, entries, died), Answer(Code.OK))

    def drop_now(self, n: int, blocks: Sequence[CommitBlock]) -> None:
        self.model.drop(n, blocks)
        self.expect(self.broker.drop(self.id(n), blocks), Answer(Code.OK))

    def cancel_now(self, n: int, verdict: JobState, grace_ms: int) -> None:
        step = self.broker.cancel(self.id(n), verdict, "because", grace_ms)
        self.expect(step, self.model.cancel(n, verdict, grace_ms))

    def take_now(self, n: int, lease_ms: int) -> None:
        lease = self.broker.run(self.broker.take_finalize(self.id(n), lease_ms))
        if not self.model.take(n, lease_ms):
            assert lease is None
            return
        job = self.model.jobs[n]
        assert lease is not None
        assert (lease.epoch, lease.verdict) == (job.epoch, job.verdict)
        self.leases.append((n, lease))

    def finalized_now(self, n: int, lease: Lease, state: JobState) -> None:
        self.expect(self.broker.finalized(lease, state, HOUR_MS), self.model.finalized(n, lease.epoch, state))

    def suspect_now(self, n: int, part: int, block: int) -> None:
        self.expect(self.broker.suspect(self.id(n), part, block, (1,)), self.model.suspect(n, part, block))

    def retire_now(self, n: int, consumer: str) -> None:
        self.expect(self.broker.retire(self.lab.keys.blocks(self.id(n)), consumer), self.model.retire(n, consumer))

    def let_a_millisecond_pass(self) -> None:
        """Entry ids are times in ms: a job's next life must not repeat what consumers still remember."""
        began: Any = self.client.time()
        now = began
        while now[0] == began[0] and now[1] // 1000 == began[1] // 1000:
            now = self.client.time()

    def wipe(self) -> None:
        found: list[Any] = self.client.keys(f"{self.lab.keys.prefix}:*")
        if found:
            self.client.unlink(*found)

    # What must hold

    @invariant()
    def redis_is_as_the_model_says(self) -> None:
        keys, model = self.lab.keys, self.model
        known = sorted(model.jobs.items())
        with self.client.pipeline(transaction=False) as pipe:
            pipe.get(keys.bytes)
            for ordered in (keys.jobs, keys.finalize, keys.recent):
                pipe.zrange(ordered, 0, -1)
            pipe.pttl(keys.recent)
            for n, job in known:
                pipe.hgetall(keys.job(self.id(n)))
                pipe.xrange(keys.blocks(self.id(n)))
                pipe.hkeys(keys.shards(self.id(n)))
                pipe.hkeys(keys.suspect(self.id(n)))
                for part in range(n + 1):
                    pipe.get(keys.done(self.id(n), part))
                if job.open:
                    pipe.xpending_range(keys.blocks(self.id(n)), "workers", "-", "+", 100)
                for key in job_keys(keys, self.id(n), job.parts):
                    pipe.pttl(key)
            raw = iter(pipe.execute())
        assert int(next(raw) or 0) == sum(job.queued for _, job in known)
        for which in ("open", "finalizing", "ended"):
            assert set(next(raw)) == {self.id(n).encode() for n, job in known if getattr(job, which)}
        assert next(raw) != -1
        for n, job in known:
            self.check_job(n, job, raw)
            self.check_expiries(n, job, raw)

    def check_job(self, n: int, job: JobModel, raw: Any) -> None:
        fields, entries, shards, suspects = next(raw), next(raw), next(raw), next(raw)
        done = {(part, block) for part in range(n + 1) for block in set_bits(next(raw))}
        state = JobState(fields[b"state"].decode())
        before = self.seen.get(n, state)
        assert state in reachable(before), f"{before} -> {state}"
        self.seen[n] = state
        assert state is job.state
        assert fields.get(b"ranges", b"").decode() == job.ranges
        assert done == job.done
        assert {name.decode() for name in shards} == job.shards
        assert {name.decode() for name in suspects} == {f"{part}:{block}" for part, block in job.suspects}
        numbers = {name: int(fields[name.encode()]) for name in ("done", "rows", "failed", "tokens", "padded")}
        committed = len(done)
        assert numbers == {
            "done": committed, "rows": 9 * committed, "failed": committed, "tokens": 5 * committed,
            "padded": 8 * committed,
        }  # fmt: skip
        queued = {(int(f[b"part"]), int(f[b"block"])): len(f[b"body"]) for _, f in entries}
        assert len(queued) == len(entries), "a block is queued twice"
        assert int(fields[b"queued"]) == sum(queued.values()) == job.queued
        assert [entry.decode() for entry, _ in entries] == list(job.entries)
        assert (int(fields[b"added"]), int(fields[b"submitted"])) == (job.added, job.submitted)
        if job.open:
            pending = {
                row["message_id"].decode(): (row["consumer"].decode(), row["times_delivered"]) for row in next(raw)
            }
            assert pending == {entry: (p.owner, p.deliveries) for entry, p in job.pending.items()}
            for part in range(n + 1):
                next_block = int(fields.get(b"next:%d" % part, 0))
                lost = {(part, block) for block in range(next_block)} - done - set(queued)
                assert not lost, f"submitted, but neither queued nor done: {lost}"
        else:
            assert entries == []

    def check_expiries(self, n: int, job: JobModel, raw: Any) -> None:
        """Every key of an ended job expires; none of another job does."""
        for key in job_keys(self.lab.keys, self.id(n), job.parts):
            expiry = next(raw)
            assert expiry == -2 or (expiry > 0) == job.ended, f"{key}: {job.state}, expiry {expiry}"


def set_bits(bitmap: bytes | None) -> list[int]:
    return [at for at in range(8 * len(bitmap)) if bitmap[at // 8] >> (7 - at % 8) & 1] if bitmap else []


def reachable(state: JobState) -> set[JobState]:
    """States after at most the few moves that one rule may make."""
    found = {state}
    for _ in range(4):
        found |= {after for before in found for after in MOVES[before]}
    return found
