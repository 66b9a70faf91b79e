"""The Redis sink against a real server, read back as RedisVL reads."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import redis
from conftest import RedisServer
from lab.dataset import DIM, Dataset, contents_of, make_content, make_error, make_spec, vectors
from redisvl.redis.utils import array_to_buffer, buffer_to_array

from embedstream.dataset.schema import errors_schema
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.errors import OutputError, SpecDiffers, UsageError
from embedstream.jobs import JobSpec, JobState
from embedstream.records import BlockRecord, ShardContent

Make = Callable[..., Dataset]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client


@pytest.fixture
def prefix() -> str:
    return f"d[oc]s-{uuid.uuid4().hex[:8]}:"


@pytest.fixture
def make(redis_server: RedisServer, prefix: str) -> Make:
    """A dataset below the test's prefix; arguments change the spec, `query` is added to the URL."""

    def make(query: str = "", **changed: object) -> Dataset:
        spec = make_spec(canonical_output(f"redis:?prefix={prefix}{query}"), **changed)
        sink = open_sink(spec.output, spec, redis_server.url)
        sink.check()
        return Dataset(sink, spec)

    return make


def test_a_row_is_a_hash_as_redisvl_expects_it(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    matrix = vectors(3)
    dataset.write(make_content(dataset.spec, matrix=matrix))

    row = client.hgetall(f"{prefix}0-1")
    assert row.pop(b"embedding") == array_to_buffer(matrix[1].tolist(), "float32")
    assert row == {
        b"id": b"0-1",
        b"job": dataset.spec.job.encode(),
        b"text": "text 0/1 café".encode(),
        b"truncated": b"1",
        b"lang": b"en",
    }
    stored = client.hget(f"{prefix}0-2", "embedding")
    assert isinstance(stored, bytes)
    assert buffer_to_array(stored, "float32") == matrix[2].tolist()
    assert not client.hexists(f"{prefix}0-2", "lang")


def test_many_rows_in_many_pieces_come_back_as_they_were(make: Make) -> None:
    dataset = make()
    content = make_content(dataset.spec, matrix=vectors(2000), rows_per_block=2000)
    data = pa.concat_tables([content.data.slice(start, 300) for start in range(0, 2000, 300)])
    dataset.write(replace(content, data=data))
    dataset.end()
    names = ["id", "text", "truncated", "lang", "embedding"]
    read = contents_of(list(dataset.sink.read()))
    assert read.schema.names == names
    assert read.equals(content.data.select(names).sort_by("id"))
    assert contents_of(list(dataset.sink.read(["id", "lang"]))).equals(read.select(["id", "lang"]))
    with pytest.raises(OutputError, match="no column n_tokens"):
        list(dataset.sink.read(["n_tokens"]))


def test_writing_again_leaves_the_same_hashes(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    content = make_content(dataset.spec, errors=[make_error()])
    dataset.sink.write_shard(content)
    before = dump(client, prefix)
    dataset.sink.write_shard(content)
    assert dump(client, prefix) == before
    assert len(before) == 5


def dump(client: redis.Redis, prefix: str) -> dict[bytes, dict[bytes, bytes]]:
    raw: Any = client
    return {key: raw.hgetall(key) for key in keys_below(client, prefix)}


def dump_all(client: redis.Redis, prefix: str) -> dict[bytes, bytes | None]:
    """Keys of whatever type, with their content."""
    raw: Any = client
    return {key: raw.dump(key) for key in keys_below(client, prefix)}


def keys_below(client: redis.Redis, prefix: str) -> list[bytes]:
    raw: Any = client
    return [*raw.scan_iter(prefix.replace("[", "\\[") + "*")]


def test_a_later_chunk_has_its_number_in_the_key(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    content = make_content(dataset.spec)
    chunks = pa.array([0, 1, 2], pa.int32())
    ids = pa.array(["x", "x", "x"], pa.string())
    data = content.data.set_column(3, content.data.schema.field("chunk"), chunks)
    data = data.set_column(2, content.data.schema.field("id"), ids)
    dataset.write(replace(content, data=data))
    names = ["_1:x", "_2:x", "_shards", "x"]
    assert sorted(key.decode() for key in keys_below(client, prefix)) == [f"{prefix}{name}" for name in names]


NAMES = ("_errors", "_manifest", "_pending", "_shards", "_probe", "_1:x", "x")
LOOK_ALIKES = sorted(
    {f"{mark}{name}{chunk}" for name in NAMES for mark in ("", "_", "__") for chunk in ("", ":0", ":1")}
)
"""Ids that are named like keys of the sink, like rows with a chunk number, and like what either might be escaped to."""


def test_no_id_takes_the_key_of_another_or_of_the_sink_itself(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    count = len(LOOK_ALIKES)
    content = make_content(dataset.spec, matrix=vectors(count), rows_per_block=count, errors=[make_error()])
    ids = pa.array(LOOK_ALIKES, pa.string())
    dataset.write(replace(content, data=content.data.set_column(2, content.data.schema.field("id"), ids)))
    dataset.end()
    assert ids_of(dataset) == LOOK_ALIKES
    assert client.hget(f"{prefix}__errors", "id") == b"_errors"
    assert len(list(dataset.sink.read_errors())) == 1


def test_without_text_none_is_stored_and_an_older_one_is_removed(make: Make, client: redis.Redis, prefix: str) -> None:
    with_text = make()
    with_text.write(make_content(with_text.spec))
    dataset = make(text=False)
    dataset.write(make_content(dataset.spec))
    dataset.end()
    assert client.hget(f"{prefix}0-1", "text") is None
    assert next(dataset.sink.read()).schema.names == ["id", "truncated", "lang", "embedding"]


def test_errors_are_kept_by_place_and_only_once(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    content = make_content(dataset.spec, errors=[make_error(1, 4), make_error(0, 9)])
    dataset.write(content)
    dataset.sink.write_shard(content)
    dataset.end()
    found = client.hgetall(f"{prefix}_errors")
    assert sorted(found) == [b"0:9:0", b"1:4:0"]
    assert json.loads(found[b"1:4:0"])["file"] == "/data/b.jsonl"
    assert sorted((error.file, error.line) for error in dataset.sink.read_errors()) == [
        ("/data/a.jsonl", 10),
        ("/data/b.jsonl", 5),
    ]


FAILED = make_error(0, 2, id="0-2", code="engine_error", message="it broke", original="text 0/2 café")


def without_its_last_row(content: ShardContent) -> ShardContent:
    """The same shard of a worker in which the row failed."""
    record = msgspec.structs.replace(content.record, rows=2, failed=1, blocks=(BlockRecord(0, 0, 2, 1, 0, "0" * 16),))
    errors = pa.Table.from_pylist([FAILED], schema=errors_schema())
    return ShardContent(record, content.data.slice(0, 2), errors)


def ids_of(dataset: Dataset) -> list[str]:
    return sorted(row["id"] for batch in dataset.sink.read() for row in batch.to_pylist())


@pytest.mark.parametrize("killed", [False, True], ids=["refused", "killed before its commit"])
def test_a_late_worker_that_fails_a_row_with_a_vector_leaves_no_error(
    make: Make, client: redis.Redis, prefix: str, killed: bool
) -> None:
    dataset = make()
    late = make_content(dataset.spec, name="late")
    dataset.write(make_content(dataset.spec, name="first"))
    dataset.sink.write_shard(without_its_last_row(late))
    if not killed:
        dataset.sink.discard_shard("late")
        assert not client.exists(f"{prefix}_pending")
    dataset.end()
    assert ids_of(dataset) == ["0-0", "0-1", "0-2"]
    assert list(dataset.sink.read_errors()) == []
    assert not client.exists(f"{prefix}_errors", f"{prefix}_pending")


def test_a_worker_that_fails_a_row_after_the_end_of_its_job_leaves_no_error(
    make: Make, client: redis.Redis, prefix: str
) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec, name="first"))
    dataset.end()
    before = dump_all(client, prefix)
    dataset.sink.write_shard(without_its_last_row(make_content(dataset.spec, name="first")))
    dataset.sink.discard_shard("first")
    assert dump_all(client, prefix) == before


def test_an_error_that_was_written_before_its_job_was_cancelled_counts_if_it_is_committed_later(
    make: Make, client: redis.Redis, prefix: str
) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec, name="first", errors=[make_error(0, 9)]))
    record = dataset.sink.write_shard(make_content(dataset.spec, "later", [(0, 1)], errors=[make_error(0, 19)]))
    dataset.end(JobState.CANCELLED)
    assert [error.line for error in dataset.sink.read_errors()] == [10]
    dataset.records.append(record)
    dataset.end()
    assert [error.line for error in dataset.sink.read_errors()] == [10, 20]
    assert not client.exists(f"{prefix}_pending")


def test_a_late_workers_vector_of_a_row_that_failed_is_removed(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    dataset.write(without_its_last_row(make_content(dataset.spec, name="first")))
    dataset.sink.write_shard(make_content(dataset.spec, name="late"))
    dataset.sink.discard_shard("late")
    assert client.exists(f"{prefix}0-2")
    dataset.end()
    assert ids_of(dataset) == ["0-0", "0-1"]
    assert [error.id for error in dataset.sink.read_errors()] == ["0-2"]
    assert not client.exists(f"{prefix}0-2")


def test_a_refused_row_does_not_take_the_vector_of_the_row_whose_id_it_repeats(make: Make) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec, errors=[make_error(0, 7, id="0-1", code="duplicate_id")]))
    dataset.end()
    assert ids_of(dataset) == ["0-0", "0-1", "0-2"]
    assert [error.code for error in dataset.sink.read_errors()] == ["duplicate_id"]


