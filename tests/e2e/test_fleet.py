"""Producer, Redis and workers as separate processes; every vector recomputed from its text."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from lab_engines import paced

from e2e.harness import (
    Fleet,
    assert_exact,
    assert_no_leftovers,
    fleet,
    read_errors,
    read_manifest,
    run,
    start_submit,
    wait_until,
    write_corpus,
)
from embedstream.jobs import job_id
from embedstream.queue.workers import in_hand_of


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> object:
    with fleet(redis_url, tmp_path) as made:
        yield made


def submit_args(workers: Fleet, corpus: Path, output: Path) -> list[object]:
    return [corpus, "-o", output, "--redis", workers.url, "--model", "hashing", "--json"]


def test_a_corpus_becomes_vectors_of_its_texts(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 3000)
    workers.start_worker()
    done = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["state"] == "completed"
    assert (report["rows"], report["failed"], report["outputs"][0]["dim"]) == (3000, 0, 384)
    assert_exact(tmp_path / "out", texts)
    assert_no_leftovers(tmp_path / "out")


@pytest.mark.holds("Complete")
def test_two_workers_share_a_job_and_double_nothing(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 20_000)
    workers.start_worker("--window-tokens", 4000)
    workers.start_worker("--window-tokens", 4000)
    done = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts, every=20)
    names = {json.loads(raw)["worker"] for raw in workers.broker.shard_records(json.loads(done.stdout)["job"])}
    assert len(names) == 2, f"only {names} committed shards"


@pytest.mark.holds("Complete")
def test_a_worker_killed_in_mid_job_loses_and_doubles_nothing(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 60_000)
    first = workers.start_worker()
    submit = start_submit(*submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    job = job_id("hashing", str(tmp_path / "out"))
    stream = workers.broker.keys.blocks(job)
    wait_until(lambda: workers.broker.client.exists(stream), "the job's stream")
    wait_until(lambda: holds_blocks(workers, stream), "a worker that holds blocks")
    first.send_signal(signal.SIGKILL)
    first.wait()
    workers.start_worker()
    out, err = submit.communicate(timeout=120)
    assert submit.returncode == 0, err
    assert_exact(tmp_path / "out", texts, every=50)
    assert json.loads(out)["rows"] == 60_000


def test_a_worker_told_to_stop_hands_its_blocks_back_at_once(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 60_000)
    first = workers.start_worker("--lease-seconds", 600)
    submit = start_submit(*submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    job = job_id("hashing", str(tmp_path / "out"))
    stream = workers.broker.keys.blocks(job)
    wait_until(lambda: workers.broker.client.exists(stream) and holds_blocks(workers, stream), "a worker with blocks")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    if workers.broker.client.exists(stream):
        assert not holds_blocks(workers, stream), "a worker that left still holds blocks"
    workers.start_worker("--lease-seconds", 600)
    _, err = submit.communicate(timeout=120)
    assert submit.returncode == 0, err
    assert_exact(tmp_path / "out", texts, every=50)


def test_a_small_job_does_not_wait_behind_a_large_one(workers: Fleet, tmp_path: Path) -> None:
    large = write_corpus(tmp_path / "large.jsonl", 80_000, seed=1)
    small = write_corpus(tmp_path / "small.jsonl", 500, seed=2)
    workers.start_worker("--window-tokens", 20_000)
    slow = start_submit(*submit_args(workers, tmp_path / "large.jsonl", tmp_path / "large"))
    stream = workers.broker.keys.blocks(job_id("hashing", str(tmp_path / "large")))
    wait_until(lambda: workers.broker.client.xlen(stream) > 10, "a backlog of the large job")
    quick = run("embed-submit", *submit_args(workers, tmp_path / "small.jsonl", tmp_path / "small"))
    assert quick.returncode == 0, quick.stderr
    assert slow.poll() is None, "the large job ended before the small one: it proves nothing"
    _, err = slow.communicate(timeout=120)
    assert slow.returncode == 0, err
    assert_exact(tmp_path / "small", small)
    assert_exact(tmp_path / "large", large, every=100)


@pytest.mark.holds("Bad rows cost only themselves")
def test_bad_rows_cost_only_themselves(workers: Fleet, tmp_path: Path) -> None:
    lines = [
        b'{"id": "good", "text": "a text"}',
        b"{broken",
        b'{"id": "empty", "text": "  "}',
        b"",
        b'{"id": "good", "text": "again"}',
        b'{"id": "bytes", "text": "\xff\xfe"}',
        b'{"id": 7, "text": "a number is an id"}',
        b'{"id": ["list"], "text": "no id"}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    workers.start_worker()
    done = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert_exact(tmp_path / "out", {"good": "a text", "7": "a number is an id"})
    errors = read_errors(tmp_path / "out")
    assert sorted(error["line"] for error in errors) == [2, 3, 5, 6, 8]
    assert all(error["code"] and error["message"] for error in errors)
    again = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"))
    assert again.returncode == 3
    assert json.loads(again.stdout)["rows"] == 2


def test_a_job_is_finished_by_workers_when_its_producer_has_left(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 2000)
    gone = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"), "--detach")
    assert gone.returncode == 0, gone.stderr
    assert not (tmp_path / "out" / "_manifest.json").exists()
    worker = workers.start_worker("--burst", wait=False)
    assert worker.wait(timeout=60) == 0
    assert_exact(tmp_path / "out", texts, every=20)


def test_a_cancelled_job_goes_on_with_the_same_command(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 5000)
    args = submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out")
    assert run("embed-submit", *args, "--detach").returncode == 0
    job = job_id("hashing", str(tmp_path / "out"))
    assert run("embed-cancel", job, "--redis", workers.url).returncode == 0
    workers.start_worker()
    wait_until(lambda: workers.broker.state(job) == "cancelled", "the cancelled job's manifest")
    done = run("embed-submit", *args)
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts, every=20)


def test_what_is_computed_of_a_cancelled_job_is_kept(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 8000)
    args = submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out")
    assert run("embed-submit", *args, "--detach").returncode == 0
    job = job_id("hashing", str(tmp_path / "out"))
    worker = workers.start_worker("--window-tokens", 4000, "--batch-tokens", 2000, "--no-warmup", **paced(40_000))
    wait_until(lambda: in_hand_of(job, workers.broker.workers(), {}).rows > 500, "rows that are computed")
    assert workers.broker.status(job).rows == 0, "and not yet written"
    cancelled = run("embed-cancel", job, "--redis", workers.url)
    said = re.fullmatch(rf"job {job} is cancelled: ([\d,]+) of 8,000 rows are kept; .*\n", cancelled.stdout)
    assert said is not None, cancelled
    kept = int(said[1].replace(",", ""))
    assert kept > 500
    wait_until(lambda: workers.broker.state(job) == "cancelled", "the cancelled job's manifest")
    assert read_manifest(tmp_path / "out")["rows"] == kept == workers.broker.status(job).rows
    assert run("embed-verify", tmp_path / "out").returncode == 0
    worker.kill()
    workers.start_worker()
    assert run("embed-submit", *args).returncode == 0
    assert_exact(tmp_path / "out", texts, every=20)


def test_a_job_is_cancelled_in_seconds_though_the_worker_that_held_it_is_dead(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 5000)
    args = submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out")
    worker = workers.start_worker("--lease-seconds", 600, "--no-warmup", **paced(1))
    submit = start_submit(*args, "--json")
    job = job_id("hashing", str(tmp_path / "out"))
    stream = workers.broker.keys.blocks(job)
    wait_until(lambda: workers.broker.state(job) == "running" and holds_blocks(workers, stream), "blocks in its hands")
    worker.kill()
    cancelled = run("embed-cancel", job, "--redis", workers.url)
    assert f"job {job} is cancelled: 0 of 5,000 rows are kept; " in cancelled.stdout
    out, _ = submit.communicate(timeout=30)
    assert (submit.returncode, json.loads(out)["state"]) == (4, "cancelled")


def test_a_job_whose_spec_an_older_version_wrote_with_fewer_fields_is_done(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 600)
    args = submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out")
    assert run("embed-submit", *args, "--detach").returncode == 0
    key = workers.broker.keys.job(job_id("hashing", str(tmp_path / "out")))
    spec = json.loads(workers.broker.stored_spec(key.rpartition(":")[2]))
    del spec["number_rows"]
    workers.broker.client.hset(key, "spec", json.dumps(spec))
    assert workers.start_worker("--burst", wait=False).wait(60) == 0
    assert_exact(tmp_path / "out", texts)


def test_an_output_that_no_worker_may_write_is_refused(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    workers.start_worker()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    done = run("embed-submit", *submit_args(workers, tmp_path / "c.jsonl", outside))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr, "the sentence names the roots"
    assert not outside.exists()
    assert not workers.broker.active_jobs()


def test_check_says_whether_this_machines_worker_is_ready(workers: Fleet) -> None:
    args = ["--check", "--model", "hashing", "--redis", workers.url]
    assert run("embed-worker", *args).returncode == 1
    workers.start_worker()
    assert run("embed-worker", *args).returncode == 0


def holds_blocks(workers: Fleet, stream: str) -> bool:
    summary = workers.broker.client.xpending(stream, "workers")
    owners = {owner["name"].decode() for owner in summary["consumers"] or []}
    return bool(owners - {"released"})


def test_a_job_that_no_worker_of_its_model_can_serve_fails_with_the_reason(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    workers.start_worker()
    done = run(
        "embed-submit", *submit_args(workers, tmp_path / "c.jsonl", tmp_path / "out"), "--prompt-name", "nonsense"
    )
    assert done.returncode == 2
    assert "Error: --prompt-name nonsense" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_every_worker_refuses_is_told_why(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    workers.start_worker("--model", "another-model", "--engine", "hashing", "--queue", "hashing")
    waiting = start_submit(tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing")
    assert waiting.stderr is not None
    lines = iter(waiting.stderr.readline, "")
    assert any("another-model" in line for line in lines), "it waits in silence"
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=30) == 130


def test_a_worker_that_is_told_so_does_not_warm_up(workers: Fleet) -> None:
    workers.start_worker("--no-warmup")
    assert [worker.warm_up_seconds for worker in workers.broker.workers()] == [pytest.approx(0, abs=0.001)]
