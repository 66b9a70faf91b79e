"""Steps meet keys that others have damaged: each does all that it does, or says what is wrong and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from lab.broker import BOUND, HOUR_MS, Lab, make_entry, make_record, to_commit
from lab.foreign_records import put_type
from redis.exceptions import ResponseError

from embedstream.errors import RecordDamaged
from embedstream.jobs import JobState
from embedstream.queue.broker import Broker
from embedstream.queue.queues import look_at_queue
from embedstream.queue.steps import Code, Lease, Step

SENSELESS = (b"", b"\xff\xfe", b"-0", b"1.5", b"1e18", b"inf", b"1" * 19, str(-(2**63)).encode(), b"nonsense")

TYPES = ("string", "list", "set", "zset", "hash", "stream")


class Scene:
    """A queue in which every step has something to do."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.broker = lab, lab.broker
        self.client: Any = lab.client
        self.job = lab.sealed_job(2)
        self.claimed = lab.claim(self.job)
        self.ending = lab.create("/ending")
        lab.fill(self.ending, 1)
        self.broker.run(self.broker.cancel(self.ending))
        taken = self.broker.run(self.broker.take_finalize(self.ending, 0))
        assert taken is not None
        self.lease: Lease = taken
        self.open = lab.create("/open")
        lab.fill(self.open, 1)
        self.cancelled = lab.create("/cancelled")
        self.broker.run(self.broker.cancel(self.cancelled))
        lab.finalize(self.cancelled, JobState.CANCELLED)
        self.broker.run(self.broker.request("r", b"x", HOUR_MS, 10))
        (self.request,) = self.broker.claim_requests("w", 1, 0)

    def steps(self) -> dict[str, Step[Any]]:
        broker, job, (first, second) = self.broker, self.job, self.claimed
        stream = broker.keys.blocks(job)
        both = [to_commit(first), to_commit(second)]
        record = make_record(job, "s", [(0, 0), (0, 1)])
        return {
            "create": broker.create(self.lab.spec("/new")),
            "reopen": broker.create(self.lab.spec("/cancelled")),
            "replace": broker.create(self.lab.spec("/cancelled", model="another")),
            "submit": broker.submit(self.open, make_entry(0, 1), BOUND),
            "seal": broker.seal(self.open, 0, 1),
            "cancel": broker.cancel(job),
            "renew": broker.renew(stream, "w1", [first.entry]),
            "release": broker.release(stream, "w1", [first.entry]),
            "drop": broker.drop(job, both),
            "commit": broker.commit(record, both, worked_ms=5),
            "suspect": broker.suspect(job, 0, 0, [1]),
            "calibrate": broker.calibrate(job, "{}"),
            "take_finalize": broker.take_finalize(self.ending, HOUR_MS),
            "finalized": broker.finalized(self.lease, JobState.FAILED, HOUR_MS),
            "request": broker.request("new", b"x", HOUR_MS, 10),
            "reply": broker.reply("r", self.request.entry, b"y", HOUR_MS),
            "retire": broker.retire(stream, "w1"),
            "look": broker.look([job, self.open]),
        }

    def copy(self) -> dict[bytes, bytes]:
        """All that lies in the queue, to be put back."""
        found = sorted(self.client.scan_iter(f"{self.lab.keys.prefix}*", count=1000))
        with self.client.pipeline(transaction=False) as pipe:
            for key in found:
                pipe.dump(key)
            return dict(zip(found, pipe.execute(), strict=True))

    def content(self) -> dict[bytes, object]:
        """The same, to be compared: of equal hashes the copies may differ."""
        copy = self.copy()
        hashes = [key for key in copy if b":job:" in key and self.client.type(key) == b"hash"]
        return {**copy, **{key: self.client.hgetall(key) for key in hashes}}

    def put_back(self, copy: dict[bytes, bytes]) -> None:
        now = self.copy()
        with self.client.pipeline(transaction=False) as pipe:
            for key in now:
                pipe.delete(key)
            for key, data in copy.items():
                pipe.restore(key, 0, data)
            pipe.execute()


STEPS = (
    "create", "reopen", "replace", "submit", "seal", "cancel", "renew", "release", "drop", "commit", "suspect",
    "calibrate", "take_finalize", "finalized", "request", "reply", "retire", "look",
)  # fmt: skip


@pytest.fixture
def scene(real_client: Any) -> Scene:
    return Scene(Lab(real_client))


