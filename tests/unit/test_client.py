from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from conftest import RedisServer
from lab.mini_worker import MiniWorker, vector

from embedstream import (
    AsyncClient,
    Client,
    CorpusChanged,
    CorpusDiffers,
    InputError,
    JobCancelled,
    JobFailed,
    JobState,
    JobUnknown,
    OutputError,
    RequestError,
    SpecDiffers,
    UsageError,
)
from embedstream.api.record_blocks import Records
from embedstream.dataset.manifest import refuse_other_spec
from embedstream.dataset.sinks import open_sink
from embedstream.keys import job_keys
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.lifecycle.opening import make_spec, refuse_forbidden
from embedstream.queue.broker import Broker, Claimed

RECORDS = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(700)]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    """A client with a queue of its own."""
    with Client(redis_server.url, queue=f"client-{uuid.uuid4().hex[:8]}") as made:
        yield made


@pytest.fixture
def worker(client: Client) -> Iterator[MiniWorker]:
    with MiniWorker(client.url, queue_of(client)) as made:
        yield made


def queue_of(client: Client) -> str:
    assert client.settings.queue is not None
    return client.settings.queue


def broker_of(client: Client) -> Broker:
    return Broker(client._redis, queue_of(client))


def texts_of(rows: Iterator[pa.RecordBatch]) -> dict[str, str]:
    return {row["id"]: row["text"] for batch in rows for row in batch.to_pylist()}


@pytest.mark.usefixtures("worker")
def test_records_become_vectors_that_can_be_read(client: Client, tmp_path: Path) -> None:
    job = client.submit(RECORDS, output=str(tmp_path / "out"))
    status = job.wait(30)
    assert (status.state, status.rows, status.failed) == (JobState.COMPLETED, 700, 0)
    rows = [row for batch in job.results() for row in batch.to_pylist()]
    assert {row["id"]: row["text"] for row in rows} == {r["id"]: r["text"] for r in RECORDS}
    assert all(row["embedding"] == vector(row["text"]) for row in rows)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "records",
    [
        pa.table({"id": ["a", "b"], "text": ["x", "yy"]}),
        pa.table({"id": ["a", "b"], "text": ["x", "yy"]}).to_batches()[0],
        pa.table({"id": ["a", "b"], "text": ["x", "yy"]}).to_reader(),
        ({"id": id, "text": text} for id, text in [("a", "x"), ("b", "yy")]),
    ],
    ids=["table", "batch", "reader", "generator"],
)
def test_records_come_in_any_shape(client: Client, tmp_path: Path, records: Records) -> None:
    job = client.submit(records, output=str(tmp_path / "out"))
    assert job.wait(30).rows == 2
    assert texts_of(job.results()) == {"a": "x", "b": "yy"}


@pytest.mark.usefixtures("worker")
def test_strings_get_their_positions_as_ids(client: Client, tmp_path: Path) -> None:
    job = client.submit(["x", "yy"], output=str(tmp_path / "out"))
    job.wait(30)
    assert texts_of(job.results()) == {"0": "x", "1": "yy"}


@pytest.mark.usefixtures("worker")
def test_bad_and_doubled_records_cost_only_themselves(client: Client, tmp_path: Path) -> None:
    records = [{"id": "a", "text": "x"}, {"id": "a", "text": "again"}, {"id": "b", "text": " "}, {"id": "c"}]
    status = client.submit(records, output=str(tmp_path / "out")).wait(30)
    assert (status.state, status.rows, status.failed) == (JobState.COMPLETED, 1, 3)
    errors = [json.loads(line) for line in (tmp_path / "out" / "_errors.jsonl").read_text().splitlines()]
    assert [(e["file"], e["line"], e["code"]) for e in errors] == [
        ("records", 2, "duplicate_id"),
        ("records", 3, "empty_text"),
        ("records", 4, "missing_field"),
    ]


@pytest.mark.usefixtures("worker")
def test_a_finished_submission_is_not_done_again(client: Client, tmp_path: Path) -> None:
    first = client.submit(RECORDS, output=str(tmp_path / "out"))
    ended = first.wait(30)
    again = client.submit(RECORDS, output=str(tmp_path / "out"))
    assert again.id == first.id
    assert again.wait(30).ended == ended.ended


