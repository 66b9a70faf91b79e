"""Whatever lies in Redis costs the one job, dataset or entry that it is about; the healthy ones are seen to."""

from __future__ import annotations

import json
import logging
import random
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from lab.broker import Lab
from rq import Queue
from rq.serializers import JSONSerializer

from embedstream.keys import COMPACTIONS, COORDINATORS, QUEUES, compaction, coordinator
from embedstream.queue.coordination import (
    Compaction,
    CoordinatorRecord,
    ask_to_ingest,
    compactions,
    coordinators,
    heartbeat,
    save_compaction,
    troubles,
)
from embedstream.server.connection import connect
from embedstream_coordinator import functions
from embedstream_coordinator.context import Context
from embedstream_coordinator.dispatching import EXPIRE_SECONDS, Dispatcher
from embedstream_coordinator.rq_types import ClosedJob, ClosedQueue, make_queue

DATASET = Compaction(output="/out/dataset", target_bytes=1, groups=("c0",))
POISONED = "/out/poisoned"
HUGE = "1" * 400


class Bench:
    """A queue with a job to be read and one to be ended, both healthy, and one of each that a case may spoil."""

    def __init__(self, url: str) -> None:
        self.client: Any = connect(url)
        self.lab = Lab(self.client)
        self.keys = self.lab.broker.keys
        self.lab.broker.announce()
        self.healthy = self._jobs("/out/a", "/out/b")
        self.read, self.ended = self._jobs(POISONED, "/out/ended")
        save_compaction(self.lab.broker, DATASET)
        record = CoordinatorRecord(name="c", host="h", pid=1, processes=1, input_roots=(), output_roots=())
        heartbeat(self.lab.broker, record, 60)
        self.now = 0.0
        self.context = Context(redis_url=url, input_roots=("/in",), output_roots=("/out", "redis:"))
        self.dispatcher = Dispatcher(self.context, lambda: self.now)

    def _jobs(self, read: str, ended: str) -> tuple[str, str]:
        jobs = self.lab.create(read, parts=1), self.lab.create(ended)
        ask_to_ingest(self.lab.broker, jobs[0])
        self.lab.broker.run(self.lab.broker.cancel(jobs[1]))
        return jobs

    def expected(self) -> set[str]:
        read, ended = self.healthy
        return {f"ingest-{read}-0", f"finalize-{ended}"}

    def spec(self, job: str, **changed: object) -> None:
        spec = json.loads(self.client.hget(self.keys.job(job), "spec"))
        self.client.hset(self.keys.job(job), "spec", json.dumps({**spec, **changed}))

    def replace(self, key: str, type: str) -> None:
        """Put a key of a type where another belongs."""
        self.client.delete(key)
        {
            "string": lambda: self.client.set(key, b"\xff"),
            "list": lambda: self.client.rpush(key, b"\xff", "x"),
            "hash": lambda: self.client.hset(key, b"\xff", "x"),
            "set": lambda: self.client.sadd(key, b"\xff", "x"),
            "zset": lambda: self.client.zadd(key, {b"\xff": 0, "x y": 0}),
        }[type]()

    def rq_job(self, name: str, **fields: object) -> str:
        """A record in RQ, as others could write it, at the head of the queue. Returns its name."""
        made = {"data": json.dumps(["embedstream.finalize", None, ["q", "x"], {}]), "origin": "embedstream"}
        self.client.hset(f"rq:job:{name}", mapping={**made, "status": "queued", **fields})
        self.client.lpush("rq:queue:embedstream", name)
        return name

    def take_all(self) -> set[str]:
        """What the processes of a coordinator would take now, and say that they work on."""
        found: set[str] = set()
        while taken := ClosedQueue.dequeue_any([make_queue(self.client)], None, self.client, ClosedJob, JSONSerializer):
            assert callable(taken[0].func)
            found.add(taken[0].id)
        return found


Plant = Callable[[Bench], object]

