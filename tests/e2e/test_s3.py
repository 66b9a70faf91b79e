"""Corpora and datasets in S3, spoken by a real server; workers and producers as separate processes, some killed."""

from __future__ import annotations

import gzip
import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.s3 import S3Server
from lab_engines import paced

from e2e.harness import (
    Fleet,
    assert_exact,
    fleet,
    read_errors,
    read_manifest,
    run,
    start_submit,
    wait_until,
    write_corpus,
)
from embedstream import Client


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def env(s3_server: S3Server, tmp_path: Path) -> Any:
    return {**s3_server.environment, "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def download(server: S3Server, bucket: str, prefix: str, folder: Path) -> Path:
    """The objects below a prefix as files, by a client of its own."""
    folder.mkdir()
    for key in server.keys(bucket, f"{prefix}/"):
        if not key.endswith("/"):
            (folder / key.removeprefix(f"{prefix}/")).write_bytes(
                server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
            )
    return folder


def test_a_fleet_turns_objects_into_vectors_in_a_bucket_though_a_worker_is_killed(
    workers: Fleet, bucket: str, s3_server: S3Server, env: Any, tmp_path: Path
) -> None:
    texts = write_corpus(tmp_path / "a.jsonl", 20_000)
    more = write_corpus(tmp_path / "b.jsonl", 10_000)
    put = s3_server.client().put_object
    put(Bucket=bucket, Key="in/a.jsonl.gz", Body=gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    rows = [{"id": id, "text": text} for id, text in more.items()]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"id": "bad", "text": None}]), tmp_path / "b.parquet", row_group_size=999
    )
    put(Bucket=bucket, Key="in/b.parquet", Body=(tmp_path / "b.parquet").read_bytes())

    root = ("--output-root", f"s3://{bucket}/out", "--window-tokens", "8000")
    dying = workers.start_worker(*root, **env, EMBEDSTREAM_FAILPOINTS="file.written#2=kill")
    workers.start_worker(*root, **env)
    sources = [f"s3://{bucket}/in/a.jsonl.gz", f"s3://{bucket}/in/b.parquet"]
    output = f"s3://{bucket}/out/vectors"
    args = [*sources, "-o", output, "--redis", workers.url, "--model", "hashing", "--json"]
    done = run("embed-submit", *args, **env)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert (report["state"], report["rows"], report["failed"]) == ("completed", 30_000, 1)
    assert dying.wait(timeout=30) == -signal.SIGKILL

    here = download(s3_server, bucket, "out/vectors", tmp_path / "here")
    assert_exact(here, texts | more, every=50)
    assert [(row["file"], row["line"], row["id"]) for row in read_errors(here)] == [(sources[1], 10_001, "bad")]
    assert not [name for name in here.iterdir() if ".tmp-" in name.name or ".probe" in name.name]
    verified = run("embed-verify", output, "--corpus", sources[0], "--corpus", sources[1], **env)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    again = run("embed-submit", *args, **env)
    assert (again.returncode, json.loads(again.stdout)) == (3, report)
    changed = (tmp_path / "a.jsonl").read_bytes().replace(b"text", b"t3xt")
    put(Bucket=bucket, Key="in/a.jsonl.gz", Body=gzip.compress(changed))
    refused = run("embed-submit", *args, **env)
    assert (refused.returncode, f"another corpus: {sources[0]} has 20,000 rows as before" in refused.stderr) == (
        2,
        True,
    )
    everything = [path.read_bytes() for path in (*here.iterdir(), *tmp_path.glob("*.log"))]
    everything += [
        str(workers.broker.client.hgetall(key)).encode()
        for key in workers.broker.client.keys("*:job:*")
        if workers.broker.client.type(key) == b"hash"
    ]
    assert not [data for data in everything if b"secret-of-admin" in data]


