"""Kept fields with types: by the columns of Parquet and Arrow, or as the user says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.api.record_blocks import records_part
from embedstream.corpus.columns import ColumnReader
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.records import Outcome, Record, RecordReader
from embedstream.dataset.manifest import refuse_other_spec
from embedstream.errors import BlockError, SpecDiffers, UsageError
from embedstream.jobs import JobSpec, KeptType, decode_spec
from embedstream.lifecycle.opening import make_spec, with_types
from embedstream.queue.blocks import Block, Refusal, decode_block, encode_block
from embedstream.queue.kept import COLUMN_TYPES, fits, typed
from embedstream.queue.packing import Packer
from embedstream_producer.corpus import check_sources


def spec_of(*keep: str, output: str = "/out", parts: tuple[str, ...] = ("/c.jsonl",)) -> JobSpec:
    return make_spec(queue="q", output=output, model="m", revision=None, parts=parts, settings={"keep": keep})


def types_of(*paths: Path, keep: tuple[str, ...], output: str = "/out") -> dict[str, KeptType]:
    """The types that a job over these files has."""
    spec = spec_of(*keep, output=output)
    parts = check_sources([str(path) for path in paths], spec=spec)
    return with_types(spec, (part.kept_types for part in parts)).keep_types


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """A Parquet file of two rows with these further columns."""

    def write(name: str, **columns: Any) -> Path:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"id": [f"{name}0", f"{name}1"], "text": ["a", "b"], **columns}), path)
        return path

    return write


def test_columns_of_parquet_keep_their_types(write: Any) -> None:
    path = write(
        "a",
        year=pa.array([1, 2], pa.int16()),
        score=pa.array([0.5, None], pa.float32()),
        good=[True, None],
        lang=["en", "de"],
        big=pa.array([2**64 - 1, 0], pa.uint64()),
        body=pa.array([{"size": 1}, {"size": 2}]),
        coded=pa.array([7, 8]).dictionary_encode(),
    )
    keep = ("year", "score", "good", "lang", "big", "body.size", "coded")
    types = {"year": "int64", "score": "float64", "good": "bool", "body.size": "int64", "coded": "int64"}
    assert types_of(path, keep=keep) == types
    assert types_of(path, keep=("year:string", "score:float64", "good")) == {"score": "float64", "good": "bool"}


def test_a_field_of_which_parts_differ_is_a_string(write: Any, tmp_path: Path) -> None:
    first, second = (
        write("a", year=[1, 2], n=[1, 2], only=[1, 2], gap=[1, 2]),
        write("b", year=[1.5, 2.5], n=[3, 4], gap=pa.nulls(2)),
    )
    assert types_of(first, second, keep=("year", "n", "only", "gap")) == {"n": "int64", "only": "int64", "gap": "int64"}
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"id": "c", "text": "c", "n": 5, "year": 1}))
    assert types_of(first, lines, keep=("n",)) == {}
    assert types_of(first, lines, keep=("n:int64",)) == {"n": "int64"}


def test_a_table_tells_types_and_rows_of_python_do_not() -> None:
    spec = spec_of("year", "lang")
    table = pa.table({"id": ["1"], "text": ["a"], "year": [2001], "lang": ["en"]})
    assert records_part(table).typed(spec).keep_types == {"year": "int64"}
    assert records_part(table.to_pylist()).typed(spec).keep_types == {}


def test_a_colon_is_part_of_a_name_unless_a_type_follows() -> None:
    assert spec_of("dc:title", "year:int64", "a:bool:string", ":bool").kept == (
        *("dc:title", "year:int64", "a:bool:string", ":bool"),
    )
    assert spec_of("dc:title", "year:int64", "a:bool:string", ":bool").keep == ("dc:title", "year", "a:bool", ":bool")


def test_hashes_in_redis_hold_text(write: Any) -> None:
    path, output = write("a", year=[1, 2]), "redis:?prefix=docs:"
    assert types_of(path, keep=("year",), output=output) == types_of(path, keep=("year:string",), output=output) == {}
    with pytest.raises(UsageError, match="--keep year:int64: hashes in Redis hold text alone: leave the type out"):
        types_of(path, keep=("year:int64",), output=output)


def test_another_type_is_another_setting() -> None:
    with pytest.raises(SpecDiffers, match=r"made with keep=year, this command says keep=year:int64"):
        refuse_other_spec("/out", spec_of("year"), spec_of("year:int64"))


def test_a_type_of_no_kept_field_is_no_spec() -> None:
    spec = msgspec.structs.replace(spec_of("year"), keep_types={"other": "int64"})
    with pytest.raises(UsageError, match="a type is given for other, which is not kept"):
        decode_spec(spec.encode())
    unknown = spec_of("year:int64").encode().replace(b'"int64"', b'"date"')
    with pytest.raises(UsageError, match="job spec cannot be read"):
        decode_spec(unknown)


VALUES = [*(0, -1, 2**63 - 1, -(2**63), 2**63, 10**30), *(1.5, 1e300, -0.0, 1e-7), *(True, False, "7", "", "1e5", [1])]
FITTING: dict[KeptType, int] = {"int64": 5, "float64": 12, "bool": 2, "string": 16}


@pytest.mark.parametrize("kind", sorted(FITTING))
def test_a_value_that_does_not_fit_fails_alone_however_it_is_read(kind: KeptType) -> None:
    spec = msgspec.structs.replace(spec_of("k"), keep_types={"k": kind})
    reader, good = RecordReader(spec), 0
    for row, value in enumerate([*VALUES, None]):
        record = {"id": "x", "text": "t", "k": value}
        line = json.dumps(record).encode()
        outcomes: list[Outcome] = [reader.line(row, line), reader.record(row, record), reader.line(row, line + b" ")]
        if not isinstance(value, list) and not (type(value) is int and not -(2**63) <= value < 2**63):
            batch = pa.record_batch({name: [each] for name, each in record.items()})
            outcomes += ColumnReader(spec, batch.schema, "c").judge(row, batch)
        kept = {each.kept if isinstance(each, Record) else each.code for each in outcomes if each is not None}
        assert len(kept) == 1, (value, outcomes)
        good += isinstance(outcomes[0], Record)
        if isinstance(outcomes[0], Refusal):
            assert f"--keep k:{kind} takes" in outcomes[0].message
    assert good == FITTING[kind] + 1  # null fits every type


@given(
    st.one_of(st.integers().map(str), st.floats().map(repr), st.text(max_size=5), st.sampled_from(["true", "False"]))
)
def test_what_fits_a_type_can_be_converted(text: str) -> None:
    for kind, type in COLUMN_TYPES.items():
        if fits(text, kind):
            assert typed(pa.array([text, None]), kind).type == type


def block_of(*years: str | None) -> Block:
    packer = Packer(0, ("year",))
    for row, year in enumerate(years):
        assert packer.add(row, str(row), "t", 1, (year,)) is None
    block = packer.finish()
    assert block is not None
    return block


def test_a_block_that_holds_another_type_than_its_job_is_refused() -> None:
    types: dict[str, KeptType] = {"year": "int64"}
    for years, whole in ((("2001", None), True), (("2001", "next year"), False)):
        fields = {
            name.encode(): value if isinstance(value, bytes) else str(value).encode()
            for name, value in encode_block(block_of(*years)).fields().items()
        }
        assert decode_block(fields, ("year",)).rows.num_rows == 2
        if whole:
            assert decode_block(fields, ("year",), 1, types).rows.num_rows == 2
        else:
            with pytest.raises(BlockError, match="block 0:0 has a year that does not fit its type, int64"):
                decode_block(fields, ("year",), 1, types)


def test_the_same_rows_are_the_same_blocks_whatever_types_they_have(write: Any, tmp_path: Path) -> None:
    path, lines = write("a", year=[1, 2]), tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in pq.read_table(path).to_pylist()))
    sums = []
    for source, keep in ((path, "year:int64"), (path, "year"), (lines, "year"), (lines, "year:int64")):
        [part] = check_sources([str(source)])
        with DuplicateIndex() as index:
            sums.append([block.sum for block in part.blocks(spec_of(keep, parts=(str(source),)), index)])
    assert sums[1:] == sums[:-1]
