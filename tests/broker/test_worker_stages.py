"""The worker's stages that live with Redis, one at a time, on a real server."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from conftest import RedisServer
from lab.worker import SETTINGS, WorkerLab, pack, refusal, share, worker_lab
from msgspec import msgpack

from embedstream.api.interactive import EmbedReply, EmbedRequest
from embedstream.jobs import JobState
from embedstream.queue.broker import Broker
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import connect
from embedstream.settings import WorkerSettings
from embedstream.tracing import Traces
from embedstream_worker import ahead
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.held import Held, HeldBlock, TokenizedGroup, Window, hand_back
from embedstream_worker.infer import Urgent
from embedstream_worker.intake import LEAST_BLOCK_TOKENS, Intake
from embedstream_worker.interactive import Interactive
from embedstream_worker.jobs import Jobs
from embedstream_worker.lease import Leases
from embedstream_worker.pipeline import Channel, Life, start_stage
from embedstream_worker.troubles import patience


@pytest.fixture
def bench(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made


def make_record() -> WorkerRecord:
    return WorkerRecord(
        name="w1", host="h", pid=1, model="m", fingerprint="", engine="", device="", dtype="", roots=(), state="ready",
        started=0.0,
    )  # fmt: skip


def make_leases(broker: Broker, held: Held, settings: WorkerSettings = SETTINGS) -> Leases:
    return Leases(share(broker, settings=settings, held=held), make_record)


def idle_ms(bench: WorkerLab, job: str) -> list[int]:
    """Idle times of a job's claimed entries."""
    client: Any = bench.broker.client
    rows = client.xpending_range(bench.broker.keys.blocks(job), "workers", "-", "+", 10_000)
    return [row["time_since_delivered"] for row in rows]


def claim_all(bench: WorkerLab, job: str, held: Held) -> list[str]:
    claimed = bench.broker.claim("w1", [job], 10_000, 0)
    for entry in claimed:
        held.add(entry.stream, entry.entry)
    return [entry.entry for entry in claimed]


class NoMemory(Broker):
    """A full server: what adds memory is refused, the rest works."""

    def heartbeat(self, record: WorkerRecord, expire_seconds: float) -> None:  # noqa: ARG002
        raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")


@pytest.mark.holds("celery#5935")
def test_every_held_entry_is_renewed_however_many_there_are(bench: WorkerLab) -> None:
    job, held = bench.job([f"{i}" for i in range(1200)], rows_per_block=1), Held()
    assert len(claim_all(bench, job, held)) == 1200
    bench.expire_leases(job, 1200)
    assert min(idle_ms(bench, job)) > 1_000_000
    make_leases(bench.broker, held).renew()
    assert max(idle_ms(bench, job)) < 1_000_000


def test_entries_that_others_own_are_neither_renewed_nor_held_any_more(bench: WorkerLab) -> None:
    job, held = bench.job(["a", "b"], rows_per_block=1), Held()
    entries, stream = claim_all(bench, job, held), bench.broker.keys.blocks(job)
    bench.expire_leases(job, 1)
    (taken,) = bench.broker.sweep("w2", job, 3_000_000, 10)
    make_leases(bench.broker, held).renew()
    assert held.entries(stream) == set(entries) - {taken.entry}
    assert bench.owners(job) == {"w1": 1, "w2": 1}


def test_leases_are_renewed_even_if_the_server_has_no_room_for_a_sign_of_life(bench: WorkerLab) -> None:
    job, held, rounds = bench.job(["a"]), Held(), iter([False, True])
    claim_all(bench, job, held)
    bench.expire_leases(job, 1)
    full = NoMemory(connect(bench.url), bench.broker.queue)
    make_leases(full, held).run(lambda _: next(rounds))
    assert max(idle_ms(bench, job)) < 1_000_000


def test_a_sign_of_life_takes_the_place_of_what_is_no_list_of_workers(bench: WorkerLab) -> None:
    client: Any = bench.broker.client
    client.set(bench.broker.keys.workers, "garbage")
    leases, rounds = make_leases(bench.broker, Held(), WorkerSettings(heartbeat_seconds=0.0)), iter(range(4))
    leases.run(lambda _: next(rounds) == 3)
    assert client.type(bench.broker.keys.workers) == b"zset"
    assert len(bench.broker.workers()) == 1