def test_results_of_a_job_are_read_from_the_bucket(
    workers: Fleet, bucket: str, env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    workers.start_worker("--output-root", f"s3://{bucket}", **env)
    with Client(workers.url, queue="hashing") as client:
        job = client.submit(["one text", "another"], output=f"s3://{bucket}/few", model="hashing")
        assert job.wait(60).rows == 2
        assert sorted(row["id"] for batch in job.results(["id"]) for row in batch.to_pylist()) == ["0", "1"]


def test_no_worker_writes_outside_its_part_of_the_bucket(
    workers: Fleet, bucket: str, s3_server: S3Server, env: Any, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    workers.start_worker("--output-root", f"s3://{bucket}/mine", **env)
    for output in (
        f"s3://{bucket}/mine2",
        f"s3://{bucket}/mine?endpoint_override=127.0.0.1:{s3_server.port}&scheme=http",
    ):
        args = [tmp_path / "c.jsonl", "-o", output, "--redis", workers.url, "--model", "hashing"]
        done = run("embed-submit", *args, **env)
        assert done.returncode == 2
        assert (
            f"no live worker may write there (their output roots: {tmp_path}, redis:, s3://{bucket}/mine)"
            in done.stderr
        )
    assert s3_server.keys(bucket) == []


def test_a_killed_run_goes_on_by_the_same_command(bucket: str, s3_server: S3Server, env: Any, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 60_000)
    args = [tmp_path / "c.jsonl", "-o", f"s3://{bucket}/out", "--model", "hashing", "--quiet"]
    first = start_submit(*args, **env, EMBEDSTREAM_WINDOW_TOKENS="8000")
    wait_until(lambda: any("part-" in key for key in s3_server.keys(bucket)), "a first shard")
    first.kill()
    first.wait()
    if any("_manifest" in key for key in s3_server.keys(bucket)):
        pytest.skip("it was done before it was killed")
    second = run("embed-submit", *args, **env)
    assert second.returncode == 0, second.stderr
    assert_exact(download(s3_server, bucket, "out", tmp_path / "here"), texts, every=100)


def test_a_bucket_outlives_the_state_that_a_run_kept_of_it(
    bucket: str, s3_server: S3Server, env: Any, tmp_path: Path
) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 3000)
    args = [tmp_path / "c.jsonl", "-o", f"s3://{bucket}/out", "--model", "hashing", "--json"]
    assert run("embed-submit", *args, **env).returncode == 0
    before = s3_server.keys(bucket)
    s3_server.client().delete_object(Bucket=bucket, Key="out/_manifest.json")
    done = run("embed-submit", *args, **(env | {"XDG_STATE_HOME": str(tmp_path / "elsewhere")}))
    assert done.returncode == 0, done.stderr
    assert "adopted 3,000 rows" in done.stderr
    assert s3_server.keys(bucket) == before
    assert_exact(download(s3_server, bucket, "out", tmp_path / "here"), texts, every=100)
    assert read_manifest(tmp_path / "here")["rows"] == 3000


def test_a_dataset_in_a_bucket_is_brought_up_to_date(
    bucket: str, s3_server: S3Server, env: Any, tmp_path: Path
) -> None:
    corpus, output = tmp_path / "c.jsonl", f"s3://{bucket}/out"
    texts = write_corpus(corpus, 500)
    args = [corpus, "-o", output, "--model", "hashing", "--json"]
    assert run("embed-submit", *args, **env).returncode == 0
    del texts["c-0"]
    texts |= {"c-1": "another text", "new": "one more"}
    corpus.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
    done = run("embed-submit", *args, "--update", **env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [report[name] for name in ("reused", "added", "changed", "removed")] == [498, 1, 1, 1]
    here = download(s3_server, bucket, "out", tmp_path / "here")
    assert_exact(here, texts, every=50)
    assert len([*here.glob("part-*")]) == len(read_manifest(here)["shards"]), "older files stay"
    assert run("embed-verify", output, "--corpus", corpus, **env).returncode == 0


def failure(env: Any, *args: Any) -> str:
    done = run("embed-submit", *args, "--model", "hashing", **env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    return line


def test_what_is_wrong_with_a_bucket_is_one_sentence(
    bucket: str, s3_server: S3Server, env: Any, tmp_path: Path
) -> None:
    write_corpus(corpus := tmp_path / "c.jsonl", 5)
    assert f"there is no bucket {bucket}-no: create it" in failure(env, corpus, "-o", f"s3://{bucket}-no/out")
    assert "there is no such object: check bucket and key" in failure(env, f"s3://{bucket}/no.jsonl")
    nowhere = env | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    assert "the store cannot be reached" in failure(nowhere, corpus, "-o", f"s3://{bucket}/out")
    reader = env | s3_server.user(f"reader-{bucket}", "s3:ListBucket", "s3:GetObject")
    try:
        assert "must allow s3:PutObject there" in failure(reader, corpus, "-o", f"s3://{bucket}/out")
        stranger = reader | {"AWS_SECRET_ACCESS_KEY": "wrong"}
        assert "AWS_ACCESS_KEY_ID" in failure(stranger, corpus, "-o", f"s3://{bucket}/out")
    finally:
        s3_server.check_permissions(False)


WRITER = ("s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject")


@pytest.mark.parametrize("trouble", ["there is no bucket", "must allow s3:PutObject there"])
def test_vectors_wait_for_a_bucket_that_is_gone_or_forbidden_in_mid_job(
    workers: Fleet, bucket: str, s3_server: S3Server, env: Any, tmp_path: Path, trouble: str
) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 3000)
    user = f"writer-{bucket}"
    mine = env | s3_server.user(user, *WRITER)
    client, output = s3_server.client(), f"s3://{bucket}/out"
    slow = mine | paced(100_000)
    workers.start_worker("--output-root", f"s3://{bucket}", "--batch-tokens", 4096, **slow)
    try:
        waiting = start_submit(
            tmp_path / "c.jsonl", "-o", output, "--redis", workers.url, "--model", "hashing", "--json", **mine
        )
        wait_until(
            lambda: any(
                workers.broker.status(job).blocks and held(workers, job) for job in workers.broker.active_jobs()
            ),
            "blocks in the worker's hands",
        )
        s3_server.check_permissions(False)
        gone = trouble == "there is no bucket"
        objects = {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in s3_server.keys(bucket)}
        if gone:
            for key in objects:
                client.delete_object(Bucket=bucket, Key=key)
            client.delete_bucket(Bucket=bucket)
        else:
            s3_server.allow(user, "s3:ListBucket", "s3:GetObject")
            s3_server.check_permissions(True)
        log = tmp_path / "worker-0.log"
        wait_until(lambda: trouble in log.read_text(), "it to be said")
        (job,) = workers.broker.active_jobs()
        wait_until(lambda: trouble in run("embed-status", job, "--redis", workers.url).stdout, "it to be shown")
        s3_server.check_permissions(False)
        if gone:
            client.create_bucket(Bucket=bucket)
            for key, body in objects.items():
                client.put_object(Bucket=bucket, Key=key, Body=body)
        _, said = waiting.communicate(timeout=120)
    finally:
        s3_server.check_permissions(False)
    assert waiting.returncode == 0, said
    assert log.read_text().count("cannot write") == 1, log.read_text()
    assert "Traceback" not in log.read_text()
    assert_exact(download(s3_server, bucket, "out", tmp_path / "here"), texts, every=10)
    verified = run("embed-verify", output, "--corpus", tmp_path / "c.jsonl", **env)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def held(workers: Fleet, job: str) -> int:
    """How many of a job's blocks are in hands."""
    pending: Any = workers.broker.client
    return int(pending.xpending(workers.broker.keys.blocks(job), "workers")["pending"])
