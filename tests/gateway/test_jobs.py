"""Jobs over HTTP: submitted, followed, ended, gone on with, and their failed rows read."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import serve_redis
from e2e.harness import Fleet, assert_exact, fleet, read_rows, wait_until, write_corpus
from gateway.conftest import Served

from embedstream.jobs import JobSpec, JobState
from embedstream_gateway import desk, jobs
from embedstream_gateway.refusals import Refusal


@dataclass(frozen=True)
class Lone:
    """A fleet of one's own with a gateway without keys."""

    fleet: Fleet
    http: httpx.Client


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Lone]:
    with serve_redis() as redis, fleet(redis.url, tmp_path) as running:
        _, url = running.start_gateway("--output-root", tmp_path / "out")
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Lone(running, client)


def ended(client: httpx.Client, id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/jobs/{id}").json()
        return found if found["ended"] is not None else None

    found: dict[str, Any] = wait_until(look, "the job's end")
    return found


def test_records_become_a_dataset_and_the_same_request_finds_it_done(served: Served) -> None:
    output = served.fleet.root / "records.vectors"
    records = [{"id": f"r{number}", "text": f"text {number}"} for number in range(300)]
    with served.http("submit") as client, served.http("read") as reader:
        body = {"model": "hashing", "output": str(output), "records": records}
        made = client.post("/jobs", json=body)
        assert made.status_code == 202
        job = made.json()["job"]
        assert made.headers["Location"] == f"/jobs/{job}"
        assert ended(reader, job)["state"] == "completed"
        assert_exact(output, {record["id"]: record["text"] for record in records})
        again = client.post("/jobs", json=body)
        assert (again.status_code, again.json()["state"]) == (202, "completed")
        other = client.post("/jobs", json={**body, "records": records[:-1]})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "differs")
        named = [each["job"] for queue in reader.get("/jobs").json()["queues"] for each in queue["jobs"]]
        assert job in named


def test_texts_that_are_too_long_are_errors_where_that_is_wanted(served: Served) -> None:
    output = served.fleet.root / "long.vectors"
    body = {"model": "hashing", "output": str(output), "records": ["word " * 20_000, "short"], "on_long": "error"}
    with served.http() as client:
        job = client.post("/jobs", json=body).json()["job"]
        assert (ended(client, job)["rows"], ended(client, job)["failed"]) == (1, 1)


def test_texts_are_cut_into_chunks_as_embed_submit_cuts_them(served: Served) -> None:
    output = served.fleet.root / "cut.vectors"
    record = {"id": "d", "title": "Of words", "text": "A sentence with words. " * 40}
    chunking = {"chunk_tokens": 40, "chunk_overlap": 8, "chunk_by": "sentence", "chunk_format": "{title}: {chunk}"}
    body = {"model": "hashing", "output": str(output), "records": [record], "title_field": "title", **chunking}
    with served.http() as client:
        job = client.post("/jobs", json=body).json()["job"]
        assert ended(client, job)["state"] == "completed"
        rows = sorted(read_rows(output), key=lambda row: row["chunk"])
        assert len(rows) > 5
        assert {row["id"] for row in rows} == {"d"}
        for row in rows:
            assert row["text"] == f"Of words: {record['text'][row['start'] : row['end']]}"
            assert row["n_tokens"] <= 40
        for wrong in ({"chunk_tokens": 9}, {"chunk_tokens": None}):
            refused = client.post("/jobs", json={**body, "output": f"{output}2", **wrong})
            assert refused.status_code == 400, refused.text
            assert "chunk-tokens" in refused.json()["error"]["message"]
        long = {"model": "hashing", "output": f"{output}3", "records": ["word " * 20_000], "on_long": "chunk"}
        assert ended(client, client.post("/jobs", json=long).json()["job"])["rows"] > 1


def test_a_job_is_followed_until_it_has_ended(served: Served) -> None:
    output = served.fleet.root / "followed.vectors"
    body = {"model": "hashing", "output": str(output), "records": ["one", "two"]}
    with served.http() as client:
        job = client.post("/jobs", json=body).json()["job"]
        with client.stream("GET", f"/jobs/{job}/events") as stream:
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert events[-1]["state"] == "completed"
        assert events[-1]["rows"] == 2


