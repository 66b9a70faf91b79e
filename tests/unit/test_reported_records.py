"""What other tools' users reported of their rows, as this reader ends them. A test is named after its report."""

from __future__ import annotations

import decimal
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.api.record_blocks import Records, records_part
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block
from embedstream_producer.corpus import check_sources
from embedstream_producer.sources import NothingUsable

NAMED = uuid.UUID(int=7)


def make_spec(*parts: str, **changed: Any) -> JobSpec:
    spec = JobSpec(queue="q", output="/out", model="m", parts=parts, **changed)
    spec.check()
    return spec


def read(*paths: Path, **changed: Any) -> list[Block]:
    parts = check_sources([str(path) for path in paths])
    with DuplicateIndex() as index:
        spec = make_spec(*(part.name for part in parts), **changed)
        return [block for part in parts for block in part.blocks(spec, index)]


def submitted(records: Records, **changed: Any) -> list[Block]:
    with DuplicateIndex() as index:
        spec = make_spec("records", **changed)
        part = records_part(records)
        part.check(spec)
        return list(part.blocks(spec, index))


def pairs(blocks: Iterable[Block]) -> list[tuple[str, str]]:
    return [(row["id"], row["text"]) for block in blocks for row in block.rows.to_pylist()]


def refusals(blocks: Iterable[Block]) -> list[tuple[int, str]]:
    return [(refusal.row, refusal.code) for block in blocks for refusal in block.refused]


def hint(path: Path, **changed: Any) -> str | None:
    [part] = check_sources([str(path)])
    try:
        return part.hint(make_spec(part.name, **changed))
    except NothingUsable as error:
        return str(error)


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    def write(*rows: object) -> Path:
        path = tmp_path / "c.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


BATCH = [
    {"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": f"text {i}"}}
    for i in range(3)
]
TEXTS = [(f"r{i}", f"text {i}") for i in range(3)]


def test_vllm_7132_lines_of_an_openai_batch_are_read_as_they_are(lines: Any, tmp_path: Path) -> None:
    assert pairs(read(lines(*BATCH))) == TEXTS
    assert pairs(submitted(BATCH)) == TEXTS
    pq.write_table(pa.Table.from_pylist(BATCH), tmp_path / "c.parquet")
    assert pairs(read(tmp_path / "c.parquet")) == TEXTS
    assert hint(tmp_path / "c.jsonl") is None


def test_elasticdump_1121_fields_of_fields_have_dotted_names(lines: Any, tmp_path: Path) -> None:
    dumped = [{"_id": f"r{i}", "_source": {"text": f"text {i}", "meta": {"lang": "en"}}} for i in range(3)]
    assert pairs(read(lines(*dumped))) == TEXTS
    rows: list[dict[str, Any]] = [
        {"meta": {"id": 1, "head": "T"}, "doc": {"text": "x"}},
        {"meta": None, "meta.id": 2, "doc": {"text": "y"}},
        {"meta": {"id": 3, "head": None}, "doc": "no object"},
    ]
    named = {"id_field": "meta.id", "text_field": "doc.text", "title_field": "meta.head", "keep": ("meta.head",)}
    blocks = read(lines(*rows), **named)
    assert (pairs(blocks), refusals(blocks)) == ([("1", "T x"), ("2", "y")], [(2, "missing_field")])
    del rows[1]["meta.id"]
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "c.parquet")
    blocks = read(tmp_path / "c.parquet", **named)
    assert blocks[0].rows.to_pylist()[0]["meta.head"] == "T"
    assert (pairs(blocks), refusals(blocks)) == ([("1", "T x")], [(1, "bad_id")])


def test_vllm_7132_advice_names_no_field_that_is_the_same_in_every_row(lines: Any) -> None:
    same = {"kind": "a text that is the same everywhere", "url": "/v1/embeddings"}
    told = hint(lines(*({"id": i, **same, "say": {"it": f"hi {i}"}} for i in range(3))))
    assert str(told).endswith('no field "text" (found: id, kind, url, say); use --text-field say.it')
    assert str(hint(lines(*({"id": i, **same} for i in range(3))))).endswith("use --text-field NAME")
    assert str(hint(lines(*({"text": "x", "kind_id": 7} for i in range(3))))).endswith(
        "use --number-rows, or --id-field NAME"
    )
    assert str(hint(lines(*({"text": "x", "kind_id": 7, "m": {"uid": i}} for i in range(3))))).endswith("m.uid")


