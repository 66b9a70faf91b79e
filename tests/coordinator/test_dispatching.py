"""Whatever the broker says is to be done has a job in RQ, whatever becomes of that job."""

from __future__ import annotations

from typing import Any

import pytest
from lab.broker import Lab
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from embedstream.queue.coordination import ask_to_ingest, note_repeated, to_ingest
from embedstream.server.connection import connect
from embedstream_coordinator.context import Context
from embedstream_coordinator.dispatching import PARTS_AHEAD, PATIENCE, Dispatcher
from embedstream_coordinator.rq_types import make_queue


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lab(redis_url: str) -> Lab:
    made = Lab(connect(redis_url))
    made.broker.announce()
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatcher(redis_url: str, clock: Clock) -> Dispatcher:
    return make_dispatcher(redis_url, clock)


def make_dispatcher(url: str, clock: Clock) -> Dispatcher:
    context = Context(redis_url=url, input_roots=("/",), output_roots=("/out", "redis:"))
    return Dispatcher(context, clock)


def ids(lab: Lab) -> list[str]:
    return [name for name in make_queue(lab.client).job_ids if not name.startswith("expire-")]


def fetch(lab: Lab, name: str) -> Job:
    return Job.fetch(name, connection=lab.client, serializer=JSONSerializer)


def test_each_unread_part_and_each_manifest_has_one_job_however_many_dispatch(
    lab: Lab, dispatcher: Dispatcher, clock: Clock, redis_url: str
) -> None:
    job = lab.create(parts=2)
    ask_to_ingest(lab.broker, job)
    note_repeated(lab.broker, job, 1, [])
    ended = lab.create("/out/other")
    lab.broker.run(lab.broker.cancel(ended))
    other = make_dispatcher(redis_url, clock)
    for each in (dispatcher, other, dispatcher):
        each.round()
    assert sorted(ids(lab)) == sorted([f"finalize-{ended}", f"ingest-{job}-0", f"ingest-{job}-1"])
    assert fetch(lab, f"ingest-{job}-1").args == [lab.broker.queue, job, 1]


def test_a_part_that_is_read_has_none_and_a_job_that_is_read_is_forgotten(lab: Lab, dispatcher: Dispatcher) -> None:
    job = lab.create(parts=2)
    ask_to_ingest(lab.broker, job)
    note_repeated(lab.broker, job, 1, [])
    lab.broker.run(lab.broker.seal(job, 0, 0))
    dispatcher.round()
    assert ids(lab) == [f"ingest-{job}-1"]
    lab.broker.run(lab.broker.seal(job, 1, 0))
    dispatcher.round()
    assert to_ingest(lab.broker) == []


def test_parts_wait_until_their_ids_are_compared_with_those_before(lab: Lab, dispatcher: Dispatcher) -> None:
    job = lab.create(parts=3)
    ask_to_ingest(lab.broker, job)
    dispatcher.round()
    assert sorted(ids(lab)) == [f"ids-{job}", f"ingest-{job}-0"]
    note_repeated(lab.broker, job, 1, [(7, 0, 3)])
    dispatcher.round()
    assert sorted(ids(lab)) == [f"ids-{job}", f"ingest-{job}-0", f"ingest-{job}-1"]


def test_a_corpus_of_many_parts_keeps_the_queue_short(lab: Lab, dispatcher: Dispatcher) -> None:
    job = lab.create(parts=3 * PARTS_AHEAD)
    ask_to_ingest(lab.broker, job)
    for part in range(3 * PARTS_AHEAD):
        note_repeated(lab.broker, job, part, [])
    dispatcher.round()
    assert len(ids(lab)) == PARTS_AHEAD


def test_outputs_outside_the_roots_are_left_to_others(lab: Lab, dispatcher: Dispatcher) -> None:
    lab.broker.run(lab.broker.cancel(lab.create("/elsewhere")))
    dispatcher.round()
    assert ids(lab) == []


@pytest.mark.parametrize("status", [JobStatus.STARTED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.QUEUED])
def test_a_job_that_rq_lost_or_that_does_not_get_on_is_put_there_anew(
    lab: Lab, dispatcher: Dispatcher, clock: Clock, status: JobStatus
) -> None:
    ended = lab.create("/out/a")
    lab.broker.run(lab.broker.cancel(ended))
    dispatcher.round()
    name = f"finalize-{ended}"
    make_queue(lab.client).pop_job_id()  # somebody took it, and died
    fetch(lab, name).set_status(status)
    dispatcher.round()
    clock.now += PATIENCE[status] - 1
    dispatcher.round()
    assert ids(lab) == [], "too soon"
    clock.now += 2
    dispatcher.round()
    assert ids(lab) == [name]
    assert fetch(lab, name).get_status() is JobStatus.QUEUED


def test_a_job_that_says_that_it_runs_is_left_alone(lab: Lab, dispatcher: Dispatcher, clock: Clock) -> None:
    ended = lab.create("/out/a")
    lab.broker.run(lab.broker.cancel(ended))
    dispatcher.round()
    name = f"finalize-{ended}"
    make_queue(lab.client).pop_job_id()
    fetch(lab, name).set_status(JobStatus.STARTED)
    for second in range(20):
        lab.client.hset(f"rq:job:{name}", "last_heartbeat", f"2026-01-01T00:00:{second:02}.000000Z")
        dispatcher.round()
        clock.now += 10
    assert ids(lab) == []


def test_a_job_that_waits_for_its_turn_is_left_alone(lab: Lab, dispatcher: Dispatcher, clock: Clock) -> None:
    first, second = lab.create("/out/a", parts=1), lab.create("/out/b", parts=1)
    for job in (first, second):
        ask_to_ingest(lab.broker, job)
    before: Any = None
    for _ in range(5):
        dispatcher.round()
        before = before or ids(lab)
        clock.now += 1000
    assert ids(lab) == before
