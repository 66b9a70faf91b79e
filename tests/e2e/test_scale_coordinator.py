"""Coordinators read and merge large corpora in the memory of small ones. Run on its own: `make scale`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import serve_redis as redis_server

from e2e.harness import fleet, read_manifest, run
from e2e.test_scale import assert_every_id_once, peak_mib
from embedstream.jobs import JobState, job_id
from embedstream.queue.coordination import compactions

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1800)]

PARTS = 2
SLACK = 1.15
"""What is not the same twice: how large the pieces are that are in memory at once."""


@dataclass
class Peaks:
    """Most memory that any process of the coordinator used, in MiB."""

    ingesting: float = 0.0
    merging: float = 0.0


def children(pid: int) -> list[int]:
    """All processes that descend from one."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            mine = [int(child) for child in path.read_text().split()]
        except OSError:
            continue
        found += mine + [each for child in mine for each in children(child)]
    return found


def write_parts(folder: Path, rows: int) -> list[Path]:
    """Short texts: a row costs most then."""
    rng = random.Random(rows)
    paths = [folder / f"{rows}-{part}.jsonl" for part in range(PARTS)]
    for part, path in enumerate(paths):
        with path.open("w") as file:
            for i in range(part * rows // PARTS, (part + 1) * rows // PARTS):
                file.write(f'{{"id": "row-{i}", "text": "{rng.randrange(36**8):x} {i}"}}\n')
    return paths


def watch(coordinator: int, until: Callable[[], bool]) -> float:
    """The peak of the coordinator's processes until something is so."""
    peak = 0.0
    while not until():
        peak = max(peak, *(peak_mib(pid) for pid in children(coordinator)))
        time.sleep(0.02)
    return peak


def measure(folder: Path, rows: int) -> Peaks:
    """A corpus read by a coordinator, finalized, then merged."""
    output = folder / f"out-{rows}"
    with redis_server() as server, fleet(server.url, folder) as workers:
        process = workers.start_coordinator()
        for _ in range(2):
            workers.start_worker("--no-warmup")
        common = ["-o", output, "--redis", workers.url, "--model", "hashing", "--quiet"]
        assert run("embed-submit", *write_parts(folder, rows), *common, "--server-side").returncode == 0
        job = job_id("hashing", str(output))
        peaks = Peaks()
        peaks.ingesting = watch(process.pid, lambda: workers.broker.state(job) is JobState.COMPLETED)
        before = len(read_manifest(output)["shards"])
        assert run("embed-compact", output, "--redis", workers.url, "--shard-mib", 64).returncode == 0
        peaks.merging = watch(process.pid, lambda: not compactions(workers.broker))
        print(
            f"\n{rows:,} rows: {before} shards merged to {len(read_manifest(output)['shards'])}, peaks in MiB {peaks}"
        )
    assert_every_id_once(output, rows)
    return peaks


def test_a_coordinator_s_memory_at_two_million_rows_is_that_at_100_000(tmp_path: Path) -> None:
    small, large = measure(tmp_path, 100_000), measure(tmp_path, 2_000_000)
    assert large.ingesting <= SLACK * small.ingesting
    assert large.merging <= SLACK * small.merging
