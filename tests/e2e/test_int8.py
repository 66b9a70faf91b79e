"""Jobs with a column in int8: one range a dimension for the whole job, whoever works on it and whatever is lost."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RedisServer
from lab.worker import TEXTS, ScriptedEngine, WorkerLab, pack, worker_lab

import embedstream
from e2e.harness import read_manifest, run, wait_until, write_corpus
from embedstream.jobs import job_id
from embedstream.outputs import parse_emit

EMIT = ("--emit", "dense", "--emit", "dense=tiny:int8:32")


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made


def arguments(lab: WorkerLab, *more: object, output: object = None) -> list[object]:
    out = output or lab.folder / "out"
    named = ["-o", out, "--queue", lab.broker.queue, "--model", "hashing", "--redis", lab.url]
    return [lab.folder / "c.jsonl", *named, *EMIT, *more]


def ranges(manifest: dict[str, Any]) -> np.ndarray[Any, Any]:
    """[2, dim]"""
    (tiny,) = (output for output in manifest["outputs"] if output["name"] == "tiny")
    return np.frombuffer(base64.b64decode(tiny["ranges"]), "<f4").reshape(2, tiny["dim"])


def columns(out: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The vectors in float32, cut and of length 1, and in int8, [rows, 32] each."""
    table: Any = embedstream.open_dataset(out).to_table()
    vectors = np.stack(table["embedding"].to_numpy())[:, :32]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.stack(table["tiny"].to_numpy())


def assert_one_range(out: Path) -> None:
    """All numbers are those that the manifest's ranges make of the vectors beside them."""
    vectors, tiny = columns(out)
    low, high = ranges(read_manifest(out))
    expected = np.clip(np.floor((vectors - low) / ((high - low) / 255)), 0, 255) - 128
    assert np.abs(tiny - expected).max() <= 1


def verified(out: Path, *more: object) -> None:
    checked = run("embed-verify", out, *more)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_few_rows_do_not_wait_for_more_while_a_producer_waits_for_them(lab: WorkerLab) -> None:
    job = lab.create(lab.spec(outputs=(parse_emit("dense:int8"),)))
    lab.submit(job, pack(TEXTS[:20], 8), seal=False)
    lab.start()
    wait_until(lambda: lab.broker.status(job).rows == 20, "the rows to be committed", 30)


def test_few_rows_do_not_wait_for_a_block_that_is_to_be_alone_in_the_worker(lab: WorkerLab) -> None:
    job = lab.job(TEXTS[:24], outputs=(parse_emit("dense:int8"),))
    (claimed,) = lab.broker.claim("dead", [job], 1, 0)
    lab.broker.run(lab.broker.release(claimed.stream, "dead", [claimed.entry], died=True))
    lab.start()
    wait_until(lambda: lab.ended(job), "the job to end", 30)
    assert lab.broker.status(job).rows == 24


def test_shards_of_several_workers_have_one_range_also_merged_and_searched(lab: WorkerLab) -> None:
    texts = write_corpus(lab.folder / "c.jsonl", 3000)
    out = lab.folder / "out"
    for _ in range(2):
        lab.start(shard_bytes=600_000, window_tokens=10_000)
    done = run("embed-submit", *arguments(lab))
    assert done.returncode == 0, done.stderr
    assert "tiny: dense in int8, 32 dimensions" in done.stdout
    shards = read_manifest(out)["shards"]
    assert len(shards) > 2
    assert_one_range(out)
    verified(out, "--corpus", lab.folder / "c.jsonl")
    before = ranges(read_manifest(out))
    merged = run("embed-compact", out)
    assert merged.returncode == 0, merged.stderr
    assert len(read_manifest(out)["shards"]) < len(shards)
    np.testing.assert_array_equal(ranges(read_manifest(out)), before)
    assert_one_range(out)
    verified(out)
    alone = run("embed-submit", *arguments(lab, output=lab.folder / "alone")[:-4], "--emit", "dense:int8")
    assert alone.returncode == 0, alone.stderr
    found = run("embed-search", lab.folder / "alone", texts["c-42"], "-k", "1")
    assert found.stdout.startswith("1.000  c-42"), found.stderr


