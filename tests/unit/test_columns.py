"""Columns are judged as rows are, whatever their types and whatever is wrong in them."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.corpus.columns import ColumnReader
from embedstream.corpus.records import Outcome, Record, RecordReader
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Refusal

SPEC = JobSpec(queue="q", output="/out", model="m", parts=("/c.parquet",))


def make_spec(**changed: Any) -> JobSpec:
    return msgspec.structs.replace(SPEC, **changed)


def judge(batch: pa.RecordBatch, spec: JobSpec = SPEC, row: int = 0) -> list[Outcome]:
    reader = ColumnReader(spec, batch.schema, "c.parquet")
    return list(reader.judge(row, batch.select(reader.columns)))


def content(outcome: Outcome) -> object:
    """All of an outcome but where it came from."""
    return msgspec.structs.replace(outcome, source=None) if isinstance(outcome, Record) else outcome


texts = st.one_of(
    st.none(),
    st.sampled_from(
        ["", " ", "\u2003", "\x1c", "\x85", "\0", "a\0b", "x", "café", "\U0001d518", "  lead", "x" * 300, "é" * 600]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
kept = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=3))


@given(
    st.lists(st.fixed_dictionaries({"_id": texts, "text": texts, "title": texts, "lang": kept}), max_size=12),
    st.sampled_from(["error", "skip"]),
    st.booleans(),
)
def test_rows_end_as_they_would_one_by_one(rows: list[dict[str, Any]], empty: str, titled: bool) -> None:
    names = ["_id", "text", *(["title"] if titled else []), "lang"]
    rows = [{name: row[name] for name in names} for row in rows]
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in names]))
    spec = make_spec(empty=empty, keep=("lang", "absent"))
    one_by_one = RecordReader(spec)
    expected = [one_by_one.record(5 + at, row) for at, row in enumerate(rows)]
    assert [content(outcome) for outcome in judge(batch, spec, 5)] == [content(outcome) for outcome in expected]


def record(outcome: Outcome) -> Record:
    assert isinstance(outcome, Record), outcome
    return outcome


def refused(outcome: Outcome) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    return outcome


@pytest.mark.parametrize("type", [pa.int64(), pa.uint64(), pa.int8()])
def test_a_whole_number_is_an_id(type: pa.DataType) -> None:
    batch = pa.record_batch({"id": pa.array([7, None], type), "text": ["a", "b"]})
    outcomes = judge(batch)
    assert record(outcomes[0]).id == "7"
    assert refused(outcomes[1]).code == "bad_id"


@pytest.mark.parametrize("type", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_is_one(type: pa.DataType) -> None:
    column = (
        pa.array(["a", "b"]).cast(type)
        if not pa.types.is_dictionary(type)
        else pa.array(["a", "b"]).dictionary_encode()
    )
    outcomes = judge(pa.record_batch({"id": column, "text": column}))
    assert [record(outcome).text for outcome in outcomes] == ["a", "b"]


def test_kept_fields_are_shown_as_json_shows_them() -> None:
    day = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    columns: Mapping[str, Any] = {
        "n": pa.array([3, None]),
        "b": pa.array([True, False]),
        "f": pa.array([1.5, float("nan")]),
        "l": pa.array([[1, 2], None]),
        "s": pa.array([{"a": "x"}, None]),
        "t": pa.array([day, None], pa.timestamp("ns", "UTC")),
        "z": pa.nulls(2),
    }
    batch = pa.record_batch({"id": ["1", "2"], "text": ["a", "b"], **columns})
    first, second = judge(batch, make_spec(keep=tuple(columns)))
    assert record(first).kept == ("3", "true", "1.5", "[1,2]", '{"a":"x"}', "2024-01-02T03:04:05Z", None)
    assert record(second).kept == (None, "false", None, None, None, None, None)


def test_a_kept_value_that_json_cannot_hold_costs_its_row_alone() -> None:
    batch = pa.record_batch({"id": ["1", "2"], "text": ["a", "b"], "raw": pa.array([b"\xff", None], pa.binary())})
    first, second = judge(batch, make_spec(keep=("raw",)))
    assert (refused(first).code, refused(first).row) == ("not_utf8", 0)
    assert record(second).kept == (None,)


LONGS = pa.array([2**63 - 1, -(2**63), 0, None, 1], pa.int64())
INTS = pa.array([2**31 - 1, -(2**31), 0, None, 1], pa.int32())
FIVE: Any = pa.array([0, 1, 2, 3, 4, 5], pa.int32())
LIST_VIEW: Any = pa.ListViewArray
LETTERS: Any = pa.array(list("abcde"))
BYTES = pa.array([b"\xff", b"a", b"", None, b"c"])
LATE: Any = LONGS.view(pa.timestamp("s"))
ZONES = (None, "UTC", "Europe/Berlin", "Nowhere/Land", "+99:99")
EXTREMES: Mapping[str, Any] = {
    **{f"{unit} {zone}": LONGS.view(pa.timestamp(unit, zone)) for unit in ("s", "ms", "us", "ns") for zone in ZONES},
    **{f"duration {unit}": LONGS.view(pa.duration(unit)) for unit in ("s", "ms", "us", "ns")},
    **{f"time {unit}": INTS.view(pa.time32(unit)) for unit in ("s", "ms")},
    **{f"time {unit}": LONGS.view(pa.time64(unit)) for unit in ("us", "ns")},
    "date32": INTS.view(pa.date32()),
    "date64": LONGS.view(pa.date64()),
    "interval": pa.array([(2**31 - 1, 2**31 - 1, 2**63 - 1), None, (0, 0, 0), (-1, -1, -1), (1, 2, 3)]),
    "decimal": pa.array([decimal.Decimal("9" * 70), None, *map(decimal.Decimal, ("-1e-3", "0", "1"))]),
    **{
        str(type): pa.array(np.array([np.inf, -np.inf, np.nan, 0, 1], type))
        for type in (np.float16, np.float32, np.float64)
    },
    "binary view": BYTES.cast(pa.binary_view()),
    "fixed bytes": pa.array([b"ab"] * 5, pa.binary(2)),
    "no UTF-8": pa.Array.from_buffers(pa.string(), 5, BYTES.buffers()),
    "list of no UTF-8": pa.ListArray.from_arrays(FIVE, pa.Array.from_buffers(pa.string(), 5, BYTES.buffers())),
    "list": pa.ListArray.from_arrays(FIVE, LATE),
    "list view": LIST_VIEW.from_arrays(FIVE[:5], pa.array([1] * 5, pa.int32()), LATE),
    "struct": pa.StructArray.from_arrays([LATE, LONGS], ["a", "b"]),
    "map": pa.MapArray.from_arrays(FIVE, LETTERS, LATE),
    "dictionary": pa.DictionaryArray.from_arrays(FIVE[:5], LATE),
    "run ends": pa.RunEndEncodedArray.from_arrays(pa.array([2, 5], pa.int32()), LATE[:2]),
    "union": pa.UnionArray.from_sparse(pa.array([0, 0, 0, 1, 1], pa.int8()), [LATE, LONGS]),
    "extension": pa.ExtensionArray.from_storage(pa.opaque(pa.timestamp("s"), "x", "y"), LATE),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_a_kept_value_beyond_what_python_knows_costs_its_row_alone(name: str) -> None:
    batch = pa.record_batch({"id": list("12345"), "text": list("abcde"), "kept": EXTREMES[name]})
    outcomes = judge(batch, make_spec(keep=("kept",)))
    assert len(outcomes) == 5
    codes = {outcome.code for outcome in outcomes if isinstance(outcome, Refusal)}
    assert codes <= {"bad_kept", "not_utf8"}


def test_a_time_beyond_microseconds_is_not_taken_for_another_one() -> None:
    late = pa.array([2**62, 0], pa.int64()).view(pa.timestamp("s"))
    first, second = judge(pa.record_batch({"id": ["1", "2"], "text": ["a", "b"], "t": late}), make_spec(keep=("t",)))
    assert refused(first).message == 'field "t" is of type timestamp[s] and out of bounds, which JSON cannot hold'
    assert record(second).kept == ("1970-01-01T00:00:00",)


def test_bytes_that_are_not_utf8_cost_their_row_alone() -> None:
    data = pa.array([b"good", b"b\xffd", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    outcomes = judge(pa.record_batch({"id": pa.array([1, 2, 3]), "text": text}))
    assert [record(outcomes[at]).text for at in (0, 2)] == ["good", "fine"]
    assert (refused(outcomes[1]).code, refused(outcomes[1]).row) == ("not_utf8", 1)
    assert 'column "text"' in refused(outcomes[1]).message


def test_a_refused_row_shows_what_it_held() -> None:
    batch = pa.record_batch({"id": ["1"], "text": [""], "other": ["unread"]})
    assert refused(judge(batch)[0]).original == '{"id": "1", "text": ""}'


@pytest.mark.parametrize(
    ("columns", "changed", "message"),
    [
        ({"key": ["1"], "text": ["a"]}, {}, r"has no id column \(_id, id, custom_id, docid\) \(there are: key, text\)"),
        ({"id": ["1"], "body": ["a"]}, {}, r"has no text column .*\(there are: id, body\): name one \(--text-field\)"),
        ({"id": ["1"], "text": ["a"]}, {"text_field": "body"}, r"has no column body \(there are: id, text\)"),
        ({"id": ["1"], "text": ["a"]}, {"title_field": "head"}, r"has no column head .*name one \(--title-field\)"),
        ({"id": [1.5], "text": ["a"]}, {}, r"column id is double; an id must be"),
        ({"id": [True], "text": ["a"]}, {}, r"column id is bool; an id must be"),
        ({"id": ["1"], "text": [5]}, {}, r"column text is int64; a text must be a string; --text-field"),
        ({"id": ["1"], "text": ["a"], "title": [5]}, {}, r"column title is int64; a title must be a string"),
    ],
)
def test_columns_that_cannot_be_used_are_one_sentence(
    columns: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"^c.parquet: {message}"):
        judge(pa.record_batch(columns), make_spec(**changed))


def test_two_columns_of_one_name_are_refused() -> None:
    batch = pa.RecordBatch.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["id", "text", "text"]
    )
    with pytest.raises(InputError, match="has 2 columns called text"):
        ColumnReader(SPEC, batch.schema, "c.parquet")