def test_a_failed_row_does_not_take_the_vector_of_another_jobs_row(
    make: Make, client: redis.Redis, prefix: str
) -> None:
    dataset = make()
    client.hset(f"{prefix}0-2", mapping={"job": "another", "id": "0-2"})
    dataset.write(without_its_last_row(make_content(dataset.spec, name="first")))
    dataset.end()
    assert client.hget(f"{prefix}0-2", "job") == b"another"


def test_the_end_of_one_job_takes_no_errors_of_another_that_runs(make: Make) -> None:
    running, ending = make(), make("&ttl=500")
    running.write(without_its_last_row(make_content(running.spec, name="first")))
    ending.write(make_content(ending.spec, name="second"))
    ending.end()
    running.end()
    assert [error.id for error in running.sink.read_errors()] == ["0-2"]


def test_with_a_time_to_live_every_key_has_it(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make("&ttl=500")
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    dataset.end()
    keys = keys_below(client, prefix)
    assert len(keys) == 5
    assert all(490 < client.ttl(key) <= 500 for key in keys)


def test_without_one_no_key_expires(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec))
    dataset.end()
    assert {client.ttl(key) for key in keys_below(client, prefix)} == {-1}


def test_the_manifest_lies_beside_the_hashes(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    assert dataset.sink.read_manifest() is None
    with pytest.raises(OutputError, match="the job has not ended yet"):
        list(dataset.sink.read())
    dataset.write(make_content(dataset.spec))
    manifest = dataset.end()
    assert dataset.sink.read_manifest() == manifest
    assert dataset.end() == manifest
    assert client.get(f"{prefix}_manifest") == msgspec.json.encode(manifest) + b"\n"
    assert list(dataset.sink.find_shards()) == []


def test_whole_shards_are_found_until_their_job_is_completed(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec, "first"))
    dataset.write(make_content(dataset.spec, "later", [(0, 1)], errors=[make_error(0, 19)]))
    dataset.sink.write_shard(make_content(dataset.spec, "late"))
    dataset.sink.discard_shard("late")
    assert list(dataset.sink.find_shards()) == dataset.records
    assert list(dataset.sink.find_shards({"first"})) == dataset.records[1:]
    dataset.end(JobState.CANCELLED)
    assert list(dataset.sink.find_shards()) == dataset.records
    dataset.end()
    assert list(dataset.sink.find_shards()) == []
    assert not client.exists(f"{prefix}_shards")


