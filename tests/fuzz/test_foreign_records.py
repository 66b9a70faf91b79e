"""Whatever lies under whichever key, each reader refuses that one thing, and the healthy job next to it goes on.

One queue with jobs in every state is copied once. Each trial puts the copy back, writes garbage into it, and lets every
reader of Redis look: worker, housekeeping, interactive requests, producer, embed-status, embed-cancel, metrics.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import RedisServer, serve_redis
from lab.broker import make_record
from lab.foreign_records import Mutation, apply_all, mutations
from lab.worker import BOUND, HOUR_MS, WorkerLab, pack, share

from embedstream import keys
from embedstream.api.interactive import EmbedRequest
from embedstream.dataset.sinks import open_sink
from embedstream.errors import EmbedstreamError, RecordDamaged
from embedstream.jobs import JobState
from embedstream.keys import GROUP
from embedstream.lifecycle.opening import open_job, refuse_forbidden
from embedstream.lifecycle.watching import look
from embedstream.metrics.exposition import queue_families
from embedstream.queue import coordination
from embedstream.queue.blocks import decode_block, encode_block
from embedstream.queue.broker import Broker, Claimed, entry_size
from embedstream.queue.queues import look_at_queue
from embedstream.queue.steps import Code, CommitBlock
from embedstream.queue.workers import InHand, Rate, WorkerRecord
from embedstream.server.connection import connect, explaining
from embedstream.settings import Settings, WorkerSettings
from embedstream.terminal import printable
from embedstream.tracing import Traces
from embedstream_producer.status import look_at_all, look_at_job
from embedstream_worker import intake
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.held import Held, HeldBlock, Window, release
from embedstream_worker.housekeeping import Housekeeping
from embedstream_worker.infer import Urgent
from embedstream_worker.intake import Intake
from embedstream_worker.interactive import Interactive
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs, OpenJob
from embedstream_worker.lease import Leases
from embedstream_worker.pipeline import Channel, Life
from embedstream_worker.prompts import Prompts
from embedstream_worker.shared import Shared
from embedstream_worker.suspects import BY_CHUNK, NotOurs, Trial
from embedstream_worker.worker import Worker, WorkerPlan

SEED = int(os.environ.get("EMBEDSTREAM_FUZZ_SEED", "1"))
TRIALS = int(os.environ.get("EMBEDSTREAM_FUZZ_TRIALS", "100000"))
"""Of the long test."""

SHARE = 300
"""Trials of the short test."""

MODEL = EngineOptions("hashing")
SETTINGS = WorkerSettings(window_ms=1, lease_seconds=600)


COORDINATOR = coordination.CoordinatorRecord(
    name="c1", host="h", pid=1, processes=2, input_roots=("/",), output_roots=("/", "redis:")
)


class Impatient(threading.Event):
    """Nobody waits for it."""

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return self.is_set()


def impatient_life() -> Life:
    life = Life()
    life.stopping = Impatient()
    return life


class ImpatientBroker(Broker):
    """Nor does it wait for blocks and requests: a server ends such waits only every tenth of a second."""

    def claim(self, consumer: str, jobs: Sequence[str], count: int, block_ms: int) -> list[Claimed]:  # noqa: ARG002
        return super().claim(consumer, jobs, count, 0)

    def claim_requests(self, consumer: str, count: int, block_ms: int) -> list[Claimed]:  # noqa: ARG002
        return super().claim_requests(consumer, count, 0)


class AnsweringModel(Channel[Any]):
    """In place of the model's stage: each request has its vectors at once."""

    def put_first(self, item: Any) -> None:
        assert isinstance(item, Urgent)
        item.results = {"dense": np.zeros((len(item.tokens.lengths), 4), np.float32)}
        item.done.set()


