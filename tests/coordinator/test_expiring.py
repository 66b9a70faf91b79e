"""What nobody will come back to is forgotten; what somebody may come back to stays."""

from __future__ import annotations

from typing import Any

import pytest
from lab.broker import Lab

from embedstream.dataset.sink import Sink
from embedstream.errors import OutputError
from embedstream.jobs import JobSpec, JobState
from embedstream.server.connection import connect
from embedstream_coordinator.expiring import expire_queue

DAY_MS = 86_400_000


@pytest.fixture
def lab(redis_url: str) -> Lab:
    return Lab(connect(redis_url))


def no_sink(spec: JobSpec) -> Sink:
    raise OutputError(f"{spec.output}: another coordinator's")


def aged(lab: Lab, job: str, days: int) -> None:
    """As if nothing had moved the job for so long."""
    ask: Any = lab.client
    key = lab.keys.job(job)
    for field in ("pushed", "committed"):
        ask.hset(key, field, int(ask.hget(key, field)) - days * DAY_MS)


def test_a_job_whose_producer_has_been_gone_for_weeks_is_cancelled_and_can_go_on(lab: Lab) -> None:
    job = lab.create()
    aged(lab, job, 31)
    assert expire_queue(lab.broker, no_sink).startswith("0 forgotten, 1 ended")
    status = lab.broker.status(job)
    assert status.state is JobState.FINALIZING
    assert "gone for 31 days" in status.reason
    assert lab.broker.outbox() == [job]
    assert expire_queue(lab.broker, no_sink).startswith("0 forgotten, 0 ended"), "twice is harmless"


def test_a_job_of_a_newer_version_is_left_alone_and_holds_nothing_else_up(lab: Lab) -> None:
    newer, job = lab.create("/newer"), lab.create()
    aged(lab, newer, 31)
    aged(lab, job, 31)
    lab.client.hset(lab.keys.job(newer), "spec", '{"v": 2}')
    assert expire_queue(lab.broker, no_sink).startswith("0 forgotten, 1 ended")
    assert (lab.broker.state(newer), lab.broker.state(job)) == (JobState.SUBMITTING, JobState.FINALIZING)


def test_a_job_that_moved_within_weeks_stays(lab: Lab) -> None:
    job = lab.create()
    aged(lab, job, 29)
    expire_queue(lab.broker, no_sink)
    assert lab.broker.state(job) is JobState.SUBMITTING


def test_ended_jobs_whose_keys_expired_are_no_longer_listed(lab: Lab) -> None:
    lab.client.zadd(lab.keys.recent, {"0123456789abcdef": 1})
    assert expire_queue(lab.broker, no_sink).startswith("1 forgotten")
    assert lab.broker.recent_jobs() == []


def test_keys_of_a_job_that_is_gone_are_removed_and_those_of_a_living_one_stay(lab: Lab) -> None:
    job = lab.create()
    lost = [lab.keys.shards("dead"), lab.keys.done("dead", 0), lab.keys.sums("dead", 3)]
    for key in lost:
        lab.client.set(key, "x")
    lab.client.set(lab.keys.sums(job, 0), "12345678")
    lab.client.set(lab.keys.suspect("dead"), "x", ex=100)
    assert expire_queue(lab.broker, no_sink).endswith("3 keys without a job removed")
    assert lab.client.exists(*lost) == 0
    assert lab.client.exists(lab.keys.sums(job, 0), lab.keys.job(job), lab.keys.suspect("dead")) == 3
