"""Redis that refuses for a while: workers and producers wait, say so once, and go on; nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import redis
from lab.redis_servers import OwnServer, own_server
from lab.worker import BOUND, Gate, ScriptedEngine, pack, worker_lab

from e2e.harness import assert_exact, assert_no_leftovers, fleet, start_submit, wait_until, write_corpus
from embedstream.api.client import Client
from embedstream.api.record_blocks import records_part
from embedstream.errors import BrokerError
from embedstream.jobs import job_id
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.server.patience import Patience
from embedstream.server.troubles import is_out_of_memory, trouble

TEXTS = [f"text number {i} " + "word " * (i % 7) for i in range(64)]
BY_ID = {f"t{i}": text for i, text in enumerate(TEXTS)}

Trouble = Callable[[OwnServer], AbstractContextManager[None]]


@contextlib.contextmanager
def down(server: OwnServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def replica(server: OwnServer) -> Iterator[None]:
    """A failover in which this server is no longer the master, for a while."""
    server.client().replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        server.client().replicaof("NO", "ONE")


@contextlib.contextmanager
def replica_without_master(server: OwnServer) -> Iterator[None]:
    server.client().config_set("replica-serve-stale-data", "no")
    with replica(server):
        yield


@contextlib.contextmanager
def disk_refuses(server: OwnServer) -> Iterator[None]:
    """What a server does whose snapshots cannot be written."""
    client = server.client()
    client.config_set("appendonly", "no")
    client.config_set("save", "900 1")
    client.set("changed", 1, ex=60)
    # Renaming the snapshot onto a folder fails.
    client.config_set("dbfilename", "in-the-way")
    (server.folder / "in-the-way").mkdir()
    (server.folder / "in-the-way" / "file").touch()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a snapshot that fails")
    try:
        yield
    finally:
        client.config_set("save", "")


@contextlib.contextmanager
def too_few_replicas(server: OwnServer) -> Iterator[None]:
    server.client().config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        server.client().config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def busy(server: OwnServer) -> Iterator[None]:
    """Somebody's script runs and runs."""
    # A new connection is refused, too: the one that ends the script is there before.
    killer = server.client()
    killer.config_set("lua-time-limit", 20)

    def loop() -> None:
        with contextlib.suppress(redis.RedisError):
            server.client().eval("while true do end", 0)

    script = threading.Thread(target=loop)
    script.start()
    wait_until(lambda: refusal(server) is not None, "the script to be called slow")
    try:
        yield
    finally:
        killer.script_kill()
        script.join()


TROUBLES = {
    "cannot be reached": down,
    "takes no writes": replica,
    "lost its master": replica_without_master,
    "cannot save to its disk": disk_refuses,
    "too few of its replicas": too_few_replicas,
}


def refusal(server: OwnServer) -> redis.RedisError | None:
    try:
        server.client().set("probe", 1, ex=60)
    except redis.RedisError as error:
        return error
    return None


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


@pytest.mark.parametrize("what", TROUBLES)
def test_a_trouble_that_passes_is_waited_for_by_workers_and_producers(
    server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.INFO)
    gate = Gate()
    with worker_lab(server.url, tmp_path) as lab:
        job, second = lab.job(TEXTS), lab.create(lab.spec("second"))
        worker = lab.start(ScriptedEngine(gate), shard_seconds=0.1)
        assert gate.arrived.wait(30)
        told: list[str] = []
        pushed: list[Pushed] = []

        def push() -> None:
            part, blocks = records_part([]), pack(TEXTS, 8)
            patience = Patience(told.append, "HOST")
            pushed.append(push_job(lab.broker, second, [part], lambda _: iter(blocks), BOUND, patience))

        with TROUBLES[what](server):
            gate.open.set()
            producer = threading.Thread(target=push)
            producer.start()
            wait_until(lambda: "waits to be committed: Redis" in caplog.text, "a commit that fails")
            wait_until(lambda: told, "the producer to say so")
        producer.join(30)
        wait_until(lambda: lab.ended(job) and lab.ended(second), "both jobs to end")
        assert pushed == [Pushed.SEALED]
        assert_exact(tmp_path / "out", BY_ID)
        assert_exact(tmp_path / "second", BY_ID)
        assert [line for line in told if what in line] == [f"Redis at HOST {CLAUSES[what]}, waiting for it"]
        worker.stop()
        assert worker.error is None


