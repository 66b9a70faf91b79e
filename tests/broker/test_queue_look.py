"""One look at a queue, with workers and without."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from lab.broker import HOUR_MS, Lab, make_record, to_commit

from embedstream.jobs import FORMAT_VERSION
from embedstream.keys import QUEUES
from embedstream.queue.queues import (
    GUESSED_TOKENS_PER_BYTE,
    GUESSED_TOKENS_PER_SECOND,
    is_stalled,
    look_at_queue,
    seconds_left,
)
from embedstream.queue.steps import Code
from embedstream.queue.workers import InHand, Rate, WorkerRecord


def worker(name: str, state: str = "ready", **said: object) -> WorkerRecord:
    fixed = {
        "host": "h",
        "pid": 1,
        "model": "m",
        "fingerprint": "f",
        "engine": "e",
        "device": "cpu",
        "dtype": "float32",
    }
    record = {"name": name, **fixed, "roots": ("/",), "state": state, "started": 0.0, **said}
    return msgspec.convert(record, WorkerRecord)


def commit(lab: Lab, job: str, count: int, tokens: int, worked_ms: int, name: str, by: str = "w1") -> None:
    """Claim and commit the next `count` blocks as a worker that took so long."""
    claimed = lab.claim(job, by, count)
    blocks = [to_commit(c) for c in claimed]
    made = make_record(job, name, [(b.part, b.block) for b in blocks], tokens=tokens)
    record = msgspec.structs.replace(made, worker=by)
    assert lab.broker.run(lab.broker.commit(record, blocks, worked_ms=worked_ms)).code is Code.COMMITTED


def test_an_empty_queue_has_nothing_to_drain(lab: Lab) -> None:
    look = look_at_queue(lab.broker)
    assert (look.blocks, look.claimed_blocks, look.bytes, look.oldest_block_seconds, look.drain_seconds) == (0,) * 5


def test_what_is_queued_counts_until_it_is_committed(lab: Lab) -> None:
    job = lab.create()
    for block in range(4):
        lab.submit(job, 0, block, size=100)
    claimed = lab.claim(job, count=3)
    look = look_at_queue(lab.broker)
    assert (look.blocks, look.claimed_blocks, look.bytes) == (4, 3, 400)
    lab.broker.run(lab.broker.release(lab.keys.blocks(job), "w1", [claimed[0].entry]))
    assert look_at_queue(lab.broker).claimed_blocks == 2
    commit(lab, job, 1, tokens=10, worked_ms=0, name="s")
    assert look_at_queue(lab.broker).blocks == 3
    assert [status.job for status in look_at_queue(lab.broker).jobs] == [job]


def test_the_oldest_block_is_as_old_as_its_entry(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    client: Any = lab.client
    seconds, micros = client.time()
    look = look_at_queue(lab.broker)
    entry = client.xrange(lab.keys.blocks(job))[0][0]
    assert look.oldest_block_seconds == pytest.approx(look.now - int(entry.partition(b"-")[0]) / 1000, abs=0.01)
    assert look.now >= seconds + micros / 1e6


def test_before_anything_was_measured_the_time_to_drain_is_a_guess_above_zero(lab: Lab) -> None:
    lab.submit(lab.create(), 0, 0, size=8000)
    look = look_at_queue(lab.broker)
    assert look.drain_seconds == 8000 * GUESSED_TOKENS_PER_BYTE / GUESSED_TOKENS_PER_SECOND
    assert not look.measured


def test_the_time_to_drain_follows_recent_commits_when_no_worker_is_left(lab: Lab) -> None:
    job = lab.create()
    for block in range(10):
        lab.submit(job, 0, block, size=100)
    commit(lab, job, 2, tokens=6000, worked_ms=3000, name="a")
    look = look_at_queue(lab.broker)
    assert (look.worker_tokens_per_second, look.measured) == (2000, True)
    assert look.tokens == 800 * 6000 / 200
    assert look.drain_seconds == look.tokens / 2000
    for name in ("w1", "w2"):
        lab.broker.heartbeat(worker(name), 60)
    lab.broker.heartbeat(worker("w3", state="starting"), 60)
    assert look_at_queue(lab.broker).drain_seconds == look.tokens / 4000


def test_the_pace_of_a_queue_outlives_its_jobs_and_forgets_what_was_long_ago(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 5)
    for n in range(3):
        commit(lab, job, 1, tokens=1_000_000, worked_ms=250_000, name=f"slow{n}")
    assert look_at_queue(lab.broker).worker_tokens_per_second == pytest.approx(4000, rel=0.01)
    commit(lab, job, 1, tokens=9_000_000, worked_ms=225_000, name="fast")
    assert look_at_queue(lab.broker).worker_tokens_per_second == pytest.approx((1.5e6 + 9e6) / 600, rel=0.01)
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job)
    assert look_at_queue(lab.broker).worker_tokens_per_second > 4000
    assert lab.client.pttl(lab.keys.pace) > 0


def test_a_commit_that_is_repeated_counts_once(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    blocks = [to_commit(c) for c in lab.claim(job)]
    step = lab.broker.commit(make_record(job, "s", [(0, 0)], tokens=500), blocks, worked_ms=1000)
    assert [lab.broker.run(step).code for _ in range(2)] == [Code.COMMITTED, Code.ALREADY]
    assert look_at_queue(lab.broker).worker_tokens_per_second == 500


def test_an_adopted_shard_says_nothing_about_the_pace(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    lab.adopt(job, [(0, 0)])
    assert look_at_queue(lab.broker).worker_tokens_per_second == GUESSED_TOKENS_PER_SECOND


def test_a_job_knows_who_wrote_how_many_of_its_rows(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 4)
    for n, (name, count) in enumerate([("w1", 1), ("w2", 2), ("w1", 1)]):
        commit(lab, job, count, tokens=1, worked_ms=1, name=f"s{n}", by=name)
    status = lab.broker.status(job)
    assert sorted(status.workers) == ["w1", "w2"]
    assert sum(status.workers.values()) == status.rows
    assert status.workers["w1"] == status.workers["w2"]


def test_a_damaged_job_does_not_hide_the_others(lab: Lab) -> None:
    broken, sound = lab.create("/broken"), lab.create("/sound")
    lab.client.hdel(lab.keys.job(broken), "rows")
    look = look_at_queue(lab.broker)
    assert [status.job for status in look.jobs] == [sound]
    assert list(look.unreadable) == [broken]
    lab.client.hset(lab.keys.job(broken), "rows", 0)


def test_blocks_of_a_job_of_another_version_call_for_no_worker(lab: Lab) -> None:
    ours, newer = lab.create("/ours"), lab.create("/newer")
    lab.submit(ours, 0, 0, size=1000)
    for block in range(3):
        lab.submit(newer, 0, block, size=5000)
    spec = lab.client.hget(lab.keys.job(newer), "spec")
    lab.client.hset(lab.keys.job(newer), "spec", json.dumps({"v": FORMAT_VERSION + 1}))
    look = look_at_queue(lab.broker)
    assert list(look.unreadable) == [newer]
    assert (look.blocks, look.refused_blocks, look.bytes) == (4, 3, 16_000)
    assert look.tokens == 1000 * GUESSED_TOKENS_PER_BYTE
    lab.client.hset(lab.keys.job(newer), "spec", spec)
    assert look_at_queue(lab.broker).tokens == 16_000 * GUESSED_TOKENS_PER_BYTE


def test_blocks_that_every_ready_worker_refuses_call_for_no_more_of_them(lab: Lab) -> None:
    wanted, foreign = lab.create("/wanted"), lab.create("/foreign")
    lab.submit(wanted, 0, 0, size=1000)
    lab.submit(foreign, 0, 0, size=3000)

    def tokens() -> float:
        return look_at_queue(lab.broker).tokens / GUESSED_TOKENS_PER_BYTE

    lab.broker.heartbeat(worker("starting", state="starting"), 60)
    assert tokens() == 4000, "a worker that starts has not looked yet, so nobody refuses"
    lab.broker.heartbeat(worker("w1", refused={foreign: "no such root"}), 60)
    assert tokens() == 1000
    assert look_at_queue(lab.broker).refused_blocks == 1
    lab.broker.heartbeat(worker("w2"), 60)
    assert tokens() == 4000, "another kind of worker takes it"


def test_a_thousand_jobs_are_looked_at_together(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [lab.create(f"/{number}") for number in range(1000)]
    lab.fill(jobs[500], 1)
    monkeypatch.setattr(lab.broker, "status", lambda job: pytest.fail(f"{job} was asked for by itself"))
    look = look_at_queue(lab.broker)
    assert {status.job for status in look.jobs} == {*jobs}
    assert look.blocks == 1


def test_a_queue_without_a_sign_of_life_for_a_month_is_not_listed(lab: Lab) -> None:
    now = int(lab.client.time()[0])
    lab.client.zadd(QUEUES, {lab.broker.queue: now - 31 * 86_400})
    assert lab.broker.queue not in lab.broker.queues()
    lab.client.zadd(QUEUES, {lab.broker.queue: now - 29 * 86_400})
    assert lab.broker.queue in lab.broker.queues()
    lab.client.zrem(QUEUES, lab.broker.queue)


def test_a_job_on_which_a_worker_computes_is_not_stalled(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    now = int(lab.client.time()[0]) * 1000
    lab.client.hset(lab.keys.job(job), mapping={"pushed": now - HOUR_MS, "committed": now - HOUR_MS})
    status = lab.broker.status(job)
    assert is_stalled(status, [])
    assert is_stalled(status, [worker("w1")])
    busy = worker("w1", rates={job: (2.0, 100.0)}, in_hand={job: (1, 50, 50)})
    assert not is_stalled(status, [busy])
    assert seconds_left(status, []) is None
    assert seconds_left(status, [busy, worker("w2", rates={job: (1.0, 50.0)})]) == (status.submitted - 1) / 3
    assert InHand(1, 50, 50) == busy.in_hand[job]
    assert Rate(2.0, 100.0) == busy.rates[job]
