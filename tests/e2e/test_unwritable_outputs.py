"""Jobs that cannot be written or committed for a while, beside others: only they wait, and nothing of them is lost."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from lab.worker import BY_ID, TEXTS, Gate, Running, ScriptedEngine, WorkerLab, finish, pack

from e2e.harness import assert_exact, wait_until
from embedstream.queue import scripts
from embedstream.server.connection import connect
from embedstream_worker.finish import BLOCK_BYTES
from embedstream_worker.write import MOST_WAITING_SHARDS


@pytest.fixture
def looks_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up for a while is looked at again within a second."""
    monkeypatch.setattr("embedstream_worker.write.LOOK_AGAIN_SECONDS", 0.5)
    monkeypatch.setattr("embedstream_worker.jobs.LOOK_AGAIN_SECONDS", 0.5)


def start_held(lab: WorkerLab, **settings: Any) -> tuple[Running, Gate]:
    """A worker that has opened the jobs there are, and waits at the model with some of their blocks."""
    gate = Gate()
    worker = lab.start(ScriptedEngine(gate), **settings)
    assert gate.arrived.wait(30)
    return worker, gate


def swap_for_links(folders: Sequence[Path], outside: Path) -> None:
    for folder in folders:
        folder.rename(folder.with_suffix(".away"))
        folder.symlink_to(outside)


def put_a_file_in_the_way(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("in the way")


def test_a_healthy_job_is_done_while_four_others_cannot_be_written(
    lab: WorkerLab, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    names = [f"bad-{i}" for i in range(4)]
    jobs = [lab.job(TEXTS, rows_per_block=32, output=name) for name in names]
    worker, gate = start_held(lab)
    folders = [lab.folder / name for name in names]
    swap_for_links(folders, outside)
    healthy = lab.job(["a", "b"], output="healthy")
    gate.open.set()
    finish(lab, healthy)
    assert_exact(lab.folder / "healthy", {"t0": "a", "t1": "b"})
    wait_until(lambda: set(lab.broker.workers()[0].waits) == set(jobs), "what waits to be told")
    assert [lab.owners(job) for job in jobs] == [{worker.worker.name: 2}] * 4, "what waits is still held"
    for folder in folders:
        folder.unlink()
        folder.with_suffix(".away").rename(folder)
    for job, folder in zip(jobs, folders, strict=True):
        finish(lab, job)
        assert_exact(folder, BY_ID)
    wait_until(lambda: not lab.broker.workers()[0].waits, "nothing to wait any more")
    assert list(outside.iterdir()) == []
    said = [line for line in caplog.messages if "outside this worker's output roots" in line and "rows wait" in line]
    assert len(said) == 4, "it is said once for each"


def test_no_more_of_a_job_is_claimed_while_it_cannot_be_written(lab: WorkerLab) -> None:
    job = lab.job(TEXTS * 4, rows_per_block=1)
    worker, gate = start_held(lab, window_tokens=2048, shard_seconds=0.1)
    put_a_file_in_the_way(lab.folder / "out")
    gate.open.set()
    wait_until(lambda: lab.broker.workers()[0].waits, "the job to wait")
    others = [lab.job(TEXTS, output=f"other-{i}", rows_per_block=1) for i in range(2)]
    finish(lab, others[0])
    claimed = lab.owners(job)
    finish(lab, others[1])
    assert lab.owners(job) == claimed
    assert claimed[worker.worker.name] < 256
    (lab.folder / "out").unlink()
    (lab.folder / "out").mkdir()
    finish(lab, job)
    assert lab.broker.status(job).rows == 256


def test_what_cannot_be_written_is_handed_back_when_the_worker_stops(lab: WorkerLab) -> None:
    job = lab.job(TEXTS)
    worker, gate = start_held(lab)
    put_a_file_in_the_way(lab.folder / "out")
    gate.open.set()
    wait_until(lambda: lab.broker.workers()[0].waits, "the job to wait")
    worker.stop()
    assert worker.error is None
    assert lab.owners(job) == {"released": 8}
    again = lab.broker.sweep("w2", job, 3_600_000, 100)
    assert [claimed.deliveries for claimed in again] == [1] * 8, "handing back looked like a death"


@pytest.mark.holds("Bounded")
@pytest.mark.usefixtures("looks_again_soon")
def test_of_many_jobs_that_cannot_be_written_no_more_is_held_than_may_wait(lab: WorkerLab) -> None:
    names = [f"bad-{i}" for i in range(12)]
    jobs = [lab.job(TEXTS, rows_per_block=32, output=name) for name in names]
    shard_bytes = 2 * BLOCK_BYTES
    worker, gate = start_held(lab, shard_bytes=shard_bytes)
    for name in names:
        put_a_file_in_the_way(lab.folder / name)
    healthy = lab.job(TEXTS, output="healthy")
    gate.open.set()
    finish(lab, healthy)
    wait_until(lambda: set(lab.broker.workers()[0].waits) == set(jobs), "all of them to wait")

    def held() -> int:
        return sum(lab.owners(job).get(worker.worker.name, 0) for job in jobs)

    most = MOST_WAITING_SHARDS * shard_bytes // BLOCK_BYTES
    wait_until(lambda: held() <= most, "the others to be handed back", 20)
    for name in names:
        (lab.folder / name).unlink()
        (lab.folder / name).mkdir(exist_ok=True)
    for job, name in zip(jobs, names, strict=True):
        finish(lab, job)
        assert_exact(lab.folder / name, BY_ID, every=16)
    worker.stop()
    assert worker.error is None


@pytest.mark.usefixtures("looks_again_soon")
def test_a_block_that_must_be_alone_does_not_wait_for_an_output_that_cannot_be_written(lab: WorkerLab) -> None:
    suspect = lab.job(TEXTS[:8], output="suspect")
    assert len(lab.broker.claim("dead", [suspect], 10, 0)) == 1
    job = lab.job(TEXTS)
    _, gate = start_held(lab)
    put_a_file_in_the_way(lab.folder / "out")
    gate.open.set()
    wait_until(lambda: lab.broker.workers()[0].waits, "the job to wait")
    lab.expire_leases(suspect, 1)
    finish(lab, suspect)
    assert not lab.ended(job)
    (lab.folder / "out").unlink()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)


def test_a_job_whose_commit_redis_refuses_for_a_while_does_not_hold_up_others(lab: WorkerLab) -> None:
    script = scripts.load("commit")
    lab.broker.client.script_load(script.body)
    refusing = [lab.create(lab.spec("refused"))]

    def make(url: str, retries: int) -> redis.Redis:
        client: Any = connect(url, retries)
        run = client.evalsha

        def evalsha(sha: str, count: int, *rest: Any) -> Any:
            if sha == script.sha and any(rest[0] == lab.broker.keys.job(job) for job in refusing):
                raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
            return run(sha, count, *rest)

        client.evalsha = evalsha
        return client  # type: ignore[no-any-return]

    (refused,) = refusing
    lab.submit(refused, pack(TEXTS, 8))
    lab.start(connect=make)
    wait_until(lambda: lab.broker.workers() and refused in lab.broker.workers()[0].waits, "the refusal to be told")
    others = [lab.job(TEXTS, output=f"other-{i}") for i in range(2)]
    for other in others:
        finish(lab, other)
    assert not lab.ended(refused)
    refusing.clear()
    finish(lab, refused)
    assert_exact(lab.folder / "refused", BY_ID)
    assert len(list((lab.folder / "refused").glob("part-*"))) == 1, "it was written again for each try"
