"""An output that cannot be written for a while: a full disk, a folder that is gone. No row is lost or doubled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RedisServer
from lab.worker import Gate, ScriptedEngine, WorkerLab, pack, worker_lab

from e2e.harness import BIN, MODEL, assert_exact, assert_no_leftovers, environment, run, wait_until, write_corpus
from embedstream_producer.embedded import state_folder

TEXTS = [f"text number {i} " + "word " * (i % 7) for i in range(512)]
BY_ID = {f"t{i}": text for i, text in enumerate(TEXTS)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NO FULL DISK WAS TESTED: a small tmpfs cannot be mounted here ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that gives an output up, and looks at it again, within seconds."""
    monkeypatch.setattr("embedstream_worker.write.OUTPUT_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("embedstream_worker.write.LOOK_AGAIN_SECONDS", 0.5)
    monkeypatch.setattr("embedstream_worker.jobs.LOOK_AGAIN_SECONDS", 0.5)


def fill(folder: Path) -> Path:
    """Take all the space that is left; the file that holds it."""
    ballast = folder / "lost+found"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return ballast


def ended(lab: WorkerLab, job: str) -> None:
    wait_until(lambda: lab.ended(job), "the job to end", 60)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_full_disk_is_waited_for_and_the_job_goes_on_when_there_is_space(
    redis_server: RedisServer,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    given_up: bool,
) -> None:
    if given_up:
        request.getfixturevalue("patience")
    with worker_lab(redis_server.url, small_disk) as lab:
        gate = Gate()
        job = lab.job(TEXTS)
        worker = lab.start(ScriptedEngine(gate))
        assert gate.arrived.wait(30)
        ballast = fill(small_disk)
        gate.open.set()
        wait_until(
            lambda: "no space left on the device: free some; 512 rows wait for it" in caplog.text, "a failed try"
        )
        if given_up:
            wait_until(lambda: f"job {job} is not for this worker" in caplog.text, "the worker to give up for a while")
        assert lab.broker.status(job).done == 0
        ballast.unlink()
        ended(lab, job)
        worker.stop()
        assert worker.error is None
    assert_exact(small_disk / "out", BY_ID)
    assert_no_leftovers(small_disk / "out")


def test_a_folder_that_vanished_with_rows_in_it_is_waited_for_and_never_made_anew(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, patience: None
) -> None:
    del patience
    with worker_lab(redis_server.url, tmp_path) as lab:
        job = lab.create(lab.spec())
        blocks = pack(TEXTS, 8)
        worker = lab.start(shard_seconds=0.1)
        lab.submit(job, blocks[:32], seal=False)
        wait_until(lambda: lab.broker.status(job).done == 32, "the first half")
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        lab.submit(job, blocks)
        wait_until(lambda: "the folder is gone, with the 32 blocks written so far" in caplog.text, "it to be missed")
        assert not (tmp_path / "out").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "out")
        ended(lab, job)
        worker.stop()
        assert worker.error is None
    assert_exact(tmp_path / "out", BY_ID)
    assert_no_leftovers(tmp_path / "out")


def test_embedded_mode_on_a_full_disk_goes_on_when_there_is_space(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logs lie on the same disk."""
    monkeypatch.setenv("XDG_STATE_HOME", str(small_disk))
    texts = write_corpus(tmp_path / "c.jsonl", 600, length=10)
    command = [str(BIN / "embed-submit"), str(tmp_path / "c.jsonl"), "-o", str(small_disk / "out"), "--model", MODEL]
    (small_disk / "out").mkdir()
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - 128 * 1024)  # room for the server to start, and little more
    with (tmp_path / "said").open("w") as said:
        submit = subprocess.Popen(command, env=environment(), stderr=said, stdout=said)
        try:
            log = state_folder(str(small_disk / "out")) / "worker.log"
            wait_until(
                lambda: (
                    submit.poll() is not None
                    or "cannot save" in (tmp_path / "said").read_text()
                    or (log.exists() and "no space left" in log.read_text())
                ),
                "the disk to be full",
            )
            ballast.unlink()
            code = submit.wait(90)
        finally:
            submit.kill()
            submit.wait()
    if code != 0:
        again = run(*command)
        assert again.returncode == 0, (tmp_path / "said").read_text() + again.stderr
    assert_exact(small_disk / "out", texts)
    assert_no_leftovers(small_disk / "out")
