"""A worker's life on a real server: warm-up, burst, signals, and a Redis that goes away."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.redis_servers import OwnServer, own_server
from lab.worker import BY_ID, TEXTS, Gate, ScriptedEngine, WorkerLab, finish, worker_lab

from e2e.harness import assert_exact, wait_until
from embedstream.cli.commands import ECHO_SECONDS
from embedstream.dataset.folder import FolderSink
from embedstream_worker import watchdog
from embedstream_worker.engines.base import OutOfMemory
from embedstream_worker.engines.hashing import HashingEngine


def test_a_burst_worker_leaves_an_empty_queue_at_once(lab: WorkerLab) -> None:
    worker = lab.start(burst=True)
    worker.join()
    assert worker.error is None


def test_a_burst_worker_leaves_when_every_manifest_stands(lab: WorkerLab) -> None:
    first, second = lab.job(TEXTS, output="first"), lab.job(TEXTS, output="second")
    worker = lab.start(burst=True)
    worker.join()
    assert worker.error is None
    assert lab.ended(first)
    assert lab.ended(second)


def test_a_burst_worker_does_not_wait_for_jobs_of_others(lab: WorkerLab, caplog: pytest.LogCaptureFixture) -> None:
    lab.job(TEXTS, output="other", model="another")
    cancelled = lab.job(TEXTS, output="outside")
    lab.broker.run(lab.broker.cancel(cancelled))
    worker = lab.start(burst=True, roots=[str(lab.folder / "mine")])
    worker.join()
    assert worker.error is None
    assert "leaving 2 unfinished jobs" in caplog.text


def test_a_worker_is_seen_while_its_model_loads_and_warms_up(lab: WorkerLab) -> None:
    loading, warming = Gate(), Gate()

    class Slow(ScriptedEngine):
        def __init__(self) -> None:
            loading([])
            super().__init__()

        def warm_up(self, batch_tokens: int) -> None:
            warming([])
            super().warm_up(batch_tokens)

    worker = lab.start(load=Slow)
    for gate in (loading, warming):
        assert gate.arrived.wait(30)
        (record,) = wait_until(lab.broker.workers, "a sign of life")
        assert (record.name, record.state) == (worker.worker.name, "starting")
        gate.open.set()
    wait_until(lambda: lab.broker.workers()[0].state == "ready", "the worker to be ready")


def test_a_worker_that_is_not_ready_for_long_says_what_it_is_doing(
    lab: WorkerLab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "SLOW_START_SECONDS", 0.1)
    loading = Gate()

    class Slow(ScriptedEngine):
        def __init__(self) -> None:
            loading([])
            super().__init__()

    lab.start(load=Slow)
    assert loading.arrived.wait(30)
    wait_until(lambda: caplog.text.count("not ready yet: loading its model for") == 2, "it to be said again")
    wait_until(lambda: lab.broker.workers()[0].phase == "loading its model", "it to be seen from elsewhere")
    assert lab.broker.workers()[0].phase_seconds > 0
    loading.open.set()
    wait_until(lambda: lab.broker.workers()[0].state == "ready", "the worker to be ready")
    assert lab.broker.workers()[0].phase == ""


def test_a_worker_stopped_while_it_warms_up_claims_nothing(lab: WorkerLab) -> None:
    warming = Gate()

    class Slow(ScriptedEngine):
        def warm_up(self, batch_tokens: int) -> None:
            warming([])
            super().warm_up(batch_tokens)

    job = lab.job(TEXTS)
    worker = lab.start(load=Slow)
    assert warming.arrived.wait(30)
    worker.worker.life.stop()
    warming.open.set()
    worker.join()
    assert worker.error is None
    assert lab.owners(job) == {}
    assert not lab.broker.workers()


def test_a_full_batch_that_does_not_fit_at_warm_up_is_halved(lab: WorkerLab) -> None:
    tried: list[int] = []

    class Small(ScriptedEngine):
        def warm_up(self, batch_tokens: int) -> None:
            tried.append(batch_tokens)
            if batch_tokens > 30:
                raise OutOfMemory("too much")
            super().warm_up(batch_tokens)

    job = lab.job(TEXTS)
    lab.start(Small(), batch_tokens=100)
    finish(lab, job)
    assert tried == [100, 50, 25]


def test_a_start_without_memory_says_nothing_of_the_next(
    lab: WorkerLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "cache"))
    memory, tried, usual = [500], list[int](), HashingEngine().info.batch_tokens

    class Measured(ScriptedEngine):
        def warm_up(self, batch_tokens: int) -> None:
            tried.append(batch_tokens)
            if batch_tokens > memory[0]:
                raise OutOfMemory("too much")
            super().warm_up(batch_tokens)

    for memory[0] in (500, usual, usual):
        lab.start(Measured(), batch_tokens=None, burst=True).join()
    assert tried[0] == usual
    assert tried[-2:] == [usual, 1]


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


def test_a_worker_outlives_its_redis_and_goes_on(
    server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    with worker_lab(server.url, tmp_path) as lab:
        job = lab.job(TEXTS)
        worker = lab.start(ScriptedEngine(gate), shard_seconds=0.1)
        assert gate.arrived.wait(30)
        server.kill()
        gate.open.set()
        wait_until(lambda: "waits to be committed" in caplog.text, "a commit that fails")
        server.start()
        finish(lab, job)
        assert_exact(tmp_path / "out", BY_ID)
        worker.stop()
        assert worker.error is None


def test_a_worker_stopped_while_redis_is_gone_leaves_its_shard_behind(
    server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    with worker_lab(server.url, tmp_path) as lab:
        job = lab.job(TEXTS)
        spec = lab.broker.status(job).spec
        worker = lab.start(ScriptedEngine(gate), shard_seconds=0.1)
        assert gate.arrived.wait(30)
        server.kill()
        gate.open.set()
        wait_until(lambda: "waits to be committed" in caplog.text, "a commit that fails")
        worker.stop(20)
        assert worker.error is None
        assert sum(shard.rows for shard in FolderSink(spec.output, spec).find_shards()) == len(TEXTS)
        server.start()


def test_a_signal_before_the_worker_serves_ends_the_loading() -> None:
    assert signals_in_a_process("signal.raise_signal(signal.SIGTERM); time.sleep(60)") == 0


def test_the_first_signal_lets_the_worker_finish_and_the_second_ends_it_at_once() -> None:
    term = "signal.raise_signal(signal.SIGTERM)"
    assert signals_in_a_process(f"life.serving = True; {term}; assert life.stopping.is_set(); sys.exit(7)") == 7
    later = f"time.sleep({2 * ECHO_SECONDS})"
    assert signals_in_a_process(f"life.serving = True; {term}; {later}; {term}; sys.exit(7)") == 1


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    term = "signal.raise_signal(signal.SIGTERM)"
    assert signals_in_a_process(f"life.serving = True; {term}; {term}; sys.exit(7)") == 7


def signals_in_a_process(code: str) -> int:
    """The exit code of a process that has the worker's signal handlers and then does this."""
    setup = (
        "import signal, sys, time\nfrom embedstream_worker.serving import stop_on_signals\n"
        "from embedstream_worker.pipeline import Life\nlife = Life()\nstop_on_signals(life)\n"
    )
    return subprocess.run([sys.executable, "-c", setup + code], timeout=30, check=False).returncode


def test_an_idle_worker_leaves_soon_after_sigterm_and_without_a_trace(lab: WorkerLab) -> None:
    command = [sys.executable, "-m", "embedstream_worker", "--model", "hashing", "--redis", lab.url]
    process = subprocess.Popen([*command, "--queue", lab.broker.queue, "--output-root", str(lab.folder)])
    try:
        wait_until(lambda: [w for w in lab.broker.workers() if w.state == "ready"], "the worker")
        process.terminate()
        assert process.wait(10) == 0
        assert not lab.broker.workers()
    finally:
        process.kill()
        process.wait()
