"""OpenAI's files and batches, by OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import RedisServer
from e2e.harness import Fleet, fleet, wait_until
from gateway.conftest import Served
from lab.broker import Lab
from lab.hashing_reference import reference_vector
from lab.redis_servers import own_server

from embedstream.server.connection import connect
from embedstream_gateway.batch_records import INPUT, Ended, Made
from embedstream_gateway.batch_runner import BatchRunner
from embedstream_gateway.store import Store, write_json


def line(custom_id: str, text: object, **body: object) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "hashing", "input": text, **body},
    }


def upload(client: openai.OpenAI, lines: Iterable[dict[str, Any]]) -> openai.types.FileObject:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    return client.files.create(file=("in.jsonl", content), purpose="batch")


def start(client: openai.OpenAI, lines: Iterable[dict[str, Any]]) -> openai.types.Batch:
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")


def ended(client: openai.OpenAI, batch: openai.types.Batch) -> openai.types.Batch:
    def look() -> openai.types.Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "cancelled", "expired") else None

    found: openai.types.Batch = wait_until(look, "the batch's end")
    return found


def read(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    return [] if file is None else [json.loads(each) for each in client.files.content(file).text.splitlines()]


def check_output(answers: list[dict[str, Any]], texts: dict[str, str]) -> None:
    """Each request is answered once, in the order of the input, with its own vector."""
    assert [answer["custom_id"] for answer in answers] == list(texts)
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        (data,) = answer["response"]["body"]["data"]
        np.testing.assert_allclose(data["embedding"], reference_vector(texts[answer["custom_id"]]), atol=1e-6)


def test_a_file_is_kept_as_it_is_until_it_is_deleted(served: Served) -> None:
    client = served.openai("submit")
    content = os.urandom(3_000_000)
    made = client.files.create(file=("some name.jsonl", content), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(content), "some name.jsonl", "batch")
    assert client.files.retrieve(made.id) == made
    assert made in client.files.list().data
    assert client.files.content(made.id).content == content
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.delete(made.id)


def test_files_are_leafed_through(served: Served) -> None:
    client = served.openai("submit")
    made = [upload(client, [line("a", "x")]).id for _ in range(5)]
    newest = client.files.list(limit=2)
    assert newest.has_more
    assert {file.id for file in client.files.list(limit=2) if file.id in made} == set(made)


@pytest.mark.parametrize("id", ["file-0", "..", "%2e%2e%2fkeys.txt", "file-" + "g" * 24, "batch_" + "0" * 24, "."])
def test_no_id_leads_out_of_the_folder(served: Served, id: str) -> None:
    with served.http() as client:
        for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"):
            found = client.get(path)
            assert found.status_code == 404 or found.json()["object"] == "list"  # the client itself takes dots away
            assert "sha256" not in found.text


@pytest.mark.parametrize(
    ("data", "files", "says"),
    [
        ({"purpose": "fine-tune"}, {"file": b"x"}, "purpose"),
        ({}, {"file": b"x"}, "purpose"),
        ({"purpose": "batch"}, {"other": b"x"}, "file"),
        ({"purpose": "batch", "more": "x" * 70_000}, {"file": b"x"}, "beside its file"),
    ],
    ids=["other-purpose", "no-purpose", "no-file", "long-field"],
)
def test_an_upload_that_is_none_leaves_nothing(
    served: Served, data: dict[str, str], files: dict[str, bytes], says: str
) -> None:
    with served.http() as client:
        before = client.get("/v1/files").json()
        refused = client.post("/v1/files", data=data, files=files)
        assert refused.status_code == 400
        assert says in refused.json()["error"]["message"]
        assert client.post("/v1/files", json={}).status_code == 400
        cut = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nabc'
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        assert client.post("/v1/files", content=cut, headers=kind).status_code == 400
        assert client.post("/v1/files", content=b"no form at all", headers=kind).status_code == 400
        assert client.get("/v1/files").json() == before
        root = served.fleet.root / "files" / "files"
        assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_a_batch_answers_each_request_by_its_custom_id(served: Served) -> None:
    client = served.openai("submit")
    texts = {f"request {number}": f"text number {number}" for number in range(600)}
    batch = start(client, (line(id, text) for id, text in texts.items()))
    assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    done = ended(client, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 600, "completed": 600, "failed": 0}
    assert done.error_file_id is None
    answers = read(client, done.output_file_id)
    check_output(answers, texts)
    assert len({answer["id"] for answer in answers}) == 600
    usage = sum(answer["response"]["body"]["usage"]["prompt_tokens"] for answer in answers)
    assert done.usage is not None
    assert done.usage.input_tokens == usage > 0
    assert batch.id in [each.id for each in client.batches.list(limit=3)]
    assert done.output_file_id is not None
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"


def test_requests_of_several_texts_and_forms_come_back_as_they_were_asked_for(served: Served) -> None:
    client = served.openai("submit")
    many = [f"text {number}" for number in range(700)]
    batch = start(
        client,
        [
            line("many", many),
            line("packed", "a text", encoding_format="base64"),
            line("short", "a text", dimensions=8),
            line("cut", "word " * 20_000, truncate=True),
        ],
    )
    found = {
        answer["custom_id"]: answer["response"]["body"] for answer in read(client, ended(client, batch).output_file_id)
    }
    assert [each["index"] for each in found["many"]["data"]] == list(range(700))
    for number in (0, 255, 256, 699):
        vector = found["many"]["data"][number]["embedding"]
        np.testing.assert_allclose(vector, reference_vector(many[number]), atol=1e-6)
    packed = np.frombuffer(base64.b64decode(found["packed"]["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(packed, reference_vector("a text"), atol=1e-6)
    assert len(found["short"]["data"][0]["embedding"]) == 8
    assert np.linalg.norm(found["short"]["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)
    assert len(found["cut"]["data"][0]["embedding"]) == 384


def test_requests_that_fail_are_in_the_error_file_and_cost_no_others(served: Served) -> None:
    client = served.openai("submit")
    lines = [
        line("good", "a text"),
        line("blank", "   "),
        line("one of two", ["fine", "  "]),
        line("long", "word " * 20_000),
        line("wide", "a text", dimensions=5000),
        line("also good", "another text"),
    ]
    done = ended(client, start(client, lines))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 6, "completed": 2, "failed": 4}
    check_output(read(client, done.output_file_id), {"good": "a text", "also good": "another text"})
    errors = {each["custom_id"]: each["response"] for each in read(client, done.error_file_id)}
    assert list(errors) == ["blank", "one of two", "long", "wide"]
    codes = [each["body"]["error"]["code"] for each in errors.values()]
    assert codes == ["empty_text", "empty_text", "context_length_exceeded", "invalid_request"]
    assert all(each["status_code"] == 400 for each in errors.values())


def test_a_file_with_bad_lines_is_no_batch_and_every_line_is_named(served: Served) -> None:
    client = served.openai("submit")
    lines: list[dict[str, Any]] = [
        line("a", "fine"),
        {"custom_id": "b"},
        line("a", "fine"),
        line("c", [1, 2]),
        line("d", []),
        line("e", ""),
        {**line("f", "fine"), "url": "/v1/chat/completions"},
        line("g", "fine") | {"body": {"model": "another", "input": "x"}},
        line("h", "fine", unknown=1),
        line("i", "fine", role="query"),
        line("j\0", "fine"),
    ]
    done = ended(client, start(client, lines))
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert [error.line for error in done.errors.data] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    codes = {error.line: error.code for error in done.errors.data}
    assert codes[3] == "duplicate_custom_id"
    assert codes[4] == "token_ids"
    assert codes[8] == "mismatched_model"
    assert done.output_file_id is None


def test_what_is_no_batch_is_refused_at_once(served: Served) -> None:
    client = served.openai("submit")
    file = upload(client, [line("a", "x", model="nothing")])
    with pytest.raises(openai.NotFoundError, match="no model nothing"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    empty = client.files.create(file=("empty", b"\n\n"), purpose="batch")
    for id, says in ((empty.id, "first line"), ("file-" + "0" * 24, "no file")):
        with pytest.raises(openai.BadRequestError, match=says):
            client.batches.create(input_file_id=id, endpoint="/v1/embeddings", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def test_metadata_come_back_and_the_input_may_be_deleted_meanwhile(served: Served) -> None:
    client = served.openai("submit")
    file = upload(client, [line("a", "a text")])
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"team": "search"}
    )
    client.files.delete(file.id)
    done = ended(client, batch)
    assert (done.status, done.metadata) == ("completed", {"team": "search"})


@pytest.fixture
def lonely(tmp_path: Path) -> Iterable[tuple[Fleet, str]]:
    """A fleet of one's own, on a Redis server of its own; no worker yet."""
    with own_server() as server, fleet(server.url, tmp_path) as running:
        yield running, server.tcp_url


