"""Who waits for a job writes what it submitted and where it said, whatever others write into Redis meanwhile."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import RedisServer
from lab.mini_worker import MiniWorker

from e2e.harness import run, start_submit, wait_until
from embedstream import AsyncClient, Client, OutputError, UsageError
from embedstream.errors import RecordDamaged
from embedstream.jobs import JobSpec, JobState, job_id
from embedstream.lifecycle.watching import look
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Step
from embedstream.server.connection import connect
from embedstream.settings import Settings


@pytest.fixture
def broker(redis_server: RedisServer) -> Broker:
    return Broker(connect(redis_server.url), f"waits-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of somebody else's."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


def change(broker: Broker, job: str, **changed: object) -> None:
    """What another user of this Redis may do to a job: another spec, and it waits to be finalized."""
    client: Any = broker.client
    spec = msgspec.structs.replace(broker.status(job).spec, **changed)
    client.hset(broker.keys.job(job), mapping={"spec": spec.encode(), "state": "finalizing", "verdict": "cancelled"})
    client.zadd(broker.keys.finalize, {job: 0})


def elsewhere(where: str, victim: Path, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return {
        "folder": str(victim),
        "redis": f"redis://127.0.0.1:{port}/0?prefix=docs:",
        "s3": f"s3://bucket/prefix?endpoint_override=127.0.0.1:{port}&scheme=http",
    }[where]


def nobody_came(listener: socket.socket) -> bool:
    try:
        listener.accept()
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("where", ["folder", "redis", "s3"])
def test_embed_submit_writes_and_connects_nowhere_else(
    broker: Broker, redis_server: RedisServer, listener: socket.socket, tmp_path: Path, where: str
) -> None:
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "b"}\n')
    args = ["--redis", redis_server.url, "--queue", broker.queue, "--model", "mini"]
    process = start_submit(tmp_path / "c.jsonl", "-o", output, *args)
    job = job_id(broker.queue, str(output))
    wait_until(lambda: broker.state(job) is JobState.RUNNING, "all to be submitted")
    change(broker, job, output=elsewhere(where, victim, listener))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert f"job {job}: its output in Redis is not the one that was submitted" in said
    assert "Traceback" not in said
    assert list(victim.iterdir()) == []
    assert nobody_came(listener)
    for command in ("embed-status", "embed-cancel"):
        assert "Traceback" not in run(command, job, "--redis", redis_server.url).stderr
    assert list(victim.iterdir()) == []
    assert nobody_came(listener)


@pytest.mark.parametrize("where", ["folder", "redis", "s3"])
def test_a_client_that_waits_writes_and_connects_nowhere_else(
    broker: Broker, redis_server: RedisServer, listener: socket.socket, tmp_path: Path, where: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    with Client(redis_server.url, queue=broker.queue) as client:
        job = client.submit(["a text"], output=str(tmp_path / "out"), model="mini")
        change(broker, job.id, output=elsewhere(where, victim, listener))
        with pytest.raises(RecordDamaged, match="its output in Redis is not the one that was submitted"):
            job.wait(30)
        found = client.job(job.id)
        with pytest.raises(TimeoutError):
            found.wait(0.1)
        client._redis.hset(broker.keys.job(job.id), "state", "completed")
        with pytest.raises(UsageError, match=r"name it: client.job\('.*', output=...\)"):
            found.results()
    assert list(victim.iterdir()) == []
    assert nobody_came(listener)


async def test_the_asyncio_client_does_the_same(broker: Broker, redis_server: RedisServer, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    async with AsyncClient(redis_server.url, queue=broker.queue) as client:
        job = await client.submit(["a text"], output=str(tmp_path / "out"), model="mini")
        change(broker, job.id, output=str(victim))
        with pytest.raises(RecordDamaged):
            await job.wait(30)
        broker.client.hset(broker.keys.job(job.id), "state", "completed")
        with pytest.raises(UsageError, match="output="):
            _ = [batch async for batch in (await client.job(job.id)).results()]
    assert list(victim.iterdir()) == []


def test_nothing_is_written_for_a_spec_that_changes_between_the_look_and_the_lease(
    broker: Broker, redis_server: RedisServer, tmp_path: Path
) -> None:
    own = JobSpec(queue=broker.queue, output=str(tmp_path / "out"), model="mini", parts=("records",))
    (tmp_path / "out").mkdir()

    class Overtaken(Broker):
        def run(self, step: Step[Any]) -> Any:
            if step.script == "take_finalize":
                change(broker, own.job, prompt="another: ")
            return super().run(step)

    overtaken = Overtaken(broker.client, broker.queue)
    overtaken.run(overtaken.create(own, ""))
    change(broker, own.job)
    with pytest.raises(RecordDamaged, match="its prompt in Redis"):
        look(overtaken, own.job, redis_server.url, Settings(), own)
    assert list((tmp_path / "out").iterdir()) == []
    assert broker.state(own.job) is JobState.FINALIZING


def test_the_results_of_a_job_found_by_its_id_are_read_where_the_caller_says(
    broker: Broker, redis_server: RedisServer, tmp_path: Path
) -> None:
    with MiniWorker(redis_server.url, broker.queue), Client(redis_server.url, queue=broker.queue) as client:
        jobs = [client.submit([text], output=str(tmp_path / text), model="mini") for text in ("a", "b")]
        for job in jobs:
            job.wait(30)
        read = client.job(jobs[0].id, output=str(tmp_path / "a")).results(["text"])
        assert [batch.to_pylist() for batch in read] == [[{"text": "a"}]]
        with pytest.raises(OutputError, match=f"holds job {jobs[1].id}, not {jobs[0].id}"):
            client.job(jobs[0].id, output=str(tmp_path / "b")).results()
    assert json.loads((tmp_path / "a" / "_manifest.json").read_text())["state"] == "completed"
