"""Claiming: what a consumer gets, and what it never sees."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio
from lab.broker import HOUR_MS, Lab

from embedstream.errors import BlockError
from embedstream.jobs import JobState
from embedstream.keys import GROUP
from embedstream.queue.blocks import decode_block
from embedstream.queue.broker import AsyncBroker, Broker
from embedstream.queue.steps import Code

MALFORMED: list[dict[Any, Any]] = [
    {b"part": b"one", b"block": b"0", b"body": b""},
    {b"part": b"0", b"block": b"1.5", b"body": b""},
    {b"part": b"0"},
    {b"block": b"0"},
    {b"part": b"-1", b"block": b"0"},
    {b"part": b"0", b"block": b"-1"},
    {b"part": b"0", b"block": b"99999999999999999999"},
    {b"x": b"y"},
]


def test_a_claim_reads_every_job_so_that_a_small_one_is_not_behind_a_large_one(lab: Lab) -> None:
    large, small = lab.create("/large"), lab.create("/small")
    lab.fill(large, 10)
    lab.fill(small, 1)
    claimed = lab.broker.claim("w1", [large, small], 2, 0)
    assert [c.stream for c in claimed].count(lab.keys.blocks(large)) == 2
    assert [c.stream for c in claimed].count(lab.keys.blocks(small)) == 1
    assert {c.deliveries for c in claimed} == {1}
    assert lab.broker.claim("w1", [], 2, 0) == []


def test_two_consumers_never_get_the_same_block(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 4)
    entries = [c.entry for consumer in ("w1", "w2", "w1") for c in lab.claim(job, consumer, 2)]
    assert len(entries) == len(set(entries)) == 4


def test_a_sweep_takes_expired_leases_only_and_counts_deaths(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    mine = lab.claim(job)
    assert lab.sweep(job) == []
    lab.age(mine[1:])
    assert [(c.entry, c.deliveries) for c in lab.sweep(job)] == [(c.entry, 2) for c in mine[1:]]
    assert lab.broker.pending(mine[0].stream, "w1") == [mine[0].entry]
    assert lab.broker.pending(mine[0].stream, "w2") == [c.entry for c in mine[1:]]


def test_looking_at_pending_entries_does_not_deliver_them_again(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    mine = lab.claim(job)
    for _ in range(3):
        assert lab.broker.pending(mine[0].stream, "w1") == [mine[0].entry]
    lab.age(mine)
    assert lab.sweep(job)[0].deliveries == 2


def test_a_sweep_stops_at_its_count(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 5)
    lab.age(lab.claim(job))
    assert [len(lab.sweep(job, count=3)) for _ in range(3)] == [3, 2, 0]


@pytest.mark.parametrize("fields", MALFORMED)
def test_entries_without_an_address_are_handed_out_and_refused_by_the_decoder(lab: Lab, fields: dict[Any, Any]) -> None:
    job = lab.create()
    lab.client.xadd(lab.keys.blocks(job), fields)
    lab.fill(job, 1)
    bad, good = lab.claim(job)
    assert good.fields[b"block"] == b"0"
    with pytest.raises(BlockError):
        decode_block(bad.fields, ())
    lab.age([bad])
    [again] = lab.sweep(job)
    assert again.entry == bad.entry


def test_jobs_that_ended_or_never_were_give_nothing(lab: Lab) -> None:
    ended, alive = lab.cancelled_job(1), lab.create("/alive")
    lab.fill(alive, 1)
    for job in (ended, "none"):
        assert lab.claim(job) == lab.sweep(job) == []
        assert lab.broker.pending(lab.keys.blocks(job), "w1") == []
        assert (lab.broker.backlog(job), lab.broker.next_block("none", 0)) == (0, 0)
    # The listing was old, and the living job does not wait for that.
    assert len(lab.broker.claim("w1", [ended, alive], 10, 0)) == 1


# What only a real server does


def test_deleted_entries_do_not_stay_pending(real_lab: Lab) -> None:
    job = real_lab.create()
    real_lab.fill(job, 6)
    mine = real_lab.claim(job)
    real_lab.age(mine)
    real_lab.client.xdel(mine[0].stream, *[c.entry for c in mine[:4]])
    assert [c.entry for c in real_lab.sweep(job)] == [c.entry for c in mine[4:]]
    summary = real_lab.client.xpending(mine[0].stream, GROUP)
    assert isinstance(summary, dict)
    assert summary["pending"] == 2


def test_a_sweep_finds_an_expired_lease_behind_many_live_ones(real_lab: Lab) -> None:
    job = real_lab.create()
    real_lab.fill(job, 900)
    mine = real_lab.claim(job, count=1000)
    real_lab.age(mine[-1:])
    assert [c.entry for c in real_lab.sweep(job, count=16)] == [mine[-1].entry]


def wait_until_blocked(client: redis.Redis) -> None:
    deadline = time.monotonic() + 5
    while not client.info("clients")["blocked_clients"]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "ending",
    [
        lambda lab, job: lab.broker.run(lab.broker.cancel(job)),
        lambda lab, job: lab.client.delete(lab.keys.blocks(job)),
        lambda lab, job: (lab.client.delete(lab.keys.blocks(job)), lab.client.xadd(lab.keys.blocks(job), {"x": "y"})),
    ],
    ids=["cancelled", "deleted", "made anew without its group"],
)
def test_a_stream_that_goes_while_a_claim_waits_on_it_gives_nothing(
    real_lab: Lab, redis_url: str, ending: Callable[[Lab, str], object]
) -> None:
    job = real_lab.create()
    got: list[object] = []
    with redis.Redis.from_url(redis_url) as own:
        broker = Broker(own, real_lab.broker.queue)
        waiting = threading.Thread(target=lambda: got.append(broker.claim("w1", [job], 10, 500)))
        waiting.start()
        wait_until_blocked(real_lab.client)
        ending(real_lab, job)
        waiting.join()
    assert got == [[]]
    real_lab.client.delete(real_lab.keys.blocks(job))


def test_a_waiting_claim_gets_a_block_as_soon_as_it_is_there(real_lab: Lab, redis_url: str) -> None:
    job = real_lab.create()
    got: list[int] = []
    with redis.Redis.from_url(redis_url) as own:
        broker = Broker(own, real_lab.broker.queue)
        waiting = threading.Thread(target=lambda: got.append(len(broker.claim("w1", [job], 10, 4000))))
        waiting.start()
        wait_until_blocked(real_lab.client)
        real_lab.fill(job, 1)
        waiting.join(2)
    assert got == [1]


def test_a_full_server_drains(real_lab: Lab) -> None:
    job, client, broker = real_lab.create(), real_lab.client, real_lab.broker
    other = real_lab.create("/other")
    real_lab.fill(job, 4)
    real_lab.fill(other, 1)
    claimed = real_lab.claim(job, count=3)
    try:
        client.config_set("maxmemory", 1)
        assert real_lab.submit(job, 0, 4).code is Code.FULL
        assert broker.run(broker.suspect(job, 0, 0, (1,))).code is Code.OK
        assert broker.run(broker.renew(claimed[0].stream, "w1", [c.entry for c in claimed])) == []
        assert broker.run(broker.release(claimed[0].stream, "w1", [claimed[2].entry])).code is Code.OK
        assert real_lab.commit(job, claimed[:2]).code is Code.COMMITTED
        assert real_lab.adopt(job, [(0, 3)]).code is Code.COMMITTED
        assert real_lab.seal(job, 0, 4).code is Code.OK
        assert real_lab.commit(job, real_lab.sweep(job)).code is Code.COMMITTED
        real_lab.finalize(job)
        assert broker.run(broker.cancel(other)).code is Code.OK
    finally:
        client.config_set("maxmemory", 0)
    assert (real_lab.state(job), real_lab.state(other)) == (JobState.COMPLETED, JobState.FINALIZING)
    assert real_lab.queued_bytes() == 0


def test_the_queue_is_bounded_by_a_quarter_of_the_servers_memory(real_lab: Lab) -> None:
    try:
        real_lab.client.config_set("maxmemory", 400_000_000)
        assert real_lab.broker.memory_bound(10**9) == 100_000_000
        assert real_lab.broker.memory_bound(5) == 5
    finally:
        real_lab.client.config_set("maxmemory", 0)


def test_scripts_are_sent_again_to_a_server_that_forgot_them(real_lab: Lab) -> None:
    job = real_lab.create()
    real_lab.fill(job, 1)
    real_lab.client.script_flush()
    assert real_lab.submit(job, 0, 1).code is Code.OK
    assert real_lab.broker.backlog(job) == 2


async def test_the_asyncio_broker_asks_and_hears_the_answer(real_lab: Lab, redis_url: str) -> None:
    real_lab.client.script_flush()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        broker = AsyncBroker(client, real_lab.broker.queue)
        assert (await broker.run(broker.request("r", b"body", HOUR_MS, 10))).code is Code.OK
        (claimed,) = real_lab.broker.claim_requests("w1", 10, 0)
        key = broker.keys.reply("r")
        assert await broker.receive(key, 0.01) is None
        assert real_lab.broker.run(real_lab.broker.reply("r", claimed.entry, b"reply", HOUR_MS)).code is Code.OK
        assert await broker.receive(key, 10) == b"reply"


@pytest.mark.parametrize("taken", ["the group", "the stream"])
def test_a_job_whose_stream_something_took_does_not_keep_others_waiting(lab: Lab, taken: str) -> None:
    """As a server does that evicts keys."""
    broken, healthy = lab.create("/broken"), lab.create("/healthy")
    lab.fill(broken, 2)
    lab.fill(healthy, 3)
    stream = lab.keys.blocks(broken)
    if taken == "the group":
        lab.client.xgroup_destroy(stream, "workers")
    else:
        lab.client.delete(stream)
    claimed = lab.broker.claim("w1", [broken, healthy], 10, 0)
    assert {c.stream for c in claimed} == {lab.keys.blocks(healthy)}
    assert len(claimed) == 3
    # What is lost with a stream comes back when its job is reopened.
    lab.broker.run(lab.broker.cancel(broken))
