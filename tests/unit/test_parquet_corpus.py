"""Parquet files as input: the same rows whatever their row groups, and one sentence for what cannot be read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.arrow_memory import arrow_memory
from lab.s3 import S3Server

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.dataset.parquet_rows import COLUMN_BYTES
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, Refusal
from embedstream.records import PartContent
from embedstream_producer.corpus import check_sources, total_bytes


def make_spec(parts: Iterable[Part], **changed: Any) -> JobSpec:
    return JobSpec(queue="q", output="/out", model="m", parts=tuple(part.name for part in parts), **changed)


def read(*sources: str, **changed: Any) -> list[Block]:
    parts = check_sources(sources)
    with DuplicateIndex() as index:
        return [block for part in parts for block in part.blocks(make_spec(parts, **changed), index)]


def rows_of(blocks: Iterable[Block]) -> list[dict[str, Any]]:
    return [row for block in blocks for row in block.rows.to_pylist()]


def table(rows: int, length: int = 20) -> pa.Table:
    texts = [f"text {row} " + "word " * (row * 7919 % length) for row in range(rows)]
    titles = [None if row % 3 else f"title {row}" for row in range(rows)]
    return pa.table({"_id": pa.array(range(1, rows + 1)), "title": titles, "text": texts, "lang": ["en"] * rows})


def test_blocks_do_not_depend_on_row_groups_nor_on_the_format(tmp_path: Path) -> None:
    data = table(5000)
    sums = set()
    for rows in (7, 1000, 100_000):
        pq.write_table(data, tmp_path / "c.parquet", row_group_size=rows)
        sums.add(tuple(block.sum for block in read(str(tmp_path / "c.parquet"), keep=("lang",))))
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in data.to_pylist()))
    sums.add(tuple(block.sum for block in read(str(lines), keep=("lang",))))
    assert len(sums) == 1


def test_a_row_is_known_by_its_number_in_the_file(tmp_path: Path) -> None:
    pq.write_table(table(3000), tmp_path / "c.parquet", row_group_size=100)
    rows = rows_of(read(str(tmp_path / "c.parquet")))
    assert [row["row"] for row in rows] == list(range(3000))
    assert [row["id"] for row in rows] == [str(row + 1) for row in range(3000)]


def test_bad_rows_are_refused_by_their_row(tmp_path: Path) -> None:
    columns = {"id": ["a", "b", "a", None], "text": ["one", "", "three", "four"]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    told: list[Refusal] = []
    parts = check_sources([str(tmp_path / "c.parquet")])
    with DuplicateIndex() as index:
        [block] = parts[0].blocks(make_spec(parts), index, told.append)
    assert [(refusal.row, refusal.code) for refusal in told] == [(1, "empty_text"), (2, "duplicate_id"), (3, "bad_id")]
    assert told[1].message == "id a was used before, in row 1"
    assert told[1].original == '{"id": "a", "text": "three"}'
    assert block.total == 4


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(1000).hex() for _ in range(20_000)]
    data = pa.table({"id": range(1, len(texts) + 1), "text": texts})
    pq.write_table(data, tmp_path / "c.parquet", use_dictionary=False, row_group_size=len(texts))
    del data, texts
    parts = check_sources([str(tmp_path / "c.parquet")])
    assert (total_bytes(parts) or 0) > 20_000_000
    before = pa.total_allocated_bytes()
    with DuplicateIndex() as index:
        most = max(pa.total_allocated_bytes() for _ in parts[0].blocks(make_spec(parts), index))
    assert most - before < 16_000_000


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path) -> None:
    pq.write_table(table(5000), tmp_path / "c.parquet", row_group_size=700)
    parts = check_sources([str(tmp_path / "c.parquet")])
    positions: list[int] = []
    with DuplicateIndex() as index:
        for _ in parts[0].blocks(make_spec(parts), index, None, positions.append):
            pass
    assert positions == sorted(positions)
    assert positions[-1] == total_bytes(parts) == (tmp_path / "c.parquet").stat().st_size


def test_the_content_is_that_of_the_file_that_was_read_whatever_took_its_name_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(table(3000), path)
    content = PartContent(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    [part] = check_sources([str(path)])
    with DuplicateIndex() as index:
        blocks = part.blocks(make_spec([part]), index)
        next(blocks)
        pq.write_table(table(10), tmp_path / "other")
        (tmp_path / "other").replace(path)
        assert part.content is None
        list(blocks)
    assert part.content == content


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_file_that_is_written_anew_while_it_is_read_is_refused(format: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    if format == "parquet":
        pq.write_table(table(3000), path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table(1).schema) as writer:
            writer.write_table(table(3000))
    os.utime(path, (1, 1))
    parts = check_sources([str(path)])
    with DuplicateIndex() as index:
        blocks = parts[0].blocks(make_spec(parts), index)
        next(blocks)
        with path.open("r+b") as again:
            again.write(path.read_bytes())
        with pytest.raises(InputError, match="was changed or replaced while it was read: run the same command again"):
            list(blocks)
    assert parts[0].content is None


def test_a_file_is_read_by_what_it_is_not_by_its_name(tmp_path: Path) -> None:
    pq.write_table(table(10), tmp_path / "c.jsonl")
    assert len(rows_of(read(str(tmp_path / "c.jsonl")))) == 10


def test_parts_of_both_formats_make_one_corpus(tmp_path: Path) -> None:
    pq.write_table(table(10), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"id": 3, "text": "doubled"}\n{"id": "z", "text": "new"}\n')
    blocks = read(str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl"))
    assert [block.part for block in blocks] == [0, 1]
    assert blocks[1].refused[0].message == "id 3 was used before, in a.parquet, row 3"
    with pytest.raises(UsageError, match="is the same file as"):
        check_sources([str(tmp_path / "a.parquet"), f"{tmp_path}/./a.parquet"])


def test_missing_columns_are_told_before_anything_is_submitted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["1"], "body": ["x"]}), tmp_path / "c.parquet")
    [part] = check_sources([str(tmp_path / "c.parquet")])
    with pytest.raises(InputError, match=r"c.parquet: has no id column .*\(there are: key, body\)"):
        part.hint(make_spec([part]))
    kept = make_spec([part], id_field="key", text_field="body", keep=("lang",))
    with pytest.raises(InputError, match=r"has no column lang \(--keep\): found: key, body$"):
        part.hint(kept)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(table(1000), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"c\.parquet: is damaged or no Parquet file"):
        check_sources([str(path)])
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match="is a Parquet file, no corpus: name the file itself"):
        check_sources([str(path)])
    pq.write_table(table(0), path)
    with pytest.raises(InputError, match="has no records"):
        check_sources([str(path)])


MIB = 1024 * 1024
ENDLESS, ROWS = "x" * (2 * MIB), 150


def shared_value(path: Path) -> None:
    """One long text in the dictionary, and as many rows as one likes that name it."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array([ENDLESS]))
    pq.write_table(pa.table({"id": pa.array(range(ROWS)), "text": texts}), path, dictionary_pagesize_limit=4 * MIB)


