"""What a corpus may be: rows of every format are those that other readers of the same files see."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import duckdb
import polars
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.s3 import S3Server

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.errors import EmbedstreamError, InputError
from embedstream.jobs import Chunking, CorpusFormat, JobSpec
from embedstream.queue.blocks import Block, Refusal
from embedstream_producer.corpus import check_sources, part_name
from embedstream_producer.expanding import expand
from embedstream_producer.json_array import ArrayStream
from embedstream_producer.plain import PlainStream

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "plain", "lang": "en"},
    {"id": "b", "text": 'with "quotes", a comma\nand a line\r\nbreak', "lang": None},
    {"id": "c", "text": "café 😀 \t tab; semicolon", "lang": "fr"},
    *({"id": f"r{i}", "text": f"row {i} " + "x" * (i % 50), "lang": "de"} for i in range(3000)),
]
Row = tuple[str, str, str | None]
EXPECTED: list[Row] = [(str(row["id"]), str(row["text"]), row["lang"]) for row in ROWS]


def blocks_of(
    sources: Sequence[str], stdin: bytes | None = None, format: CorpusFormat | None = None, **changed: Any
) -> list[Block]:
    names = expand(sources, format)
    settings = {"keep": ("lang",), **changed}
    spec = JobSpec(
        queue="q", output="/out", model="hashing", parts=tuple(map(part_name, names)), format=format, **settings
    )
    parts = check_sources(names, None if stdin is None else io.BytesIO(stdin), spec=spec, format=format)
    with DuplicateIndex() as index:
        return [block for part in parts for block in part.blocks(spec, index)]


def rows_of(blocks: Iterable[Block], *names: str) -> list[tuple[Any, ...]]:
    names = names or ("id", "text", "lang")
    return [
        tuple(row[name] for name in names)
        for block in blocks
        for row in pa.Table.from_batches([block.rows]).to_pylist()
    ]


def rows_in_duckdb(query: str) -> list[Any]:
    found = duckdb.sql(query)
    assert found is not None
    return found.fetchall()


def refusals_of(blocks: Iterable[Block]) -> list[Refusal]:
    return [refusal for block in blocks for refusal in block.refused]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False))


def write_csv(path: Path) -> None:
    polars.DataFrame(ROWS).write_csv(path)


def write_tsv(path: Path) -> None:
    polars.DataFrame(ROWS).write_csv(path, separator="\t")


def write_arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=700)


def write_arrow_file(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=700)


def write_feather(path: Path) -> None:
    polars.DataFrame(ROWS).write_ipc(path, compression="zstd")


def write_parquet(path: Path) -> None:
    pq.write_table(TABLE, path)


TABLE = pa.Table.from_pylist(ROWS)

FORMATS: dict[str, Callable[[Path], None]] = {
    "c.jsonl": write_jsonl,
    "c.json": write_array,
    "c.csv": write_csv,
    "c.tsv": write_tsv,
    "c.arrow": write_arrow_stream,
    "file.arrow": write_arrow_file,
    "c.feather": write_feather,
    "c.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_in_the_same_blocks(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    write_jsonl(tmp_path / "reference.jsonl")
    blocks = blocks_of([str(tmp_path / name)])
    assert rows_of(blocks) == EXPECTED
    assert [block.sum for block in blocks] == [
        block.sum for block in blocks_of([str(tmp_path / "reference.jsonl")], keep_types={})
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_whatever_a_file_is_called(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / "corpus")
    assert rows_of(blocks_of([str(tmp_path / "corpus")])) == EXPECTED


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.csv", "c.tsv", "c.arrow"])
def test_what_is_read_to_its_end_comes_from_a_pipe_and_out_of_gzip(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert rows_of(blocks_of(["-"], gzip.compress(data))) == EXPECTED
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(data))
    assert rows_of(blocks_of([str(packed)])) == EXPECTED


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_read_is_kept_by_size_and_sum(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    [part] = check_sources([str(tmp_path / name)])
    spec = JobSpec(queue="q", output="/out", model="m", parts=(part.name,))
    with DuplicateIndex() as index:
        list(part.blocks(spec, index))
    assert part.content is not None
    assert part.content == part.read_content(lambda _: None)
    assert part.content.bytes == (tmp_path / name).stat().st_size


CELLS = st.text(st.sampled_from('a"é,;\t\n\r 😀'), max_size=6) | st.none()


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), separator=st.sampled_from(",\t"))
def test_values_of_a_csv_are_those_that_polars_and_duckdb_see(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str | None, str | None]], separator: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / ("c.csv" if separator == "," else "c.tsv")
    frame = polars.DataFrame(
        {
            "id": [f"i{i}" for i in range(len(rows))],
            "text": ["t"] * len(rows),
            "a": [a for a, _ in rows],
            "b": [b for _, b in rows],
        },
        schema={"id": polars.String, "text": polars.String, "a": polars.String, "b": polars.String},
    )
    frame.write_csv(path, separator=separator)
    found = rows_of(blocks_of([str(path)], keep=("a", "b")), "id", "a", "b")
    assert found == polars.read_csv(path, separator=separator, infer_schema=False).select("id", "a", "b").rows()
    options = f"all_varchar=true, delim='{separator}', quote='\"', escape='\"', allow_quoted_nulls=false"
    query = f"SELECT id, a, b FROM read_csv('{path}', {options}, new_line='\\n', header=true)"
    if not any("\r" in (cell or "") for row in rows for cell in row):  # DuckDB's choice of line ends decides there
        assert found == rows_in_duckdb(query)


def test_a_row_of_a_csv_with_another_number_of_values_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    lines = ["id,text,lang", "bad,row", *(f"{i},text {i},en" for i in range(2000)), "1,2,3,4", "z,last,de", "x"]
    path.write_text("\n".join(lines))
    blocks = blocks_of([str(path)])
    assert [id for id, *_ in rows_of(blocks)] == [*map(str, range(2000)), "z"]
    assert [(each.row, each.code, each.message) for each in refusals_of(blocks)] == [
        (0, "bad_row", "the row has 2 values, the header 3"),
        (2001, "bad_row", "the row has 4 values, the header 3"),
        (2003, "bad_row", "the row has 1 values, the header 3"),
    ]
    assert refusals_of(blocks)[1].original == "1,2,3,4"


@pytest.mark.parametrize(
    "text",
    [
        'id,text\n1,"open\n2,b\n',
        'id,text\n1,a\n2,"open',
        'id,text\n1,a\n2,"open ""\n',
        'text\n"open\nb\n',
        "id,text\n" + "1,a\n" * 9 + '2,"open\n' + "3,c\n" * 99_999,
    ],
)
def test_a_csv_with_a_quote_that_is_never_closed_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match="a quote is never closed"):
        blocks_of([str(tmp_path / "c.csv")], keep=(), number_rows=True)


@pytest.mark.parametrize("line", ["  \t ", "id,text"])
def test_json_lines_after_a_line_that_could_be_a_header_are_json_lines(line: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(f'{line}\n{{"id": "1", "text": "a"}}\n')
    assert rows_of(blocks_of([str(tmp_path / "c.jsonl")], keep=()), "id", "text") == [("1", "a")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('id,text\n1,"a"', [("1", "a")]),
        ('id,text\n1,"a\nb"\n\n\n', [("1", "a\nb")]),
        ('id,text\n1,5" wide\n', [("1", '5" wide')]),
        ('id,text\n1,"a ""b"""\n', [("1", 'a "b"')]),
        ('id,text\n""\n1,a\n', [("1", "a")]),
        ('id,text\r\n1,"a"\r\n', [("1", "a")]),
    ],
)
def test_a_csv_whose_quotes_are_closed_is_read_to_its_end(
    text: str, found: list[tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / "c.csv").write_bytes(text.encode())
    assert rows_of(blocks_of([str(tmp_path / "c.csv")], keep=()), "id", "text") == found


@pytest.mark.parametrize(
    "text",
    [
        "\n\r\nid,text\n01,2024-01-01\n",
        "\ufeff\nid,text\n01,2024-01-01\n",
        "id,text\r01,2024-01-01\r",
        '"a\nb",id,text\n1.0,01,2024-01-01\n',
    ],
    ids=["blank lines", "mark and blank line", "ends of old Macs", "a line end in a name"],
)
@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_values_of_a_csv_are_text_however_it_begins(text: str, piped: bool, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(text.encode())
    source = "-" if piped else str(tmp_path / "c.csv")
    blocks = blocks_of([source], stdin=text.encode(), format="csv", keep=())
    assert rows_of(blocks, "id", "text") == [("01", "2024-01-01")]


def test_a_blank_line_that_comes_alone_through_a_pipe_is_not_the_end_of_a_csv() -> None:
    pieces = iter([b"\n", b"id,text\n01,a\n"])

    class Pipe(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            return next(pieces, b"")

        read1 = read

    spec = JobSpec(queue="q", output="/out", model="hashing", parts=("-",))
    [part] = check_sources(["-"], Pipe(), spec=spec, format="csv")
    with DuplicateIndex() as index:
        assert rows_of(part.blocks(spec, index), "id", "text") == [("01", "a")]


def test_a_header_that_is_not_read_whole_is_refused(tmp_path: Path) -> None:
    for size in (1 << 20, 9 << 20):
        (tmp_path / "c.csv").write_bytes(b"id,text," + b"x" * size + b"\n01,a,b\n")
        with pytest.raises(InputError, match="its header is damaged, or too long"):
            blocks_of([str(tmp_path / "c.csv")], keep=())


def test_a_value_of_a_csv_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"id,text\n1,good\n2,b\xffd\n3,good\n")
    blocks = blocks_of([str(path)], keep=())
    assert rows_of(blocks, "id") == [("1",), ("3",)]
    assert [(each.row, each.code) for each in refusals_of(blocks)] == [(1, "not_utf8")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"id,text\n1," + b"x" * (9 << 20), "a row has more than 8,388,608 bytes, or a quote is never closed"),
        (b"number,words\n1,hello\n", r"has no id column .* \(there are: number, words\): name one"),
        (b'[{"id": 1, "text": "a"}, {"id": 2', "damaged at element 2 of its JSON array"),
        (b'[{"id": 1, "text": "a"} {"id": 2}]', r"damaged at element 1 .*neither a comma nor \] follows"),
        (b'[{"id": 1, "text": "a"}] and more', "more follows after the array"),
        (b'[{"id": 1, "text": "a"}, {"id": 2, "text": "' + b"x" * (9 << 20), "element 2 has more than 8,388,608 bytes"),
        (b"[1, 2]", "the first 2 rows are all refused: element 1: a line must be a JSON object"),
        (b"[]", "has no records"),
        (b"ARROW1\0\0nothing of it", "is damaged or no Arrow file"),
    ],
    ids=[
        "csv row",
        "csv columns",
        "array cut",
        "array comma",
        "array end",
        "long element",
        "scalars",
        "empty",
        "arrow",
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said) as refused:
        blocks_of([str(path)], keep=())
    assert str(refused.value).startswith(str(path))


def test_an_arrow_file_that_is_cut_off_is_one_sentence(tmp_path: Path) -> None:
    write_arrow_file(tmp_path / "c.arrow")
    whole = (tmp_path / "c.arrow").read_bytes()
    (tmp_path / "c.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged or no Arrow file or stream"):
        blocks_of([str(tmp_path / "c.arrow")])


@settings(deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    st.integers(1, 7),
    st.sampled_from([None, 0, 2]),
)
def test_elements_of_an_array_are_found_however_its_bytes_come(
    values: list[Any], size: int, indent: int | None
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")

    class Pieces:
        def __init__(self) -> None:
            self._at = 0

        def read(self, _size: int) -> bytes:
            self._at += size
            return data[self._at - size : self._at]

        def close(self) -> None: ...

    stream = ArrayStream(PlainStream(Pieces(), "corpus"), "corpus")
    found = [(row, element) for row, elements in stream.batches() for row, element in enumerate(elements, row)]
    assert [row for row, _ in found] == list(range(len(values)))
    assert [json.loads(element.decode("utf-8", "surrogatepass")) for _, element in found] == values


class Spaces(io.BytesIO):
    """Some bytes, a lot of white space, and some bytes."""

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before, self._after, self._left = before, after, 64 << 20

    def read(self, size: int | None = -1) -> bytes:
        data, self._before = self._before, b""
        if not data and self._left > 0:
            data = b" " * min(size or 0, self._left)
            self._left -= len(data)
        if not data:
            data, self._after = self._after, b""
        return data

    read1 = read


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [(b"", b"[1]", 1), (b"[", b"]", 0), (b"[1,", b"2]", 2), (b"[1]", b"", 1)],
    ids=["before the array", "in an empty array", "behind a comma", "behind the array"],
)
def test_white_space_of_an_array_takes_no_memory(before: bytes, after: bytes, count: int) -> None:
    stream = ArrayStream(PlainStream(Spaces(before, after), "corpus"), "corpus")
    tracemalloc.start()
    try:
        found = sum(len(elements) for _, elements in stream.batches())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == count
    assert most < 16 << 20


def test_what_is_no_array_is_not_read_to_its_end() -> None:
    lines = Spaces(b'{"id": "1", "text": "a"}\n', b"")
    with pytest.raises(InputError, match=r"does not begin with \["):
        list(ArrayStream(PlainStream(lines, "corpus"), "corpus").batches())
    assert lines.read(1) == b" "


def test_a_format_that_is_named_is_taken_whatever_the_content_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_text("id\n1\n")
    blocks = blocks_of([str(path)], format="csv", keep=(), text_field="id")
    assert rows_of(blocks, "id", "text") == [("1", "1")]


def test_a_folder_is_the_files_in_it_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.parquet"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        frame = polars.DataFrame({"id": [name], "text": ["x"]})
        write: Any = frame.write_csv if name == "a.csv" else frame.write_parquet if "c" in name else frame.write_ndjson
        write(path)
    for ignored in ("README.md", "_SUCCESS", ".hidden.jsonl", "_tmp/d.jsonl"):
        path = tmp_path / "corpus" / ignored
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert rows_of(blocks_of([str(tmp_path / "corpus")], keep=()), "id") == [
        ("a.csv",),
        ("b.jsonl",),
        ("deep/c.parquet",),
    ]
    assert rows_of(blocks_of([f"{tmp_path}/corpus/*.jsonl"], keep=()), "id") == [("b.jsonl",)]
    assert rows_of(blocks_of([f"{tmp_path}/corpus/**/*.[cp]*"], keep=()), "id") == [("a.csv",), ("deep/c.parquet",)]


def test_folders_of_a_hive_tree_are_columns_as_polars_and_duckdb_see_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    table = pa.table(
        {
            "id": [f"{i}" for i in range(12)],
            "text": [f"text {i}" for i in range(12)],
            "lang": ["en", "de", "f r"] * 4,
            "year": pa.array([2023, 2024] * 6, pa.int32()),
        }
    )
    pq.write_to_dataset(table, tree, partition_cols=["lang", "year"])
    names = ("id", "text", "lang", "year")
    blocks = blocks_of([str(tree)], keep=("lang", "year"), keep_types={"year": "int64"})
    found = sorted((id, text, lang, int(year)) for id, text, lang, year in rows_of(blocks, *names))
    assert found == sorted(polars.read_parquet(f"{tree}/**/*.parquet", hive_partitioning=True).select(names).rows())
    query = f"SELECT id, text, lang, year FROM read_parquet('{tree}/**/*.parquet', hive_partitioning=true)"
    assert found == sorted(rows_in_duckdb(query))
    [part, *_] = check_sources(
        expand([str(tree)]), spec=JobSpec(queue="q", output="/o", model="m", parts=("p",), keep=("lang", "year"))
    )
    assert part.kept_types == {"lang": "string", "year": "int64"}


@pytest.mark.parametrize("splits", [False, True], ids=["data set", "splits"])
def test_a_folder_that_datasets_saved_is_its_rows(tmp_path: Path, splits: bool) -> None:
    data = datasets.Dataset.from_list(ROWS)
    saved: Any = datasets.DatasetDict({"train": data.select(range(2000)), "test": data.select(range(2000, len(ROWS)))})
    (saved if splits else data).save_to_disk(tmp_path / "saved", num_shards=None if splits else 3)
    if not splits:
        (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"left by map")
    assert rows_of(blocks_of([str(tmp_path / "saved")])) == EXPECTED
    loaded: Any = datasets.load_from_disk(str(tmp_path / "saved"))
    every = [row for split in (loaded.values() if splits else [loaded]) for row in split]
    assert [(row["id"], row["text"], row["lang"]) for row in every] == EXPECTED


def make_texts(folder: Path) -> dict[str, str]:
    texts = {"a.md": "# First\n", "deep/b.md": "second", "deep/c.txt": "third", "z.md": "é"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD.md").write_text("not a text")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return texts


def test_a_folder_of_texts_is_a_part_whose_ids_are_names(tmp_path: Path) -> None:
    texts = make_texts(tmp_path / "docs")
    assert rows_of(blocks_of([str(tmp_path / "docs")], keep=()), "id", "text") == sorted(texts.items())
    found = rows_of(blocks_of([f"{tmp_path}/docs/**/*.md"], keep=()), "id", "text")
    assert found == [(name, text) for name, text in sorted(texts.items()) if name.endswith(".md")]
    assert rows_of(blocks_of([f"{tmp_path}/docs/deep/*"], keep=()), "id") == [("b.md",), ("c.txt",)]
    assert len(expand([str(tmp_path / "docs")])) == 1


def test_a_file_of_a_folder_of_texts_that_is_none_costs_only_itself(tmp_path: Path) -> None:
    make_texts(tmp_path)
    (tmp_path / "bad.md").write_bytes(b"\xff")
    (tmp_path / "empty.md").write_text(" ")
    (tmp_path / "long.md").write_text("é" * (1 << 20))
    blocks = blocks_of([str(tmp_path)], keep=())
    assert len(rows_of(blocks, "id")) == 4
    assert [(each.id, each.code) for each in refusals_of(blocks)] == [
        ("bad.md", "not_utf8"),
        ("empty.md", "empty_text"),
        ("long.md", "text_too_long"),
    ]


def test_the_sum_of_a_folder_of_texts_tells_of_every_change(tmp_path: Path) -> None:
    make_texts(tmp_path)

    def content() -> tuple[object, object]:
        [part] = check_sources(expand([str(tmp_path)]))
        spec = JobSpec(queue="q", output="/out", model="m", parts=(part.name,))
        with DuplicateIndex() as index:
            list(part.blocks(spec, index))
        assert part.content == part.read_content(lambda _: None)
        return part.content, part.size

    seen = {content()}
    (tmp_path / "a.md").write_text("# Thirst\n")
    seen.add(content())
    (tmp_path / "a.md").rename(tmp_path / "aa.md")
    seen.add(content())
    (tmp_path / "z.md").unlink()
    seen.add(content())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{0}/nothing", "holds nothing that a corpus is made of"),
        ("{0}/*.jsonl", "fits no file"),
        ("{0}/absent/*.jsonl", "no such folder"),
        ("hf://models/a/b", "is no address of a data set"),
        ("{0}/saved", "data-0.arrow: no such file, and state.json names it"),
        ("{0}/broken", "state.json"),
    ],
)
def test_what_is_no_corpus_is_one_sentence(tmp_path: Path, source: str, said: str) -> None:
    for folder, state in (
        ("saved", '{"_data_files": [{"filename": "data-0.arrow"}]}'),
        ("broken", "{"),
        ("nothing", None),
    ):
        (tmp_path / folder).mkdir()
        if state:
            (tmp_path / folder / "state.json").write_text(state)
    with pytest.raises(EmbedstreamError, match=said):
        blocks_of([source.format(tmp_path)])


