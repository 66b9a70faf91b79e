"""A coordinator and its processes live on whatever lies in Redis, and do the work of the healthy job beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab.redis_servers import own_server

from e2e.harness import Fleet, assert_exact, fleet, run, wait_until, write_corpus
from embedstream.jobs import JobSpec, JobState, job_id
from embedstream.keys import COMPACTIONS, COORDINATORS, QUEUES
from embedstream.queue.coordination import ask_to_ingest, coordinators
from embedstream.server.connection import connect


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Fleet]:
    with own_server() as server, fleet(server.url, tmp_path) as made:
        yield made


def spoil_job(workers: Fleet, name: str, **fields: object) -> str:
    """A job to be read whose hash has other values."""
    spec = JobSpec(queue="hashing", output=f"/out/{name}", model="hashing", parts=("/nowhere.jsonl",))
    workers.broker.run(workers.broker.create(spec))
    ask_to_ingest(workers.broker, spec.job)
    for field, value in fields.items():
        workers.broker.client.hset(workers.broker.keys.job(spec.job), field, str(value))
    return spec.job


def rq_job(client: Any, name: str, data: object, **fields: object) -> None:
    client.hset(f"rq:job:{name}", mapping={"data": json.dumps(data), "status": "queued", **fields})
    client.lpush("rq:queue:embedstream", name)


def poison(workers: Fleet) -> None:
    client: Any = connect(workers.url)
    keys = workers.broker.keys
    workers.broker.announce()
    spoil_job(workers, "number", created="1" * 400)
    spoil_job(workers, "spec", spec='{"output": "/x\\u0000y"}')
    client.hset(keys.repeated(spoil_job(workers, "repeated")), "x", "x")
    client.zadd(keys.ingest, {"a b": 0, b"\xff": 0})
    client.zadd(keys.finalize, {"a b": 0, b"\xff": 0})
    client.zadd(QUEUES, {b"\xff": 9e12})
    client.zadd(COORDINATORS, {b"\xff": 9e15})
    client.hset(COMPACTIONS, mapping={"x": b"\xff", "y": '{"output": "/x\\u0000y", "target_bytes": 1}'})
    client.zadd("rq:scheduled:embedstream", {b"\xff": 0})
    client.zadd("rq:wip:embedstream", {b"\xff": 1})
    client.sadd("rq:workers:embedstream", b"\xff")
    client.set("rq:finished:embedstream", "no sorted set")
    client.rpush("rq:queue:embedstream", b"\xff", "a b")
    endless = {"retries_left": 9_999_999, "retry_intervals": "[0]"}
    rq_job(client, "foreign", ["os.getcwd", None, [], {}], **endless)
    rq_job(client, "dated", ["embedstream.finalize", None, ["q", "j"], {}], created_at="yesterday")
    rq_job(client, "typed", ["embedstream.ingest", None, [1, 2, "x"], {}])
    rq_job(client, "surrogate", ["embedstream.ids", None, ["\ud800", "\ud800"], {}])
    rq_job(client, "executed", ["embedstream.finalize", None, ["q", "j"], {}])
    client.set("rq:executions:executed", "no sorted set")
    rq_job(client, "noted", ["embedstream.ids", None, ["hashing", spoil_job(workers, "noted", state="nonsense")], {}])


def test_the_healthy_job_beside_many_poisoned_records_is_read_and_ended(workers: Fleet, tmp_path: Path) -> None:
    poison(workers)
    coordinator = workers.start_coordinator()
    wait_until(lambda: coordinators(workers.broker), "the coordinator")
    ours = psutil.Process(coordinator.pid)
    wait_until(lambda: len(ours.children()) == 2, "its processes")
    processes = {child.pid for child in ours.children()}
    texts = write_corpus(tmp_path / "c.jsonl", 300)
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"]
    submitted = run("embed-submit", tmp_path / "c.jsonl", *common, "--server-side", "--quiet")
    assert submitted.returncode == 0, submitted.stderr
    job = job_id("hashing", str(tmp_path / "out"))
    wait_until(lambda: workers.broker.state(job) is JobState.RUNNING, "the end of the part", 60)
    workers.broker.client.set("rq:queue:embedstream", "no list")
    workers.broker.client.set(COORDINATORS, "no sorted set")
    # What workers make of such records is tested elsewhere: this one finds a clean queue.
    client: Any = workers.broker.client
    keys = workers.broker.keys
    for key in (keys.finalize, keys.jobs):
        client.zrem(key, *[member for member in client.zrange(key, 0, -1) if member != job.encode()])
    workers.start_worker(EMBEDSTREAM_FAILPOINTS="take_finalize.before=kill")
    wait_until(lambda: workers.broker.state(job) is JobState.COMPLETED, "the end of the job", 60)
    assert_exact(tmp_path / "out", texts, every=10)
    assert coordinator.poll() is None
    assert {child.pid for child in ours.children()} == processes, "one of them was started again"
    log = (tmp_path / "coordinator-0.log").read_text().splitlines()
    assert not [line for line in log if "Traceback" in line]
    assert sum("foreign: os.getcwd: is no function" in line for line in log) == 1
    told = [line.partition("WARNING")[2] for line in log if "WARNING" in line]
    assert len(told) == len(set(told)), "something was said twice"
    assert run("embed-compact", tmp_path / "out", "--redis", workers.url).returncode == 0


@pytest.mark.parametrize("type", ["string", "list"])
def test_a_processes_own_record_of_another_type_is_removed_and_the_next_job_does_not_wait(
    workers: Fleet, tmp_path: Path, type: str
) -> None:
    client: Any = connect(workers.url)
    workers.start_worker()
    workers.start_coordinator()
    wait_until(lambda: client.scard("rq:workers:embedstream") == 2, "its processes")
    records = client.smembers("rq:workers:embedstream")
    for record in records:
        with client.pipeline() as at_once:
            at_once.unlink(record)
            at_once.set(record, "x") if type == "string" else at_once.rpush(record, "x")
            at_once.execute()
    wait_until(lambda: {client.type(record) for record in records} <= {b"hash", b"none"}, "what lies there is removed")
    write_corpus(tmp_path / "c.jsonl", 30)
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"]
    assert run("embed-submit", tmp_path / "c.jsonl", *common, "--server-side", "--quiet").returncode == 0
    job = job_id("hashing", str(tmp_path / "out"))
    wait_until(lambda: workers.broker.state(job) is JobState.COMPLETED, "the job's end")
