"""Coordinators as separate processes: they read parts and write manifests, and whoever is left goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.redis_servers import own_server
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from e2e.harness import (
    BIN,
    Fleet,
    assert_contents,
    assert_exact,
    assert_no_leftovers,
    environment,
    fleet,
    kill_with_children,
    read_errors,
    read_manifest,
    run,
    wait_until,
    write_corpus,
)
from embedstream.jobs import JobState, job_id
from embedstream.queue.coordination import compactions, coordinators, troubles, unsealed_parts
from embedstream.server.connection import connect
from embedstream_coordinator.rq_types import make_queue

SMALL_QUEUE = {"EMBEDSTREAM_QUEUE_BYTES": "200000"}
"""So that a part is read no faster than workers work."""


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def write_parts(folder: Path, count: int, rows: int) -> tuple[list[Path], dict[str, str]]:
    """Files of a corpus, and text by id."""
    paths = [folder / f"part{n}.jsonl" for n in range(count)]
    texts: dict[str, str] = {}
    for seed, path in enumerate(paths):
        texts |= write_corpus(path, rows, seed=seed)
    return paths, texts


def submit_server_side(workers: Fleet, paths: list[Path], output: Path, *args: object) -> str:
    """Returns the job."""
    common = ["-o", output, "--redis", workers.url, "--model", "hashing", "--server-side", "--json", "--quiet"]
    done = run("embed-submit", *paths, *common, *args)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["job"])


def wait_for_end(workers: Fleet, job: str, seconds: float = 60) -> None:
    def is_completed() -> bool:
        state = workers.broker.state(job)
        assert state not in (JobState.FAILED, JobState.CANCELLED)
        return state is JobState.COMPLETED

    wait_until(is_completed, f"the end of job {job}", seconds)


def test_several_parts_are_read_by_several_coordinators_into_the_dataset_of_one_reader(
    workers: Fleet, tmp_path: Path
) -> None:
    paths, texts = write_parts(tmp_path, 6, 800)
    with paths[4].open("a") as file:
        file.write('{"id": "part1-7", "text": "an id of an earlier part"}\n')
        file.write('{"id": "part4-7", "text": "an id of the same part"}\n')
        file.write('{"id": "part1-7", "text": "an id of an earlier part, again"}\n')
    first, second = workers.start_coordinator(), workers.start_coordinator()
    job = submit_server_side(workers, paths, tmp_path / "out")
    workers.start_worker()
    wait_for_end(workers, job)
    assert_exact(tmp_path / "out", texts, every=10)
    assert [(e["code"], e["file"], e["line"]) for e in read_errors(tmp_path / "out")] == [
        ("duplicate_id", str(paths[4]), line) for line in (801, 802, 803)
    ]
    verified = run("embed-verify", tmp_path / "out", *[arg for path in paths for arg in ("--corpus", path)])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert_contents(tmp_path / "out", *paths)
    for process in (first, second):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert coordinators(workers.broker) == []


def test_parts_are_read_at_the_same_time(workers: Fleet, tmp_path: Path) -> None:
    paths, texts = write_parts(tmp_path, 3, 4000)
    workers.start_coordinator("--processes", 3, **SMALL_QUEUE)
    job = submit_server_side(workers, paths, tmp_path / "out")
    running = make_queue(workers.broker.client).started_job_registry
    wait_until(lambda: len(running.get_job_ids()) == 3, "three readers")
    assert unsealed_parts(workers.broker, job, 3) == [0, 1, 2]
    workers.start_worker()
    wait_for_end(workers, job)
    assert_exact(tmp_path / "out", texts, every=20)


def test_a_coordinator_that_is_killed_is_taken_over(workers: Fleet, tmp_path: Path) -> None:
    paths, texts = write_parts(tmp_path, 2, 4000)
    first = workers.start_coordinator(**SMALL_QUEUE)
    job = submit_server_side(workers, paths, tmp_path / "out")
    wait_until(lambda: workers.broker.backlog(job) > 4, "some blocks")
    first.kill()
    first.wait()
    workers.start_coordinator(**SMALL_QUEUE)
    workers.start_worker()
    wait_for_end(workers, job, seconds=120)
    assert_exact(tmp_path / "out", texts, every=20)


def test_a_coordinator_that_is_told_to_stop_leaves_at_once_and_the_next_one_goes_on(
    workers: Fleet, tmp_path: Path
) -> None:
    paths, texts = write_parts(tmp_path, 2, 4000)
    first = workers.start_coordinator(**SMALL_QUEUE)
    job = submit_server_side(workers, paths, tmp_path / "out")
    wait_until(lambda: workers.broker.backlog(job) > 4, "some blocks")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=20) == 0
    workers.start_coordinator(**SMALL_QUEUE)
    workers.start_worker()
    wait_for_end(workers, job)
    assert_exact(tmp_path / "out", texts, every=20)
    assert troubles(workers.broker, job) == {}


def test_a_job_begun_by_coordinators_is_ended_by_embed_submit(workers: Fleet, tmp_path: Path) -> None:
    paths, texts = write_parts(tmp_path, 3, 2000)
    with paths[2].open("a") as file:
        file.write('{"id": "part0-7", "text": "an id of an earlier part"}\n')
    first = workers.start_coordinator(**SMALL_QUEUE)
    submit_server_side(workers, paths, tmp_path / "out")
    wait_until(lambda: sum(workers.broker.backlog(job) for job in workers.broker.active_jobs()) > 3, "some blocks")
    first.kill()
    first.wait()
    workers.start_worker()
    done = run("embed-submit", *paths, "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing")
    assert done.returncode == 3, done.stderr
    assert_exact(tmp_path / "out", texts, every=20)
    assert [(e["code"], e["line"]) for e in read_errors(tmp_path / "out")] == [("duplicate_id", 2001)]


def test_check_tells_whether_a_coordinator_is_there(workers: Fleet) -> None:
    assert run("embed-coordinator", "--check", "--redis", workers.url).returncode == 1
    process = workers.start_coordinator()
    assert run("embed-coordinator", "--check", "--redis", workers.url).returncode == 0
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert run("embed-coordinator", "--check", "--redis", workers.url).returncode == 1


@pytest.mark.parametrize("point", ["submit.before", "submit.after#3", "seal.before", "seal.after"])
def test_a_part_whose_reader_dies_is_read_on(workers: Fleet, tmp_path: Path, point: str) -> None:
    paths, texts = write_parts(tmp_path, 2, 2000)
    first = workers.start_coordinator(EMBEDSTREAM_FAILPOINTS=f"{point}=kill")
    job = submit_server_side(workers, paths, tmp_path / "out")
    wait_until(lambda: troubles(workers.broker, job) or workers.broker.state(job) is JobState.RUNNING, "a death")
    first.kill()
    first.wait()
    workers.start_coordinator()
    workers.start_worker()
    wait_for_end(workers, job, seconds=120)
    assert_exact(tmp_path / "out", texts, every=20)


@pytest.mark.parametrize("point", ["take_finalize.before", "take_finalize.after", "file.renamed", "finalized.before"])
def test_a_coordinator_alone_writes_the_manifest_though_another_died_at_it(
    workers: Fleet, tmp_path: Path, point: str
) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 1000)
    worker = workers.start_worker(EMBEDSTREAM_FAILPOINTS="take_finalize.before=kill")
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"]
    assert run("embed-submit", tmp_path / "c.jsonl", *common, "--detach", "--quiet").returncode == 0
    assert worker.wait(timeout=60) == -signal.SIGKILL
    job = job_id("hashing", str(tmp_path / "out"))
    assert workers.broker.state(job) is JobState.FINALIZING
    first = workers.start_coordinator(EMBEDSTREAM_FAILPOINTS=f"{point}=kill")
    wait_until(lambda: "died" in troubles(workers.broker, job).get("finalize", ""), "a death")
    assert "finalize: the coordinator's process for it died" in run("embed-status", job, "--redis", workers.url).stdout
    kill_with_children(first)
    workers.broker.free_finalize(job)  # its lease would run for a minute
    workers.start_coordinator()
    wait_for_end(workers, job, seconds=90)
    assert_exact(tmp_path / "out", texts, every=20)
    assert_no_leftovers(tmp_path / "out")
    assert troubles(workers.broker, job) == {}


def test_nothing_but_our_own_functions_is_called_whatever_lies_in_redis(workers: Fleet, tmp_path: Path) -> None:
    client = connect(workers.url)
    bait = tmp_path / "called"
    queue, pickled = Queue("embedstream", client, serializer=JSONSerializer), Queue("embedstream", client)
    foreign = [
        queue.enqueue("os.mkdir", str(bait)),
        queue.enqueue("embedstream_coordinator.functions.finalize", "hashing", "x"),
        queue.enqueue("embedstream.finalize", "hashing", job="x"),
        pickled.enqueue("os.mkdir", str(bait)),
    ]
    hooked = queue.enqueue("embedstream.finalize", "hashing", "0123456789abcdef")
    client.hset(hooked.key, "success_callback_name", "os.getcwd")
    workers.start_coordinator()
    wait_until(lambda: fetch(client, hooked).is_finished, "the job with a hook")
    said = "\n".join(path.read_text() for path in tmp_path.glob("coordinator-*.log"))
    assert [said.count(f"{job.id}: ") for job in foreign] == [1, 1, 1, 1]
    assert "os.mkdir: is no function of a coordinator, so it is not called" in said
    assert queue.job_ids == []
    assert not bait.exists()
    texts = write_corpus(tmp_path / "c.jsonl", 300)
    job_name = submit_server_side(workers, [tmp_path / "c.jsonl"], tmp_path / "out")
    workers.start_worker()
    wait_for_end(workers, job_name)
    assert_exact(tmp_path / "out", texts)


def test_what_cannot_be_read_is_told_by_status_and_read_when_it_is_there(workers: Fleet, tmp_path: Path) -> None:
    paths, texts = write_parts(tmp_path, 2, 500)
    away = paths[1].rename(tmp_path / "away")
    workers.start_coordinator()
    workers.start_worker()
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--server-side"]
    job = job_id("hashing", str(tmp_path / "out"))
    for _ in range(2):
        refused = run("embed-submit", *paths, *common)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"Error: job {job}, ids: {paths[1]}: no such file: correct that, and coordinators" in refused.stderr
        assert f"`embed-cancel {job} --redis {workers.url}`" in refused.stderr
    shown = run("embed-status", job, "--redis", workers.url).stdout
    assert f"ids: {paths[1]}: no such file" in shown
    assert f"    ids: {paths[1]}: no such file" in run("embed-status", "--redis", workers.url).stdout
    assert "coordinators have read 1 of 2 parts" in shown
    assert json.loads(run("embed-status", job, "--redis", workers.url, "--json").stdout)["troubles"] == {
        "ids": f"{paths[1]}: no such file"
    }
    away.rename(paths[1])  # before the third try, which comes a minute after the second
    info = subprocess.run([str(BIN / "rq"), "info", "-u", workers.url], capture_output=True, text=True, check=True)
    assert "embedstream" in info.stdout
    wait_for_end(workers, job, seconds=90)
    assert_exact(tmp_path / "out", texts)


@pytest.mark.parametrize("kind", ["outside", "link", "standard input", "pipe"])
def test_a_coordinator_reads_nothing_outside_its_input_roots(workers: Fleet, tmp_path: Path, kind: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.jsonl"
    inside.mkdir()
    write_corpus(outside, 10)
    part = {"outside": outside, "link": inside / "link", "pipe": inside / "pipe"}.get(kind, inside / "-")
    if kind == "link":
        part.symlink_to(outside)
    if kind == "pipe":
        subprocess.run(["mkfifo", str(part)], check=True)
    job = submit_server_side(workers, [part], tmp_path / "out")
    if kind == "standard input":
        rename_part(workers, job, "-")
    command = [str(BIN / "embed-coordinator"), "--redis", workers.url, "--input-root", str(inside)]
    process = subprocess.Popen(command, env=environment(), cwd=inside, stderr=subprocess.DEVNULL)
    workers.processes.append(process)
    found = wait_until(lambda: troubles(workers.broker, job), "the refusal")
    words = {"standard input": "is no file that a coordinator could read", "pipe": "is no regular file"}
    assert words.get(kind, "is outside this coordinator's input roots") in found["part 0"]
    assert workers.broker.backlog(job) == 0
    process.terminate()
    assert process.wait(timeout=20) == 0


def rename_part(workers: Fleet, job: str, name: str) -> None:
    """As somebody would who writes into Redis."""
    key = workers.broker.keys.job(job)
    spec = json.loads(ask(workers).hget(key, "spec"))
    ask(workers).hset(key, "spec", json.dumps({**spec, "parts": [name]}))


def test_what_no_live_coordinator_may_read_is_refused_before_there_is_a_job(workers: Fleet, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    write_corpus(tmp_path / "c.jsonl", 10)
    command = [str(BIN / "embed-coordinator"), "--redis", workers.url, "--input-root", str(inside)]
    workers.processes.append(subprocess.Popen(command, env=environment(), cwd=inside, stderr=subprocess.DEVNULL))
    wait_until(lambda: coordinators(workers.broker), "the coordinator")
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--server-side"]
    done = run("embed-submit", tmp_path / "c.jsonl", *common)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no coordinator may read {tmp_path}/c.jsonl (their input roots: {inside}): start one with" in done.stderr
    assert workers.broker.state(job_id("hashing", str(tmp_path / "out"))) is None


def test_without_a_coordinator_submit_and_status_say_so(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 10)
    common = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--server-side"]
    done = run("embed-submit", tmp_path / "c.jsonl", *common)
    assert done.returncode == 0
    assert "no coordinator runs, so its parts are not read: start one with `embed-coordinator --redis" in done.stderr
    job = job_id("hashing", str(tmp_path / "out"))
    assert "no coordinator runs" in run("embed-status", job, "--redis", workers.url).stdout
    before = (int(workers.broker.client.time()[0]) - 3600) * 1000
    workers.broker.client.hset(workers.broker.keys.job(job), mapping={"pushed": before, "committed": before})
    stalled = run("embed-status", job, "--redis", workers.url).stdout
    assert "no coordinator runs" in stalled
    assert "coordinators do not get on with its parts: see above" in stalled
    assert "its producer is gone" not in stalled


def test_the_same_server_side_command_again_does_nothing_once_it_is_finished(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 200)
    workers.start_coordinator()
    workers.start_worker()
    job = submit_server_side(workers, [tmp_path / "c.jsonl"], tmp_path / "out")
    wait_for_end(workers, job)
    before = read_manifest(tmp_path / "out")
    assert submit_server_side(workers, [tmp_path / "c.jsonl"], tmp_path / "out") == job
    assert read_manifest(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["c.jsonl"], "--server-side needs --redis"),
        (["-", "-o", "out", "--redis", "redis://nowhere"], "standard input is on this machine only"),
        (["c.jsonl", "c.jsonl", "-o", "out", "--redis", "redis://nowhere"], "c.jsonl: given twice"),
        (["c.jsonl", "--retry-failed", "--redis", "redis://nowhere"], "exclude each other"),
    ],
)
def test_what_cannot_be_read_elsewhere_is_refused_in_one_sentence(args: list[str], said: str) -> None:
    done = run("embed-submit", *args, "--server-side", "--model", "hashing")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_coordinator_without_redis_says_so() -> None:
    done = run("embed-coordinator", "--redis", "redis://127.0.0.1:1/0")
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_user_with_the_documented_rights_can_be_a_coordinator(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text().replace("\\\n", "")
    (rule,) = re.findall(r"^ACL SETUSER coordinator (.*)$", text, re.MULTILINE)
    paths, texts = write_parts(tmp_path, 3, 300)
    away = paths[2].rename(tmp_path / "away")
    with own_server() as server:
        server.client().execute_command("ACL", "SETUSER", "coordinator", *rule.replace("PASSWORD", "secret").split())
        url = server.tcp_url.replace("redis://", "redis://coordinator:secret@")
        with fleet(url, tmp_path) as workers:
            process = workers.start_coordinator()
            common = ["-o", tmp_path / "out", "--redis", url, "--model", "hashing", "--server-side"]
            assert run("embed-submit", *paths, *common).returncode == 2, "a part that is not there"
            job = job_id("hashing", str(tmp_path / "out"))
            workers.start_worker()
            assert troubles(workers.broker, job)
            away.rename(paths[2])
            wait_for_end(workers, job, seconds=90)
            done = run("embed-compact", tmp_path / "out", "--redis", url)
            assert done.returncode == 0, done.stderr
            wait_until(lambda: not compactions(workers.broker), "the compaction")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        denied = {entry[b"object"] for entry in server.client().execute_command("ACL", "LOG")}
        assert denied <= {b"config"}, "more than it may do without"
    assert_exact(tmp_path / "out", texts)


def test_numbers_of_all_queues_are_served_with_no_worker_alive(workers: Fleet, tmp_path: Path) -> None:
    paths, _ = write_parts(tmp_path, 1, 2000)
    process = workers.start_coordinator("--metrics-port", 0, "--log-format", "json")
    job = submit_server_side(workers, paths, tmp_path / "out")
    wait_until(lambda: workers.broker.state(job) is JobState.RUNNING, "a part that is read")
    log = tmp_path / "coordinator-0.log"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (url,) = [line["message"].removeprefix("metrics at ") for line in lines if "metrics at" in line["message"]]
    served = urllib.request.urlopen(url).read().decode()
    drain = re.findall(r'^embedstream_queue_drain_seconds\{queue="hashing"\} (\S+)$', served, re.MULTILINE)
    assert float(drain[0]) > 0
    assert urllib.request.urlopen(url.replace("/metrics", "/readyz")).status == 200
    assert all("coordinator" in line for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_a_coordinator_waits_for_redis_and_goes_on(tmp_path: Path) -> None:
    paths, texts = write_parts(tmp_path, 2, 3000)
    with own_server() as server, fleet(server.url, tmp_path) as workers:
        process = workers.start_coordinator(**SMALL_QUEUE)
        job = submit_server_side(workers, paths, tmp_path / "out")
        wait_until(lambda: workers.broker.backlog(job) > 2, "some blocks")
        server.kill()
        wait_until(lambda: "waiting for it" in (tmp_path / "coordinator-0.log").read_text(), "the coordinator's word")
        server.start()
        workers.start_worker()
        wait_for_end(workers, job, seconds=120)
        assert process.poll() is None
    assert_exact(tmp_path / "out", texts, every=20)


def fetch(client: Any, job: Job) -> Job:
    return Job.fetch(job.id, connection=client, serializer=JSONSerializer)


def ask(workers: Fleet) -> Any:
    """redis-py types its replies as unions over all its configurations."""
    return workers.broker.client