def test_failed_rows_are_read_with_their_originals(served: Served) -> None:
    output = served.fleet.root / "failing.vectors"
    records = [{"id": str(number), "text": "" if number % 2 else "fine"} for number in range(10)]
    with served.http() as client:
        job = client.post("/jobs", json={"model": "hashing", "output": str(output), "records": records}).json()["job"]
        assert ended(client, job)["failed"] == 5
        found = client.get(f"/jobs/{job}/errors", params={"limit": 3}).json()
        assert [row["id"] for row in found["errors"]] == ["1", "3", "5"]
        assert {row["code"] for row in found["errors"]} == {"empty_text"}
        assert all(row["original"] for row in found["errors"])
        assert found["has_more"]
        rest = client.get(f"/jobs/{job}/errors", params={"limit": 3, "offset": 3}).json()
        assert [row["id"] for row in rest["errors"]] == ["7", "9"]
        assert not rest["has_more"]


def test_a_job_whose_rows_were_in_its_request_is_submitted_again_and_not_retried(served: Served) -> None:
    output = served.fleet.root / "all-fail.vectors"
    with served.http() as client:
        job = client.post("/jobs", json={"model": "hashing", "output": str(output), "records": ["", " "]}).json()["job"]
        assert ended(client, job)["state"] == "failed"
        refused = client.post(f"/jobs/{job}/retry")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_here")
        assert f"/page/jobs/{job}/retry" not in client.get(f"/page/jobs/{job}").text


