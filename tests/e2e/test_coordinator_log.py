"""What coordinators log: each trouble once, with what it is about and who says it; a stop is no failure."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.redis_servers import own_server
from lab.verify import make_dataset
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from e2e.harness import Fleet, assert_exact, fleet, run, wait_until, write_corpus
from embedstream.jobs import JobState, job_id
from embedstream.queue.coordination import compactions, troubles

JSON = ("--log-format", "json")


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def lines(path: Path) -> list[dict[str, Any]]:
    """What was said from the coordinator's start on, but for what failpoints say."""
    told = [json.loads(line) for line in path.read_text().splitlines() if not line.startswith("failpoint ")]
    assert all(line["coordinator"] for line in told)
    start = [line["message"].startswith("coordinator ") for line in told].index(True)
    return told[start + 1 :]


def submit(workers: Fleet, corpus: Path, output: Path, *args: str) -> str:
    """Returns the job."""
    command = [corpus, "-o", output, "--redis", workers.url, "--model", "hashing", "--quiet", *args]
    done = run("embed-submit", *command)
    assert done.returncode == 0, done.stderr
    return job_id("hashing", str(output))


def test_what_cannot_be_read_is_logged_once_however_often_it_is_tried(workers: Fleet, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    write_corpus(corpus, 10)
    job = submit(workers, corpus, tmp_path / "out", "--server-side")
    corpus.rename(tmp_path / "away")
    workers.start_coordinator(*JSON)
    name = f"ingest-{job}-0"

    def is_tried_twice() -> bool:
        found = Job.fetch(name, workers.broker.client, JSONSerializer)
        return found.retries_left == 1 and found.get_status() is JobStatus.SCHEDULED

    wait_until(lambda: troubles(workers.broker, job), "a first try")
    wait_until(is_tried_twice, "another try")
    said = [(line["job"], line["part"], line["message"]) for line in lines(tmp_path / "coordinator-0.log")]
    assert said == [(job, "0", f"{name}: {corpus}: no such file")]


def test_what_redis_refuses_to_every_process_of_a_coordinator_is_logged_once(tmp_path: Path) -> None:
    with own_server() as server, fleet(server.url, tmp_path) as workers:
        workers.start_coordinator(*JSON)
        server.client().execute_command("ACL", "SETUSER", "default", "-blmove")
        ask = server.client()

        def denials() -> int:
            return sum(int(entry[b"count"]) for entry in ask.execute_command("ACL", "LOG"))

        wait_until(lambda: denials() > 4, "both processes, started again twice")
        said = [line["message"] for line in lines(tmp_path / "coordinator-0.log")]
        assert len(said) == 1
        assert "forbids a command or key to this user" in said[0]


def test_a_redis_that_is_away_is_waited_for_in_one_line(tmp_path: Path) -> None:
    with own_server() as server, fleet(server.url, tmp_path) as workers:
        workers.start_coordinator(*JSON)
        server.kill()
        log = tmp_path / "coordinator-0.log"
        wait_until(lambda: "waiting for it" in log.read_text(), "the coordinator's word")
        server.start()
        write_corpus(tmp_path / "c.jsonl", 10)
        job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out", "--server-side")
        wait_until(lambda: workers.broker.state(job) is JobState.RUNNING, "a part that is read")
        words = [line["message"] for line in lines(log)]
        assert words == [f"Redis at {server.url} cannot be reached, waiting for it"]


def test_a_root_that_is_not_there_is_told_at_the_start(workers: Fleet, tmp_path: Path) -> None:
    workers.start_coordinator(*JSON, "--input-root", tmp_path / "unmounted")
    assert [(line["level"], line["message"]) for line in lines(tmp_path / "coordinator-0.log")] == [
        ("warning", f"{tmp_path}/unmounted: no such folder, so nothing below it is found here: is its disk mounted?")
    ]


@pytest.mark.parametrize("doing", ["ingest", "finalize", "merge"])
def test_a_stop_is_no_failure_and_what_was_being_done_goes_on_at_once(
    workers: Fleet, tmp_path: Path, doing: str
) -> None:
    corpus, output, stop = tmp_path / "c.jsonl", tmp_path / "out", {"EMBEDSTREAM_FAILPOINTS": "file.written=pause"}
    texts = write_corpus(corpus, 4000)
    if doing == "ingest":
        first = workers.start_coordinator(*JSON, EMBEDSTREAM_QUEUE_BYTES="200000")
        job = submit(workers, corpus, output, "--server-side")
        wait_until(lambda: workers.broker.backlog(job) > 4, "some blocks")
        workers.start_worker()
    elif doing == "finalize":
        worker = workers.start_worker(EMBEDSTREAM_FAILPOINTS="take_finalize.before=kill")
        job = submit(workers, corpus, output, "--detach")
        assert worker.wait(timeout=60) == -signal.SIGKILL
        first = workers.start_coordinator(*JSON, **stop)
        wait_until(lambda: "failpoint" in (tmp_path / "coordinator-1.log").read_text(), "a manifest being written")
    else:
        made = make_dataset(tmp_path, 2000)
        job, output = "", made.folder
        first = workers.start_coordinator(*JSON, **stop)
        assert run("embed-compact", output, "--redis", workers.url).returncode == 0
        wait_until(lambda: "failpoint" in (tmp_path / "coordinator-0.log").read_text(), "a shard being written")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=20) == 0
    (log,) = tmp_path.glob("coordinator-*.log")
    said = [
        (line["level"], line.get("job", ""), line["message"])
        for line in lines(log)
        if not line["message"].startswith("expire")  # which may be under way as well
    ]
    assert [each[:2] for each in said] == [("info", job)]
    assert f"{doing}-" in said[0][2]
    assert "handed over, as this coordinator stops" in said[0][2]
    workers.start_coordinator()
    if doing == "merge":
        wait_until(lambda: not compactions(workers.broker), "the end of the compaction", 50)
        assert run("embed-verify", output).returncode == 0
    else:
        wait_until(lambda: workers.broker.state(job) is JobState.COMPLETED, "the end of the job", 50)
        assert_exact(output, texts, every=20)
        assert troubles(workers.broker, job) == {}