def test_a_folder_and_a_pattern_in_a_bucket_are_their_objects(bucket: str, s3_server: S3Server) -> None:
    for name, text in {
        "c/a.jsonl": '{"id": "one", "text": "x"}',
        "c/lang=en/b.csv": "id,text\ntwo,y",
        "c/_x": "",
    }.items():
        s3_server.client().put_object(Bucket=bucket, Key=name, Body=text.encode())
    for name in ("docs/a.md", "docs/deep/b.md"):
        s3_server.client().put_object(Bucket=bucket, Key=name, Body=b"a text")

    def read(source: str) -> list[str]:
        return [id for (id,) in rows_of(blocks_of([f"s3://{bucket}/{source}"], keep=()), "id")]

    assert read("c") == read("c/") == ["one", "two"]
    assert read("c/**/*.csv") == ["two"]
    assert read("docs") == read("docs/**/*.md") == ["a.md", "deep/b.md"]


def test_a_folder_that_changes_while_it_is_listed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    is_file = Path.is_file

    def then_removed(path: Path) -> bool:
        found = is_file(path)
        path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", then_removed)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        expand([str(tmp_path)])


def test_outputs_that_lie_in_a_corpus_are_no_part_of_it(tmp_path: Path) -> None:
    texts = make_texts(tmp_path)
    for output in ("c.jsonl.vectors", "out"):
        (tmp_path / output).mkdir()
        (tmp_path / output / "README.md").write_text("a data set")
        pq.write_table(TABLE, tmp_path / output / "part-0.parquet")
    (tmp_path / "out" / "_manifest.json").write_text("{}")
    assert rows_of(blocks_of([str(tmp_path)], keep=()), "id") == [(name,) for name in sorted(texts)]
    assert len(expand([f"{tmp_path}/**/*.md"])) == 1
    assert len(rows_of(blocks_of([f"{tmp_path}/**/*.md"], keep=()), "id")) == 3
    for name in texts:
        (tmp_path / name).unlink()
    (tmp_path / "one.csv").write_text("id,text\n1,x\n")
    assert expand([str(tmp_path)]) == [f"{tmp_path}/one.csv"]
    assert expand([str(tmp_path / "out")]) == [f"{tmp_path}/out/part-0.parquet"], "unless it is asked for"


