"""`Client()` without Redis: a private server and workers of this process alone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import embedstream
from e2e.harness import environment, run, wait_until
from embedstream import Client, UsageError
from embedstream.errors import ModelError, OutputBusy, ServerError
from embedstream_producer.embedded import server
from embedstream_producer.embedded.programs import fake_program

ROWS = 20_000

PROGRAM = f"""
import sys
import embedstream

client = embedstream.Client()
rows = ({{"id": str(n), "text": f"text number {{n}} " * 20}} for n in range({ROWS}))
job = client.submit(rows, output=sys.argv[1], model="hashing")
print("submitted", flush=True)
print(job.wait(progress=lambda status: print(status.done, flush=True)).rows)
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Redis is named, and what embedded mode keeps lies in the test's folder."""
    monkeypatch.delenv("EMBEDSTREAM_REDIS_URL", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def started_by(process: int) -> list[psutil.Process]:
    return list(psutil.Process(process).children(recursive=True))


def test_jobs_and_requests_share_a_worker_that_ends_with_the_client(tmp_path: Path) -> None:
    before = set(started_by(psutil.Process().pid))
    with Client() as client:
        jobs = [client.submit([name], output=str(tmp_path / name), model="hashing") for name in ("a", "b")]
        assert [job.wait(60).rows for job in jobs] == [1, 1]
        assert client.embed(["x", "y"], model="hashing").shape == (2, 384)
        started = set(started_by(psutil.Process().pid)) - before
        assert sum("embedstream_worker" in process.cmdline() for process in started) == 1
        with pytest.raises(OutputBusy), Client() as other:
            other.submit(["again"], output=str(tmp_path / "a"), model="hashing")
        assert [row["text"] for batch in jobs[0].results(["text"]) for row in batch.to_pylist()] == ["a"]
    wait_until(lambda: not any(process.is_running() for process in started), "the processes to end")
    with Client() as client:
        assert client.submit(["a"], output=str(tmp_path / "a"), model="hashing").wait(60).rows == 1


def test_a_program_that_is_killed_leaves_no_process_and_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "submitted\n"
        program.stdout.readline()
        started = started_by(program.pid)
        program.kill()
    assert started
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.wait(60)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == str(ROWS), done.stderr
    ids = embedstream.open_dataset(tmp_path / "out").to_table(columns=["id"])["id"].to_pylist()
    assert sorted(ids, key=str) == sorted(map(str, range(ROWS)))
    assert run("embed-verify", tmp_path / "out").returncode == 0


def test_a_worker_that_cannot_run_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = str(tmp_path / "model")
    with Client() as client:
        job = client.submit(["a text"], output=str(tmp_path / "out"), model=model)
        with pytest.raises(ModelError, match="model"):
            job.wait(120)
        with pytest.raises(ModelError, match="model"):
            client.embed("a text", model=model)


def test_what_needs_a_fleet_says_so() -> None:
    with Client() as client:
        for output in ("s3://bucket/prefix", "redis://:secret@host/0?prefix=docs:"):
            with pytest.raises(UsageError, match="without Redis a Client writes into folders alone") as error:
                client.submit(["a text"], output=output, model="hashing")
            assert "secret" not in str(error.value)
        with pytest.raises(UsageError, match="give redis_url"):
            client.job("0" * 16)


def test_a_server_that_other_users_could_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_program", fake_program)
    with Client() as client, pytest.raises(ServerError, match="that no other user reaches: install redis or valkey"):
        client.submit(["a text"], output=str(tmp_path / "out"), model="hashing")


def test_without_the_worker_s_libraries_one_sentence_names_what_to_install() -> None:
    program = """
import importlib.util, sys
import embedstream
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
try:
    embedstream.Client().embed("a text", model="some/model")
except embedstream.UsageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("torch is not installed"), json.dumps([done.stdout, done.stderr])
    assert "pip install 'embedstream[local]', or give Client the redis_url of a fleet" in done.stdout