def test_shards_of_another_spec_are_refused_and_damaged_notes_are_passed_over(
    make: Make, client: redis.Redis, prefix: str
) -> None:
    dataset = make()
    record = dataset.write(make_content(dataset.spec, "first"))
    noted = client.hget(f"{prefix}_shards", f"{dataset.spec.job}:first")
    assert isinstance(noted, bytes)
    newer = noted.replace(b'"v":1', b'"v":999')
    assert newer != noted
    for name, note in (("damaged", b"{"), ("renamed", noted), ("a_newer_version", newer)):
        client.hset(f"{prefix}_shards", f"{dataset.spec.job}:{name}", note)
    assert list(dataset.sink.find_shards()) == [record]
    other = make(prompt="query: ")
    assert other.spec.job == dataset.spec.job
    with pytest.raises(SpecDiffers, match="prompt"):
        list(other.sink.find_shards())


def test_other_jobs_rows_below_the_prefix_are_not_read(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    dataset.write(make_content(dataset.spec))
    client.hset(f"{prefix}stranger", mapping={"id": "stranger", "job": "other", "embedding": b"\0" * 4 * DIM})
    dataset.end()
    assert sum(batch.num_rows for batch in dataset.sink.read()) == 3


# Servers that refuse


def test_check_leaves_nothing_behind(make: Make, client: redis.Redis, prefix: str) -> None:
    make()
    assert dump(client, prefix) == {}


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    spec = make_spec(canonical_output("redis://:secret@127.0.0.1:1/0?prefix=docs:"))
    with pytest.raises(
        OutputError, match=r"docs:\*: Redis at redis://:\*\*\*@127.0.0.1:1/0 cannot be reached"
    ) as caught:
        open_sink(spec.output, spec).check()
    assert "secret" not in str(caught.value)


def test_a_user_who_may_not_write_there_is_told_so(redis_server: RedisServer, client: redis.Redis) -> None:
    client.acl_setuser("reader", enabled=True, passwords=["+secret"], keys=["docs:*"], commands=["+@all", "-hset"])
    spec = make_spec(canonical_output(f"unix://reader:secret@{redis_server.socket}?prefix=docs:"))
    with pytest.raises(OutputError, match="forbids a command") as caught:
        open_sink(spec.output, spec).check()
    assert "secret" not in str(caught.value)


def test_a_full_server_is_one_sentence(make: Make, client: redis.Redis) -> None:
    dataset = make()
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutputError, match="the server's memory is full: raise its maxmemory") as caught:
            dataset.sink.write_shard(make_content(dataset.spec))
    finally:
        client.config_set("maxmemory", 0)
    assert len(str(caught.value)) < 300
    dataset.write(make_content(dataset.spec))


