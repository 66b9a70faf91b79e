"""Metrics and probes of worker processes: scraped over HTTP, compared with what the job did."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import RedisServer
from lab.worker import Gate, ScriptedEngine, worker_lab
from lab_engines import faulty
from prometheus_client import CollectorRegistry, Gauge, Metric

from e2e.harness import Fleet, Process, fleet, read_manifest, run, wait_until, write_corpus
from e2e.scraping import get, logged_url, scrape, value
from embedstream.api.interactive import EmbedRequest, ask
from embedstream.jobs import job_id
from embedstream.metrics import exposition
from embedstream.metrics.exposition import MOST_REQUESTS, Exposition, QueueCollector
from embedstream.metrics.metrics import QUEUE_METRICS, WORKER_METRICS
from embedstream.queue.broker import Broker
from embedstream.queue.queues import GUESSED_TOKENS_PER_SECOND
from embedstream.server.connection import connect


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def test_the_metrics_are_those_declared_and_say_what_the_job_did(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 5000)
    with (tmp_path / "c.jsonl").open("a") as corpus:
        corpus.write('{"id": "empty", "text": ""}\n{broken\n')
    workers.start_worker("--metrics-port", 0)
    url = logged_url(tmp_path / "worker-0.log")
    done = run(
        *("embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"),
        *("--max-length", 20, "--json"),
    )
    assert done.returncode == 3, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rows"] == 5000
    families = scrape(url)
    exposed = {name for family in families.values() for name in (family.name, f"{family.name}_total")}
    declared = {metric.name for metric in (*WORKER_METRICS, *QUEUE_METRICS)}
    assert declared <= exposed
    ours = {name for name in families if name.startswith("embedstream_")}
    assert ours == {name.removesuffix("_total") for name in declared}
    for metric in (*WORKER_METRICS, *QUEUE_METRICS):
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
    blocks = sum(run["last"] - run["first"] + 1 for shard in manifest["shards"] for run in shard["blocks"])
    for name, counted in {
        "embedstream_claimed_blocks_total": blocks,
        "embedstream_committed_blocks_total": blocks,
        "embedstream_redelivered_blocks_total": 0,
        "embedstream_committed_shards_total": len(manifest["shards"]),
        "embedstream_committed_rows_total": 5000,
        "embedstream_failed_rows_total": 2,
        "embedstream_truncated_rows_total": manifest["truncated"],
        "embedstream_duplicate_rows_total": manifest["duplicates"],
        "embedstream_committed_tokens_total": manifest["tokens"],
        "embedstream_padding_tokens_total": manifest["padded"] - manifest["tokens"],
        "embedstream_ready": 1,
        "embedstream_redis_up": 1,
        "embedstream_queue_blocks": 0,
        "embedstream_queue_bytes": 0,
        "embedstream_queue_drain_seconds": 0,
        "embedstream_queue_stalled_jobs": 0,
    }.items():
        assert value(families, name) == counted, name
    assert manifest["truncated"] > 0
    not_computed = manifest["tokens"] - value(families, "embedstream_batch_tokens_sum")
    assert 0 <= not_computed <= 20 * manifest["duplicates"]
    assert value(families, "embedstream_queue_workers", state="ready") == 1
    assert value(families, "embedstream_stage_seconds_count", stage="commit") == len(manifest["shards"])
    busy = value(families, "embedstream_device_busy_seconds_total")
    assert 0 < busy <= value(families, "embedstream_stage_seconds_sum", stage="infer")
    assert value(families, "embedstream_queue_worker_tokens_per_second") != GUESSED_TOKENS_PER_SECOND
    assert value(families, "embedstream_warm_up_seconds") > 0
    assert value(families, "embedstream_worker_info", engine="hashing", model="hashing") == 1
    assert "process_resident_memory_bytes" in families


def test_what_is_queued_is_told_in_seconds_with_no_worker_alive(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "first.jsonl", 3000, seed=1)
    write_corpus(tmp_path / "second.jsonl", 3000, seed=2)
    worker = workers.start_worker()
    args = ["--redis", workers.url, "--model", "hashing", "--json"]
    first = json.loads(run("embed-submit", tmp_path / "first.jsonl", "-o", tmp_path / "1", *args).stdout)
    worker.terminate()
    assert worker.wait(20) == 0
    assert run("embed-submit", tmp_path / "second.jsonl", "-o", tmp_path / "2", *args, "--detach").returncode == 0
    families = scrape_queues(workers.url)
    assert value(families, "embedstream_queue_workers", queue="hashing", state="ready") == 0
    assert value(families, "embedstream_queue_jobs", queue="hashing", state="running") == 1
    assert value(families, "embedstream_queue_claimed_blocks", queue="hashing") == 0
    pace = value(families, "embedstream_queue_worker_tokens_per_second", queue="hashing")
    tokens = value(families, "embedstream_queue_tokens", queue="hashing")
    assert tokens == pytest.approx(first["tokens"], rel=0.1)  # as many rows of the same kind
    assert value(families, "embedstream_queue_drain_seconds", queue="hashing") == pytest.approx(tokens / pace)
    assert value(families, "embedstream_queue_oldest_block_age_seconds", queue="hashing") > 0


def scrape_queues(redis_url: str) -> dict[str, Metric]:
    """As a coordinator does it: all queues of a server."""
    registry = CollectorRegistry()
    registry.register(QueueCollector(redis_url))
    served = Exposition("127.0.0.1", 0, registry, lambda: "", lambda: "")
    try:
        return scrape(served.url.removesuffix("/metrics"))
    finally:
        served.close()


def test_a_redis_that_is_gone_leaves_the_rest_of_a_scrape_as_it_is() -> None:
    families = scrape_queues("redis://127.0.0.1:1")
    assert value(families, "embedstream_redis_up") == 0
    assert "embedstream_queue_drain_seconds" not in families


def test_a_worker_is_unready_until_it_is_warm(redis_server: RedisServer, tmp_path: Path) -> None:
    loading, warming = Gate(), Gate()

    class Slow(ScriptedEngine):
        def __init__(self) -> None:
            loading([])
            super().__init__()

        def warm_up(self, batch_tokens: int) -> None:
            warming([])
            super().warm_up(batch_tokens)

    with worker_lab(redis_server.url, tmp_path) as lab:
        worker = lab.start(load=Slow).worker
        served = Exposition("127.0.0.1", 0, worker.meter.registry, lambda: "", worker.life.unready)
        url = served.url.removesuffix("/metrics")
        try:
            for gate in (loading, warming):
                assert gate.arrived.wait(30)
                assert get(f"{url}/readyz") == (503, "starting\n")
                assert get(f"{url}/healthz") == (200, "ok\n")
                assert value(scrape(url), "embedstream_ready") == 0
                gate.open.set()
            wait_until(lambda: get(f"{url}/readyz") == (200, "ok\n"), "the worker to be ready")
            assert value(scrape(url), "embedstream_ready") == 1
        finally:
            served.close()


def test_time_spent_on_requests_does_not_slow_the_pace_of_a_queue(redis_server: RedisServer, tmp_path: Path) -> None:
    gate = Gate()
    with worker_lab(redis_server.url, tmp_path) as lab:
        worker = lab.start(ScriptedEngine(gate)).worker
        busy = partial(
            worker.meter.registry.get_sample_value, "embedstream_device_busy_seconds_total", {"queue": lab.broker.queue}
        )
        wait_until(lambda: worker.life.state == "ready", "the worker")
        broker = Broker(connect(lab.url), lab.broker.queue)
        asking = threading.Thread(target=lambda: ask(broker, EmbedRequest(texts=("a",)), 60))
        asking.start()
        wait_until(lambda: (busy() or 0) > 1, "a long request")
        gate.open.set()
        asking.join(30)
        job = lab.job(["a text"] * 100)
        wait_until(lambda: lab.ended(job), "the job to end")
        pace: Any = lab.broker.client.hgetall(lab.broker.keys.pace)
        assert 0 < int(pace[b"ms"]) < 1000


def test_a_worker_that_drains_is_healthy_and_not_ready(workers: Fleet, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "[[fault:hang]]"}\n')
    strikes = tmp_path / "strikes"
    strikes.mkdir()
    options = ["--metrics-port", 0, "--drain-seconds", 3]
    worker = workers.start_worker(*options, **faulty(strikes))
    url = logged_url(tmp_path / "worker-0.log")
    assert get(f"{url}/readyz") == (200, "ok\n")
    args = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--detach"]
    assert run("embed-submit", tmp_path / "c.jsonl", *args).returncode == 0
    wait_until(lambda: list(strikes.iterdir()), "a batch in the model")
    worker.send_signal(signal.SIGTERM)
    wait_until(lambda: get(f"{url}/readyz") == (503, "draining\n"), "the worker to drain")
    assert get(f"{url}/healthz") == (200, "ok\n")
    families = scrape(url)
    assert value(families, "embedstream_ready") == 0
    assert value(families, "embedstream_queue_claimed_blocks") == 1
    assert worker.wait(30) == 0


def test_blocks_of_a_killed_worker_count_as_redelivered(workers: Fleet, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "[[fault:kill*1]]"}\n')
    strikes = tmp_path / "strikes"
    strikes.mkdir()
    first = workers.start_worker(**faulty(strikes))
    args = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--detach"]
    assert run("embed-submit", tmp_path / "c.jsonl", *args).returncode == 0
    assert first.wait(30) == -signal.SIGKILL
    workers.start_worker("--metrics-port", 0, **faulty(strikes))
    job = job_id("hashing", str(tmp_path / "out"))
    wait_until(lambda: workers.broker.status(job).state.ended, "the job to end")
    families = scrape(logged_url(tmp_path / "worker-1.log"))
    assert value(families, "embedstream_redelivered_blocks_total") == 1
    assert value(families, "embedstream_committed_rows_total") == 1


def test_a_port_that_is_taken_is_one_sentence(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("embed-worker", "--model", "hashing", "--redis", redis_url, "--metrics-port", port)
    assert done.returncode == 2
    assert f"metrics cannot be served at 127.0.0.1 port {port}" in done.stderr
    assert "--metrics-port" in done.stderr


def test_without_a_port_nothing_listens(workers: Fleet) -> None:
    assert not listens(workers.start_worker().pid)
    assert listens(workers.start_worker("--metrics-port", 0).pid)


def listens(pid: int) -> bool:
    """Whether the process has a TCP socket that waits for connections (Linux)."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(path.readlink().name)
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return any(fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets for fields in lines)