def test_a_job_whose_record_is_damaged_is_named_and_costs_no_other(served: Served) -> None:
    output = served.fleet.root / "damaged.vectors"
    broker = served.fleet.broker
    with served.http() as client:
        job = client.post("/jobs", json={"model": "hashing", "output": str(output), "records": ["x"]}).json()["job"]
        ended(client, job)
        broker.client.hset(broker.keys.job(job), "spec", b"\xff")
        refused = client.get(f"/jobs/{job}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "damaged")
        assert job in refused.json()["error"]["message"]
        (queue,) = [each for each in client.get("/jobs").json()["queues"] if each["queue"] == "hashing"]
        assert job in queue["unreadable_jobs"]
        broker.run(broker.forget(job, broker.keys_below(job)))


def test_coordinators_read_a_corpus_and_a_cancelled_job_goes_on(lone: Lone) -> None:
    root = lone.fleet.root
    texts = write_corpus(root / "corpus.jsonl", 2000)
    (root / "out").mkdir()
    worker = lone.fleet.start_worker()
    body = {"model": "hashing", "output": str(root / "out" / "v"), "corpus": [str(root / "corpus.jsonl")]}
    refused = lone.http.post("/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_coordinator")
    coordinator = lone.fleet.start_coordinator()
    worker.send_signal(signal.SIGSTOP)
    job = lone.http.post("/jobs", json=body).json()["job"]
    assert lone.http.post(f"/jobs/{job}/retry").status_code == 409
    assert lone.http.delete(f"/jobs/{job}").status_code == 200
    worker.send_signal(signal.SIGCONT)
    assert ended(lone.http, job)["state"] == "cancelled"
    assert lone.http.delete(f"/jobs/{job}").status_code == 409
    assert f'href="/page/jobs/{job}/retry"' in lone.http.get(f"/page/jobs/{job}").text
    assert lone.http.post(f"/jobs/{job}/retry").status_code == 200
    wait_until(lambda: lone.http.get(f"/jobs/{job}").json()["state"] == "completed", "it goes on")
    assert_exact(root / "out" / "v", texts)
    coordinator.terminate()
    coordinator.wait()
    again = lone.http.post("/jobs", json=body)
    assert (again.status_code, again.json().get("state")) == (202, "completed"), "nothing is left for a coordinator"


def test_the_stream_of_a_job_that_is_lost_ends(lone: Lone) -> None:
    lone.fleet.start_worker().send_signal(signal.SIGSTOP)
    body = {"model": "hashing", "output": str(lone.fleet.root / "out" / "v"), "records": ["one"]}
    job = lone.http.post("/jobs", json=body).json()["job"]
    with lone.http.stream("GET", f"/jobs/{job}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: job"
        lone.fleet.broker.client.flushall()
        assert "event: job" not in list(lines)
    assert lone.http.get(f"/jobs/{job}/events").status_code == 404


def test_records_that_find_no_room_in_the_queue_are_given_up_in_time_and_go_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [f"text {number}" for number in range(5000)]
    monkeypatch.setattr(desk, "SUBMIT_SECONDS", 0.5)
    with serve_redis() as redis:
        served = desk.Desk(redis.url, [str(tmp_path)])
        spec = served.spec("hashing", "hashing", str(tmp_path / "v"), None, None, {})
        with monkeypatch.context() as small:
            small.setenv("EMBEDSTREAM_QUEUE_BYTES", "1")
            with pytest.raises(Refusal, match="queue is full") as refused:
                served.push(records, spec, "")
        assert (refused.value.status, refused.value.retry_after) == (503, 2)
        assert served.look(spec.job).status.state is JobState.SUBMITTING
        monkeypatch.setattr(desk, "SUBMIT_SECONDS", 60)
        served.push(records, spec, "")
        assert served.look(spec.job).status.submitted == 5000


async def test_what_takes_too_long_keeps_its_thread_until_its_end_and_no_more_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "CALL_SECONDS", 0.05)
    ends, begun = threading.Event(), list[int]()

    def act() -> None:
        begun.append(1)
        ends.wait()

    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with pytest.raises(Refusal, match="not done within"):
                await jobs.blocking(act, pool)
        ends.set()
    assert begun == [1]


@pytest.mark.parametrize(
    ("parts", "run", "may"),
    [
        (("/data/a.jsonl", "s3://bucket/b.parquet"), False, True),
        (("-",), False, False),
        (("records",), False, False),
        (("/data/run", "/data/queries.jsonl", "/data/corpus.jsonl"), True, False),
    ],
    ids=["files", "standard-input", "records", "run"],
)
def test_coordinators_are_asked_only_for_what_they_can_read(parts: tuple[str, ...], run: bool, may: bool) -> None:
    assert desk.may_reread(JobSpec(queue="q", output="/data/v", model="m", parts=parts, run=run)) == may


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"output": "/elsewhere/v"}, 403, "outside"),
        ({"output": "{root}/../v"}, 403, "outside"),
        ({"output": "relative/v"}, 400, "absolute"),
        ({"output": "redis:?prefix=docs:"}, 403, "outside"),
        ({"output": "{root}/full"}, 409, "not a dataset"),
        ({"records": None}, 400, "either"),
        ({"records": None, "corpus": ["a.jsonl"]}, 400, "absolute"),
        ({"records": None, "corpus": ["/a/../b"]}, 400, "plain spelling"),
        ({"records": None, "corpus": ["/a", "/a"]}, 400, "twice"),
        ({"model": "/etc"}, 404, "no model"),
        ({"outputs": ["dense:int1"]}, 400, "--emit"),
        ({"unknown": 1}, 400, "unknown"),
        ({"prompt": "a", "prompt_name": "b"}, 400, "exclude"),
        ({"format": "text"}, 400, "format"),
    ],
    ids=[
        "outside",
        "above",
        "relative",
        "redis",
        "occupied",
        "no-source",
        "relative-corpus",
        "spelling",
        "twice",
        "model",
        "emit",
        "unknown",
        "prompts",
        "format",
    ],
)
def test_what_may_not_be_is_refused(served: Served, changed: dict[str, Any], status: int, says: str) -> None:
    root = served.fleet.root
    (root / "full").mkdir(exist_ok=True)
    (root / "full" / "file").write_text("mine")
    body = {"model": "hashing", "output": str(root / "refused"), "records": ["x"], **changed}
    body = {name: value for name, value in body.items() if value is not None}
    body["output"] = str(body["output"]).replace("{root}", str(root))
    with served.http() as client:
        refused = client.post("/jobs", json=body)
        assert refused.status_code == status, refused.text
        assert says in refused.json()["error"]["message"]


@pytest.mark.parametrize("id", ["0" * 16, "nothing", "..%2f..", "0" * 15 + "G"])
def test_a_job_that_is_not_there_is_not_found(served: Served, id: str) -> None:
    with served.http() as client:
        for ask in (client.get(f"/jobs/{id}"), client.delete(f"/jobs/{id}"), client.get(f"/jobs/{id}/errors")):
            assert ask.status_code == 404
        assert client.get(f"/jobs/{id}/events").status_code == 404
        assert client.post(f"/jobs/{id}/retry").status_code == 404


def test_without_roots_nothing_is_written_or_read(served: Served) -> None:
    _, url = served.fleet.start_gateway()
    body = {"model": "hashing", "output": str(served.fleet.root / "v"), "records": ["x"]}
    refused = httpx.post(f"{url}/jobs", json=body)
    assert refused.status_code == 501
    assert "--output-root" in refused.text
