"""A dataset below a prefix of a bucket: the same promises as in a folder, and one sentence for all that fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import msgspec
import pyarrow as pa
import pyarrow.dataset
import pytest
from lab.dataset import Dataset, contents_of, make_content, make_error, make_spec, vectors
from lab.s3 import S3Server

from embedstream.api.reading import open_dataset
from embedstream.api.search import search
from embedstream.dataset.bucket import Bucket
from embedstream.dataset.objects import file_system, parse_object
from embedstream.dataset.sinks import open_sink
from embedstream.errors import OutputError, SpecDiffers


@pytest.fixture
def dataset(bucket: str) -> Dataset:
    spec = make_spec(f"s3://{bucket}/corpora/wiki")
    return Dataset(open_sink(spec.output, spec), spec)


def storage(output: str) -> Bucket:
    return Bucket(parse_object(output, "output"))


def shown_keys(server: S3Server, bucket: str) -> list[str]:
    """Keys of objects, without the empty ones that stand for folders."""
    return [key for key in server.keys(bucket) if not key.endswith("/")]


def test_what_is_written_is_found_listed_and_read(dataset: Dataset, bucket: str, s3_server: S3Server) -> None:
    dataset.sink.check()
    first = dataset.write(make_content(dataset.spec, "a", errors=[make_error()]))
    second = dataset.write(make_content(dataset.spec, "b", blocks=[(0, 1)]))
    assert list(dataset.sink.find_shards()) == [first, second]
    assert [shard.name for shard in dataset.sink.find_shards({"a"})] == ["b"]
    assert dataset.sink.read_manifest() is None
    manifest = dataset.end()
    assert dataset.sink.read_manifest() == manifest
    assert contents_of(list(dataset.sink.read(["id", "embedding"]))).num_rows == 6
    assert [row.line for row in dataset.sink.read_errors()] == [301]
    names = ["_README.md", "_errors-a.arrow", "_errors.jsonl", "_manifest.json", "part-a.parquet", "part-b.parquet"]
    assert shown_keys(s3_server, bucket) == [f"corpora/wiki/{name}" for name in names]
    body = s3_server.client().get_object(Bucket=bucket, Key="corpora/wiki/_errors.jsonl")["Body"].read()
    assert json.loads(body)["id"] == "bad-300"
    address = parse_object(dataset.spec.output, "output")
    assert pa.dataset.dataset(address.path, filesystem=file_system(address)).count_rows() == manifest.rows


def test_the_nearest_chunks_are_found_in_a_bucket(dataset: Dataset) -> None:
    matrix = vectors(3)
    dataset.write(make_content(dataset.spec, "a", matrix=matrix))
    dataset.end()
    assert search(dataset.spec.output, {"dense": matrix[1:2]}, 1)[0].id == "0-1"


def test_a_shard_that_is_not_listed_does_not_exist_for_readers(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, "a"))
    dataset.sink.write_shard(make_content(dataset.spec, "z"))
    dataset.end()
    assert sum(batch.num_rows for batch in dataset.sink.read()) == 3
    assert open_dataset(dataset.spec.output).count_rows() == 3


def test_a_discarded_shard_is_gone_and_discarding_twice_is_harmless(
    dataset: Dataset, bucket: str, s3_server: S3Server
) -> None:
    dataset.write(make_content(dataset.spec, "a", errors=[make_error()]))
    dataset.sink.discard_shard("a")
    dataset.sink.discard_shard("a")
    assert shown_keys(s3_server, bucket) == []


def test_a_job_with_other_settings_is_refused(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, "a"))
    other = open_sink(dataset.spec.output, msgspec.structs.replace(dataset.spec, max_length=9))
    with pytest.raises(SpecDiffers, match="max-length"):
        other.check()


def test_a_prefix_that_holds_something_else_is_refused(bucket: str, s3_server: S3Server) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="photos/cat.jpg", Body=b"x")
    with pytest.raises(OutputError, match=r"not empty and not a dataset \(it holds cat.jpg\)"):
        open_sink(f"s3://{bucket}/photos").check()


def test_finalizing_names_a_shard_that_is_gone(dataset: Dataset, bucket: str, s3_server: S3Server) -> None:
    dataset.write(make_content(dataset.spec, "a"))
    s3_server.client().delete_object(Bucket=bucket, Key="corpora/wiki/part-a.parquet")
    with pytest.raises(OutputError, match=r"part-a.parquet: is gone"):
        dataset.end()
    assert dataset.sink.read_manifest() is None


def test_a_damaged_object_is_named(dataset: Dataset, bucket: str, s3_server: S3Server) -> None:
    dataset.write(make_content(dataset.spec, "a"))
    dataset.end()
    s3_server.client().put_object(Bucket=bucket, Key="corpora/wiki/part-a.parquet", Body=b"PAR1 no more")
    with pytest.raises(OutputError, match=r"part-a.parquet: damaged"):
        list(dataset.sink.read())


def test_what_uploads_in_several_requests_arrives_whole(bucket: str) -> None:
    content = bytes(range(256)) * 100_000
    files = storage(f"s3://{bucket}/x")
    files.write("large", [content])
    files.write("pieces", (content[at : at + 1000] for at in range(0, len(content), 1000)))
    assert files.read("large") == content
    assert files.sha256("large") == files.sha256("pieces")


def test_a_bucket_that_is_not_there_is_one_sentence(bucket: str) -> None:
    with pytest.raises(OutputError, match=f"s3://{bucket}-x/out: cannot write: there is no bucket {bucket}-x: create"):
        open_sink(f"s3://{bucket}-x/out").check()


def test_a_store_that_cannot_be_reached_is_one_sentence(bucket: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"s3://{bucket}/out?endpoint_override=127.0.0.1:{nobody.getsockname()[1]}&scheme=http"
        with pytest.raises(OutputError, match=r"the store cannot be reached .*check the network, the region") as caught:
            open_sink(address).check()
    assert "\n" not in str(caught.value)


class Breaking:
    """A relay to the server that breaks every connection after so many bytes have gone up, and then all others."""

    def __init__(self, port: int, most: int) -> None:
        self._port, self._left = port, most
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                down, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(down,), daemon=True).start()

    def _relay(self, down: socket.socket) -> None:
        if self._left <= 0:
            down.close()
            return
        up = socket.create_connection(("127.0.0.1", self._port))
        threading.Thread(target=self._answers, args=(up, down), daemon=True).start()
        while self._left > 0 and (data := down.recv(65536)):
            self._left -= len(data)
            up.sendall(data)
        up.close()
        down.close()

    def _answers(self, up: socket.socket, down: socket.socket) -> None:
        try:
            while data := up.recv(65536):
                down.sendall(data)
        except OSError:
            return


@pytest.fixture
def breaking(s3_server: S3Server) -> Iterator[Breaking]:
    relay = Breaking(s3_server.port, 12_000_000)
    yield relay
    relay.close()


def test_an_upload_that_breaks_leaves_nothing_to_see(bucket: str, s3_server: S3Server, breaking: Breaking) -> None:
    address = f"s3://{bucket}/out?endpoint_override=127.0.0.1:{breaking.port}&scheme=http"
    with pytest.raises(OutputError, match=r"s3://.*/out/part-a.parquet: cannot write: the store cannot be reached"):
        storage(address).write("part-a.parquet", [b"x" * 40_000_000])
    assert s3_server.keys(bucket) == []


def test_what_a_broken_upload_would_have_replaced_stays(bucket: str, breaking: Breaking) -> None:
    storage(f"s3://{bucket}/out").write("_errors.jsonl", [b"old"])
    address = f"s3://{bucket}/out?endpoint_override=127.0.0.1:{breaking.port}&scheme=http"
    with pytest.raises(OutputError):
        storage(address).write("_errors.jsonl", (b"x" * 1_000_000 for _ in range(40)))
    assert storage(f"s3://{bucket}/out").read("_errors.jsonl") == b"old"


def test_a_generator_that_fails_publishes_nothing(bucket: str, s3_server: S3Server) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"
        raise OutputError("a shard is damaged")

    with pytest.raises(OutputError, match="a shard is damaged"):
        storage(f"s3://{bucket}/out").write("_errors.jsonl", pieces())
    assert s3_server.keys(bucket) == []


def test_the_line_of_advice_reads_with_the_same_credentials_and_shows_none(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    dataset.end()
    said = dataset.sink.describe()
    assert f"embedstream.open_dataset('{dataset.spec.output}')" in said
    assert "secret-of-admin" not in said
    assert open_dataset(dataset.spec.output).to_table().num_rows == 3


def test_the_table_is_the_one_that_was_written(dataset: Dataset) -> None:
    content = make_content(dataset.spec)
    dataset.write(content)
    dataset.end()
    assert pa.Table.from_batches(list(dataset.sink.read())).equals(content.data)