def test_a_refusal_that_names_its_command_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> None:
        raise redis.ResponseError(f"Command # 2 (ZADD key {next(now)} w1) of pipeline caused error: no such luck")

    now, speaking = itertools.count(), patience("speaking", time.sleep)
    assert [speaking.once(refused) for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "speaking: Redis refuses (no such luck), trying again (no such luck)"
    ]


def test_a_pipeline_that_gets_nowhere_gives_its_leases_up(bench: WorkerLab, caplog: pytest.LogCaptureFixture) -> None:
    job, held = bench.job(["a"]), Held()
    leases = make_leases(bench.broker, held, WorkerSettings(stall_seconds=-1.0))
    leases.renew()
    assert not caplog.records, "a worker that holds nothing is idle, not stuck"
    claim_all(bench, job, held)
    bench.expire_leases(job, 1)
    leases.renew()
    leases.renew()
    assert min(idle_ms(bench, job)) > 1_000_000
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_handing_back_does_not_count_as_a_delivery(bench: WorkerLab) -> None:
    job, held = bench.job([f"{i}" for i in range(600)], rows_per_block=1), Held()
    hand_back(bench.broker, bench.broker.keys.blocks(job), "w1", claim_all(bench, job, held))
    assert bench.owners(job) == {"released": 600}
    again = bench.broker.sweep("w2", job, 3_000_000, 1000)
    assert {claimed.deliveries for claimed in again} == {1}


class Taking:
    """An intake in its thread, and the windows that it forms."""

    def __init__(self, bench: WorkerLab, room: int = 1000, window_tokens: int = 131_072, **settings: Any) -> None:
        self.windows: Channel[Window] = Channel(room)
        broker = Broker(connect(bench.url, 0), bench.broker.queue)
        options = EngineOptions("hashing")
        self.jobs = Jobs(broker, bench.url, HashingEngine(), options, (str(bench.folder),), lambda *_: 0)
        chosen = WorkerSettings(**{"window_ms": 20, "lease_seconds": 600.0, **settings})
        self.ahead = Ahead(65_536, padded=False, window_tokens=window_tokens, row_bytes=4 * 384)
        shared = share(broker, settings=chosen)
        self.life, self.held = shared.life, shared.held
        intake = Intake(shared, self.jobs, self.ahead, self.windows)
        self.thread = start_stage("intake", self.life, intake.run, [self.windows])

    def next(self) -> list[HeldBlock]:
        window = self.windows.get(timeout=30)
        assert window is not None, "no window came"
        self.ahead.arrived(sum(held.tokens for held in window.blocks))
        return window.blocks

    def stop(self) -> None:
        self.life.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert self.life.failure is None


def test_windows_hold_about_as_many_tokens_as_they_should(bench: WorkerLab) -> None:
    bench.job(["x" * 4000] * 64, rows_per_block=4)
    taking = Taking(bench, window_tokens=16_000)
    windows = [taking.next() for _ in range(3)]
    taking.stop()
    assert all(1 <= len(blocks) <= 8 for blocks in windows), [len(blocks) for blocks in windows]


def test_a_text_counts_as_many_tokens_in_a_window_as_the_model_takes_of_it(bench: WorkerLab) -> None:
    bench.job(["x" * 200_000] * 64, rows_per_block=1)  # fifty thousand tokens each, of which the engine takes 8192
    taking = Taking(bench, window_tokens=40_000)
    sizes = [len(taking.next()) for _ in range(3)]
    taking.stop()
    assert sizes[2] >= 4, sizes


def test_short_texts_make_no_windows_whose_vectors_do_not_fit_into_a_containers_memory(
    bench: WorkerLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "memory_bytes", lambda: 1 << 30)
    bench.job(["x"] * (1 << 17), rows_per_block=256)
    taking = Taking(bench, window_tokens=1 << 20)
    sizes = [sum(held.block.rows.num_rows for held in taking.next()) for _ in range(2)]
    taking.stop()
    assert 30_000 < min(sizes) <= max(sizes) < 60_000, "64 MiB of vectors"


