"""The steps by which jobs end, and those beside the jobs: requests, consumers, workers."""

from __future__ import annotations

import pytest
from lab.broker import HOUR_MS, Lab

from embedstream.errors import BrokerError
from embedstream.jobs import JobState
from embedstream.queue.broker import SHARDS_AT_ONCE
from embedstream.queue.steps import Answer, Code, Lease
from embedstream.queue.workers import WorkerRecord

# cancel


@pytest.mark.parametrize("verdict", [JobState.CANCELLED, JobState.FAILED])
def test_cancel_drops_what_is_queued_and_puts_the_job_into_the_outbox(lab: Lab, verdict: JobState) -> None:
    job, other = lab.create(), lab.create("/other")
    lab.fill(job, 2)
    lab.fill(other, 1)
    step = lab.broker.cancel(job, verdict, "too many errors")
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    status = lab.broker.status(job)
    assert (status.state, status.reason, status.queued_bytes) == (JobState.FINALIZING, "too many errors", 0)
    assert (lab.broker.outbox(), lab.broker.active_jobs(), lab.queued_bytes()) == ([job], [other], 100)
    lease = lab.broker.run(lab.broker.take_finalize(job, 0))
    assert lease is not None
    assert lease.verdict == verdict
    lab.finalize(job, verdict)
    assert lab.broker.run(step) == Answer(Code.OK)


def test_cancel_is_too_late_from_finalizing_on(lab: Lab) -> None:
    job = lab.sealed_job(1)
    lab.commit(job, lab.claim(job))
    assert lab.broker.run(lab.broker.cancel(job)) == Answer(Code.TOO_LATE, detail="finalizing")
    lab.finalize(job)
    assert lab.broker.run(lab.broker.cancel(job)).state is JobState.COMPLETED
    assert lab.broker.run(lab.broker.cancel("none")) == Answer(Code.UNKNOWN_JOB)


# take_finalize and finalized


@pytest.mark.holds("taskiq-redis#131")
def test_a_job_of_the_outbox_is_leased_to_one(lab: Lab) -> None:
    job = lab.sealed_job(0)
    lease = lab.broker.run(lab.broker.take_finalize(job, HOUR_MS))
    assert isinstance(lease, Lease)
    assert lease.verdict == ""
    assert abs(lease.now / 1000 - lab.broker.status(job).now) < 10
    assert lab.broker.run(lab.broker.take_finalize(job, HOUR_MS)) is None
    assert lab.broker.run(lab.broker.finalized(lease, JobState.COMPLETED, HOUR_MS)) == Answer(Code.OK)


def test_a_finalizer_whose_lease_was_never_answered_gets_it_by_asking_again(lab: Lab) -> None:
    job = lab.sealed_job(0)
    taking = lab.broker.take_finalize(job, HOUR_MS)
    lost = lab.broker.run(taking)
    lease = lab.broker.run(taking)
    assert lost is not None
    assert lease is not None
    assert lease.epoch == lost.epoch
    assert lab.broker.run(lab.broker.take_finalize(job, HOUR_MS)) is None
    assert lab.broker.run(lab.broker.finalized(lease, JobState.COMPLETED, HOUR_MS)) == Answer(Code.OK)
    assert lab.broker.run(taking) is None


def test_only_jobs_of_the_outbox_are_leased(lab: Lab) -> None:
    job = lab.create()
    assert lab.broker.run(lab.broker.take_finalize(job, 0)) is None
    assert lab.broker.run(lab.broker.take_finalize("none", 0)) is None
    lab.client.zadd(lab.keys.finalize, {job: 0, "none": 0})  # left over from a lost job
    assert lab.broker.run(lab.broker.take_finalize(job, 0)) is None
    assert lab.broker.run(lab.broker.take_finalize("none", 0)) is None
    assert lab.broker.outbox() == []


def test_finalized_ends_the_job_and_all_its_keys_expire(lab: Lab) -> None:
    job = lab.sealed_job(2)
    lab.broker.run(lab.broker.suspect(job, 0, 7, (1,)))
    lab.commit(job, lab.claim(job))
    lease = lab.broker.run(lab.broker.take_finalize(job, 0))
    assert lease is not None
    step = lab.broker.finalized(lease, JobState.COMPLETED, HOUR_MS, '{"v": 1}')
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    status = lab.broker.status(job)
    assert (status.state, status.ended, status.manifest) == (JobState.COMPLETED, lease.now / 1000, '{"v": 1}')
    assert (lab.broker.outbox(), lab.broker.recent_jobs(), lab.broker.unfinished()) == ([], [job], False)
    left = [lab.keys.shards(job), lab.keys.suspect(job), lab.keys.done(job, 0), lab.keys.sums(job, 0)]
    ttls = [lab.client.pttl(key) for key in left]
    assert all(HOUR_MS - 10_000 < ttl <= HOUR_MS for ttl in ttls)
    assert 0 < lab.client.pttl(lab.keys.job(job)) < min(ttls)  # a job that is found has all its other keys