def does_all_or_nothing(scene: Scene, step: Step[Any], whole: dict[bytes, bytes], damage: Callable[[], object]) -> None:
    """Run a step among damage, then put the whole back."""
    damage()
    before = scene.content()
    said = ""
    try:
        scene.broker.run(step)
    except (RecordDamaged, ResponseError) as error:
        said = str(error)
    if said:
        after = scene.content()
        assert [key for key in {*before, *after} if before.get(key) != after.get(key)] == [], f"half done: {said}"
        assert "is damaged: " in said or "part 0 of a job with " in said
    scene.put_back(whole)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_among_keys_of_another_type_is_done_or_writes_nothing(scene: Scene, name: str) -> None:
    step = scene.steps()[name]
    derived = [f"{step.keys[0]}:{kind}:0" for kind in ("done", "sums")]
    whole = scene.copy()
    for key in (*step.keys, *derived):
        for kind in TYPES:
            does_all_or_nothing(scene, step, whole, partial(put_type, scene.client, key.encode(), kind))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_among_senseless_fields_is_done_or_writes_nothing(scene: Scene, name: str) -> None:
    step = scene.steps()[name]
    job = step.keys[0]
    if scene.client.type(job) != b"hash":
        return
    fields, whole = scene.client.hkeys(job), scene.copy()
    for field in (*fields, b"by:test", b"next:0"):
        for text in SENSELESS:
            does_all_or_nothing(scene, step, whole, partial(scene.client.hset, job, field, text))


@pytest.mark.parametrize("value", ["garbage", "1.5", str(-(2**63)), str(2**63 - 1)])
@pytest.mark.parametrize("name", ["bytes", "pace"])
def test_no_counter_of_the_queue_keeps_a_job_from_its_end(scene: Scene, name: str, value: str) -> None:
    keys = scene.broker.keys
    if name == "bytes":
        scene.client.set(keys.bytes, value)
    else:
        scene.client.hset(keys.pace, mapping={"tokens": value, "ms": value})
    assert scene.broker.run(scene.steps()["commit"]).code is Code.COMMITTED
    assert scene.job in scene.broker.outbox()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["jobs", "finalize", "bytes", "pace", "suspect"])
def test_no_key_beside_the_jobs_own_keeps_a_job_from_its_end(scene: Scene, name: str, kind: str) -> None:
    keys = scene.broker.keys
    key = keys.suspect(scene.job) if name == "suspect" else getattr(keys, name)
    put_type(scene.client, key.encode(), kind)
    assert scene.broker.run(scene.steps()["commit"]).code is Code.COMMITTED
    assert scene.job in scene.broker.outbox()
    scene.lab.finalize(scene.job)
    assert scene.broker.state(scene.job) is JobState.COMPLETED
    assert look_at_queue(scene.broker).bytes >= 0


@pytest.mark.parametrize("parts", ["1e18", "inf", "nan", "-1", "4611686018427387904", "x"])
def test_no_number_of_parts_keeps_the_server_busy(scene: Scene, parts: str) -> None:
    for job, name in ((scene.cancelled, "replace"), (scene.ending, "finalized")):
        scene.client.hset(scene.broker.keys.job(job), "parts", parts)
        assert scene.broker.run(scene.steps()[name]).code in (Code.CREATED, Code.OK)


def test_a_damaged_job_is_forgotten_with_all_its_keys_and_made_again(scene: Scene) -> None:
    broker, keys, job = scene.broker, scene.broker.keys, scene.job
    assert not broker.is_damaged(job)
    queued = look_at_queue(broker).bytes
    for key in (keys.job(job), keys.done(job, 7), keys.troubles(job)):
        put_type(scene.client, key.encode(), "list")
    assert broker.is_damaged(job)
    assert broker.run(broker.forget(job, broker.keys_below(job))).code is Code.OK
    assert not [key for key in scene.copy() if job.encode() in key]
    assert job not in broker.active_jobs()
    assert look_at_queue(broker).bytes == queued - sum(len(c.fields[b"body"]) for c in scene.claimed)
    assert scene.lab.create() == job


def test_only_the_keys_of_that_job_are_forgotten(real_client: Any) -> None:
    """A queue's name may hold what is a pattern to Redis."""
    odd, plain = Lab(real_client), Lab(real_client)
    odd.broker, plain.broker = Broker(real_client, "q[a-z]*?\\"), Broker(real_client, "qbxx")
    job, other = odd.sealed_job(1), plain.sealed_job(1)
    assert set(odd.broker.keys_below(job)) == {f"{odd.keys.job(job)}:blocks", f"{odd.keys.job(job)}:sums:0"}
    real_client.hset(odd.keys.job(job), "state", "nonsense")
    odd.broker.run(odd.broker.forget(job, odd.broker.keys_below(job)))
    assert not odd.broker.knows(job)
    assert plain.broker.status(other).blocks == 1