def read_by_others(path: Path) -> Iterator[pa.Table]:
    """The rows of a file by readers that nobody here wrote, all values as text."""
    name, text = str(path), dict.fromkeys(("id", "text", "lang"), polars.String)
    separator = "\t" if name.endswith(".tsv") else ","
    match path.suffix:
        case ".jsonl":
            yield polars.read_ndjson(name, schema=text).to_arrow()
            yield datasets.load_dataset("json", data_files=name, split="train").data.table
            yield duckdb.read_json(name, format="newline_delimited").to_arrow_table()
        case ".json":
            yield polars.read_json(name, schema=text).to_arrow()
            yield datasets.load_dataset("json", data_files=name, split="train").data.table
            yield duckdb.read_json(name, format="array").to_arrow_table()
        case ".csv" | ".tsv":
            yield polars.read_csv(name, separator=separator, infer_schema=False).to_arrow()
            yield datasets.load_dataset("csv", data_files=name, split="train", sep=separator).data.table
        case ".parquet":
            yield polars.read_parquet(name).to_arrow()
            yield datasets.load_dataset("parquet", data_files=name, split="train").data.table
            yield duckdb.read_parquet(name).to_arrow_table()
        case ".arrow":
            yield datasets.load_dataset("arrow", data_files=name, split="train").data.table
        case _:
            yield polars.read_ipc(name).to_arrow()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_that_datasets_polars_and_duckdb_see(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMATS[name](tmp_path / name)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = rows_of(blocks_of([str(tmp_path / name)]))
    for table in read_by_others(tmp_path / name):
        assert [(row["id"], row["text"], row["lang"]) for row in table.to_pylist()] == found


def test_files_of_text_may_be_named_one_by_one(tmp_path: Path) -> None:
    make_texts(tmp_path)
    names = [f"{tmp_path}/a.md", f"{tmp_path}/deep/b.md"]
    assert rows_of(blocks_of(names, keep=()), "id", "text") == [("a.md", "# First\n"), ("b.md", "second")]
    found = rows_of(blocks_of([f"{tmp_path}/deep/c.txt"], format="text", keep=()), "id", "text")
    assert found == [("c.txt", "third")]
    with pytest.raises(InputError, match=r"gone\.md: no such file"):
        blocks_of([f"{tmp_path}/gone.md"], keep=())


def test_a_folder_of_data_and_of_texts_is_asked_about(tmp_path: Path) -> None:
    texts = make_texts(tmp_path)
    (tmp_path / "kept.json").write_text('[{"id": 1, "text": "x"}]')
    said = r"holds data \(kept\.json: 1 files\) and texts \(a\.md: 4 files\): say which by a pattern \('.*\*\.json'\)"
    with pytest.raises(InputError, match=said):
        blocks_of([str(tmp_path)], keep=())
    assert rows_of(blocks_of([str(tmp_path)], format="text", keep=()), "id") == [(name,) for name in sorted(texts)]
    for name in texts:
        (tmp_path / name).unlink()
    (tmp_path / "README.md").write_text("about the data")
    assert rows_of(blocks_of([str(tmp_path)], keep=()), "id") == [("1",)]


def test_a_corpus_has_the_same_chunks_in_every_format(tmp_path: Path) -> None:
    chunking = Chunking(tokens=6, overlap=2)
    sums = set()
    for name in ("c.jsonl", "c.json", "c.csv", "c.arrow", "c.parquet"):
        FORMATS[name](tmp_path / name)
        blocks = blocks_of([str(tmp_path / name)], chunking=chunking)
        sums.add(tuple(block.sum for block in blocks))
    assert len(sums) == 1
    texts = {id: text for id, text, _ in EXPECTED}
    found = rows_of(blocks, "id", "start", "end", "text")
    assert len(found) > len(EXPECTED)
    assert all(texts[id][start:end] == text for id, start, end, text in found)