def test_only_the_newest_lease_may_say_that_a_job_is_finalized(lab: Lab) -> None:
    job = lab.sealed_job(0)
    old = lab.broker.run(lab.broker.take_finalize(job, 0))
    new = lab.broker.run(lab.broker.take_finalize(job, 0))
    assert old is not None
    assert new is not None
    assert lab.broker.run(lab.broker.finalized(old, JobState.FAILED, HOUR_MS)) == Answer(Code.STALE)
    assert lab.broker.run(lab.broker.finalized(new, JobState.COMPLETED, HOUR_MS)) == Answer(Code.OK)
    assert lab.broker.run(lab.broker.finalized(new, JobState.FAILED, HOUR_MS)) == Answer(Code.STALE)
    assert lab.state(job) is JobState.COMPLETED


def test_who_cannot_write_the_manifest_leaves_it_to_others_at_once(lab: Lab) -> None:
    job = lab.create()
    assert lab.broker.run(lab.broker.cancel(job)).code is Code.OK
    lease = lab.broker.run(lab.broker.take_finalize(job, HOUR_MS))
    assert lease is not None
    for _ in range(2):
        assert lab.broker.run(lab.broker.finalized(lease, JobState.FINALIZING, 0)).code is Code.OK
    again = lab.broker.run(lab.broker.take_finalize(job, HOUR_MS))
    assert again is not None
    assert lab.broker.run(lab.broker.finalized(lease, JobState.FINALIZING, 0)).code is Code.STALE
    assert lab.broker.run(lab.broker.take_finalize(job, HOUR_MS)) is None
    assert lab.broker.run(lab.broker.finalized(again, JobState.CANCELLED, HOUR_MS)).code is Code.OK
    assert lab.broker.run(lab.broker.finalized(again, JobState.FINALIZING, 0)).code is Code.STALE


def test_a_lease_from_before_the_job_was_reopened_is_stale(lab: Lab) -> None:
    job = lab.create()
    lab.broker.run(lab.broker.cancel(job))
    lease = lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    assert lab.broker.run(lab.broker.finalized(lease, JobState.CANCELLED, HOUR_MS)) == Answer(Code.STALE)
    assert lab.state(job) is JobState.SUBMITTING


def test_a_lease_from_before_redis_was_emptied_is_stale(lab: Lab) -> None:
    job = lab.sealed_job(0)
    old = lab.broker.run(lab.broker.take_finalize(job, 0))
    assert old is not None
    lab.client.delete(*lab.client.keys(f"{lab.keys.prefix}:*"))
    assert lab.broker.run(lab.broker.finalized(old, JobState.FAILED, HOUR_MS)) == Answer(Code.UNKNOWN_JOB)
    lab.sealed_job(0)
    assert lab.broker.run(lab.broker.take_finalize(job, 0)) is not None
    assert lab.broker.run(lab.broker.finalized(old, JobState.FAILED, HOUR_MS)) == Answer(Code.STALE)


def test_a_job_that_is_made_anew_after_it_expired_is_no_longer_listed_as_ended(lab: Lab) -> None:
    job = lab.cancelled_job(1)
    lab.client.delete(lab.keys.job(job))  # it expires a second before its other keys
    assert lab.create() == job
    assert (lab.broker.recent_jobs(), lab.broker.active_jobs()) == ([], [job])
    assert lab.submit(job, 0, 0, variant=1).code is Code.OK  # nothing of the old one counts


# requests


def test_a_request_is_answered_once(lab: Lab) -> None:
    assert lab.broker.run(lab.broker.request("r1", b"texts", HOUR_MS, 10)) == Answer(Code.OK)
    [c] = lab.broker.claim_requests("w1", 10, 0)
    assert (c.fields[b"request"], c.fields[b"body"], c.deliveries) == (b"r1", b"texts", 1)
    step = lab.broker.reply("r1", c.entry, b"vectors", HOUR_MS)
    assert lab.broker.run(step) == Answer(Code.OK)
    assert lab.broker.run(step) == Answer(Code.GONE)
    assert lab.client.lrange(lab.keys.reply("r1"), 0, -1) == [b"vectors"]
    assert lab.client.xlen(lab.keys.interactive) == 0


