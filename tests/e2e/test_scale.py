"""Large corpora through two workers, one of them killed: nothing lost or doubled, and memory stays flat.

Run on its own: `make scale`. It prints the peaks it compares.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e2e.harness import BIN, Fleet, environment, fleet, read_manifest, start_submit, wait_until

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1800)]

TEXT = "the quick brown fox jumps over the lazy dog and writes text number {} about it "


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
    with path.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"id": f"row-{i}", "text": (TEXT * (1 + i % 7)).format(*[i] * 7)}) + "\n")


def embed(workers: Fleet, corpus: Path, output: Path, rows: int, kill: bool) -> Peaks:
    """One job through two workers, one killed half-way if asked; the peaks of all processes."""
    workers.broker.client.config_resetstat()
    pair = [workers.start_worker(), workers.start_worker()]
    submit = start_submit(corpus, "-o", output, "--redis", workers.url, "--model", "hashing", "--json", "--quiet")
    job = wait_until(workers.broker.active_jobs, "the job")[0]
    peaks, killed = Peaks(), not kill
    while submit.poll() is None:
        peaks.producer = max(peaks.producer, peak_mib(submit.pid))
        peaks.worker = max(peaks.worker, *(peak_mib(process.pid) for process in pair))
        status = workers.broker.status(job)
        peaks.redis = max(peaks.redis, workers.broker.client.info("memory")["used_memory"] / 2**20)
        if not killed and status.rows >= rows // 2:
            pair[0].send_signal(signal.SIGKILL)
            killed = True
    out, err = submit.communicate()
    assert submit.returncode == 0, err
    assert killed, "the job ended before half of it was counted"
    assert json.loads(out)["rows"] == rows
    for process in pair:
        process.terminate()
        process.wait(timeout=60)
    return peaks


def assert_every_id_once(output: Path, rows: int) -> None:
    shards = read_manifest(output)["shards"]
    ids = pq.read_table([output / f"part-{shard['name']}.parquet" for shard in shards], columns=["id"]).column("id")
    assert len(ids) == rows
    assert set(ids.to_pylist()) == {f"row-{i}" for i in range(rows)}


def test_100_000_records_with_a_worker_killed_half_way(redis_url: str, tmp_path: Path) -> None:
    write_large_corpus(tmp_path / "c.jsonl", 100_000)
    with fleet(redis_url, tmp_path) as workers:
        embed(workers, tmp_path / "c.jsonl", tmp_path / "out", 100_000, kill=True)
    assert_every_id_once(tmp_path / "out", 100_000)


def test_memory_at_a_million_rows_is_that_at_100_000(redis_url: str, tmp_path: Path) -> None:
    peaks = {}
    for rows in (100_000, 1_000_000):
        write_large_corpus(tmp_path / f"{rows}.jsonl", rows)
        with fleet(redis_url, tmp_path) as workers:
            workers.broker.client.flushall()
            peaks[rows] = embed(workers, tmp_path / f"{rows}.jsonl", tmp_path / f"{rows}", rows, kill=False)
        assert_every_id_once(tmp_path / f"{rows}", rows)
    print(f"\npeak MiB: {peaks}")
    small, large = peaks[100_000], peaks[1_000_000]
    assert large.producer <= 1.1 * small.producer
    assert large.worker <= 1.1 * small.worker
    assert large.redis <= 1.1 * small.redis


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