@pytest.mark.parametrize("rows", [1, 5])
def test_a_small_job_takes_its_ranges_from_all_of_its_rows(lab: WorkerLab, rows: int) -> None:
    write_corpus(lab.folder / "c.jsonl", rows)
    lab.start()
    done = run("embed-submit", *arguments(lab))
    assert done.returncode == 0, done.stderr
    verified(lab.folder / "out")
    vectors, _ = columns(lab.folder / "out")
    low, high = ranges(read_manifest(lab.folder / "out"))
    np.testing.assert_allclose((low, high), (vectors.min(axis=0), vectors.max(axis=0)), atol=1e-6)


def test_rows_that_are_run_again_have_the_ranges_of_those_there(lab: WorkerLab) -> None:
    texts, out = write_corpus(lab.folder / "c.jsonl", 600), lab.folder / "out"
    failing = [texts[f"c-{i}"] for i in (7, 300)]
    worker = lab.start(ScriptedEngine(nan=failing), roots=(str(lab.folder), "redis:"))
    done = run("embed-submit", *arguments(lab))
    assert done.returncode == 3, done.stderr
    worker.stop()
    before = ranges(read_manifest(out))
    lab.start()
    again = run("embed-submit", *arguments(lab, "--retry-failed"))
    assert again.returncode == 0, again.stderr
    assert len(embedstream.open_dataset(out).to_table()) == 600
    np.testing.assert_array_equal(ranges(read_manifest(out)), before)
    assert_one_range(out)
    verified(out, "--corpus", lab.folder / "c.jsonl")


def test_a_job_that_redis_lost_goes_on_with_the_ranges_of_the_shards_that_are_there(lab: WorkerLab) -> None:
    write_corpus(lab.folder / "c.jsonl", 2000)
    out = lab.folder / "out"
    lab.start(shard_bytes=400_000, window_tokens=10_000)
    done = run("embed-submit", *arguments(lab))
    assert done.returncode == 0, done.stderr
    before = ranges(read_manifest(out))
    (out / "_manifest.json").unlink()
    first, *left = sorted(out.glob("part-*.parquet"))
    assert left
    first.unlink()
    client: Any = lab.broker.client
    client.unlink(*client.scan_iter(f"{lab.broker.keys.prefix}:job:*"))
    again = run("embed-submit", *arguments(lab))
    assert again.returncode == 0, again.stderr
    assert "taken over" in again.stderr + again.stdout or "adopted" in again.stderr + again.stdout
    np.testing.assert_array_equal(ranges(read_manifest(out)), before)
    assert {path.name for path in left} < {path.name for path in out.glob("part-*.parquet")}
    assert_one_range(out)
    verified(out, "--corpus", lab.folder / "c.jsonl")


def test_a_dataset_of_which_every_row_failed_gets_its_ranges_when_they_are_run_again(lab: WorkerLab) -> None:
    texts, out = write_corpus(lab.folder / "c.jsonl", 20), lab.folder / "out"
    worker = lab.start(ScriptedEngine(nan=[*texts.values()]))
    done = run("embed-submit", *arguments(lab))
    assert done.returncode not in (0, 3), done.stderr
    worker.stop()
    assert "ranges" not in json.dumps(read_manifest(out)["outputs"])
    lab.start()
    again = run("embed-submit", *arguments(lab, "--retry-failed"))
    assert again.returncode == 0, again.stderr
    assert_one_range(out)
    verified(out, "--corpus", lab.folder / "c.jsonl")


def test_ranges_in_redis_that_are_none_cost_that_job_alone(lab: WorkerLab) -> None:
    write_corpus(lab.folder / "c.jsonl", 50)
    detached = run("embed-submit", *arguments(lab, "--detach"))
    assert detached.returncode == 0, detached.stderr
    job = job_id(lab.broker.queue, str(lab.folder / "out"))
    lab.broker.client.hset(lab.broker.keys.job(job), "ranges", '{"tiny":"garbage"}')
    lab.start()
    other = run("embed-submit", *arguments(lab, output=lab.folder / "other"))
    assert other.returncode == 0, other.stderr
    assert lab.broker.state(job) == "running"