CASES: dict[str, Plant] = {
    # Of jobs and queues.
    "a blank in an id to be read": lambda b: b.client.zadd(b.keys.ingest, {"a b": 0}),
    "a blank in an id to be ended": lambda b: b.client.zadd(b.keys.finalize, {"a b": 0}),
    "an id that is known and has a blank": lambda b: (
        b.client.copy(b.keys.job(b.ended), b.keys.job("a b")),
        b.client.zadd(b.keys.finalize, {"a b": 0}),
    ),
    "an id that is known and has a colon": lambda b: (
        b.client.copy(b.keys.job(b.read), b.keys.job("a:b")),
        b.client.zadd(b.keys.ingest, {"a:b": 0}),
    ),
    "an id of 5,000 letters": lambda b: b.client.zadd(b.keys.ingest, {"a" * 5000: 0}),
    "no UTF-8 among the jobs to be read": lambda b: b.client.zadd(b.keys.ingest, {b"\xff": 0}),
    "no UTF-8 among the jobs to be ended": lambda b: b.client.zadd(b.keys.finalize, {b"\xff": 0}),
    "no UTF-8 among the queues": lambda b: b.client.zadd(QUEUES, {b"\xff": 9e12}),
    "braces in a queue": lambda b: b.client.zadd(QUEUES, {"}{": 9e12, "": 9e12, "\0": 9e12}),
    "NUL in the output of a job to be read": lambda b: b.spec(b.read, output="/x\0y"),
    "NUL in the output of a job to be ended": lambda b: b.spec(b.ended, output="/x\0y"),
    "half a surrogate pair in an output": lambda b: b.spec(b.ended, output="/out/\ud800"),
    "an output of 5,000 letters": lambda b: b.spec(b.ended, output="/out/" + "a" * 5000),
    "a port that is no number": lambda b: b.spec(b.ended, output="redis://h:x/0?prefix=a:"),
    "an address that is half IPv6": lambda b: b.spec(b.ended, output="redis://[::1/0?prefix=a:"),
    "an endless number": lambda b: b.client.hset(b.keys.job(b.read), "created", "1e400"),
    "a number of 400 digits": lambda b: b.client.hset(b.keys.job(b.ended), "created", HUGE),
    "a number of 5,000 digits": lambda b: b.client.hset(b.keys.job(b.ended), "rows", "1" * 5000),
    "a state that is none": lambda b: b.client.hset(b.keys.job(b.ended), "state", "nonsense"),
    "a verdict that is none": lambda b: b.client.hset(b.keys.job(b.ended), "verdict", "nonsense"),
    "an epoch that is none": lambda b: b.client.hset(b.keys.job(b.ended), "epoch", "nonsense"),
    "a spec that is no JSON": lambda b: b.client.hset(b.keys.job(b.read), "spec", b"\xff{"),
    "a spec that is a thousand lists": lambda b: b.client.hset(b.keys.job(b.read), "spec", "[" * 100_000),
    "a spec of another version": lambda b: b.spec(b.read, v=2),
    "a spec without parts": lambda b: b.spec(b.read, parts=[]),
    "no spec": lambda b: b.client.hdel(b.keys.job(b.read), "spec"),
    "a part compared that is no number": lambda b: b.client.hset(b.keys.repeated(b.read), "x", "x"),
    "a part compared that is no list": lambda b: b.client.hset(b.keys.repeated(b.read), "0", b"\xc1"),
    "a trouble that is no UTF-8": lambda b: b.client.hset(b.keys.troubles(b.read), b"\xff", b"\xff"),
    # Of compactions and coordinators.
    "a blank in a merged shard": lambda b: b.client.hset(
        COMPACTIONS, DATASET.id, msgspec.json.encode(msgspec.structs.replace(DATASET, groups=("a b",)))
    ),
    "NUL in the output of a compaction": lambda b: save_compaction(
        b.lab.broker, Compaction(output="/x\0y", target_bytes=1)
    ),
    "a compaction under another's id": lambda b: b.client.hset(COMPACTIONS, "other", msgspec.json.encode(DATASET)),
    "a compaction that is no JSON": lambda b: b.client.hset(COMPACTIONS, "x", b"\xff"),
    "a compaction under no UTF-8": lambda b: b.client.hset(COMPACTIONS, b"\xff", msgspec.json.encode(DATASET)),
    "a compaction of negative size": lambda b: b.client.hset(
        COMPACTIONS, DATASET.id, msgspec.json.encode(DATASET).replace(b":1,", b":-1,")
    ),
    "a merged shard that is no UTF-8": lambda b: b.client.hset(compaction(DATASET.id), b"\xff", b"\xff"),
    "a merged shard that is no record": lambda b: b.client.hset(compaction(DATASET.id), "c0", b"\xff"),
    "a coordinator that is no JSON": lambda b: b.client.set(coordinator("c"), b"\xff"),
    "a coordinator whose name is no UTF-8": lambda b: b.client.zadd(COORDINATORS, {b"\xff": 9e15}),
    # Of RQ.
    "no UTF-8 in RQ's queue": lambda b: b.client.lpush("rq:queue:embedstream", b"\xff"),
    "a blank in RQ's queue": lambda b: b.client.lpush("rq:queue:embedstream", "a b", "a:b", "", "x" * 5000),
    "no UTF-8 among what is tried again": lambda b: b.client.zadd("rq:scheduled:embedstream", {b"\xff": 0}),
    "a blank among what is tried again": lambda b: b.client.zadd("rq:scheduled:embedstream", {"a b": 0, "a:b": 0}),
    "no UTF-8 among what runs": lambda b: b.client.zadd(
        "rq:wip:embedstream", {b"\xff": 1, b"\xff:\xff": 1, "a:b:c": 1}
    ),
    "no UTF-8 among what was taken": lambda b: b.client.rpush("rq:queue:embedstream:intermediate", b"\xff", ""),
    "no UTF-8 among RQ's workers": lambda b: b.client.sadd("rq:workers:embedstream", b"\xff", "x"),
    "no UTF-8 among what failed": lambda b: b.client.zadd("rq:failed:embedstream", {b"\xff": 1}),
    "a date that is none": lambda b: b.rq_job(f"finalize-{b.healthy[1]}", enqueued_at="yesterday"),
    "a date that is none of a job to be tried again": lambda b: (
        b.rq_job("again", created_at="yesterday"),
        b.client.zadd("rq:scheduled:embedstream", {"again": 0}),
    ),
    "a status that is none": lambda b: b.rq_job(f"ingest-{b.healthy[0]}-0", status="nonsense"),
    "a number of RQ's that is none": lambda b: b.rq_job(f"ingest-{b.healthy[0]}-0", result_ttl="x"),
    "a function of another's": lambda b: b.rq_job(
        f"ingest-{b.healthy[0]}-0", data=json.dumps(["os.mkdir", None, ["/x"], {}])
    ),
    "another record of RQ's": lambda b: b.replace(f"rq:job:ingest-{b.healthy[0]}-0", "list"),
    "arguments of another type": lambda b: b.rq_job(
        "odd", data=json.dumps(["embedstream.ingest", None, [1, ["x"], "y"], {}])
    ),
    "half a surrogate pair as argument": lambda b: b.rq_job(
        "odd", data=json.dumps(["embedstream.ingest", None, ["\ud800", "\ud800", 0], {}])
    ),
    "too few arguments": lambda b: b.rq_job("odd", data=json.dumps(["embedstream.merge", None, [], {}])),
    "a function that is a list": lambda b: b.rq_job("odd", data=json.dumps([["x"], {}, 7, []])),
    "data that are no JSON": lambda b: b.rq_job("odd", data=b"\x80\x04."),
    "no data": lambda b: (b.rq_job("odd"), b.client.hdel("rq:job:odd", "data")),
    "dependencies that are none": lambda b: b.rq_job("odd", dependency_ids="{"),
    "web hooks that are none": lambda b: b.rq_job(f"ingest-{b.healthy[0]}-0", webhooks="[1]"),
    "a record without a field of ours": lambda b: b.client.hset(f"rq:job:ingest-{b.healthy[0]}-0", "x", "x"),
    "a job of another RQ": lambda b: Queue("embedstream", b.client).enqueue("os.getcwd"),
}