def gateway_of(running: Fleet, *args: object) -> tuple[Any, openai.OpenAI]:
    process, url = running.start_gateway("--files", running.root / "files", *args)
    return process, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_cancelled_batch_ends_with_what_is_done(lonely: tuple[Fleet, str]) -> None:
    running, _ = lonely
    worker = running.start_worker()
    _, client = gateway_of(running)
    worker.send_signal(signal.SIGSTOP)
    lines = [line(f"r{number}", f"text {number}") for number in range(50)]
    batch = start(client, lines)
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", "the batch begins")
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert done.request_counts.total == 50
    missing = read(client, done.error_file_id)
    answered = read(client, done.output_file_id)
    assert [each["custom_id"] for each in lines] == sorted(
        [each["custom_id"] for each in [*missing, *answered]], key=lambda id: int(id[1:])
    )
    assert {each["error"]["code"] for each in missing} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_that_is_not_done_in_time_ends_with_what_is_done(lonely: tuple[Fleet, str]) -> None:
    running, _ = lonely
    worker = running.start_worker()
    process, client = gateway_of(running)
    worker.send_signal(signal.SIGSTOP)
    batch = start(client, [line("late", "a text")])
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", "the batch begins")
    process.kill()
    process.wait()
    made = running.root / "files" / "batches" / batch.id / "batch.json"
    made.write_text(json.dumps({**json.loads(made.read_text()), "expires_at": batch.created_at}))
    _, client = gateway_of(running)
    done = ended(client, batch)
    assert (done.status, done.expired_at is not None, done.output_file_id) == ("expired", True, None)
    assert [each["error"]["code"] for each in read(client, done.error_file_id)] == ["batch_expired"]


