"""A source is opened once for being checked, for advice, and for its first reading."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.s3 import S3Server

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.jobs import JobSpec
from embedstream_producer.corpus import MOST_OPEN, check_sources, part_name

ROWS = [{"id": row, "text": f"text {row}"} for row in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()

_opened: list[str] | None = None


def _note(event: str, values: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(values[0]))


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that this process opens."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def write_lines(path: Path) -> None:
    path.write_bytes(LINES)


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=500)


FORMATS = {"c.jsonl": write_lines, "c.jsonl.gz": write_gzip, "c.parquet": write_parquet}


def read_all(*sources: str, times: int = 1) -> None:
    spec = JobSpec(queue="q", output="/out", model="m", parts=tuple(map(part_name, sources)))
    parts = check_sources(sources, spec=spec)
    for _ in range(times):
        with DuplicateIndex() as index:
            assert sum(block.total for part in parts for block in part.blocks(spec, index)) == len(ROWS) * len(sources)


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=list(FORMATS))
def test_a_file_is_opened_once_and_again_for_each_further_reading(
    name: str, write: Callable[[Path], None], tmp_path: Path, opened: list[str]
) -> None:
    write(tmp_path / name)
    for times in (1, 3):
        opened.clear()
        read_all(str(tmp_path / name), times=times)
        assert opened.count(str(tmp_path / name)) == times


def test_of_many_files_only_the_first_stay_open_until_they_are_read(tmp_path: Path, opened: list[str]) -> None:
    sources = [str(tmp_path / f"{number}.jsonl") for number in range(MOST_OPEN + 2)]
    for source in sources:
        write_lines(Path(source))
    opened.clear()
    read_all(*sources)
    assert [opened.count(source) for source in sources] == [1] * MOST_OPEN + [2, 2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_small_object_is_read_by_one_request_between_two_looks(
    name: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    FORMATS[name](tmp_path / name)
    s3_server.client().put_object(Bucket=bucket, Key=name, Body=(tmp_path / name).read_bytes())
    with s3_server.requests() as methods:
        read_all(f"s3://{bucket}/{name}")
    assert methods == ["HEAD", "GET", "HEAD"]


def test_a_larger_object_is_read_in_large_pieces(bucket: str, s3_server: S3Server) -> None:
    rows = [{"id": row, "text": "word " * 2000} for row in range(1000)]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    s3_server.client().put_object(Bucket=bucket, Key="c.jsonl", Body=body)
    source = f"s3://{bucket}/c.jsonl"
    spec = JobSpec(queue="q", output="/out", model="m", parts=(source,))
    with s3_server.requests() as methods, DuplicateIndex() as index:
        [part] = check_sources([source], spec=spec)
        assert sum(block.total for block in part.blocks(spec, index)) == len(rows)
    assert methods == ["HEAD", "GET", "GET", "GET", "HEAD"], "the first bytes, 8 MiB, and the rest"