@pytest.mark.usefixtures("worker")
def test_a_finished_submission_of_other_records_is_refused_even_from_an_iterator(
    client: Client, tmp_path: Path
) -> None:
    client.submit(RECORDS, output=str(tmp_path / "out")).wait(30)
    other = [*RECORDS[:-1], {**RECORDS[-1], "text": "another"}]
    for records in (other, iter(other)):
        with pytest.raises(CorpusDiffers, match=r"records has 700 rows as before, of which 188 lie in blocks"):
            client.submit(records, output=str(tmp_path / "out"))
    with pytest.raises(CorpusDiffers, match=r"records had 700 rows and has 699"):
        client.submit(RECORDS[:-1], output=str(tmp_path / "out"))
    assert client.submit(iter(RECORDS), output=str(tmp_path / "out")).wait(30).rows == 700
    assert client.submit(other, output=str(tmp_path / "out"), trust_unchanged=True).wait(30).rows == 700


@pytest.mark.usefixtures("worker")
def test_another_setting_into_the_same_output_is_refused(client: Client, tmp_path: Path) -> None:
    client.submit(["x"], output=str(tmp_path / "out")).wait(30)
    with pytest.raises(SpecDiffers, match="prompt"):
        client.submit(["x"], output=str(tmp_path / "out"), prompt="query: ")