FRAME = {"id": ["r0", "r1", "r2"], "text": ["text 0", "text 1", "text 2"]}


class Interface:
    """Nothing but Arrow's interface."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        table: Any = pa.table(FRAME)
        return table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(FRAME),
        pd.DataFrame(FRAME).set_index("id"),
        pd.DataFrame(FRAME).astype("category"),
        pl.DataFrame(FRAME),
        pl.DataFrame(FRAME, schema={"id": pl.Binary, "text": pl.Categorical}, strict=False),
        pa.table(FRAME),
        pa.table(FRAME).to_struct_array(),
        Interface(),
    ],
    ids=["pandas", "index", "category", "polars", "views", "pyarrow", "structs", "interface"],
)
def test_sentence_transformers_3371_a_data_frame_gives_its_rows(frame: Any) -> None:
    assert pairs(submitted(frame)) == TEXTS


@pytest.mark.parametrize(
    "series", [pd.Series(["x", "y"]), pl.Series(["x", "y"]), pa.array(["x", "y"]), np.array(["x", "y"])]
)
def test_sentence_transformers_3371_a_series_gives_its_texts(series: Any) -> None:
    assert pairs(submitted(series)) == [("0", "x"), ("1", "y")]


@pytest.mark.parametrize("frame", [pd.DataFrame({"id": [], "text": []}), pl.DataFrame({"id": [], "text": []})])
def test_an_empty_frame_has_no_rows(frame: Any) -> None:
    assert submitted(frame) == []


class Foreign:
    columns = ("id", "text")

    def __iter__(self) -> Any:
        return iter(self.columns)


@pytest.mark.parametrize("table", [pl.LazyFrame(FRAME), Foreign()], ids=["lazy", "foreign"])
def test_sentence_transformers_3371_other_tables_are_refused_with_the_way(table: Any) -> None:
    with pytest.raises(UsageError, match="collect it into a pyarrow table or a data frame of pandas or polars"):
        submitted(table)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"id": [1, "a"], "text": ["x", "y"]}), "give each column a name and a type of its own"),
        (pd.DataFrame({"id": [1, 2], "body": ["x", "y"]}), r"has no text column .*\(there are: id, body\)"),
        (pd.DataFrame({"id": [1, None], "text": ["x", "y"]}), "column id is double; an id must be"),
    ],
)
def test_a_frame_that_cannot_be_used_is_one_sentence(frame: Any, message: str) -> None:
    with pytest.raises((UsageError, InputError), match=f"^records: .*{message}"):
        submitted(frame)
    with pytest.raises(InputError, match=r"records: has no column lnag \(--keep\): did you mean lang\?"):
        submitted(pa.table(FRAME | {"lang": ["en"] * 3}), keep=("lnag",))
    with pytest.raises(InputError, match=r"records: the first row does not have lnag \(--keep\): did you mean lang\?"):
        submitted([{"id": 1, 7: 7, "text": "x", "lang": "en"}, "text"], keep=("lnag",))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("written", "id"),
    [
        ({"$oid": "5f0c"}, "5f0c"),
        ({"$uuid": str(NAMED)}, str(NAMED)),
        ({"$numberLong": "7"}, "7"),
        ({"$numberDecimal": "7.50"}, "7.50"),
        ({"$numberInt": 7}, "7"),
        ({"$binary": {"base64": "AAAAAAAAAAAAAAAAAAAABw==", "subType": "04"}}, str(NAMED)),
    ],
)
def test_mongo_express_761_ids_of_extended_json_are_taken(lines: Any, written: object, id: str) -> None:
    row = {"_id": written, "text": "x"}
    assert pairs(read(lines(row))) == pairs(submitted([row])) == [(id, "x")]


@pytest.mark.parametrize("bad", [None, {}, [1], True, "", {"$date": "2024"}, {"$oid": "a", "b": 1}, {"$oid": None}])
def test_elasticdump_211_an_unusable_first_choice_does_not_hide_a_good_second_one(
    lines: Any, tmp_path: Path, bad: object
) -> None:
    row = {"_id": bad, "id": "good", "text": bad if bad != "" else None, "content": "x"}
    assert pairs(read(lines(row))) == pairs(submitted([row])) == [("good", "x")]
    assert refusals(read(lines({"_id": bad, "text": "x"}))) == [(0, "bad_id")]
    columns = {"_id": pa.array([None, "a"]), "id": pa.array([5, 6]), "text": [[1], [2]], "content": ["x", "y"]}
    assert pairs(read(parquet(tmp_path / "c.parquet", **columns))) == [("5", "x"), ("a", "y")]
    structs = [{"$oid": "p"}, {"$oid": "q"}]
    path = parquet(tmp_path / "d.parquet", _id=structs, text=["x", "y"])
    assert pairs(read(path, id_field="_id.$oid")) == [("p", "x"), ("q", "y")]


def test_arrow_48169_ids_that_are_uuids_and_texts_that_are_json(tmp_path: Path) -> None:
    ids, texts = pa.array([NAMED.bytes, None], pa.uuid()), pa.array(['{"a": 1}', '"b"'], pa.json_())
    for stored in (True, False):
        pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / "c.parquet", store_schema=stored)
        blocks = read(tmp_path / "c.parquet")
        assert (pairs(blocks), refusals(blocks)) == ([(str(NAMED), '{"a": 1}')], [(1, "bad_id")])
    assert pairs(submitted(pa.table({"id": ids[:1], "text": texts[:1]}))) == [(str(NAMED), '{"a": 1}')]


@pytest.mark.parametrize("type", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), pa.binary(1)])
@pytest.mark.parametrize("stored", [True, False])
def test_velox_10398_bytes_without_a_type_are_text_but_for_those_that_are_none(
    tmp_path: Path, type: pa.DataType, stored: bool
) -> None:
    ids: Any = pa.array([b"a", b"b", b"\xff", b"d"])
    texts: Any = pa.array([b"w", b"\xfe", b"y", b"z"])
    if pa.types.is_dictionary(type):
        ids, texts = ids.dictionary_encode(), texts.dictionary_encode()
    else:
        ids, texts = ids.cast(type), texts.cast(type)
    data = pa.table({"id": ids, "text": texts, "kept": texts})
    pq.write_table(data, tmp_path / "c.parquet", store_schema=stored)
    blocks = read(tmp_path / "c.parquet", keep=("kept",))
    assert (pairs(blocks), refusals(blocks)) == ([("a", "w"), ("d", "z")], [(1, "not_utf8"), (2, "not_utf8")])
    assert blocks[0].rows.column("kept").to_pylist() == ["w", "z"]


def test_nomic_21_rows_without_ids_are_numbered_in_every_format(lines: Any, tmp_path: Path) -> None:
    first = lines({"text": "a"}, "oops", {"text": "b", "id": "unread"}, {"text": ""})
    second = parquet(tmp_path / "d.parquet", text=["c", "c"])
    assert str(hint(first, id_field="key")).endswith("use --number-rows, or --id-field NAME")
    with pytest.raises(InputError, match=r"has no id column .*: name one \(--number-rows, or --id-field\)"):
        hint(second)
    assert hint(first, number_rows=True) is hint(second, number_rows=True) is None
    blocks = read(first, second, number_rows=True)
    assert pairs(blocks) == [("0-0", "a"), ("0-2", "b"), ("1-0", "c"), ("1-1", "c")]
    assert [(refusal.row, refusal.id) for refusal in blocks[0].refused] == [(1, None), (3, "0-3")]
    texts: list[Any] = [{"text": "a"}, "b"]
    assert pairs(submitted(texts, number_rows=True)) == [("0-0", "a"), ("0-1", "b")]
    assert pairs(submitted(pa.table({"text": ["a", "b"]}), number_rows=True)) == [("0-0", "a"), ("0-1", "b")]
    with pytest.raises(UsageError, match="--number-rows and --id-field exclude each other"):
        make_spec("c", number_rows=True, id_field="id")


UNSEEN = ["\u200b", "\u200d\ufeff", "\u00ad \u2060", "\u3164", "\u0001", "\ufe0f\U000e0041", "\u202e\u115f"]
SEEN = ["\u200bx", "\u0915\u200d", "\ufffd", "\u2800", "\u00adé"]


def test_draft_js_2163_a_text_that_cannot_be_seen_is_empty(lines: Any, tmp_path: Path) -> None:
    texts = [*UNSEEN, *SEEN]
    ids = [str(at) for at in range(len(texts))]
    sources: list[list[Block]] = [
        read(lines(*({"id": id, "text": text, "title": "\u200b"} for id, text in zip(ids, texts, strict=True)))),
        read(parquet(tmp_path / "c.parquet", id=ids, text=texts, title=["\u200b"] * len(texts))),
        submitted(texts),
    ]
    for blocks in sources:
        assert refusals(blocks) == [(at, "empty_text") for at in range(len(UNSEEN))]
        assert [text for _, text in pairs(blocks)] == SEEN


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", '{"a": [NaN]}', '"\\ud800"'])
def test_pandas_30716_what_python_writes_beyond_json_costs_no_row_where_it_is_not_used(
    lines: Any, constant: str
) -> None:
    path = lines(f'{{"id": 1.50, "text": "NaN", "score": {constant}, "kept": {{"a" : NaN, "n": 1.50}}, "other": NaN}}')
    [block] = read(path, keep=("kept", "other"))
    [row] = block.rows.to_pylist()
    assert (row["id"], row["text"], row["kept"], row["other"]) == ("1.50", "NaN", '{"a":null,"n":1.50}', None)


def test_pandas_30716_in_a_field_that_is_used_the_message_names_it(lines: Any) -> None:
    path = lines('{"id": NaN, "text": "x"}', '{"id": 1, "text": Infinity}', '{"id": 1, "text": "x", "title": NaN}')
    assert [refusal.message for refusal in read(path)[0].refused] == [
        'field "id" is not a finite number; an id must be a string or a number',
        'field "text" is not a finite number; a text must be a string',
        'field "title" is not a finite number; a title must be a string; --title-field takes another',
    ]


def test_a_title_field_that_is_the_text_is_not_joined_to_itself(lines: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": "a", "text": "x", "content": None}, {"id": "b", "text": "T", "content": "y"}]
    columns = {name: [row[name] for row in rows] for name in ("id", "text", "content")}
    both = [read(lines(*rows), title_field="text"), submitted(rows, title_field="text")]
    both.append(read(parquet(tmp_path / "c.parquet", **columns), title_field="text"))
    for blocks in both:
        assert pairs(blocks) == [("a", "x"), ("b", "T y")]
    assert pairs(read(parquet(tmp_path / "d.parquet", id=["a"], text=["x"]), title_field="text")) == [("a", "x")]


def test_whole_decimals_are_ids(tmp_path: Path) -> None:
    ids = pa.array([decimal.Decimal(7), decimal.Decimal(10**30)], pa.decimal128(38, 0))
    assert pairs(read(parquet(tmp_path / "c.parquet", id=ids, text=["x", "y"]))) == [("7", "x"), (str(10**30), "y")]
    assert pairs(submitted([{"id": decimal.Decimal("7.5"), "text": "x"}])) == [("7.5", "x")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"custom_id": f"r{i}", "body": {"input": ["a", "b"]}} for i in range(3)],
            "a text must be a string; --text-f",
        ),
        (
            [{"id": None, "text": f"text {i}"} for i in range(3)],
            "an id must be .*; --id-field takes another, --number-",
        ),
    ],
)
def test_vllm_7132_a_corpus_of_which_no_row_can_be_used_starts_nothing(
    lines: Any, rows: list[dict[str, Any]], message: str
) -> None:
    path = lines(*rows)
    with pytest.raises(InputError, match=f"the first 3 rows are all refused: .*{message}.*: nothing was"):
        check_sources([str(path)], spec=make_spec(str(path)))
    with pytest.raises(InputError, match=r"^records: the first 3 records cannot be used: field"):
        submitted(rows)


@pytest.mark.parametrize("rows", [[("a", "x")], [b"x"], [["a", "x"], ["b", "y"]]])
def test_sentence_transformers_3371_a_list_of_what_are_no_records_is_refused(rows: Any) -> None:
    with pytest.raises(InputError, match=r"used: a record must be a mapping or a string, not (tuple|bytes|list)"):
        submitted(rows)


def test_vllm_7132_fields_of_structs_are_among_the_columns_that_there_are(tmp_path: Path) -> None:
    path = parquet(tmp_path / "c.parquet", id=["a"], doc=[{"body": "x", "more": {"lang": "en"}}])
    with pytest.raises(InputError, match=r"\(there are: id, doc\.body, doc\.more\.lang\): name one \(--text-field\)"):
        hint(path)


def test_a_name_that_is_empty_is_no_file() -> None:
    with pytest.raises(UsageError, match="a corpus file's name is empty"):
        check_sources([""])
