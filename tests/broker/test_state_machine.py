"""Random runs of every step in any order, each held against a model of what a queue must be.

A run that fails prints how to repeat it; `EMBEDSTREAM_TEST_SEED` repeats a whole session.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import ClassVar

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lab.broker import BOUND, HOUR_MS, make_entry, to_commit
from lab.broker_machine import BrokerSteps

from embedstream.jobs import JobState
from embedstream.keys import RELEASED
from embedstream.queue.broker import Claimed
from embedstream.queue.steps import Code, CommitBlock
from embedstream.records import ShardRecord

STEPS = 70

BLOCKS = 5  # in a part, unless more are adopted

COMMON = {
    ("create", Code.CREATED), ("create", Code.EXISTS), ("create", Code.REOPENED), ("create", Code.DIFFERS),
    ("submit", Code.OK), ("submit", Code.DUPLICATE), ("submit", Code.GAP), ("submit", Code.FULL),
    ("submit", Code.CHANGED), ("submit", Code.ENDED), ("submit", Code.UNKNOWN_JOB),
    ("seal", Code.OK), ("seal", Code.MISSING), ("seal", Code.CHANGED), ("seal", Code.ENDED),
    ("commit", Code.COMMITTED), ("commit", Code.ALREADY), ("commit", Code.CONFLICT), ("commit", Code.CHANGED),
    ("commit", Code.DROPPED), ("commit", Code.OTHER_SPACE), ("commit", Code.OTHER_RANGES), ("commit", Code.UNKNOWN_JOB),
    ("calibrate", Code.OK), ("calibrate", Code.OTHER_RANGES), ("calibrate", Code.ENDED),
    ("calibrate", Code.UNKNOWN_JOB),
    ("cancel", Code.OK), ("cancel", Code.TOO_LATE), ("cancel", Code.UNKNOWN_JOB),
    ("finalized", Code.OK), ("finalized", Code.STALE),
    ("retire", Code.OK), ("retire", Code.PENDING), ("suspect", Code.OK), ("suspect", Code.ENDED),
}  # fmt: skip
"""What a session must have met, a short one three quarters of it, or its runs prove little."""

MANY = 1000

jobs = st.integers(0, 1)
parts = st.integers(0, 1)
consumers = st.sampled_from(["w1", "w2", "w3"])
choices = st.integers(0, 7)
spaces = st.sampled_from(["a", "a", "b"])
ranges = st.sampled_from([0, 1, 1, 2])


class BrokerMachine(BrokerSteps):
    """Every rule runs a step once, twice at once, or again much later."""

    # Those who do as they should

    @initialize()
    def two_jobs(self) -> None:
        self.create_now(0, False)
        self.create_now(1, False)

    @rule(n=jobs, blocks=st.integers(1, 4), bound=st.sampled_from([BOUND] * 4 + [150]), twice=st.booleans())
    def the_producer_goes_on(self, n: int, blocks: int, bound: int, twice: bool) -> None:
        """Make the job or find it, submit some blocks of its parts, seal what is whole."""
        self.send(lambda: self.create_now(n, False), twice)
        job = self.model.jobs[n]
        for part in range(n + 1):
            length = max(BLOCKS, job.known_length(part))
            for block in range(job.next[part], min(length, job.next[part] + blocks)):
                variant = (job.sums.get((part, block)) or bytes(8))[3]
                self.submit_any(n, part, block, variant, 60, bound, twice)
            if job.next[part] == length:
                self.seal(n, part, length, twice)

    @rule(consumer=consumers, twice=st.booleans())
    def the_worker_goes_on(self, consumer: str, twice: bool) -> None:
        """Renew and commit what is held, forget it, and claim more."""
        for n in range(2):
            self.look_after(consumer, n, 0, "renew", twice)
            self.calibrate(n, 1, twice)
            self.commit(consumer, n, 0, "a", 1, twice)
        self.sweep(consumer, 0, 2)
        self.claim(consumer, 2)

    @precondition(lambda self: any(self.held.values()))
    @rule(consumer=consumers, twice=st.booleans())
    def the_worker_stops(self, consumer: str, twice: bool) -> None:
        """Hand back what is held."""
        for n in range(2):
            self.look_after(consumer, n, 0, "release", twice)
        self.held[consumer].clear()

    @precondition(lambda self: any(self.held.values()))
    @rule(consumer=consumers)
    def another_takes_over(self, consumer: str) -> None:
        """A consumer that has not renewed for long loses its blocks, and does not know."""
        self.leases_expire(consumer)
        for n in range(2):
            self.sweep({"w1": "w2", "w2": "w3", "w3": "w1"}[consumer], n, 4)

    @precondition(lambda self: any(job.finalizing for job in self.model.jobs.values()))
    @rule(n=jobs, failed=st.booleans(), twice=st.booleans())
    def the_finalizer_goes_on(self, n: int, failed: bool, twice: bool) -> None:
        self.take_finalize(n, HOUR_MS, twice)
        if self.leases:
            self.finalized(0, failed, twice)
        self.seal(n, 0, None, False)

    # Every step alone

    @rule(n=jobs, other=st.sampled_from([False] * 7 + [True]), twice=st.booleans())
    def create(self, n: int, other: bool, twice: bool) -> None:
        self.send(lambda: self.create_now(n, other), twice)

    @rule(
        n=jobs,
        part=parts,
        block=st.integers(0, BLOCKS),
        variant=st.sampled_from([0, 0, 1]),
        size=st.sampled_from([10, 60, 200]),
        bound=st.sampled_from([BOUND, 150, 250]),
        twice=st.booleans(),
    )
    def submit_any(self, n: int, part: int, block: int, variant: int, size: int, bound: int, twice: bool) -> None:
        part %= n + 1
        self.send(lambda: self.submit_now(n, part, block, variant, size, bound), twice)

    @rule(n=jobs, part=parts, blocks=st.sampled_from([None, None, None, 0, 1, 2, 3, 4]), twice=st.booleans())
    def seal(self, n: int, part: int, blocks: int | None, twice: bool) -> None:
        job, part = self.job(n), part % (n + 1)
        count = blocks if blocks is not None else job.next[part] if job else 0
        self.send(lambda: self.seal_now(n, part, count), twice)

    @rule(consumer=consumers, count=st.integers(1, 4))
    def claim(self, consumer: str, count: int) -> None:
        active = [n for n in range(2) if (job := self.job(n)) is not None and job.open]
        claimed = self.broker.claim(consumer, [self.id(n) for n in active], count, 0)
        expected = [(n, entry, 1) for n in active for entry in self.model.jobs[n].claim(consumer, count)]
        self.remember(consumer, claimed, expected)

    @rule(consumer=consumers, n=jobs, count=st.integers(1, 4))
    def sweep(self, consumer: str, n: int, count: int) -> None:
        job = self.job(n)
        expected = [(n, *found) for found in job.sweep(consumer, count)] if job else []
        self.remember(consumer, self.lab.sweep(self.id(n), consumer, count=count), expected)

    def remember(self, consumer: str, claimed: list[Claimed], expected: list[tuple[int, str, int]]) -> None:
        streams = [self.lab.keys.blocks(self.id(n)) for n, _, _ in expected]
        assert [(c.stream, c.entry, c.deliveries) for c in claimed] == [
            (stream, entry, deliveries) for stream, (_, entry, deliveries) in zip(streams, expected, strict=True)
        ]
        self.held[consumer] += [(n, c) for (n, _, _), c in zip(expected, claimed, strict=True)]

    @rule(consumer=consumers)
    def leases_expire(self, consumer: str) -> None:
        """Whatever the consumer has pending was not renewed for two hours."""
        with self.client.pipeline(transaction=False) as pipe:
            for n, job in self.model.jobs.items():
                for entry in job.expire(consumer):
                    stream = self.lab.keys.blocks(self.id(n))
                    pipe.xclaim(stream, "workers", consumer, 0, [entry], idle=2 * HOUR_MS, justid=True)
            pipe.execute()

    @precondition(lambda self: any(self.held.values()))
    @rule(consumer=consumers)
    def crash(self, consumer: str) -> None:
        """Another worker or the coordinator then tries to remove the consumer, too."""
        self.held[consumer].clear()
        for n in range(2):
            self.retire(consumer, n, False)

    def pick(self, consumer: str, n: int, mask: int) -> list[Claimed]:
        """Some of what a consumer remembers of a job, each block once."""
        mine = {c.fields[b"part"] + b":" + c.fields[b"block"]: c for of, c in self.held[consumer] if of == n}
        return [c for at, c in enumerate(mine.values()) if mask == 0 or mask >> at % 3 & 1]

    @precondition(lambda self: any(self.held.values()))
    @rule(consumer=consumers, n=jobs, mask=choices, space=spaces, range=ranges, twice=st.booleans())
    def commit(self, consumer: str, n: int, mask: int, space: str, range: int, twice: bool) -> None:
        """Commit, and after CONFLICT without those blocks; what is committed is forgotten only now and then."""
        blocks, name = [to_commit(c) for c in self.pick(consumer, n, mask)], f"s{next(self.names)}"
        job = self.job(n)
        others = job.done if job else frozenset[tuple[int, int]]()
        rest = [b for b in blocks if (b.part, b.block) not in others]
        if blocks:
            self.send(lambda: self.commit_now(n, name, blocks, space, range), twice)
        if 0 < len(rest) < len(blocks):
            self.send(lambda: self.commit_now(n, name, rest, space, range), twice)
        if not mask & 1:
            entries = {b.entry for b in blocks}
            self.held[consumer] = [(of, c) for of, c in self.held[consumer] if c.entry not in entries]

    @precondition(lambda self: any(self.held.values()))
    @rule(
        consumer=consumers,
        n=jobs,
        mask=choices,
        what=st.sampled_from(["renew", "release", "leave in death", "drop"]),
        twice=st.booleans(),
    )
    def look_after(self, consumer: str, n: int, mask: int, what: str, twice: bool) -> None:
        mine = self.pick(consumer, n, mask)
        entries, blocks = [c.entry for c in mine], [to_commit(c) for c in mine]
        match what:
            case "renew":
                self.send(lambda: self.renew_now(n, consumer, entries), twice)
            case "release" | "leave in death":
                self.send(lambda: self.release_now(n, consumer, entries, died=what != "release"), twice)
            case _:
                self.send(lambda: self.drop_now(n, blocks), twice)

    @rule(
        n=jobs,
        blocks=st.lists(st.tuples(parts, st.integers(0, BLOCKS)), min_size=1, max_size=3, unique=True),
        variant=st.integers(0, 1),
        space=spaces,
        range=ranges,
        twice=st.booleans(),
    )
    def adopt(self, n: int, blocks: list[tuple[int, int]], variant: int, space: str, range: int, twice: bool) -> None:
        """A shard from the output: of blocks that are submitted, or not yet, or that the corpus does not have."""
        name = f"s{next(self.names)}"
        found = [CommitBlock(p, b, make_entry(p, b, variant=variant).sum) for p, b in blocks if p <= n]
        if found:
            self.send(lambda: self.commit_now(n, name, found, space, range), twice)

    @rule(
        n=jobs,
        verdict=st.sampled_from([None, None, JobState.CANCELLED, JobState.FAILED]),
        grace_ms=st.sampled_from([0, HOUR_MS]),
        twice=st.booleans(),
    )
    def cancel(self, n: int, verdict: JobState | None, grace_ms: int, twice: bool) -> None:
        if verdict is not None:
            self.send(lambda: self.cancel_now(n, verdict, grace_ms), twice)

    @precondition(lambda self: self.model.jobs)
    @rule(n=jobs, lease_ms=st.sampled_from([0, HOUR_MS]), twice=st.booleans())
    def take_finalize(self, n: int, lease_ms: int, twice: bool) -> None:
        self.send(lambda: self.take_now(n, lease_ms), twice)

    @precondition(lambda self: any(job.finalizing for job in self.model.jobs.values()))
    @rule(n=jobs)
    def finalizer_dies(self, n: int) -> None:
        """Or the grace of a cancelled job is over."""
        self.client.zadd(self.lab.keys.finalize, {self.id(n): 0}, xx=True)
        if (job := self.job(n)) is not None:
            job.leased = job.graced = False

    @precondition(lambda self: self.leases)
    @rule(at=choices, failed=st.booleans(), twice=st.booleans())
    def finalized(self, at: int, failed: bool, twice: bool) -> None:
        n, lease = self.leases[-1 - at % len(self.leases)]
        state = JobState(lease.verdict) if lease.verdict else JobState.FAILED if failed else JobState.COMPLETED
        self.send(lambda: self.finalized_now(n, lease, state), twice)

    @rule(n=jobs, range=st.integers(1, 2), twice=st.booleans())
    def calibrate(self, n: int, range: int, twice: bool) -> None:
        self.send(lambda: self.calibrate_now(n, range), twice)

    @rule(n=jobs, part=parts, block=st.integers(0, BLOCKS), twice=st.booleans())
    def suspect(self, n: int, part: int, block: int, twice: bool) -> None:
        self.send(lambda: self.suspect_now(n, part % (n + 1), block), twice)

    @rule(consumer=st.sampled_from(["w1", "w2", "w3", RELEASED]), n=jobs, twice=st.booleans())
    def retire(self, consumer: str, n: int, twice: bool) -> None:
        self.send(lambda: self.retire_now(n, consumer), twice)

    @precondition(lambda self: self.sent)
    @rule(at=st.integers(0, 30))
    def a_late_packet_arrives(self, at: int) -> None:
        """A step that was sent before is run once more."""
        self.sent[-1 - at % len(self.sent)]()

    @rule(really=choices)
    def redis_is_emptied(self, really: int) -> None:
        if really == 5:
            self.wipe()
            self.model.jobs.clear()
            self.seen.clear()
            self.cancel(0, JobState.CANCELLED, 0, False)
            self.submit_any(0, 0, 0, 0, 10, BOUND, False)
            self.adopt(0, [(0, 0)], 0, "a", 1, False)

    def teardown(self) -> None:
        """From wherever a run has led, every job can be brought to its end, and then nothing stays."""
        for n in sorted(self.model.jobs):
            self.finish(n)
        self.redis_is_as_the_model_says()
        assert self.lab.left_behind() == []
        self.wipe()

    def finish(self, n: int) -> None:
        job = self.model.jobs[n]
        if job.open:
            for part in range(n + 1):
                for block in range(job.next[part], max(BLOCKS, job.known_length(part))):
                    if part not in job.sealed:
                        variant = (job.sums.get((part, block)) or bytes(8))[3]
                        self.submit_now(n, part, block, variant, 10, BOUND)
                self.seal_now(n, part, job.sealed.get(part, job.next[part]))
            for consumer in self.held:
                self.leases_expire(consumer)
            self.held["w1"].clear()
            self.sweep("w1", n, 100)
            self.claim("w1", 100)
            self.commit("w1", n, 0, job.space or "a", 0, False)
            assert job.finalizing
            cover = sorted((p, b) for p, blocks in job.sealed.items() for b in range(blocks))
            raws = self.broker.shard_records(self.id(n))
            records = [msgspec.json.decode(raw, type=ShardRecord) for raw in raws]
            assert sorted((b.part, b.block) for record in records for b in record.blocks) == cover
        if job.finalizing:
            self.finalizer_dies(n)
            self.take_now(n, 0)
            self.finalized_now(n, self.leases[-1][1], JobState(job.verdict or "completed"))
        assert job.ended


@pytest.mark.holds("Complete")
@pytest.mark.slow
@pytest.mark.parametrize("runs", [80, pytest.param(2500, marks=pytest.mark.scale)])
def test_any_order_of_steps_keeps_the_promises(real_client: redis.Redis, runs: int) -> None:
    number = int(os.environ.get("EMBEDSTREAM_TEST_SEED") or random.randrange(2**32))
    print(f"EMBEDSTREAM_TEST_SEED={number}")

    class Machine(BrokerMachine):
        client = real_client
        met: ClassVar[Counter[tuple[str, Code]]] = Counter()

    run_state_machine_as_test(
        seed(number)(Machine),
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    missed = COMMON - set(Machine.met)
    assert len(missed) <= (0 if runs >= MANY else len(COMMON) // 4), missed