def test_other_paths_are_not_found_and_any_address_can_be_served() -> None:
    served = Exposition("::1", 0, CollectorRegistry(), lambda: "the device is lost", lambda: "")
    try:
        url = served.url.removesuffix("/metrics")
        assert url.startswith("http://[::1]:")
        assert get(f"{url}/healthz") == (503, "the device is lost\n")
        assert get(f"{url}/readyz?verbose") == (200, "ok\n")
        assert get(f"{url}/")[0] == 404
    finally:
        served.close()


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=abc", "application/openmetrics-text;version=", ";;=,"]
)
def test_a_header_that_makes_no_sense_is_answered_and_leaves_no_word_in_the_log(
    accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    Gauge("embedstream_x", "x", registry=registry).set(1)
    served = Exposition("127.0.0.1", 0, registry, lambda: "", lambda: "")
    try:
        asked = urllib.request.Request(served.url, headers={"Accept": accept})
        with urllib.request.urlopen(asked, timeout=20) as reply:
            assert b"embedstream_x 1.0" in reply.read()
    finally:
        served.close()
    assert caplog.records == []


@pytest.fixture
def served() -> Iterator[Exposition]:
    """With an answer of megabytes."""
    registry = CollectorRegistry()
    Gauge("large", "x" * (16 << 20), registry=registry).set(1)
    made = Exposition("127.0.0.1", 0, registry, lambda: "", lambda: "")
    try:
        yield made
    finally:
        made.close()


def connections(served: Exposition, count: int, said: bytes) -> list[socket.socket]:
    port = int(served.url.rpartition(":")[2].partition("/")[0])
    made = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for each in made:
        each.sendall(said)
    return made


def answering() -> int:
    """Threads of the server that hold a connection."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("said", [b"", b"GET /rea"], ids=["silent", "slow"])
def test_slow_clients_stop_no_probe_and_are_few_at_once(served: Exposition, said: bytes) -> None:
    url = served.url.removesuffix("/metrics")
    slow = connections(served, 100, said)
    try:
        assert get(f"{url}/readyz") == (200, "ok\n")
        sooner = exposition.REQUEST_SECONDS / 2
        wait_until(lambda: answering() <= MOST_REQUESTS, "all but the newest to be cut off", sooner)
        assert get(f"{url}/readyz") == (200, "ok\n")
    finally:
        for each in slow:
            each.close()
    wait_until(lambda: answering() == 0, "the rest to be gone")


@pytest.mark.parametrize("said", [b"G", b"GET /metrics HTTP/1.0\r\n\r\n"], ids=["slow", "deaf"])
def test_a_request_has_an_end_though_something_is_said_all_the_time(
    served: Exposition, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.2)
    (slow,) = connections(served, 1, said)
    wait_until(lambda: answering() == 1, "a thread for it")

    def cut_off() -> bool:
        with contextlib.suppress(OSError):
            slow.send(b"x")
        return answering() == 0

    with slow:
        wait_until(cut_off, "the server to cut it off")


def test_a_log_in_json_names_worker_and_job_on_its_lines(workers: Fleet, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "[[fault:kill*2]]"}\n')
    strikes = tmp_path / "strikes"
    strikes.mkdir()
    args = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--detach"]
    assert run("embed-submit", tmp_path / "c.jsonl", *args).returncode == 0
    job = job_id("hashing", str(tmp_path / "out"))

    def over(process: Process) -> bool:
        return process.poll() is not None or workers.broker.status(job).state.ended

    for _ in range(3):
        last = workers.start_worker("--log-format", "json", wait=False, **faulty(strikes))
        wait_until(partial(over, last), "a death, or the end")
    lines = [json.loads(line) for line in (tmp_path / "worker-2.log").read_text().splitlines()]
    assert {line["queue"] for line in lines} == {"hashing"}
    ready = next(line for line in lines if line["message"].startswith("ready after"))
    tried = next(line for line in lines if "one by one" in line["message"])
    assert (ready["level"], tried["level"]) == ("info", "warning")
    assert tried["job"] == job
    assert tried["block"] == "0:0"
    assert tried["worker"] == ready["worker"]
    assert tried["time"].endswith("Z")