def of_rq(key: str, type: str, _: Bench) -> tuple[str, str]:
    return f"rq:{key}", type


REGISTRIES = ("wip", "finished", "failed", "scheduled", "deferred", "canceled")
TYPES = ("string", "list", "hash", "set", "zset")
KEYS: dict[str, Callable[[Bench], tuple[str, str]]] = {
    "queues": lambda _: (QUEUES, "zset"),
    "coordinators": lambda _: (COORDINATORS, "zset"),
    "coordinator": lambda _: (coordinator("c"), "string"),
    "compactions": lambda _: (COMPACTIONS, "hash"),
    "compaction": lambda _: (compaction(DATASET.id), "hash"),
    "finalize": lambda b: (b.keys.finalize, "zset"),
    "ingest": lambda b: (b.keys.ingest, "zset"),
    "job read": lambda b: (b.keys.job(b.read), "hash"),
    "job ended": lambda b: (b.keys.job(b.ended), "hash"),
    "repeated": lambda b: (b.keys.repeated(b.read), "hash"),
    "troubles": lambda b: (b.keys.troubles(b.read), "hash"),
    **{f"rq:{key}": partial(of_rq, key, "list") for key in ("queue:embedstream", "queue:embedstream:intermediate")},
    **{f"rq:{key}:embedstream": partial(of_rq, f"{key}:embedstream", "zset") for key in REGISTRIES},
    **{f"rq:{key}": partial(of_rq, key, "set") for key in ("workers", "workers:embedstream", "queues")},
}