def test_a_request_that_was_sent_twice_is_answered_once(lab: Lab) -> None:
    for _ in range(2):
        lab.broker.run(lab.broker.request("r1", b"texts", HOUR_MS, 10))
    answers = [
        lab.broker.run(lab.broker.reply("r1", c.entry, b"vectors", HOUR_MS)).code
        for c in lab.broker.claim_requests("w1", 10, 0)
    ]
    assert answers == [Code.OK, Code.GONE]
    assert lab.client.llen(lab.keys.reply("r1")) == 1


def test_nobody_pushes_an_answer_to_a_caller_who_left(lab: Lab) -> None:
    lab.broker.run(lab.broker.request("r1", b"texts", HOUR_MS, 10))
    [c] = lab.broker.claim_requests("w1", 10, 0)
    lab.client.delete(lab.keys.caller("r1"))  # as its expiry does
    assert lab.broker.run(lab.broker.reply("r1", c.entry, b"vectors", HOUR_MS)) == Answer(Code.GONE)
    assert not lab.client.exists(lab.keys.reply("r1"))
    assert lab.client.xlen(lab.keys.interactive) == 0


def test_requests_above_the_bound_are_refused(lab: Lab) -> None:
    assert lab.broker.run(lab.broker.request("r1", b"", HOUR_MS, 1)) == Answer(Code.OK)
    assert lab.broker.run(lab.broker.request("r2", b"", HOUR_MS, 1)) == Answer(Code.BUSY)
    assert not lab.client.exists(lab.keys.caller("r2"))


def test_requests_of_a_dead_worker_are_taken_over(lab: Lab) -> None:
    lab.broker.run(lab.broker.request("r1", b"texts", HOUR_MS, 10))
    lab.age(lab.broker.claim_requests("w1", 10, 0))
    [c] = lab.broker.sweep_requests("w2", HOUR_MS, 10)
    assert (c.fields[b"body"], c.deliveries) == (b"texts", 2)


def test_without_requests_there_is_nothing_to_claim(lab: Lab) -> None:
    assert lab.broker.claim_requests("w1", 10, 0) == []
    assert lab.broker.sweep_requests("w1", HOUR_MS, 10) == []


# retire


def test_only_a_consumer_without_pending_entries_is_retired(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    [c] = lab.claim(job)
    step = lab.broker.retire(c.stream, "w1")
    assert lab.broker.run(step) == Answer(Code.PENDING)
    assert lab.broker.dead_consumers(job, []) == []
    lab.commit(job, [c])
    assert lab.broker.dead_consumers(job, []) == ["w1"]
    assert lab.broker.dead_consumers(job, ["w1"]) == []
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    assert lab.broker.dead_consumers(job, []) == []


def test_retiring_from_a_stream_that_is_gone_is_fine(lab: Lab) -> None:
    job = lab.cancelled_job(1)
    assert lab.broker.run(lab.broker.retire(lab.keys.blocks(job), "w1")) == Answer(Code.OK)
    assert lab.broker.dead_consumers(job, []) == []


# workers and queues


def make_worker(name: str) -> WorkerRecord:
    return WorkerRecord(
        name=name, host="h", pid=1, model="m", fingerprint="f", engine="hashing", device="cpu", dtype="float32",
        roots=("/out",), state="ready", started=1.0,
    )  # fmt: skip


def test_a_worker_is_listed_while_it_says_that_it_lives(lab: Lab) -> None:
    assert lab.broker.workers() == []
    lab.broker.heartbeat(make_worker("a"), 60)
    lab.broker.heartbeat(make_worker("b"), 60)
    assert lab.broker.workers() == [make_worker("a"), make_worker("b")]
    lab.broker.leave("a")
    lab.client.delete(lab.keys.worker("b"))  # as its expiry does
    assert lab.broker.workers() == []
    assert lab.broker.queue in lab.broker.queues()


def test_a_quarter_of_the_servers_memory_bounds_the_queue(lab: Lab) -> None:
    assert lab.broker.memory_bound(123) == 123


def test_a_damaged_job_is_reported(lab: Lab) -> None:
    job = lab.create()
    lab.client.hdel(lab.keys.job(job), "rows")
    with pytest.raises(BrokerError, match="damaged"):
        lab.broker.status(job)


def test_records_of_many_shards_are_asked_for_in_pieces_and_one_that_vanishes_meanwhile_is_missed(lab: Lab) -> None:
    job, names = lab.create(), [f"s{number:03}" for number in range(SHARDS_AT_ONCE + 1)]
    lab.client.hset(lab.keys.shards(job), mapping={name: name for name in reversed(names)})
    assert list(lab.broker.shard_records(job)) == [name.encode() for name in names]
    records = lab.broker.shard_records(job)
    assert next(records) == b"s000"
    lab.client.hdel(lab.keys.shards(job), names[-1])
    with pytest.raises(BrokerError, match="records of shards vanish"):
        list(records)
