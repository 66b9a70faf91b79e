"""Is it still this corpus? A finished output is compared with the corpus that the same command names again."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.mini_worker import MiniWorker

from e2e.harness import BIN, Fleet, environment, read_manifest, run, write_corpus
from embedstream.settings import BLOCK_LIMITS

ROWS = BLOCK_LIMITS.chunks + 5


@pytest.fixture
def queue() -> str:
    return f"unchanged-{uuid.uuid4().hex[:8]}"


def lines(prefix: str, other: int | None = None, rows: int = ROWS) -> bytes:
    """JSON lines of always the same length; `other`: the row whose text is another."""
    texts = (f"{'x' if row == other else 't'}ext {row}" for row in range(rows))
    return b"".join(
        json.dumps({"id": f"{prefix}{row}", "text": text}).encode() + b"\n" for row, text in enumerate(texts)
    )


def packed(name: str, data: bytes) -> bytes:
    """In the format that a name stands for, uncompressed within it: the same length for the same length."""
    if name.endswith(".gz"):
        return gzip.compress(data, 0, mtime=0)
    if name.endswith(".zst"):
        return bytes(pa.compress(data, codec="zstd", asbytes=True))
    if name.endswith(".parquet"):
        out = io.BytesIO()
        rows = [json.loads(line) for line in data.splitlines()]
        pq.write_table(
            pa.Table.from_pylist(rows), out, compression="none", use_dictionary=False, write_statistics=False
        )
        return out.getvalue()
    return data


NAMES = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]


def args(tmp_path: Path, url: str, queue: str, *more: object) -> list[object]:
    return ["-o", tmp_path / "out", "--redis", url, "--queue", queue, "--model", "mini", *more]


def test_a_finished_output_of_a_corpus_that_changed_is_refused_by_file_and_rows_whatever_its_size_and_time(
    tmp_path: Path, redis_url: str, queue: str
) -> None:
    good = {name: packed(name, lines(name)) for name in NAMES}
    paths = [tmp_path / name for name in NAMES]
    for path in paths:
        path.write_bytes(good[path.name])
    command = [*paths, *args(tmp_path, redis_url, queue)]
    with MiniWorker(redis_url, queue):
        assert run("embed-submit", *command).returncode == 0
    manifest = (tmp_path / "out" / "_manifest.json").read_bytes()
    for path in paths:
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(packed(path.name, lines(path.name, other=ROWS - 1)))
        if not path.name.endswith(".zst"):
            assert path.stat().st_size == len(good[path.name]), "the size gives nothing away"
        os.utime(path, ns=times)
        refused = run("embed-submit", *command)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert (
            f"{tmp_path / 'out'}: is finished, and was made of another corpus: {path} has {ROWS:,} rows as before, of "
            f"which 5 lie in blocks that differ, from row {BLOCK_LIMITS.chunks + 1:,} on: bring it up to date "
            f"(--update), write to another output (-o)"
        ) in refused.stderr
        if path is not paths[-1]:
            path.write_bytes(good[path.name])
    trusting = run("embed-submit", *command, "--trust-unchanged")
    assert (trusting.returncode, "finished already" in trusting.stdout) == (0, True)
    path.write_bytes(good[path.name])
    again = run("embed-submit", *command)
    assert (again.returncode, "finished already" in again.stdout) == (0, True)
    assert (tmp_path / "out" / "_manifest.json").read_bytes() == manifest


def test_rows_that_came_or_went_are_counted_and_the_same_rows_in_other_bytes_are_the_same_corpus(
    tmp_path: Path, redis_url: str, queue: str
) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(lines("c")))
    command = [path, *args(tmp_path, redis_url, queue)]
    with MiniWorker(redis_url, queue):
        assert run("embed-submit", *command).returncode == 0
    path.write_bytes(gzip.compress(lines("c", rows=BLOCK_LIMITS.chunks)))
    fewer = run("embed-submit", *command)
    assert (fewer.returncode, f"had {ROWS:,} rows and has {BLOCK_LIMITS.chunks:,}: " in fewer.stderr) == (2, True)
    path.write_bytes(gzip.compress(lines("c", rows=ROWS + 2)))
    more = run("embed-submit", *command)
    assert (more.returncode, f"had {ROWS:,} rows and has {ROWS + 2:,}, of which 7 lie in" in more.stderr) == (2, True)
    path.write_bytes(gzip.compress(lines("c").replace(b'": "', b'":   "'), 1))
    same = run("embed-submit", *command)
    assert (same.returncode, "finished already" in same.stdout) == (0, True), same.stderr
    assert "other bytes than were embedded, but the same rows" in same.stderr


def test_standard_input_is_read_to_its_end_and_compared(tmp_path: Path, redis_url: str, queue: str) -> None:
    def piped(data: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [str(BIN / "embed-submit"), "-", *map(str, args(tmp_path, redis_url, queue))]
        return subprocess.run(command, input=data, env=environment(), capture_output=True, timeout=60, check=False)

    with MiniWorker(redis_url, queue):
        assert piped(lines("s")).returncode == 0
    assert b"finished already" in piped(lines("s")).stdout
    other = piped(lines("s", other=0))
    assert other.returncode == 2
    assert b"made of another corpus: standard input has" in other.stderr


def test_an_output_in_redis_tells_how_many_rows_there_were(tmp_path: Path, redis_url: str, queue: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines("c"))
    common = ["--redis", redis_url, "--queue", queue, "--model", "mini"]
    command = [path, "-o", f"redis:?prefix={queue}:", *common]
    with MiniWorker(redis_url, queue, roots=("redis:",)):
        assert run("embed-submit", *command).returncode == 0
    assert "finished already" in run("embed-submit", *command).stdout
    path.write_bytes(lines("c", other=0))
    other = run("embed-submit", *command)
    assert (other.returncode, f"has {ROWS:,} rows as before, in other bytes: " in other.stderr) == (2, True)


def test_what_coordinators_read_is_said_not_to_be_compared_and_is_where_it_can_be_read(
    redis_url: str, tmp_path: Path
) -> None:
    path, fleet = tmp_path / "c.jsonl", Fleet(redis_url, tmp_path)
    write_corpus(path, 100)
    command = [path, "-o", tmp_path / "out", "--redis", redis_url, "--model", "hashing"]
    try:
        fleet.start_worker()
        assert run("embed-submit", *command).returncode == 0
    finally:
        fleet.close()
    write_corpus(path, 101)
    again = run("embed-submit", *command, "--server-side")
    assert again.returncode == 0, again.stderr
    assert "was not looked at" in again.stderr
    assert "without --server-side" in again.stderr
    refused = run("embed-submit", *command)
    assert (refused.returncode, "had 100 rows and has 101" in refused.stderr) == (2, True)
    assert read_manifest(tmp_path / "out")["rows"] == 100
