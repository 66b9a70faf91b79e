"""What a worker's process takes, whatever lies in its blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from e2e.harness import fleet, wait_until
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import MAX_ROWS, Block, Refusal, block_schema, content_sum, encode_block

MIB = 1024 * 1024
BLOCKS = 512
"""Of refused rows alone, as many in each as a block may have: 524,288 rows."""

NO_ROWS = pa.RecordBatch.from_pylist([], schema=block_schema(()))


def refused_block(number: int) -> Block:
    rows = range(number * MAX_ROWS, (number + 1) * MAX_ROWS)
    refused = tuple(Refusal(row, None, "bad_json", "is not JSON: invalid character (byte 0)", "x") for row in rows)
    return Block(0, number, NO_ROWS, content_sum(NO_ROWS, refused, 0), refused)


def most_memory(pid: int) -> int:
    """The most bytes that a process has had in memory so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.holds("Bounded")
def test_a_corpus_of_refused_rows_takes_no_more_memory_than_some_shards(redis_url: str, tmp_path: Path) -> None:
    with fleet(redis_url, tmp_path) as here:
        worker = here.start_worker()
        spec = JobSpec(queue="hashing", output=str(tmp_path / "out"), model="hashing", parts=("lines",))
        here.broker.run(here.broker.create(spec))
        before = most_memory(worker.pid)
        for number in range(BLOCKS):
            here.broker.run(here.broker.submit(spec.job, encode_block(refused_block(number)), 1 << 30))
        wait_until(lambda: here.broker.status(spec.job).done == BLOCKS, "every block to be committed")
        took = most_memory(worker.pid) - before
        assert took < 256 * MIB, f"{took // MIB} MiB for {BLOCKS * MAX_ROWS:,} refused rows"