def shared_beginning(path: Path) -> None:
    """Texts that are stored as what they have more than the one before."""
    data = pa.table({"id": pa.array(range(ROWS)), "text": [ENDLESS] * ROWS})
    pq.write_table(data, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="zstd")


def long_texts_among_short_ones(path: Path) -> None:
    """Rows that are short on average."""
    texts = ["short"] * 50_000 + [ENDLESS] * ROWS
    data = pa.table({"id": pa.array(range(len(texts))), "text": texts})
    pq.write_table(data, path, use_dictionary=False, compression="zstd", write_batch_size=4, data_page_size=100_000)


@pytest.mark.slow
@pytest.mark.parametrize("make", [shared_value, shared_beginning, long_texts_among_short_ones])
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_few_kilobytes_that_decode_to_much_more_take_the_memory_of_the_bound(
    make: Callable[[Path], None], where: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    path = tmp_path / "c.parquet"
    make(path)
    assert path.stat().st_size < 2 * len(ENDLESS)
    source = str(path)
    if where == "bucket":
        s3_server.client().put_object(Bucket=bucket, Key="c.parquet", Body=path.read_bytes())
        source = f"s3://{bucket}/c.parquet"
    parts = check_sources([source])
    refused = 0
    with arrow_memory() as peak, DuplicateIndex() as index:
        for block in parts[0].blocks(make_spec(parts), index):
            refused += len(block.refused)
    assert refused == ROWS
    assert peak() < 4 * COLUMN_BYTES < ROWS * len(ENDLESS) / 2


def test_metadata_that_contradicts_the_schema_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": ["a", None], "text": ["x", "y"]}), path, use_dictionary=False)
    whole = path.read_bytes()
    at = whole.rindex(b"\x19\x26") + 1  # how many values are null and how many are not: a list of two
    path.write_bytes(whole[:at] + b"\x16\x82\x00" + whole[at + 3 :])  # of one, which takes as many bytes
    with pytest.raises(InputError, match=r"c\.parquet: cannot be read .*histogram size mismatch"):
        read(str(path))


def test_a_page_that_says_it_is_too_large_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    data = pa.table({"id": ["a"], "text": ["x" * 10_000]})
    pq.write_table(data, path, use_dictionary=False, compression="zstd", write_statistics=False)
    at = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    whole = path.read_bytes()
    size = whole[at + 3 : at + 6]  # after the kind of page: 10,010 bytes, in three bytes of seven bits, doubled
    assert whole[at : at + 3] == b"\x15\x00\x15"
    assert sum((byte & 127) << 7 * place for place, byte in enumerate(size)) == 2 * 10_010
    path.write_bytes(whole[: at + 3] + b"\xfe\xff\xff\xff\x0f" + whole[at + 6 :])
    with (
        arrow_memory() as peak,
        pytest.raises(InputError, match=r"column text has a page of 2,147,483,647 bytes, more than .*smaller pages"),
    ):
        read(str(path))
    assert peak() < MIB


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_an_object_gives_the_blocks_of_the_same_file(
    name: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    path = tmp_path / name
    data = table(4000)
    if name.endswith(".parquet"):
        pq.write_table(data, path, row_group_size=500)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in data.to_pylist()).encode()
        compress: Any = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
        path.write_bytes(compress.get(path.suffix, bytes)(lines))
    s3_server.client().put_object(Bucket=bucket, Key=f"corpora/{name}", Body=path.read_bytes())
    source = f"s3://{bucket}/corpora/{name}"
    assert [block.sum for block in read(source)] == [block.sum for block in read(str(path))]
    parts = [*check_sources([source]), *check_sources([str(path)])]
    assert parts[0].name == source
    assert total_bytes(parts) == 2 * path.stat().st_size
    content = PartContent(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    for part in parts:
        with DuplicateIndex() as index:
            list(part.blocks(make_spec([part]), index))
        assert part.content == content


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_an_object_that_is_replaced_while_it_is_read_is_no_corpus(
    name: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    path = tmp_path / name
    pq.write_table(table(3000), path) if name.endswith(".parquet") else path.write_text('{"id": 1, "text": "x"}\n' * 9)
    put = s3_server.client().put_object
    put(Bucket=bucket, Key=name, Body=path.read_bytes())
    parts = check_sources([f"s3://{bucket}/{name}"])
    with DuplicateIndex() as index:
        blocks = parts[0].blocks(make_spec(parts), index)
        put(Bucket=bucket, Key=name, Body=path.read_bytes() + b"\n")
        with pytest.raises(InputError, match=r"damaged|was changed or replaced while it was read"):
            list(blocks)


def test_an_object_that_is_not_there_is_one_sentence(bucket: str) -> None:
    with pytest.raises(InputError, match=f"s3://{bucket}/c.jsonl: cannot be read: there is no such object"):
        check_sources([f"s3://{bucket}/c.jsonl"])
    with pytest.raises(UsageError, match=r"corpus s3://\*\*\*@b: an address holds no credentials"):
        check_sources(["s3://key:secret@b/c.jsonl"])
