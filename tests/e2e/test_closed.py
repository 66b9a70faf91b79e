"""Promise 8: what somebody who may write to Redis can make a worker do, and what not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import RedisServer
from lab.worker import Gate, ScriptedEngine, WorkerLab, pack, worker_lab

from e2e.harness import assert_exact, wait_until
from embedstream.jobs import JobState
from embedstream.queue.blocks import block_schema

TEXTS = ["one", "two", "three", "four"]
BY_ID = {f"t{i}": text for i, text in enumerate(TEXTS)}


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path / "root") as made:
        made.folder.mkdir()
        yield made


def smuggle(lab: WorkerLab, job: str, **changed: Any) -> None:
    """Put an entry into a job's stream past the submit step: its last entry, changed."""
    client: Any = lab.broker.client
    stream = lab.broker.keys.blocks(job)
    [(_, fields)] = client.xrevrange(stream, count=1)
    client.xadd(stream, {**fields, **{name.encode(): value for name, value in changed.items()}})


def ends_failed(lab: WorkerLab, job: str) -> str:
    wait_until(lambda: lab.ended(job), "the job to end", 30)
    status = lab.broker.status(job)
    assert status.state is JobState.FAILED
    return status.reason


def bomb() -> bytes:
    """A block of one row whose text is half a gibibyte, in some tens of kilobytes."""
    sink = pa.BufferOutputStream()
    values: list[Any] = [[0], ["t0"], [0], ["\0" * 2**29], [None], [None], [None]]
    columns = [pa.array(value, field.type) for value, field in zip(values, block_schema(()), strict=True)]
    batch = pa.record_batch(columns, schema=block_schema(()))
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.holds("Closed")
def test_a_decompression_bomb_ends_its_job_and_neither_the_worker_nor_another_job(lab: WorkerLab) -> None:
    hostile = lab.job(TEXTS, rows_per_block=2)
    smuggle(lab, hostile, rows=b"1", body=bomb())
    worker = lab.start()
    assert "once decompressed" in ends_failed(lab, hostile)
    good = lab.job(TEXTS, output="good")
    wait_until(lambda: lab.ended(good), "the good job to end", 30)
    assert_exact(lab.folder / "good", BY_ID)
    assert worker.alive


def test_an_entry_that_was_never_submitted_does_not_come_back_for_ever(lab: WorkerLab) -> None:
    job = lab.create(lab.spec())
    lab.submit(job, pack(TEXTS, 2)[:1], seal=False)
    smuggle(lab, job, sum=b"another.", block=b"0")
    lab.broker.client.xtrim(lab.broker.keys.blocks(job), maxlen=1, approximate=False)
    worker = lab.start()
    assert "block 0:0 in the queue is not the one that was submitted" in ends_failed(lab, job)
    assert worker.alive


def test_a_failed_job_goes_on_with_the_same_command_once_its_producer_is_well(lab: WorkerLab) -> None:
    spec = lab.spec()
    job = lab.create(spec)
    lab.submit(job, pack(TEXTS, 2), seal=False)
    smuggle(lab, job, body=b"no Arrow")
    lab.start()
    assert "cannot be read" in ends_failed(lab, job)
    lab.create(spec)
    lab.submit(job, pack(TEXTS, 2))
    wait_until(lambda: lab.broker.state(job) is JobState.COMPLETED, "the job to complete", 30)
    assert_exact(lab.folder / "out", BY_ID)


@pytest.mark.holds("Closed")
def test_a_spec_that_names_a_place_outside_of_the_roots_is_refused(lab: WorkerLab, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for output in (str(outside), str(lab.folder / ".." / "outside"), "/etc/embedstream"):
        spec = lab.spec(output)
        job = lab.create(spec)
        lab.submit(job, pack(TEXTS, 2))
    lab.job(TEXTS, output="inside")
    worker = lab.start(burst=True)
    worker.join()
    assert worker.error is None
    assert not outside.exists()
    assert not Path("/etc/embedstream").exists()
    assert_exact(lab.folder / "inside", BY_ID)


def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(
    lab: WorkerLab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside, sub = tmp_path / "outside", lab.folder / "sub"
    (outside / "out").mkdir(parents=True)
    gate = Gate()
    job = lab.job(TEXTS, output="sub/out")
    lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    sub.rename(lab.folder / "before")
    sub.symlink_to(outside)
    gate.open.set()
    wait_until(lambda: "outside this worker's output roots" in caplog.text, "the link to be refused", 30)
    assert not list((outside / "out").iterdir())
    sub.unlink()
    (lab.folder / "before").rename(sub)
    wait_until(lambda: lab.broker.state(job) is JobState.COMPLETED, "the job to complete", 60)
    assert_exact(sub / "out", BY_ID)
    assert not list((outside / "out").iterdir())
