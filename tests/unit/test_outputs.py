"""Columns of every kind: from what a model gave to Parquet and hashes, and back; and spoiled values are found."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RedisServer
from hypothesis import given
from hypothesis import strategies as st
from lab.dataset import Dataset, make_content, make_spec
from lab.results import EDGES, EVERY_KIND, some_results
from lab.verify import Made, edit_manifest, replaced, rewrite

import embedstream
from embedstream.dataset.redis_values import from_fields, to_fields
from embedstream.dataset.schema import output_fields
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.values import Ragged, Values, from_columns, quantized, ranges_of, to_columns
from embedstream.errors import OutputError, UsageError
from embedstream.lifecycle.opening import make_spec as job_spec
from embedstream.outputs import (
    DTYPES,
    KINDS,
    NAMES,
    Output,
    OutputSpec,
    encode_ranges,
    parse_emit,
    with_ranges,
    without_ranges,
)
from embedstream.records import ShardContent, ShardRecord
from embedstream_producer.verify import verify
from embedstream_worker.engines.base import OutputInfo
from embedstream_worker.landing import landing

ROWS = 40


def batch_of(output: Output, values: Values) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(to_columns(output, values), schema=pa.schema(output_fields(output)))


def assert_close(ours: Values, theirs: Values, tolerance: float) -> None:
    if isinstance(ours, Ragged):
        assert isinstance(theirs, Ragged)
        np.testing.assert_array_equal(ours.counts, theirs.counts)
        if ours.indices is not None:
            np.testing.assert_array_equal(ours.indices, theirs.indices)
        ours, theirs = ours.values, theirs.values
    assert not isinstance(theirs, Ragged)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("output", EVERY_KIND, ids=lambda output: output.name)
def test_columns_hold_what_the_model_gave_also_as_a_slice_and_in_hashes_and_in_parquet(
    output: Output, tmp_path: Path
) -> None:
    values = some_results([output.kind], ROWS)[output.kind]
    batch = batch_of(output, values)
    if output.dtype == "ubinary":
        expected: Values = np.where(values > 0, 1, -1)  # type: ignore[operator]
    elif output.dtype == "int8":
        expected = np.clip(values, *EDGES[15:17])  # type: ignore[call-overload]
    elif output.name == "short":
        expected = values[:, :8] / np.linalg.norm(values[:, :8], axis=1, keepdims=True)  # type: ignore[index]
    else:
        expected = values
    tolerance = {"float16": 2e-3, "int8": 1.5 / 255}.get(output.dtype, 1e-6)
    assert_close(from_columns(output, batch), expected, tolerance)
    some = np.arange(7, 31)
    part = expected.take(some) if isinstance(expected, Ragged) else expected[some]
    assert_close(from_columns(output, batch.slice(7, 24)), part, tolerance)
    for column, field in zip(batch.slice(7, 24).columns, batch.schema, strict=True):
        assert from_fields([*to_fields(column)], field.type).equals(column)
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "f.parquet")
    [again] = pq.read_table(tmp_path / "f.parquet").combine_chunks().to_batches()
    assert_close(from_columns(output, again), expected, tolerance)


@pytest.mark.parametrize("rows", [1, 2, 300])
def test_ranges_reach_from_the_least_to_the_greatest_number_of_each_dimension(rows: int) -> None:
    dice = np.random.default_rng(rows)
    vectors = np.concatenate([dice.standard_normal((rows, 14)), np.full((rows, 1), 3), np.zeros((rows, 1))], axis=1)
    vectors = vectors.astype(np.float32)
    ranges = ranges_of([vectors[: rows // 2], vectors[:0], vectors[rows // 2 :]])
    output = Output(name="small", kind="dense", dtype="int8", dim=16, ranges=ranges)
    low, high = np.frombuffer(ranges, "<f4").reshape(2, 16)
    np.testing.assert_array_equal((low, high), (vectors.min(axis=0), vectors.max(axis=0)))
    read: Any = from_columns(output, batch_of(output, vectors))
    assert (vectors - read >= -1e-6).all()
    assert (vectors - read <= (high - low) / 255 + 1e-6).all()
    assert (quantized(vectors, output)[:, 14:] == -128).all(), "where all numbers are the same"
    far = np.array([[3e38] * 16, [-3e38] * 16], np.float32)
    assert quantized(far, output).tolist() == [[127] * 16, [-128] * 16]
    whole = Output(name="small", kind="dense", dtype="int8", dim=16, ranges=ranges_of([far]))
    assert quantized(far, whole).tolist() == [[127] * 16, [-128] * 16]


def test_ranges_of_other_outputs_are_refused() -> None:
    small = [each for each in EVERY_KIND if each.dtype == "int8"]
    other = Output(name="x", kind="dense", dtype="int8", dim=2)
    assert with_ranges(without_ranges(small), encode_ranges(small)) == tuple(small)
    for outputs, encoded in (
        (small, ""),
        (small, "{}"),
        (small, "[]"),
        (small, " " + encode_ranges(small)),
        (small, '{"small":"AAAA"}'),
        ([*small, other], encode_ranges(small)),
        ([other], encode_ranges(small)),
        (small[:0], encode_ranges(small)),
    ):
        with pytest.raises(ValueError, match=r"."):
            with_ranges(outputs, encoded)


def test_no_rows_make_empty_columns() -> None:
    for output in EVERY_KIND:
        assert batch_of(output, some_results([output.kind], 0)[output.kind]).num_rows == 0


@pytest.mark.parametrize("output", EVERY_KIND, ids=lambda output: output.name)
def test_results_return_to_their_rows_and_the_last_ones_of_a_row_count(output: Output) -> None:
    info = OutputInfo(output.dim if output.kind != "dense" else 16)
    expected = some_results([output.kind], ROWS)[output.kind]
    others = some_results([output.kind], ROWS, seed=1)[output.kind]
    place, rows = landing(output.kind, info, ROWS), np.random.default_rng(3).permutation(ROWS)
    place.put(rows[:25], taken(others, rows[:25]))
    place.put(rows[25:], taken(expected, rows[25:]))
    place.put(rows[:25], taken(expected, rows[:25]))
    assert_close(place.values(), expected, 0)
    assert_close(place.values(), expected, 0)
    nothing = landing(output.kind, info, 3).values()
    assert batch_of(output, nothing).num_rows == 3


def taken(values: Values, rows: Any) -> Values:
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0},
        {"dim": -1},
        {"dim": 2**62},
        {"dim": 12, "dtype": "ubinary"},
        {"kind": "sparse", "dtype": "ubinary"},
        {"kind": "labels"},
        {"kind": "labels", "labels": ["a"]},
        {"labels": ["a"] * 16},
        {"kind": "heatmap"},
        {"dtype": "float63"},
        {"name": "id"},
        {"name": "half"},
        {"dtype": "int8"},
        {"ranges": base64.b64encode(bytes(128)).decode()},
        {"dtype": "int8", "ranges": base64.b64encode(bytes(64)).decode()},
        {"dtype": "int8", "ranges": "not base64"},
        {"dtype": "int8", "ranges": base64.b64encode(struct.pack("<32f", *EDGES[::-1])).decode()},
        {"dtype": "int8", "ranges": base64.b64encode(struct.pack("<32f", *[-3e38] * 16, *[3e38] * 16)).decode()},
        {"dtype": "int8", "ranges": base64.b64encode(struct.pack("<32f", *[0.0] * 31, np.nan)).decode()},
    ],
    ids=range(19),
)
def test_a_manifest_whose_outputs_no_dataset_has_is_refused_by_every_reader(
    written: Made, change: dict[str, Any]
) -> None:
    edit_manifest(written, lambda manifest: manifest["outputs"][0].update(change))
    with pytest.raises(OutputError, match="the manifest cannot be read"):
        embedstream.open_dataset(written.spec.output)
    assert verify(written.spec.output, (), None).findings.keys() == {"manifest"}


@given(
    st.sampled_from(KINDS),
    st.one_of(st.none(), st.text("abc_é", min_size=1, max_size=5)),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 2000)),
)
def test_an_output_is_read_as_it_is_written(kind: Any, name: str | None, dtype: int, dim: int | None) -> None:
    spec = OutputSpec(
        name=name or NAMES[kind],
        kind=kind,
        dtype=DTYPES[kind][dtype % len(DTYPES[kind])],
        dim=dim if kind == "dense" else None,
    )
    try:
        spec.check()
    except UsageError:
        assert spec.dtype == "ubinary"
    else:
        assert parse_emit(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dens", "dense, sparse"),
        ("", "dense, sparse"),
        ("dense:float63", "float63"),
        ("dense:0", "from 1 to"),
        ("dense:float16:ubinary:8", "'ubinary' is not its one dtype"),
        ("dense:8:16", "'16' is not its one"),
        ("dense:1048577", "from 1 to 1,048,576 dimensions"),
        ("dense:" + "9" * 5000, "from 1 to"),
        ("dense:ubinary:100", "multiple of 8"),
        ("sparse:ubinary", "float32 or float16"),
        ("sparse:7", "only dense"),
        ("dense=", "name"),
    ],
)
def test_what_is_no_output_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_emit(text)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"outputs": ["dens"]}, "dense, sparse"),
        ({"outputs": "dense"}, "begin with dense, sparse"),
        ({"outputs": [7]}, r"\$\.outputs\[0\]"),
        ({"task": "nonsense"}, r"\$\.task"),
        ({"role": "reader"}, r"\$\.role"),
        ({"max_length": "7"}, r"\$\.max_length"),
    ],
    ids=str,
)
def test_settings_of_a_job_are_checked_where_no_command_line_did_it(settings: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        job_spec(queue="q", output="/out", model="m", revision=None, parts=["p"], settings=settings)


def test_outputs_may_be_written_as_on_the_command_line() -> None:
    settings: Any = {"outputs": ["dense:ubinary:256", OutputSpec(name="sparse", kind="sparse")]}
    spec = job_spec(queue="q", output="/out", model="m", revision=None, parts=["p"], settings=settings)
    assert [*map(str, spec.outputs)] == ["dense:ubinary:256", "sparse:float32"]


@pytest.fixture
def written(tmp_path: Path) -> Made:
    spec = make_spec(str(tmp_path / "out"))
    made = Dataset(open_sink(spec.output, spec), spec)
    made.sink.check()
    made.write(make_content(spec, rows_per_block=ROWS // 4, outputs=EVERY_KIND))
    return Made(spec, [], made.records, made.end())


def test_a_dataset_of_every_kind_is_verified_and_opened_by_its_manifest(written: Made) -> None:
    assert verify(written.spec.output, (), None).findings == {}
    table = embedstream.open_dataset(written.spec.output).to_table()
    assert table.num_rows == ROWS // 4
    assert {name for output in EVERY_KIND for name in output.columns} <= set(table.column_names)


def test_a_shard_without_rows_says_nothing_of_ranges_and_one_with_rows_has_to(tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path / "out"))
    made = Dataset(open_sink(spec.output, spec), spec)
    made.sink.check()
    none = make_content(spec, "none", [(0, 0)], rows_per_block=0, outputs=EVERY_KIND)
    untold = msgspec.structs.replace(none.record, outputs=without_ranges(EVERY_KIND))
    made.write(ShardContent(untold, none.data, none.errors))
    record = made.write(make_content(spec, "some", [(0, 1)], outputs=EVERY_KIND))
    assert made.end().outputs == EVERY_KIND
    assert verify(spec.output, (), None).findings == {}
    with pytest.raises(msgspec.ValidationError, match="does not say what its int8 numbers stand for"):
        msgspec.json.decode(msgspec.json.encode(record).replace(b'"ranges"', b'"range_"'), type=ShardRecord)


def test_int8_numbers_that_mean_something_else_by_the_manifest_than_by_the_footer_are_found(written: Made) -> None:
    def change(manifest: Any) -> None:
        (small,) = (output for output in manifest["outputs"] if output["name"] == "small")
        small["ranges"] = base64.b64encode(struct.pack("<32f", *[-0.75] * 16, *[0.5] * 16)).decode()

    edit_manifest(written, change)
    assert verify(written.spec.output, (), None).findings.keys() == {"space"}


def test_vectors_of_the_tokens_of_long_texts_are_verified(tmp_path: Path) -> None:
    """As long as BGE-M3 takes them, where a row has more numbers than any row of a corpus may have."""
    spec = make_spec(str(tmp_path / "out"))
    made = Dataset(open_sink(spec.output, spec), spec)
    made.sink.check()
    content = make_content(spec)
    outputs = (Output(name="tokens", kind="multivector", dtype="float16", dim=1024, normalized=True),)
    vectors = np.full((3 * 8192, 1024), 2.0**-5, np.float32)
    columns = to_columns(outputs[0], Ragged(np.full(3, 8192), vectors))
    table = content.data.drop_columns(["embedding"]).append_column(output_fields(outputs[0])[0], columns[0])
    made.write(ShardContent(msgspec.structs.replace(content.record, outputs=outputs), table, content.errors))
    made.end()
    assert verify(spec.output, (), None).findings == {}


def nan(column: list[Any]) -> None:
    column[3] = np.nan


def in_list(column: list[Any], value: Any) -> None:
    column[3] = [value, *column[3][1:]]


def sparse(column: list[Any], change: dict[str, Any]) -> None:
    column[3] = column[3] | change


@pytest.mark.parametrize(
    ("column", "change", "kind"),
    [
        ("embedding", lambda column: in_list(column, np.nan), "not_finite"),
        ("half", lambda column: in_list(column, np.float16(9)), "norm"),
        ("short", lambda column: in_list(column, np.inf), "not_finite"),
        ("sparse", lambda column: sparse(column, {"values": [np.nan] * len(column[3]["values"])}), "not_finite"),
        ("sparse", lambda column: sparse(column, {"values": [0.0] * len(column[3]["values"])}), "values"),
        ("sparse", lambda column: sparse(column, {"indices": [7, 7], "values": [1.0, 1.0]}), "values"),
        ("sparse", lambda column: sparse(column, {"indices": [7, 5], "values": [1.0, 1.0]}), "values"),
        ("sparse", lambda column: sparse(column, {"indices": [100], "values": [1.0]}), "values"),
        ("sparse", lambda column: sparse(column, {"indices": [5, 7, 9], "values": [1.0]}), "values"),
        ("multivector", lambda column: column.__setitem__(3, []), "zero"),
        ("multivector", lambda column: column.__setitem__(3, [[np.float16(2)] * 4]), "norm"),
        ("score", nan, "not_finite"),
        ("topic", lambda column: column.__setitem__(3, "none of them"), "values"),
        ("topic_score", lambda column: column.__setitem__(3, -1.0), "values"),
        ("topic_scores", lambda column: in_list(column, np.nan), "not_finite"),
        ("topic_scores", lambda column: column.__setitem__(3, [9.0, 9.5, 9.0]), "values"),
    ],
)
def test_a_spoiled_value_of_any_kind_is_found(written: Made, column: str, change: Any, kind: str) -> None:
    path = written.part()

    def spoil(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        change(values)
        return replaced(table, column, values)

    rewrite(written, path, spoil)
    found = verify(written.spec.output, (), None).findings
    assert {name: each.count for name, each in found.items()} == {kind: 1}
    assert (found[kind].first[0].row, found[kind].first[0].file) == (3, path.name)


def test_hashes_of_every_kind_are_read_and_verified_and_a_spoiled_one_is_found(redis_server: RedisServer) -> None:
    spec = make_spec(f"{redis_server.url}?prefix=every-kind:")
    made = Dataset(open_sink(spec.output, spec), spec)
    made.sink.check()
    content = make_content(spec, rows_per_block=ROWS // 4, outputs=EVERY_KIND)
    made.write(content)
    made.end()
    assert verify(spec.output, (), None).findings == {}
    names = [name for output in EVERY_KIND for name in output.columns]
    read = pa.Table.from_batches(list(made.sink.read(["id", *names]))).sort_by("id")
    assert read.equals(content.data.select(["id", *names]).sort_by("id"))
    client: Any = redis_server.client()
    for field, value in (
        ("sparse", b"\0" * 8),
        ("multivector", b"\0" * 7),
        ("score", b"nan"),
        ("topic", b"x"),
        ("score", None),
    ):
        whole = client.hget("every-kind:0-3", field)
        client.hdel("every-kind:0-3", field)
        if value is not None:
            client.hset("every-kind:0-3", field, value)
        assert sum(each.count for each in verify(spec.output, (), None).findings.values()) == 1, field
        client.hset("every-kind:0-3", field, whole)


@pytest.mark.parametrize("output", [OutputSpec(name="job", kind="dense"), OutputSpec(name="job", kind="labels")])
def test_an_output_named_like_a_field_of_every_hash_is_refused(output: OutputSpec) -> None:
    spec = make_spec("redis://localhost?prefix=a:", outputs=(output,))
    with pytest.raises(UsageError, match="have a field job already"):
        open_sink(spec.output, spec)