@pytest.mark.slow
def test_blocks_without_a_text_do_not_make_windows_without_end(bench: WorkerLab) -> None:
    bench.job([refusal(i) for i in range(3000)], rows_per_block=1)
    most = 32
    taking = Taking(bench, window_tokens=most * LEAST_BLOCK_TOKENS)
    seen = 0
    while seen < 3000:
        blocks = taking.next()
        seen += len(blocks)
        assert len(blocks) <= most
    taking.stop()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({b"v": b"99"}, "99"),
        ({b"body": b"no Arrow"}, "block 0:1 cannot be read"),
        ({b"part": b"7"}, "its job has 1 parts"),
        ({b"block": b"x"}, "no number"),
        ({b"block": b"1" * 4000}, "out of bounds"),
    ],
)
def test_a_block_that_cannot_be_read_ends_its_job_with_the_reason_and_no_other(
    bench: WorkerLab, broken: dict[bytes, bytes], message: str
) -> None:
    job, other = bench.create(bench.spec()), bench.create(bench.spec("other"))
    bench.submit(other, pack(["c"], 1))
    bench.submit(job, pack(["a", "b"], 1))
    client: Any = bench.broker.client
    stream = bench.broker.keys.blocks(job)
    *_, (_, fields) = client.xrange(stream)
    client.xadd(stream, {**fields, **broken})
    taking = Taking(bench)
    got = [(held.job.id, held.block.number) for held in taking.next()]
    while not bench.broker.status(job).reason:
        got += [(held.job.id, held.block.number) for held in taking.next()]
    taking.stop()
    status = bench.broker.status(job)
    assert message in status.reason
    assert (status.state, bench.broker.outbox()) == (JobState.FINALIZING, [job])
    assert (other, 0) in got
    assert bench.broker.state(other) is JobState.RUNNING


def test_a_window_that_nobody_takes_any_more_is_handed_back(bench: WorkerLab) -> None:
    job = bench.job(["a", "b"], rows_per_block=1)
    taking = Taking(bench, room=0)
    while not taking.held.entries(bench.broker.keys.blocks(job)):
        assert taking.thread.is_alive()
    taking.windows.close()
    taking.thread.join(30)
    assert bench.owners(job) == {"released": 2}
    assert not taking.held.snapshot()


def test_blocks_come_as_one_window_once_their_producers_are_done(bench: WorkerLab) -> None:
    bench.job(["a", "b"], rows_per_block=1)
    begun = time.monotonic()
    taking = Taking(bench, window_ms=60_000)
    assert len(taking.next()) == 2
    assert time.monotonic() - begun < 30
    taking.stop()


def test_a_stream_that_is_gone_is_not_asked_for_in_a_tight_loop(bench: WorkerLab) -> None:
    job = bench.job(["a"])
    client: Any = bench.broker.client
    client.delete(bench.broker.keys.blocks(job))
    taking = Taking(bench)
    before, begun = reads(client), time.monotonic()
    assert taking.windows.get(timeout=0.5) is None
    rate = (reads(client) - before) / (time.monotonic() - begun)
    taking.stop()
    assert rate < 100


def say_alive(bench: WorkerLab, *names: str) -> None:
    for name in names:
        bench.broker.heartbeat(msgspec.structs.replace(make_record(), name=name), 60)


def test_at_the_end_of_a_job_windows_leave_something_for_the_other_workers(bench: WorkerLab) -> None:
    bench.job(["x" * 400] * 64, rows_per_block=1)
    say_alive(bench, "w1", "w2", "w3", "w4")
    taking = Taking(bench, window_ms=60_000)
    sizes = [len(taking.next())]
    while sum(sizes) < 64:
        sizes.append(len(taking.next()))
    taking.stop()
    assert sizes[0] == 8, "an eighth of what is left with the first one in hand"
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_a_worker_without_others_takes_all_that_fits(bench: WorkerLab) -> None:
    bench.job(["x" * 400] * 64, rows_per_block=1)
    say_alive(bench, "w1")
    taking = Taking(bench)
    assert len(taking.next()) == 64
    taking.stop()


def test_while_more_is_to_come_windows_are_filled(bench: WorkerLab) -> None:
    job = bench.create(bench.spec())
    bench.submit(job, pack(["x" * 400] * 64, 1))
    say_alive(bench, "w1", "w2", "w3", "w4")
    taking = Taking(bench, window_ms=60_000, window_tokens=6_000)
    assert len(taking.next()) > 8
    taking.stop()