def test_a_batch_survives_the_death_of_every_gateway_and_worker(lonely: tuple[Fleet, str]) -> None:
    running, _ = lonely
    running.start_worker()
    texts = {f"request {number}": f"text number {number}" for number in range(3000)}
    first, client = gateway_of(running)
    batch = start(client, [line(id, text) for id, text in texts.items()])
    first.kill()
    first.wait()
    _, client = gateway_of(running)
    wait_until(lambda: client.batches.retrieve(batch.id).status != "validating", "it goes on")
    for process in list(running.processes):
        if process.poll() is None:
            process.kill()
            process.wait()
    running.start_worker()
    _, third = gateway_of(running)
    _, fourth = gateway_of(running)
    done = ended(fourth, batch)
    assert done.status == "completed"
    check_output(read(third, done.output_file_id), texts)
    kept = running.root / "files" / "batches" / batch.id
    wait_until(lambda: not (kept / "vectors").exists() and not (kept / "input").exists(), "what is not needed goes")


def test_what_is_kept_long_enough_is_removed(lonely: tuple[Fleet, str]) -> None:
    running, _ = lonely
    running.start_worker()
    process, client = gateway_of(running)
    done = ended(client, start(client, [line("a", "a text")]))
    process.kill()
    process.wait()
    _, later = gateway_of(running, "--file-days", "1e-9")
    wait_until(lambda: not later.batches.list().data, "the batch is removed")
    assert done.output_file_id is not None


