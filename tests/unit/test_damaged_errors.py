"""Files of error rows that somebody changed: whoever reads them says so in one sentence, and nothing ends of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from conftest import RedisServer
from lab.broker import Lab
from lab.dataset import Dataset, make_content, make_error, make_spec, make_status

from embedstream.dataset.error_files import MOST_BYTES
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_digest
from embedstream.dataset.schema import errors_schema
from embedstream.dataset.sinks import open_sink
from embedstream.errors import EmbedstreamError, OutputError
from embedstream.jobs import JobState, Retry
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.lifecycle.retry_completing import finalize_retry
from embedstream.server.connection import connect
from embedstream.settings import MIB

ROWS = [make_error(1, 4), make_error(0, 7)]


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The file with other rows."""
    made = change(pa.ipc.open_file(path.read_bytes()).read_all())
    with pa.ipc.new_file(str(path), made.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(made)


def with_column(name: str, values: list[Any], type: pa.DataType, nullable: bool = False) -> Callable[[Path], None]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.names.index(name), pa.field(name, type, nullable), pa.array(values, type))

    return lambda path: rewritten(path, change)


def not_utf8(path: Path) -> None:
    raw = pa.array([b"\xff", b"\xff"], pa.binary())
    text: Any = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    rewritten(path, lambda table: table.set_column(5, errors_schema().field("message"), text))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a missing column": lambda path: rewritten(path, lambda table: table.drop_columns(["message"])),
    "a column of another type": with_column("message", [1, 2], pa.int64()),
    "a row number of another type": with_column("row", ["x", "y"], pa.string()),
    "a row number beyond all": with_column("row", [2**64 - 1, 2**63], pa.uint64()),
    "a part of a nested type": with_column("part", [[1], [2]], pa.list_(pa.int32())),
    "a null where none may be": with_column("code", [None, "x"], pa.string(), nullable=True),
    "a message of more than any batch may have": with_column("message", ["x" * (MOST_BYTES + 1), "y"], pa.string()),
    "part 99": with_column("part", [99, 0], pa.int32()),
    "part -1": with_column("part", [-1, 0], pa.int32()),
    "bytes that are no UTF-8": not_utf8,
    "a torn file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty file": lambda path: path.write_bytes(b""),
    "Parquet": lambda path: path.write_bytes(b"PAR1" * 100),
    "a message longer than memory": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff\xff\xff\xff" * 3),
    "no file": lambda path: path.unlink(),
    "a folder": to_folder,
    "other rows of the same kind": with_column("message", ["x", "y"], pa.string()),
}
COMMITTED = [name for name in DAMAGES if name not in ("other rows of the same kind", "no file", "a folder")]
"""What somebody can have committed as it is, with its checksum."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    spec = make_spec(str(tmp_path / "out"))
    made = Dataset(FolderSink(spec.output, spec), spec)
    made.sink.check()
    made.write(make_content(spec, errors=ROWS))
    return made


def errors_path(dataset: Dataset) -> Path:
    return Path(dataset.spec.output) / "_errors-a.arrow"


def commit_as_it_is(dataset: Dataset) -> None:
    checksum = hashlib.sha256(errors_path(dataset).read_bytes()).hexdigest()
    dataset.records = [msgspec.structs.replace(dataset.records[0], errors_sha256=checksum)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_job_is_not_ended_with_error_rows_that_are_not_those_that_were_committed(
    dataset: Dataset, damage: str
) -> None:
    DAMAGES[damage](errors_path(dataset))
    with pytest.raises(OutputError, match=r"_errors-a\.arrow: .*restore"):
        dataset.end()
    assert dataset.sink.read_manifest() is None


@pytest.mark.parametrize("damage", COMMITTED)
def test_nor_with_error_rows_that_make_no_sense_whatever_was_committed(dataset: Dataset, damage: str) -> None:
    DAMAGES[damage](errors_path(dataset))
    commit_as_it_is(dataset)
    with pytest.raises(OutputError, match=r"_errors-a\.arrow"):
        dataset.end()
    assert dataset.sink.read_manifest() is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_reader_is_told_of_error_rows_that_were_changed(dataset: Dataset, damage: str) -> None:
    dataset.end()
    DAMAGES[damage](errors_path(dataset))
    with pytest.raises(OutputError, match=r"_errors-a\.arrow"):
        list(open_sink(dataset.spec.output).read_errors())


@pytest.mark.parametrize("damage", DAMAGES)
def test_failed_rows_that_were_run_again_are_not_added_where_the_others_were_changed(
    dataset: Dataset, damage: str
) -> None:
    manifest = dataset.end()
    retry = Retry(manifest=manifest_digest(manifest), space=manifest.space)
    spec = msgspec.structs.replace(dataset.spec, retry=retry)
    sink = FolderSink(spec.output, spec)
    record = sink.write_shard(make_content(spec, "b", rows_per_block=1))
    DAMAGES[damage](errors_path(dataset))
    with pytest.raises(OutputError, match=r"_errors-a\.arrow"):
        finalize_retry(sink, make_status(spec, 1), [record])
    assert sink.read_manifest() == manifest


def test_bytes_at_random_are_told_as_the_files_fault(dataset: Dataset) -> None:
    path, dice = errors_path(dataset), random.Random(13)
    whole, told = path.read_bytes(), 0
    for _ in range(500):
        torn = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            torn[dice.randrange(len(torn))] = dice.randrange(256)
        path.write_bytes(torn)
        commit_as_it_is(dataset)
        try:
            dataset.end()
        except OutputError:
            told += 1
        else:
            (path.parent / "_manifest.json").unlink()  # what stands is not looked at again
    assert told > 100


def test_error_rows_of_megabytes_are_written_so_that_they_can_be_read(dataset: Dataset) -> None:
    rows = [make_error(row=row, original="x" * MIB) for row in range(40)]
    dataset.write(make_content(dataset.spec, "b", [(0, 1)], errors=rows))
    dataset.end()
    assert [len(row.original) for row in dataset.sink.read_errors()].count(MIB) == 40


@pytest.fixture
def lab(redis_server: RedisServer) -> Lab:
    return Lab(connect(redis_server.url))


def test_a_lease_on_what_cannot_be_ended_is_taken_less_and_less_often(lab: Lab, tmp_path: Path) -> None:
    job = lab.create(str(tmp_path / "out"), parts=1)
    lab.client.hset(lab.keys.shards(job), "a", b"\xff")
    lab.broker.run(lab.broker.cancel(job))
    pauses = []
    for _ in range(12):
        lab.broker.free_finalize(job)
        with pytest.raises(Exception, match="cannot be read"):
            finalize_job(lab.broker, job, lambda spec: open_sink(spec.output, spec))
        assert lab.broker.run(lab.broker.take_finalize(job, 0)) is None, "it is not free yet"
        ask: Any = lab.client
        seconds, micros = ask.time()
        pauses.append(round(ask.zscore(lab.keys.finalize, job) / 1000 - seconds - micros / 1e6))
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]
    assert lab.broker.state(job) is JobState.FINALIZING


@pytest.mark.parametrize(
    ("field", "value"),
    [("verdict", "nonsense"), ("spec", "{}"), ("created", "1" * 400), ("max_errors", "x%"), ("parts", "x")],
)
def test_a_job_whose_record_is_damaged_is_refused_and_its_lease_is_not_kept(
    lab: Lab, tmp_path: Path, field: str, value: str
) -> None:
    job = lab.create(str(tmp_path / "out"), parts=1)
    lab.broker.run(lab.broker.cancel(job))
    whole = lab.client.hget(lab.keys.job(job), field)
    lab.client.hset(lab.keys.job(job), field, value)

    def end() -> bool:
        return finalize_job(lab.broker, job, lambda spec: open_sink(spec.output, spec))

    with pytest.raises(EmbedstreamError):
        end()
    lab.client.hset(lab.keys.job(job), field, whole)
    lab.broker.free_finalize(job)
    assert end()
