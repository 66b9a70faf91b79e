"""Large corpora through two workers, one of them killed: nothing lost or doubled, and memory stays flat.

Run on its own: `make scale`. It prints the peaks it compares.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import serve_redis as redis_server

from e2e.harness import BIN, Fleet, environment, fleet, read_manifest, start_submit, wait_until

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1800)]

QUEUE_BYTES = 4 * 2**20
"""Small enough that the producer of either corpus must wait: Redis is measured at its bound."""


BOOKKEEPING_MIB_PER_MILLION = 1.0
"""What a job's own keys may take: a bit and a sum for each block, and which blocks each shard holds."""


@dataclass
class Peaks:
    """Most memory ever used, in MiB."""

    producer: float = 0.0
    worker: float = 0.0
    redis: float = 0.0


def peak_mib(pid: int) -> float:
    """The process's largest resident set so far; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def write_large_corpus(path: Path, rows: int) -> None:
    """Texts of some 250 characters that do not compress to nothing."""
    rng = random.Random(rows)
    words = [f"{rng.randrange(36**5):x}" for _ in range(5000)]
    with path.open("w") as file:
        for i in range(rows):
            text = " ".join(rng.choices(words, k=10 + i % 60))
            file.write(f'{{"id": "row-{i}", "text": "{text}"}}\n')


def embed(workers: Fleet, corpus: Path, output: Path, rows: int, kill: bool) -> Peaks:
    """One job through two workers, one killed half-way if asked; the peaks of all processes."""
    args = [corpus, "-o", output, "--redis", workers.url, "--model", "hashing", "--json", "--quiet"]
    submit = start_submit(*args, EMBEDSTREAM_QUEUE_BYTES=str(QUEUE_BYTES))
    client: Any = workers.broker.client
    wait_until(lambda: int(client.get(workers.broker.keys.bytes) or 0) > 0.9 * QUEUE_BYTES, "a full queue")
    job = workers.broker.active_jobs()[0]
    pair = [workers.start_worker(), workers.start_worker()]
    redis_pid = client.info("server")["process_id"]
    peaks, killed = Peaks(), not kill
    while submit.poll() is None:
        peaks.producer = max(peaks.producer, peak_mib(submit.pid))
        peaks.worker = max(peaks.worker, *(peak_mib(process.pid) for process in pair))
        peaks.redis = max(peaks.redis, peak_mib(redis_pid))
        if not killed and workers.broker.status(job).rows >= rows // 2:
            pair[0].send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    out, err = submit.communicate()
    assert submit.returncode == 0, err
    assert killed, "the job ended before half of it was counted"
    assert json.loads(out)["rows"] == rows
    return peaks


def assert_every_id_once(output: Path, rows: int) -> None:
    shards = read_manifest(output)["shards"]
    ids = pq.read_table([output / shard["file"] for shard in shards], columns=["id"]).column("id")
    assert len(ids) == rows
    assert set(ids.to_pylist()) == {f"row-{i}" for i in range(rows)}


def test_100_000_records_with_a_worker_killed_half_way(tmp_path: Path) -> None:
    write_large_corpus(tmp_path / "c.jsonl", 100_000)
    with redis_server() as server, fleet(server.url, tmp_path) as workers:
        embed(workers, tmp_path / "c.jsonl", tmp_path / "out", 100_000, kill=True)
    assert_every_id_once(tmp_path / "out", 100_000)


@pytest.mark.holds("Bounded", "sentence-transformers#1244", "vllm#30268")
def test_memory_at_two_million_rows_is_that_at_100_000(tmp_path: Path) -> None:
    peaks = {}
    for rows in (100_000, 2_000_000):
        write_large_corpus(tmp_path / f"{rows}.jsonl", rows)
        with redis_server() as server, fleet(server.url, tmp_path) as workers:
            peaks[rows] = embed(workers, tmp_path / f"{rows}.jsonl", tmp_path / f"{rows}", rows, kill=False)
        assert_every_id_once(tmp_path / f"{rows}", rows)
    print(f"\npeak MiB: {peaks}")
    small, large = peaks[100_000], peaks[2_000_000]
    assert large.producer <= 1.1 * small.producer
    assert large.worker <= 1.1 * small.worker
    assert large.redis <= 1.1 * small.redis + BOOKKEEPING_MIB_PER_MILLION * 2


def test_embedded_mode_takes_100_000_records(tmp_path: Path) -> None:
    write_large_corpus(tmp_path / "c.jsonl", 100_000)
    done = subprocess.run(
        [BIN / "embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--json", "--quiet"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_every_id_once(tmp_path / "c.jsonl.vectors", 100_000)