def test_what_a_process_that_died_was_making_is_removed_and_what_is_new_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, 30)
    store.prepare()
    for root in (store.files, store.batches):
        for name in (".old", ".new"):
            (root / name).mkdir()
            (root / name / "input").write_bytes(b"x")
        (root / ".file").touch()
        for path in (root / ".old" / "input", root / ".old"):
            os.utime(path, (0, 0))
    store.sweep(time.time())
    for root in (store.files, store.batches):
        assert {path.name for path in root.iterdir()} == {".new", ".file"}


DAMAGES = (b"", b"{", b"\xff", b"[" * 20_000, b'{"id": 1}', b'{"at": "soon"}')


def test_a_damaged_record_is_left_out_and_stops_neither_sweeping_nor_other_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, 30)
    store.prepare()
    damages = [*DAMAGES, *DAMAGES]  # more than one gateway drives at once, and the first by their names
    for number, damage in enumerate(damages):
        for folder, names in ((store.files, ["file.json"]), (store.batches, ["batch.json", "ended.json"])):
            for name in names:
                prefix = "file-" if folder is store.files else "batch_"
                record = folder / f"{prefix}{number:020x}{name[:2].encode().hex()}" / name
                record.parent.mkdir()
                record.write_bytes(damage)
    with store.writing("in.jsonl", "batch") as kept, store.writing("old.jsonl", "batch", created=1.0) as old:
        stays, goes = kept.finish().id, old.finish().id
    bad, ended = (store.batches / f"batch_{digit * 24}" for digit in "ef")
    for folder in (bad, ended):
        folder.mkdir()
        (folder / INPUT).write_bytes(b"no request\n")
    (ended / "ended.json").write_text('{"status": "completed", "at": 1}')
    made = Made(
        id=bad.name,
        input_file_id=stays,
        endpoint="/v1/embeddings",
        completion_window="24h",
        created_at=1,
        expires_at=2**40,
        metadata=None,
        model="m",
        model_address="m",
        queue="m",
    )
    write_json(bad / "batch.json", made)
    runner = BatchRunner(store, "redis://127.0.0.1:1")
    runner.start()
    wait_until((bad / "ended.json").exists, "the batch among damaged ones is judged")
    runner.stop()
    assert not ended.exists()
    assert [file.id for file in store.all()] == [stays]
    assert store.get(stays) is not None
    assert not (store.files / goes).exists()
    assert "file.json: is damaged" in caplog.text


def test_the_job_of_a_batch_that_is_over_is_ended_where_redis_has_it_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    store = Store(tmp_path, 30)
    store.prepare()
    lab = Lab(connect(redis_server.url))
    over, open_one, other = (str(tmp_path / "batches" / name / "vectors") for name in ("batch_0", "batch_1", ".."))
    for output in (over, open_one):
        Path(output).parent.mkdir()
    write_json(Path(over).parent / "ended.json", Ended(status="completed", at=2**40))
    specs = [lab.spec(os.path.normpath(output), 1) for output in (over, open_one, other)]
    for spec in specs:
        lab.broker.run(lab.broker.create(spec))
    lab.broker.announce()
    runner = BatchRunner(store, redis_server.url)
    runner.start()
    wait_until(lambda: lab.broker.status(specs[0].job).verdict, "the job is ended")
    runner.stop()
    assert [lab.broker.status(spec.job).verdict for spec in specs] == ["cancelled", "", ""]


def test_without_a_folder_files_are_refused(lonely: tuple[Fleet, str]) -> None:
    running, _ = lonely
    _, url = running.start_gateway()
    refused = httpx.post(f"{url}/v1/files", files={"file": io.BytesIO(b"x")}, data={"purpose": "batch"})
    assert refused.status_code == 501
    assert "--files" in refused.text