def test_an_output_that_was_deleted_is_free_for_another_setting(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with MiniWorker(client.url, queue_of(client)):
        first = client.submit(RECORDS[:3], output=str(out), prompt="a: ")
        first.wait(30)
        shutil.rmtree(out)
        with pytest.raises(SpecDiffers, match="but not its folder"):  # its workers may see one that this one does not
            client.submit(RECORDS[:2], output=str(out), prompt="b: ")
        out.mkdir()
        second = client.submit(RECORDS[:2], output=str(out), prompt="b: ")
        status = second.wait(30)
    assert (second.id, status.state, status.rows) == (first.id, JobState.COMPLETED, 2)
    assert len(texts_of(second.results())) == 2
    shutil.rmtree(out)
    out.mkdir()
    third = client.submit(RECORDS[:1], output=str(out), prompt="c: ")
    third.cancel()
    finalize_job(broker_of(client), third.id, lambda spec: open_sink(spec.output, spec, client.url))
    third.wait(30, check=False)
    shutil.rmtree(out)
    with MiniWorker(client.url, queue_of(client)):
        assert client.submit(RECORDS[:3], output=str(out), prompt="d: ").wait(30).rows == 3


def test_the_output_of_a_job_that_runs_is_not_free_though_nothing_lies_there(client: Client, tmp_path: Path) -> None:
    job = client.submit(RECORDS[:3], output=str(tmp_path / "out"), prompt="a: ")
    with pytest.raises(SpecDiffers, match=f"end that job first .embed-cancel {job.id}"):
        client.submit(RECORDS[:3], output=str(tmp_path / "out"), prompt="b: ")
    assert broker_of(client).status(job.id).spec.prompt == "a: "


@pytest.mark.usefixtures("worker")
def test_an_ended_job_keeps_its_output_while_a_shard_is_left(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    client.submit(RECORDS[:3], output=str(out), prompt="a: ").wait(30)
    (out / "_manifest.json").unlink()
    with pytest.raises(SpecDiffers, match="delete the old one"):
        client.submit(RECORDS[:3], output=str(out), prompt="b: ")


@pytest.mark.usefixtures("worker")
def test_a_job_that_failed_without_a_row_does_not_hold_its_output(client: Client, tmp_path: Path) -> None:
    records, out = [{"id": "a", "body": "x"}, {"id": "b", "body": "yy"}], tmp_path / "out"
    failed = client.submit(iter(records), output=str(out), keep=["body"])
    assert failed.wait(30, check=False).state is JobState.FAILED
    assert list(out.glob("part-*"))
    job = client.submit(records, output=str(out), text_field="body")
    status = job.wait(30, check=False)
    assert (status.state, status.rows, status.failed) == (JobState.COMPLETED, 2, 0)
    assert texts_of(job.results()) == {"a": "x", "b": "yy"}
    assert (out / "_errors.jsonl").read_text() == ""
    assert len(list(out.glob("part-*"))) == len(list(out.glob("*.parquet"))) == 1  # nothing of the failed job is left


def test_an_unfinished_submission_goes_on_and_other_records_are_refused(client: Client, tmp_path: Path) -> None:
    job = client.submit(RECORDS, output=str(tmp_path / "out"))
    assert job.status().state is JobState.RUNNING
    assert client.submit(RECORDS, output=str(tmp_path / "out")).status().submitted == 700
    with pytest.raises(CorpusChanged, match="records"):
        client.submit([{"id": "other", "text": "other"}], output=str(tmp_path / "out"))
    with MiniWorker(client.url, queue_of(client)):
        assert job.wait(30).rows == 700
    assert len(texts_of(job.results())) == 700


def test_a_cancelled_job_ends_with_what_it_has_and_can_go_on(client: Client, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    job = client.submit(RECORDS, output=out)
    (tmp_path / "out").mkdir()
    assert job.cancel()
    assert job.wait(30, check=False).state is JobState.CANCELLED
    with MiniWorker(client.url, queue_of(client)):
        assert client.submit(RECORDS, output=out).wait(30, check=False).state is JobState.COMPLETED


@pytest.mark.usefixtures("worker")
def test_more_errors_than_allowed_fail_the_job(client: Client, tmp_path: Path) -> None:
    records = [{"id": str(i), "text": "x" if i % 2 else ""} for i in range(20)]
    status = client.submit(records, output=str(tmp_path / "out"), max_errors="5").wait(30, check=False)
    assert status.state is JobState.FAILED
    status = client.submit(records, output=str(tmp_path / "out"), max_errors="50%").wait(30, check=False)
    assert status.state is JobState.COMPLETED


@pytest.mark.usefixtures("worker")
def test_an_emptied_redis_is_made_good_from_the_shards(client: Client, tmp_path: Path) -> None:
    job = client.submit(RECORDS, output=str(tmp_path / "out"))
    rows = job.wait(30).rows
    shards = sorted(path.name for path in (tmp_path / "out").glob("part-*"))
    broker = broker_of(client)
    client._redis.delete(*job_keys(broker.keys, job.id, 1), broker.keys.recent)
    with pytest.raises(JobUnknown):
        job.status()
    again = client.submit(RECORDS, output=str(tmp_path / "out"))
    assert again.wait(30).rows == rows == 700
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == shards


def test_a_job_lost_while_it_is_submitted_is_submitted_again(client: Client, tmp_path: Path) -> None:
    held, lost = threading.Event(), threading.Event()

    class Holding(MiniWorker):
        """Has blocks in its hands when the job is lost."""

        def _work(self, job: str, claimed: list[Claimed]) -> None:
            held.set()
            assert lost.wait(30)
            super()._work(job, claimed)

    class Losing:
        """Loses the job in Redis in the middle of its first reading."""

        def __iter__(self) -> Iterator[dict[str, object]]:
            for i, record in enumerate(RECORDS):
                if i == 600 and not lost.is_set():
                    assert held.wait(30)
                    broker = broker_of(client)
                    (id,) = broker.active_jobs()
                    client._redis.delete(*job_keys(broker.keys, id, 1), broker.keys.blocks(id), broker.keys.jobs)
                    lost.set()
                yield dict(record)

    with Holding(client.url, queue_of(client)):
        job = client.submit(Losing(), output=str(tmp_path / "out"))
        assert job.wait(30).rows == 700
    assert lost.is_set()
    assert len(texts_of(job.results())) == 700


def test_a_lost_job_of_an_iterator_says_that_it_cannot_be_read_again(client: Client, tmp_path: Path) -> None:
    def records() -> Iterator[dict[str, str]]:
        for i, record in enumerate(RECORDS):
            if i == 600:
                client._redis.delete(*client._redis.keys(f"embedstream:{{{queue_of(client)}}}*"))
            yield record

    with pytest.raises(InputError, match="cannot be read again"):
        client.submit(records(), output=str(tmp_path / "out"))


def test_an_output_outside_every_live_workers_roots_is_refused(client: Client, tmp_path: Path) -> None:
    roots = (str(tmp_path / "allowed"),)
    with (
        MiniWorker(client.url, queue_of(client), roots=roots),
        pytest.raises(OutputError, match=str(tmp_path / "allowed")),
    ):
        client.submit(["x"], output=str(tmp_path / "elsewhere"))
    assert broker_of(client).active_jobs() == []


def test_a_job_is_found_by_its_id_on_whichever_queue(client: Client, tmp_path: Path) -> None:
    job = client.submit(["x"], output=str(tmp_path / "out"))
    with Client(client.url) as other:
        assert other.job(job.id).queue == client.settings.queue
        with pytest.raises(JobUnknown):
            other.job("0000000000000000")


def test_waiting_ends_after_its_timeout(client: Client, tmp_path: Path) -> None:
    job = client.submit(["x"], output=str(tmp_path / "out"))
    with pytest.raises(TimeoutError, match="0 of 1 blocks"):
        job.wait(0.1)
    with pytest.raises(OutputError, match="wait for its end"):
        job.results()


@pytest.mark.usefixtures("worker")
def test_a_few_texts_are_embedded_now(client: Client) -> None:
    vectors = client.embed(["a", "bcd"])
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [vector("a"), vector("bcd")]
    assert client.embed("a", prompt="query: ").tolist() == [vector("query: a")]


@pytest.mark.usefixtures("worker")
def test_a_text_that_cannot_be_embedded_says_why(client: Client) -> None:
    with pytest.raises(RequestError, match="not_finite"):
        client.embed(["refuse me"])


@pytest.mark.usefixtures("worker")
def test_a_worker_that_knows_no_scores_is_not_believed(client: Client) -> None:
    for ask in (lambda: client.rerank("a question", ["a"]), lambda: client.classify("a")):
        with pytest.raises(RequestError, match=r"the worker answered with dense, not .*: upgrade it"):
            ask()


def test_half_a_surrogate_pair_is_refused_by_its_place(client: Client) -> None:
    with pytest.raises(UsageError, match=r"text 1 .*surrogate pair \(character 2\)"):
        client.embed(["fine", "no\ud800"])


def test_a_password_in_an_output_is_for_the_workers_alone(client: Client) -> None:
    socket, prefix = client.url.removeprefix("unix://"), f"{queue_of(client)}:"

    def output(user: str) -> str:
        return f"unix://{user}:secret@{socket}?prefix={prefix}"

    redis_server: Any = client._redis
    for user in ("first-reader", "other-reader"):
        redis_server.execute_command("ACL", "SETUSER", user, "reset", "on", ">secret", "~*", "+@all")
    with MiniWorker(client.url, queue_of(client), roots=(client.url,)):
        job = client.submit(["x"], output=output("first-reader"))
        assert job.wait(30).rows == 1
    assert b"secret" not in (client._redis.get(f"{prefix}_manifest") or b"secret")
    assert "secret" not in job.status().manifest
    assert (
        client.submit(["x"], output=output("first-reader")).id
        == client.submit(["x"], output=output("other-reader")).id
        == job.id
    )


@pytest.mark.parametrize("folder", [True, False])
def test_a_job_without_a_single_record_ends(client: Client, worker: MiniWorker, tmp_path: Path, folder: bool) -> None:
    output = tmp_path / "deep" / "out"
    if folder:
        output.mkdir(parents=True)
    job = client.submit([], output=str(output), model="mini")
    finalize_job(worker.broker, job.id, lambda spec: open_sink(spec.output, spec, client.url))
    assert job.wait(timeout=10).state is JobState.COMPLETED
    assert list(job.results()) == []


def test_another_output_of_the_text_column_is_said_the_right_way_round(client: Client, tmp_path: Path) -> None:
    client.submit(RECORDS[:3], output=str(tmp_path / "out"))
    with pytest.raises(SpecDiffers, match="made with no-text=False, this command says no-text=True"):
        client.submit(RECORDS[:3], output=str(tmp_path / "out"), text=False)


def test_no_password_is_in_a_refusal(client: Client) -> None:
    output = "redis://:secret@127.0.0.1:1/0?prefix=x:"
    with (
        MiniWorker(client.url, queue_of(client), roots=("redis://:geheim@other:1/0",)),
        pytest.raises(OutputError, match="no live worker may write there") as caught,
    ):
        refuse_forbidden(broker_of(client).workers(), output)
    assert "secret" not in str(caught.value)
    assert "geheim" not in str(caught.value)
    spec = make_spec(queue="q", output=output, model="mini", revision=None, parts=("-",), settings={})
    moved = msgspec.structs.replace(spec, output="redis://:geheim@127.0.0.1:2/0?prefix=x:")
    with pytest.raises(SpecDiffers) as differs:
        refuse_other_spec(output, spec, moved)
    assert "secret" not in str(differs.value)
    assert "geheim" not in str(differs.value)


def test_an_unanswered_request_names_the_command_that_starts_a_worker(client: Client) -> None:
    with pytest.raises(RequestError, match=f"embed-worker --model .* --queue {client.settings.queue}"):
        client.embed(["a"], timeout=0.2)


def test_without_a_redis_url_the_client_for_asyncio_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBEDSTREAM_REDIS_URL", raising=False)
    with pytest.raises(UsageError, match="EMBEDSTREAM_REDIS_URL"):
        AsyncClient()


def test_one_record_in_place_of_many_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not one record"):
        client.submit("a text", output=str(tmp_path / "out"))


async def test_the_asyncio_client_does_the_same(redis_server: RedisServer, tmp_path: Path) -> None:
    queue = f"client-{uuid.uuid4().hex[:8]}"
    with MiniWorker(redis_server.url, queue):
        async with AsyncClient(redis_server.url, queue) as client:
            job = await client.submit(iter(RECORDS), output=str(tmp_path / "out"))
            status = await job.wait(30)
            assert (status.state, status.rows) == (JobState.COMPLETED, 700)
            assert (await (await client.job(job.id)).status()).ended == status.ended
            assert not await job.cancel()
            read = [row["id"] async for batch in job.results(["id"]) for row in batch.to_pylist()]
            assert sorted(read) == sorted(record["id"] for record in RECORDS)
            assert (await client.embed(["a", "bcd"])).tolist() == [vector("a"), vector("bcd")]
    async with AsyncClient(redis_server.url, queue) as client:
        with pytest.raises(RequestError, match="embed-worker"):
            await client.embed(["a"], timeout=0.2)


async def test_the_asyncio_client_takes_an_asynchronous_stream(redis_server: RedisServer, tmp_path: Path) -> None:
    async def records() -> AsyncIterator[dict[str, str]]:
        for record in RECORDS:
            await asyncio.sleep(0)
            yield record

    async def broken() -> AsyncIterator[str]:
        yield "x"
        raise ValueError("the source broke")

    queue = f"client-{uuid.uuid4().hex[:8]}"
    with MiniWorker(redis_server.url, queue):
        async with AsyncClient(redis_server.url, queue) as client:
            job = await client.submit(records(), output=str(tmp_path / "out"))
            assert (await job.wait(30)).rows == 700
            assert (await client.submit(records(), output=str(tmp_path / "out"))).id == job.id
            with pytest.raises(ValueError, match="the source broke"):
                await client.submit(broken(), output=str(tmp_path / "broken"))


async def test_a_hundred_requests_wait_on_one_loop_and_leave_it_at_once(redis_server: RedisServer) -> None:
    queue = f"client-{uuid.uuid4().hex[:8]}"
    async with AsyncClient(redis_server.url, queue) as client:
        threads = threading.active_count()
        asking = [asyncio.create_task(client.embed(["a"], timeout=300)) for _ in range(100)]
        with Client(redis_server.url, queue) as other:
            waiting: Any = broker_of(other).client
            while waiting.xlen(broker_of(other).keys.interactive) < 100:
                await asyncio.sleep(0.01)
        assert threading.active_count() <= threads
        for each in asking:
            each.cancel()
        left = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 10)
        assert {type(each) for each in left} == {asyncio.CancelledError}
        with MiniWorker(redis_server.url, queue):
            answers = await asyncio.gather(*(client.embed([f"{n}"]) for n in range(100)))
        assert [answer.tolist() for answer in answers] == [[vector(f"{n}")] for n in range(100)]


async def test_a_cancelled_submission_draws_no_more_records(redis_server: RedisServer, tmp_path: Path) -> None:
    drawn = 0

    def records() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"text {drawn}"

    async with AsyncClient(redis_server.url, f"client-{uuid.uuid4().hex[:8]}") as client:
        submitting = asyncio.create_task(client.submit(records(), output=str(tmp_path / "out")))
        while drawn < 2000:
            await asyncio.sleep(0.01)
        (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("embedstream")]
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()


def test_the_package_is_light() -> None:
    heavy = "torch|transformers|numpy|pyarrow|redis|click|rich"
    code = f"import sys, embedstream; print([m for m in '{heavy}'.split('|') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (
        "import sys, embedstream; embedstream.Client; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.usefixtures("worker")
def test_a_job_that_failed_is_raised_unless_it_is_only_looked_at_and_its_rows_say_why(
    client: Client, tmp_path: Path
) -> None:
    job = client.submit([{"id": "a", "text": ""}, {"id": "b"}], output=str(tmp_path / "out"))
    with pytest.raises(JobFailed, match=rf"job {job.id} failed: every row failed"):
        job.wait(30)
    assert job.wait(30, check=False).state is JobState.FAILED
    assert [(row.line, row.code) for row in job.errors()] == [(1, "empty_text"), (2, "missing_field")]


def test_a_job_that_was_cancelled_is_raised(client: Client, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    job = client.submit(RECORDS, output=str(tmp_path / "out"))
    job.cancel()
    with pytest.raises(JobCancelled, match=f"job {job.id} cancelled"):
        job.wait(30)


async def test_the_asynchronous_client_raises_and_tells_the_same(client: Client, tmp_path: Path) -> None:
    seen: list[int] = []
    async with AsyncClient(client.url, queue=queue_of(client)) as asynchronous:
        job = await asynchronous.submit([{"id": "a", "text": ""}], output=str(tmp_path / "out"))
        waiting = asyncio.ensure_future(job.wait(30, progress=lambda status: seen.append(status.rows)))
        while not seen:
            await asyncio.sleep(0.01)
        with MiniWorker(client.url, queue_of(client)), pytest.raises(JobFailed):
            await waiting
        assert [row.code for row in await job.errors()] == ["empty_text"]


@pytest.mark.usefixtures("worker")
def test_records_that_end_by_an_error_end_their_job_and_the_same_submission_goes_on(
    client: Client, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")

    def broken() -> Iterator[dict[str, str]]:
        yield from RECORDS[:600]
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        client.submit(broken(), output=output)
    (job,) = broker_of(client).outbox()
    (tmp_path / "out").mkdir(exist_ok=True)
    finalize_job(broker_of(client), job, lambda spec: open_sink(spec.output, spec, client.url))
    status = client.job(job).wait(30, check=False)
    assert status.state is JobState.CANCELLED
    assert "its records ended early: KeyError: 'column'; submit them again to go on" in status.reason
    assert client.submit(RECORDS, output=output).wait(30).rows == 700


def test_a_loop_that_ends_in_the_middle_of_a_submission_leaves_the_job_as_it_is(client: Client, tmp_path: Path) -> None:
    began = threading.Event()

    async def endless() -> AsyncIterator[dict[str, str]]:
        for record in RECORDS[:600]:
            yield record
        began.set()
        await asyncio.sleep(600)

    async def program() -> None:
        async with AsyncClient(client.url, queue=queue_of(client)) as asynchronous:
            submission = asyncio.ensure_future(asynchronous.submit(endless(), output=str(tmp_path / "out")))
            while not began.is_set():
                await asyncio.sleep(0.01)
            submission.cancel()

    asyncio.run(program())
    for thread in threading.enumerate():
        if thread.name.startswith("embedstream"):
            thread.join(30)
    (job,) = broker_of(client).active_jobs()
    assert broker_of(client).state(job) is JobState.SUBMITTING