CLAUSES = {
    "cannot be reached": "cannot be reached",
    "takes no writes": "takes no writes, as it is a replica (a failover is under way, or the URL is wrong)",
    "lost its master": "is a replica that has lost its master (a failover is under way)",
    "cannot save to its disk": (
        "refuses writes because it cannot save to its disk (free space there; its log says more)"
    ),
    "too few of its replicas": "refuses writes because too few of its replicas are there (min-replicas-to-write)",
}


def test_an_outage_of_minutes_is_one_line_for_each_thing_that_a_worker_does(
    server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    tries: list[Exception] = []
    met = Patience.met

    def count(patience: Patience, error: Exception) -> float:
        tries.append(error)
        return met(patience, error)

    monkeypatch.setattr(Patience, "met", count)
    with worker_lab(server.url, tmp_path) as lab:
        worker = lab.start()
        wait_until(lambda: [w for w in lab.broker.workers() if w.state == "ready"], "the worker")
        with down(server):
            wait_until(lambda: len(tries) >= 20, "many tries")
        job = lab.job(TEXTS)
        wait_until(lambda: lab.ended(job), "the job")
        worker.stop()
        assert worker.error is None
    warnings = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len(warnings) >= 3
    assert len({line.partition(":")[0] for line in warnings}) == len(warnings), warnings


def test_what_does_not_pass_is_raised_at_once(server: OwnServer) -> None:
    server.client().config_set("requirepass", "secret")
    with pytest.raises(redis.AuthenticationError):
        Patience()(lambda: server.client().get("x"))


def test_a_server_that_runs_somebodys_script_is_called_busy(server: OwnServer) -> None:
    with busy(server):
        error = refusal(server)
    assert error is not None
    assert trouble(error) == "is busy with a script (SCRIPT KILL ends it)"


def test_a_full_servers_refusal_is_told_from_others(server: OwnServer) -> None:
    server.client().config_set("maxmemory", 1)
    for command in (("SET", "x", 1), ("EVAL", "redis.call('SET', 'x', 1)", 0)):
        with pytest.raises(redis.ResponseError) as caught:
            server.client().execute_command(*command)
        assert is_out_of_memory(caught.value)
        assert "out of memory" in (trouble(caught.value) or "")


@pytest.mark.parametrize("hung", [False, True])
def test_an_interactive_request_gets_a_clear_error_after_its_timeout(server: OwnServer, hung: bool) -> None:
    client = Client(server.tcp_url)
    if hung:
        os.kill(server.pid, signal.SIGSTOP)
    else:
        server.kill()
    begun = time.monotonic()
    with pytest.raises(BrokerError, match=f"127.0.0.1:{server.port}/0 cannot be reached") as caught:
        client.embed(["now"], timeout=1.0)
    assert "Traceback" not in str(caught.value)
    assert time.monotonic() - begun < (14 if hung else 4)


def test_a_redis_that_comes_back_empty_in_mid_job_costs_only_what_was_not_written(
    server: OwnServer, tmp_path: Path
) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 60_000, length=20)
    with fleet(server.url, tmp_path) as workers:
        worker = workers.start_worker()
        args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", server.url, "--model", "hashing"]
        submit = start_submit(*args)
        job = job_id("hashing", str(tmp_path / "out"))
        wait_until(lambda: workers.broker.state(job) and workers.broker.status(job).rows, "a shard that is committed")
        server.kill()
        server.lose_data()
        server.start()
        _, said = submit.communicate(timeout=120)
        assert submit.returncode == 0, said
        assert "rows that lay in the output already" in said
        worker.terminate()  # killed, it would leave half-written what it writes of blocks that are done by now
        assert worker.wait(30) == 0
    assert_exact(tmp_path / "out", texts, every=100)
    assert_no_leftovers(tmp_path / "out")