def test_what_is_claimed_is_in_a_window_though_redis_cannot_say_how_much_is_left(
    bench: WorkerLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job(["a", "b"], rows_per_block=1)
    say_alive(bench, "w1", "w2")
    asked = []

    def fail(_broker: Broker, jobs: object) -> object:
        asked.append(jobs)
        raise redis.ConnectionError("cut")

    monkeypatch.setattr(Broker, "look", fail)
    taking = Taking(bench)
    blocks = [*taking.next(), *taking.next()]
    taking.stop()
    assert asked
    assert {held.entry for held in blocks} == taking.held.entries(bench.broker.keys.blocks(job))
    assert sorted(held.block.number for held in blocks) == [0, 1]


def test_the_next_window_is_not_claimed_while_enough_is_on_the_way(bench: WorkerLab) -> None:
    job = bench.job(["a"] * 8, rows_per_block=1)
    taking = Taking(bench, window_tokens=LEAST_BLOCK_TOKENS)
    first = taking.windows.get(timeout=30)
    assert first is not None
    assert taking.windows.get(timeout=0.3) is None
    assert bench.owners(job) == {"w1": 1}, "what one worker does not need yet is there for others"
    taking.ahead.arrived(sum(held.tokens for held in first.blocks))
    assert len(taking.next()) == 1
    taking.stop()


def make_interactive(
    bench: WorkerLab, life: Life, channel: Channel[list[TokenizedGroup] | Urgent], settings: WorkerSettings = SETTINGS
) -> Interactive:
    engine, broker = HashingEngine(), Broker(connect(bench.url, 0), bench.broker.queue)
    return Interactive(share(broker, life, settings), engine, engine.tokenizer(), channel, Traces())


def reads(client: Any) -> int:
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_xreadgroup", {}).get("calls", 0))


def test_requests_are_not_asked_for_in_a_tight_loop_while_nobody_ever_asked(bench: WorkerLab) -> None:
    life = Life()
    channel: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    asking = make_interactive(bench, life, channel)
    client: Any = bench.broker.client
    before, begun = reads(client), time.monotonic()
    thread = start_stage("interactive", life, asking.run, [])
    assert channel.get(timeout=0.5) is None
    rate = (reads(client) - before) / (time.monotonic() - begun)
    life.stop()
    thread.join(30)
    assert rate < 100


def test_a_request_whose_worker_leaves_goes_back_at_once(bench: WorkerLab) -> None:
    life, broker = Life(), bench.broker
    channel: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    asking = make_interactive(bench, life, channel)
    request = EmbedRequest(texts=("a",))
    broker.run(broker.request("r", msgpack.encode(request), 60_000, 10))
    thread = start_stage("interactive", life, asking.run, [])
    urgent = channel.get(timeout=30)
    assert isinstance(urgent, Urgent)
    channel.close()
    urgent.done.set()  # without an answer, as the model's stage does when it ends
    thread.join(30)
    assert not thread.is_alive()
    assert life.failure is None
    (again,) = broker.sweep_requests("w2", 3_000_000, 10)
    assert (again.fields[b"request"], again.deliveries) == (b"r", 1)


def test_a_request_that_its_workers_died_of_is_not_tried_again(bench: WorkerLab) -> None:
    life, broker = Life(), bench.broker
    channel: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    broker.run(broker.request("r", msgpack.encode(EmbedRequest(texts=("a",))), 60_000, 10))
    for dead in ("d1", "d2"):
        assert broker.sweep_requests(dead, 0, 10) or broker.claim_requests(dead, 10, 0)
    asking = make_interactive(bench, life, channel, WorkerSettings(lease_seconds=0))
    thread = start_stage("interactive", life, asking.run, [])
    client: Any = broker.client
    (_, raw) = client.blpop([broker.keys.reply("r")], timeout=30)
    life.stop()
    thread.join(30)
    assert "2 workers died" in msgpack.decode(raw, type=EmbedReply).error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (msgpack.encode(EmbedRequest(texts=("x",) * 1024, prompt="p" * 60_000)), "each with its prompt"),
        (msgpack.encode({"texts": ["x" * (5 << 20)]}), "a request of 5,242,"),
        (b"\xff", "Expected `object`"),
    ],
    ids=["prompt times texts", "body", "no request"],
)
def test_a_request_for_too_much_is_answered_with_the_bound(bench: WorkerLab, body: bytes, says: str) -> None:
    life, channel = Life(), Channel[list[TokenizedGroup] | Urgent](1)
    bench.broker.run(bench.broker.request("r", body, 60_000, 10))
    asking = make_interactive(bench, life, channel)
    thread = start_stage("interactive", life, asking.run, [])
    client: Any = bench.broker.client
    (_, raw) = client.blpop([bench.broker.keys.reply("r")], timeout=30)
    life.stop()
    thread.join(30)
    assert re.search(says, msgpack.decode(raw, type=EmbedReply).error)
    assert channel.get(timeout=0) is None