@pytest.mark.parametrize("kind", ["hash", "string"])
def test_what_another_application_keeps_below_the_prefix_is_left_as_it_is(
    make: Make, client: redis.Redis, prefix: str, kind: str
) -> None:
    dataset, theirs = make(), f"{prefix}0-1"
    if kind == "hash":
        client.hset(theirs, mapping={"id": "0-1", "data": "theirs"})
    else:
        client.set(theirs, "theirs")
    before = dump_all(client, prefix)
    with pytest.raises(OutputError, match=r"another application are there|WRONGTYPE"):
        dataset.sink.write_shard(make_content(dataset.spec))
    assert dump_all(client, prefix) == before


def test_a_kept_field_that_would_hide_the_job_is_refused(redis_server: RedisServer) -> None:
    spec: JobSpec = make_spec("redis:?prefix=docs:", keep=("job",))
    with pytest.raises(UsageError, match="--keep job"):
        open_sink(spec.output, spec, redis_server.url)


def test_vectors_are_the_same_bytes_wherever_a_slice_begins(make: Make, client: redis.Redis, prefix: str) -> None:
    dataset = make()
    matrix = vectors(5)
    content = make_content(dataset.spec, matrix=matrix, rows_per_block=5)
    sliced = make_content(dataset.spec, matrix=matrix[2:], rows_per_block=3)
    data = content.data.slice(2)
    dataset.write(replace(sliced, data=data))
    stored = client.hget(f"{prefix}0-3", "embedding")
    assert isinstance(stored, bytes)
    assert np.array_equal(np.frombuffer(stored, "<f4"), matrix[3])


def test_the_advised_line_names_server_and_keys_and_no_password(redis_server: RedisServer) -> None:
    here = open_sink("redis:?prefix=docs:", queue_url=redis_server.url)
    there = open_sink("redis://:secret@host/3?prefix=docs:")
    assert here.describe() == f"redis-cli -s {redis_server.socket} --scan --pattern 'docs:*' | head"
    pattern = "--scan --pattern 'docs:*' | head"
    assert there.describe() == f"redis-cli --askpass -u redis://host:6379/3 {pattern}"
    named = open_sink("redis://me:secret@host/3?prefix=docs:")
    assert named.describe() == f"redis-cli --askpass --user me -u redis://host:6379/3 {pattern}"