@pytest.fixture
def bench(redis_url: str) -> Bench:
    return Bench(redis_url)


def look(bench: Bench, caplog: pytest.LogCaptureFixture) -> set[str]:
    """What is taken in two looks of a dispatcher; that a third one has nothing new to say is asserted."""
    taken: set[str] = set()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bench.dispatcher.round()
            taken |= bench.take_all()
        said = len(caplog.records)
        assert said < 10
        bench.now += EXPIRE_SECONDS + 1
        bench.dispatcher.round()
        taken |= bench.take_all()
        assert len(caplog.records) == said, "what was said is said again"
    assert not any(record.exc_info for record in caplog.records)
    # What commands look at.
    coordinators(bench.lab.broker)
    troubles(bench.lab.broker, bench.read)
    return taken


@pytest.mark.parametrize("case", CASES)
def test_a_poisoned_record_costs_itself_alone(bench: Bench, caplog: pytest.LogCaptureFixture, case: str) -> None:
    CASES[case](bench)
    assert look(bench, caplog) >= bench.expected()
    assert "forgotten" in functions.expire(bench.context, bench.lab.broker.queue)
    compactions(bench.lab.broker)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("type", TYPES)
def test_a_key_of_another_type_costs_itself_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture, key: str, type: str
) -> None:
    name, right = KEYS[key](bench)
    if type != right:
        bench.replace(name, type)
    taken, (read, ended) = look(bench, caplog), bench.healthy
    lost = {"queues": {read, ended}, "finalize": {ended}, "ingest": {read}}.get(key if type != right else "", set())
    assert taken >= {each for each in bench.expected() if not any(job in each for job in lost)}