def worker_record(name: str, job: str) -> WorkerRecord:
    return WorkerRecord(
        name=name, host="h", pid=1, model="hashing", fingerprint="f", engine="hashing", device="cpu", dtype="float32",
        roots=("/", "redis:"), state="ready", started=1.0, rows=5, tokens=9, lease_seconds=600.0,
        in_hand={job: InHand(3, 4, 5)}, written={job: 1}, rates={job: Rate(1.5, 2.5)}, refused={"x": "y"},
        waits={job: "a disk is full"},
    )  # fmt: skip


class Queue:
    """A queue with everything in it, which can be put back as it was."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.lab = WorkerLab(url, folder)
        self.broker = self.lab.broker = ImpatientBroker(connect(url), "q")
        self.client: Any = self.broker.client
        self.engine = HashingEngine()
        self.tokenizer = self.engine.tokenizer()
        plan = WorkerPlan(url, "q", MODEL, (str(folder),), SETTINGS)
        self.worker = Worker(plan, lambda: self.engine, connect=lambda _url, _retries: self.client)
        self._make_jobs()
        self._make_others()
        self.copy = {
            key: (self.client.dump(key), max(0, self.client.pttl(key))) for key in sorted(self.client.scan_iter("*"))
        }

    def _make_jobs(self) -> None:
        lab, broker = self.lab, self.broker
        self.healthy = lab.job(["a", "b"], rows_per_block=1, output="healthy")
        self.sick = lab.job([f"text {row}" for row in range(6)], rows_per_block=1, output="sick", prompt="p: ")
        (job,) = (job for job in self._jobs().takeable() if job.id == self.sick)
        (first,) = broker.claim("gone", [self.sick], 1, 0)
        block = decode_block(first.fields, ())
        held = HeldBlock(job, first.stream, first.entry, entry_size(first.fields), 1, block, 1.0)
        assert self._commit(job, held) is Code.COMMITTED
        broker.claim("gone", [self.sick], 2, 0)
        for entry in broker.pending(broker.keys.blocks(self.sick), "gone"):
            self.client.xclaim(
                broker.keys.blocks(self.sick), GROUP, "gone", 0, [entry], idle=HOUR_MS, retrycount=3, justid=True
            )
        broker.run(broker.suspect(self.sick, 0, 1, [0]))
        self.open = lab.create(lab.spec("open", parts=("/a", "/b"), max_length=9, keep=("lang",)))
        self.ending = lab.job(["a"], output="ending")
        broker.run(broker.cancel(self.ending, JobState.FAILED, "for a reason"))
        self.done = lab.job(["a"], output="done")
        broker.run(broker.cancel(self.done))
        lease = broker.run(broker.take_finalize(self.done, 0))
        assert lease is not None
        broker.run(broker.finalized(lease, JobState.CANCELLED, HOUR_MS, "{}"))
        self.jobs = (self.sick, self.open, self.ending, self.done)
        self.specs = {job: broker.status(job).spec for job in self.jobs}

    def _share(self) -> Shared:
        return replace(share(self.broker, impatient_life(), SETTINGS), consumer="me")

    def _jobs(self) -> Jobs:
        prompts = Prompts(self._share(), self.tokenizer, AnsweringModel(1))
        return Jobs(self.broker, self.url, self.engine, MODEL, (str(self.folder),), prompts.length)

    def _make_others(self) -> None:
        broker, client = self.broker, self.client
        body = msgspec.msgpack.encode(EmbedRequest(texts=("a", "b"), prompt="p", max_length=5))
        for name in ("r1", "r2"):
            broker.run(broker.request(name, body, HOUR_MS, 10))
        client.rpush(broker.keys.reply("r2"), b"an answer")
        broker.heartbeat(worker_record("w1", self.sick), 3600)
        broker.heartbeat(worker_record("w2", self.open), 3600)
        coordination.heartbeat(broker, COORDINATOR, 3600)
        wanted = coordination.Compaction(output="/out", target_bytes=5, groups=("0123456789abcdef",))
        coordination.save_compaction(broker, wanted)
        coordination.note_compacted(broker, wanted, "trouble", "a disk is full")
        coordination.ask_to_ingest(broker, self.open)
        coordination.note_trouble(broker, self.open, "part 0", "it is gone")
        coordination.note_repeated(broker, self.open, 0, [(1, 0, 0)])

    def put_back(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            pipe.flushdb()
            for key, (data, expires) in self.copy.items():
                pipe.restore(key, expires, data)
            pipe.execute()

    # What every reader does

    def attack(self, chosen: list[Mutation]) -> None:
        """Every reader looks at what others have made of the queue."""
        self.put_back()
        apply_all(self.client, chosen)
        touched = {mutation.key.decode(errors="replace") for mutation in chosen}
        broker = self.broker
        jobs = [job for job in self.jobs if any(job in key for key in touched)] or [self.sick]
        self._show()
        self._ask(jobs)
        housekeeping = Housekeeping(broker, self.url, (str(self.folder),))
        housekeeping.finalize()
        housekeeping._retire()
        leases = Leases(self._share(), lambda: worker_record("me", self.sick))
        leases.say_alive()
        self._work(healthy=broker.keys.jobs not in touched)
        self._answer(healthy=broker.keys.interactive not in touched)
        self.worker._inherit()
        self.worker._leave()
        self._produce()
        for job in jobs:
            self._end(job)

    def _show(self) -> None:
        """All that people and metrics are shown."""
        shown = look_at_all(Broker(self.client, ""))
        json.loads(msgspec.json.encode(shown.value))
        assert all(map(printable, shown.lines))
        queue_families([look_at_queue(self.broker, 10)])

    def _ask(self, jobs: list[str]) -> None:
        for job in jobs:
            refused(look_at_job, Broker(self.client, ""), job, None, self.url)
            refused(look, self.broker, job, self.url, Settings(), self.specs[job])

    def _work(self, healthy: bool) -> None:
        """A worker takes what it can. `healthy`: whether the healthy job must come, and be done."""
        shared, jobs = self._share(), self._jobs()
        held = shared.held
        opened = [job.id for job in jobs.takeable()]
        assert not healthy or self.healthy in opened
        windows: Channel[Window] = Channel(100)
        ahead = Ahead(65_536, padded=False)
        made = Intake(shared, jobs, ahead, windows)
        done = False
        for _ in range(14):
            made._step()
            while (window := windows.get(0)) is not None:
                ahead.arrived(sum(block.tokens for block in window.blocks))
                for block in window.blocks:
                    code = self._compute(jobs, held, shared.life, block)
                    done |= (block.job.id, code) == (self.healthy, Code.COMMITTED)
        assert not healthy or done, "the healthy job's blocks do not come"
        assert held.empty

    def _compute(self, jobs: Jobs, held: Held, life: Life, block: HeldBlock) -> Code | None:
        """As the stages after the intake do; the answer to the commit."""
        held_block, job = block.block, block.job
        try:
            if block.deliveries >= BY_CHUNK:
                trial = Trial(self.broker, held, life, block)
                assert set(trial.errors) <= set(range(held_block.rows.num_rows))
                trial.note(0)
                trial.note(None)
            code = self._commit(job, block)
        except NotOurs:
            code = None
        except RecordDamaged as error:
            jobs.refuse(job.id, str(error), LOOK_AGAIN_SECONDS)
            code = None
        if code is None:
            release(self.broker, "me", held, [block])
        held.remove(block.stream, [block.entry])
        return code

    def _commit(self, job: OpenJob, block: HeldBlock) -> Code:
        address = (block.block.part, block.block.number)
        record = make_record(job.id, "s{}-{}".format(*address), [address], job.space)
        commit = CommitBlock(*address, block.block.sum, block.entry, block.size)
        return self.broker.run(self.broker.commit(record, [commit], job.stored, worked_ms=5)).code

    def _answer(self, healthy: bool) -> None:
        """Interactive requests: at least the good ones have their answers."""
        served = Interactive(self._share(), self.engine, self.tokenizer, AnsweringModel(1), Traces())
        try:
            for request in served._claim():
                served._serve(request)
        except RecordDamaged:
            assert not healthy, "one request has ended the others"

    def _produce(self) -> None:
        """A producer submits next to all that, and again what is there."""
        broker = self.broker
        refused(refuse_forbidden, broker.workers(), str(self.folder))
        spec = self.lab.spec("fresh")
        assert broker.run(broker.create(spec)).code is Code.CREATED
        for block in pack(["a"], 1):
            assert broker.run(broker.submit(spec.job, encode_block(block), BOUND)).code in (Code.OK, Code.FULL)
        assert broker.run(broker.seal(spec.job, 0, 1)).code in (Code.OK, Code.MISSING)
        again = self.specs[self.sick]
        refused(open_job, broker, again, open_sink(again.output, again, self.url))

    def _end(self, job: str) -> None:
        """As embed-cancel does: afterwards it is ended, or gone without a trace and can be submitted again."""
        broker = self.broker
        if not refused(broker.is_damaged, job):
            refused(broker.run, broker.cancel(job))
            return
        assert broker.run(broker.forget(job, broker.keys_below(job))).code is Code.OK
        assert not broker.knows(job)
        assert broker.keys_below(job) == []
        assert job not in (*broker.active_jobs(), *broker.outbox(), *broker.recent_jobs())
        assert broker.run(broker.create(self.specs[job])).code is Code.CREATED


def refused(act: Callable[..., Any], *args: Any) -> Any:
    """Do something that may be refused in one sentence."""
    try:
        with explaining("redis://x"):
            return act(*args)
    except EmbedstreamError:
        return None


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with serve_redis() as made:
        yield made


@pytest.fixture
def queue(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setattr(intake, "IDLE_WAIT_MS", 1)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power here
    connect(server.url).flushall()
    return Queue(server.url, tmp_path)


def mutated_keys(queue: Queue) -> list[bytes]:
    """All but those of the healthy job."""
    return [key for key in queue.copy if queue.healthy.encode() not in key]


def trials(queue: Queue, count: int) -> Iterator[list[Mutation]]:
    """So many, the same for the same seed: every mutation alone as far as that goes, then some of them together."""
    rng = random.Random(SEED)
    found = list(mutations(queue.client, mutated_keys(queue), rng))
    rng.shuffle(found)
    yield from ([mutation] for mutation in found[:count])
    for _ in range(count - len(found)):
        yield rng.sample(found, rng.choice((1, 2, 2, 3, 5)))


def run(queue: Queue, count: int) -> int:
    done = 0
    for chosen in trials(queue, count):
        try:
            queue.attack(chosen)
        except BaseException:
            print("attacked by", "; ".join(map(str, chosen)))
            raise
        done += 1
    return done


def test_the_queue_that_is_attacked_has_a_key_of_every_kind(queue: Queue) -> None:
    kinds = {name for name in vars(keys.Keys) if not name.startswith("_")} - {"prefix", "queue"}
    held = {key.decode() for key in queue.copy}
    named = queue.broker.keys
    there = {
        kind
        for kind in kinds
        for job in queue.jobs
        for each in [getattr(named, kind)]
        if (each if isinstance(each, str) else key_of(each, kind, job)) in held
    }
    assert there == kinds


def key_of(make: Any, kind: str, job: str) -> str:
    match kind:
        case "worker":
            return str(make("w1"))
        case "reply":
            return str(make("r2"))
        case "caller":
            return str(make("r1"))
        case "done" | "sums":
            return str(make(job, 0))
    return str(make(job))


def test_garbage_costs_nothing_but_what_it_lies_in(queue: Queue) -> None:
    assert run(queue, SHARE) == SHARE


@pytest.mark.scale
@pytest.mark.timeout(0)
def test_a_hundred_thousand_kinds_of_garbage_cost_nothing_but_what_they_lie_in(queue: Queue) -> None:
    assert run(queue, TRIALS) == TRIALS
    print(f"{TRIALS:,} trials with seed {SEED}")