def test_values_at_random_cost_one_job_at_most(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    dice = random.Random(9)
    values = [
        b"",
        b"\xff",
        b"\0",
        b"-1",
        b"nan",
        b"1e400",
        HUGE,
        "9" * 20,
        "[" * 999,
        "{}",
        "null",
        '"\\ud800"',
        "x" * 5000,
    ]
    fields = sorted(bench.client.hkeys(bench.keys.job(bench.ended)))
    for _ in range(300):
        job, field, value = dice.choice((bench.read, bench.ended)), dice.choice(fields), dice.choice(values)
        before = bench.client.hget(bench.keys.job(job), field)
        bench.client.hset(bench.keys.job(job), field, value)
        bench.dispatcher.round()
        bench.client.hset(bench.keys.job(job), field, before)
    assert bench.take_all() >= bench.expected()
    assert not any(record.exc_info for record in caplog.records)


def test_fields_of_rq_at_random_cost_one_job_at_most(bench: Bench) -> None:
    dice = random.Random(9)
    bench.dispatcher.round()
    name = f"ingest-{bench.healthy[0]}-0"
    ours = bench.client.hgetall(f"rq:job:{name}")
    others = ["timeout", "ttl", "retries_left", "retry_intervals", "repeats_left", "dependency_ids", "webhooks", "meta"]
    values = [b"\xff", b"-1", b"nan", HUGE, "[" * 999, "{}", "[0]", "null", "x", '[{"url": 1}]']
    for _ in range(300):
        field = dice.choice([*sorted(ours), *others])
        bench.client.delete(f"rq:job:{name}")
        bench.client.hset(f"rq:job:{name}", mapping={**ours, field: dice.choice(values)})
        bench.dispatcher.round()
        bench.now += 1
    bench.take_all()
    bench.client.delete(f"rq:job:{name}")
    bench.dispatcher.round()
    assert name in bench.take_all()


def test_a_foreign_job_that_asks_for_endless_tries_is_refused_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    endless = {"retries_left": 9_999_999, "retry_intervals": "[0]", "repeats_left": 9_999_999}
    bench.rq_job("foreign", data=json.dumps(["os.mkdir", None, ["/x"], {}]), **endless)
    bench.rq_job("odd", **endless)
    bench.dispatcher.round()
    assert "foreign" not in bench.take_all()
    assert [record.getMessage() for record in caplog.records] == [
        "foreign: os.mkdir: is no function of a coordinator, so it is not called"
    ]
    ours = ClosedJob.fetch("odd", bench.client, JSONSerializer)
    assert (ours.retries_left, ours.retry_intervals, ours.repeats_left) == (3, [2, 10, 60], None)


MIB = 2**20
CALL = json.dumps(["embedstream.finalize", None, ["q", "x"], {}]).encode()
BOMB = zlib.compress(CALL + b" " * 64 * MIB)
LARGE: dict[str, tuple[str, bytes, bool]] = {
    "a call that is a bomb": ("data", BOMB, True),
    "a call that is a bomb cut short": ("data", BOMB[:-8], True),
    "a call that is long": ("data", CALL + b" " * 32 * MIB, True),
    "a description that is long": ("description", b" " * 32 * MIB, True),
    "an error that is a bomb": ("exc_info", BOMB, False),
    "a result that is long": ("result", b"[" + b" " * 32 * MIB + b"]", False),
    "a field of nobody's that is long": ("x", b" " * 32 * MIB, False),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_job_in_rq_that_is_large_takes_no_memory(bench: Bench, caplog: pytest.LogCaptureFixture, case: str) -> None:
    field, value, refused = LARGE[case]
    name = bench.rq_job(f"ingest-{bench.healthy[0]}-0", **{field: value})
    tracemalloc.start()
    try:
        taken = look(bench, caplog)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB
    assert taken >= bench.expected()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{name}: ")]
    assert said == [f"{name}: its record in RQ has more than 65,536 bytes, so it is no coordinator's"] * refused


def test_jobs_that_others_let_wait_for_ours_are_left_alone(bench: Bench) -> None:
    job = ClosedJob.fetch(bench.rq_job("ours"), bench.client, JSONSerializer)
    bench.client.sadd(job.dependents_key, bench.rq_job("waiting", status="deferred"))
    bench.client.delete("rq:queue:embedstream")
    make_queue(bench.client).enqueue_dependents(job)
    assert not bench.client.exists("rq:queue:embedstream")
