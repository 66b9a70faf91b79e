"""Files as parts of a corpus, and parts as blocks."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedstream.corpus.columns import ColumnReader
from embedstream.corpus.cutting import cut_part
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.corpus.records import LONGEST_LINE_BYTES, Outcome, Record, RecordReader
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, Refusal, decode_block, encode_block
from embedstream.queue.refusals import Code
from embedstream.records import PartContent
from embedstream.settings import BLOCK_LIMITS
from embedstream_producer.corpus import check_sources, total_bytes
from embedstream_producer.options import Options, resolve_output


def make_spec(parts: Sequence[Part], **changed: Any) -> JobSpec:
    return JobSpec(queue="q", output="/out", model="m", parts=tuple(part.name for part in parts), **changed)


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def index() -> Iterator[DuplicateIndex]:
    with DuplicateIndex() as index:
        yield index


def ids(blocks: Iterable[Block]) -> list[str]:
    return [str(id) for block in blocks for id in block.rows.column("id").to_pylist()]


def refusals(blocks: Iterable[Block]) -> list[tuple[int, str]]:
    return [(refusal.row, refusal.code) for block in blocks for refusal in block.refused]


def test_rows_are_numbered_by_line_and_refusals_travel_with_them(tmp_path: Path, index: DuplicateIndex) -> None:
    path = write(
        tmp_path / "c.jsonl",
        "",
        {"id": "a", "text": "x"},
        "",
        "oops",
        {"id": "a", "text": "y"},
        "\r",
        {"id": 2, "text": "z"},
    )
    parts = check_sources([path])
    seen: list[Refusal] = []
    [block] = parts[0].blocks(make_spec(parts), index, seen.append)
    assert block.rows.column("row").to_pylist() == [1, 6]
    assert block.rows.column("id").to_pylist() == ["a", "2"]
    assert refusals([block]) == [(3, Code.INVALID_JSON), (4, Code.DUPLICATE_ID)]
    assert block.refused[1].message == "id a was used before, in line 2"
    assert block.refused[1].original == '{"id": "a", "text": "y"}'
    assert seen == list(block.refused)


def test_an_id_of_an_earlier_part_is_a_duplicate(tmp_path: Path, index: DuplicateIndex) -> None:
    first = write(tmp_path / "first.jsonl", {"id": "a", "text": "x"}, {"id": 7, "text": "x"})
    second = write(tmp_path / "second.jsonl", {"id": "b", "text": "x"}, {"id": "7", "text": "x"})
    parts = check_sources([first, second])
    spec = make_spec(parts)
    blocks = [block for part in parts for block in part.blocks(spec, index)]
    assert ids(blocks) == ["a", "7", "b"]
    assert blocks[1].refused[0].message == "id 7 was used before, in first.jsonl, line 2"


def test_a_duplicate_names_the_whole_path_where_files_share_a_name(tmp_path: Path, index: DuplicateIndex) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    sources = [write(tmp_path / folder / "c.jsonl", {"id": 7, "text": "x"}) for folder in ("a", "b")]
    parts = check_sources(sources)
    blocks = [block for part in parts for block in part.blocks(make_spec(parts), index)]
    assert blocks[1].refused[0].message == f"id 7 was used before, in {sources[0]}, line 1"


def test_a_refused_or_skipped_row_does_not_take_its_id(tmp_path: Path, index: DuplicateIndex) -> None:
    path = write(tmp_path / "c.jsonl", {"id": 1, "text": 5}, {"id": 1, "text": " "}, {"id": 1, "text": "x"})
    parts = check_sources([path])
    [block] = parts[0].blocks(make_spec(parts, empty="skip"), index)
    assert ids([block]) == ["1"]
    assert (len(block.refused), block.skipped) == (1, 1)


def test_reading_parts_again_gives_the_same_blocks(tmp_path: Path, index: DuplicateIndex) -> None:
    rows = [{"id": i % 900, "text": f"text {i} " * (i % 50), "k": "v" * i} for i in range(1500)]
    parts = check_sources([write(tmp_path / "a", *rows), write(tmp_path / "b", *rows[500:])])
    spec = make_spec(parts, keep=("k",))
    first = [list(part.blocks(spec, index)) for part in parts]
    assert len(first[0]) > 3
    assert first[1][0].refused
    unfinished = parts[0].blocks(spec, index)
    next(unfinished)
    again = [list(part.blocks(spec, index)) for part in parts]
    with DuplicateIndex() as fresh:
        elsewhere = [list(part.blocks(spec, fresh)) for part in parts]
    for other in (again, elsewhere):
        assert [[block.sum for block in blocks] for blocks in other] == [[b.sum for b in blocks] for blocks in first]
        assert [[block.number for block in blocks] for blocks in other] == [list(range(len(b))) for b in first]


def test_compression_and_byte_order_marks_change_no_block(tmp_path: Path) -> None:
    text = "".join(json.dumps({"id": i, "text": "words " * 20}) + "\r\n" for i in range(2000)).encode()
    sums = []
    for name, data in (("plain", text), ("bom", b"\xef\xbb\xbf" + text), ("gz", gzip.compress(text[:-2]))):
        (tmp_path / name).write_bytes(data)
        parts = check_sources([str(tmp_path / name)])
        with DuplicateIndex() as index:
            sums.append([block.sum for block in parts[0].blocks(make_spec(parts), index)])
    assert sums[0] == sums[1] == sums[2]


lines = st.one_of(
    st.builds(
        lambda id, text: json.dumps({"id": id, "text": text}),
        st.integers(0, 30),
        st.sampled_from(["", "x", "y" * 100_000]),
    ),
    st.sampled_from(
        ["", " ", "oops", "{}", '{"id": 1}', '{"id": [], "text": "x"}', "\x00", "[1]", '{"id": 5, "text": "\\ud800"}']
    ),
)


@settings(max_examples=60, deadline=None)
@given(corpus=st.lists(lines, max_size=60), size=st.integers(1, 20), empty=st.sampled_from(["error", "skip"]))
def test_blocks_do_not_depend_on_how_rows_are_batched(corpus: list[str], size: int, empty: str) -> None:
    spec = JobSpec(queue="q", output="/o", model="m", parts=("/c",), empty=empty)  # type: ignore[arg-type]
    reader = RecordReader(spec)
    outcomes: list[Outcome] = [reader.line(row, line.encode()) for row, line in enumerate(corpus)]
    batches = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
    with DuplicateIndex() as one, DuplicateIndex(pending_ids=3) as other:
        single = list(cut_part(0, ([outcome] for outcome in outcomes), spec, one))
        batched = list(cut_part(0, batches, spec, other))
    assert [block.sum for block in single] == [block.sum for block in batched]
    assert [block.rows for block in single] == [block.rows for block in batched]
    assert [block.refused for block in single] == [block.refused for block in batched]


@settings(max_examples=150, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.lists(lines.map(str.encode) | st.binary(max_size=30), max_size=30).map(b"\n".join),
        st.lists(lines.map(str.encode), max_size=30).map(b"\r\n".join),
    )
)
def test_every_line_that_is_not_blank_ends_once(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    blocks: list[Block] | None = None
    try:
        parts = check_sources([str(path)], format="jsonl")
        with DuplicateIndex() as index:
            blocks = list(parts[0].blocks(make_spec(parts, empty="skip"), index))
    except InputError as error:
        problem = str(error)
    if blocks is None:
        assert problem.startswith(f"{path}: ")
        return
    plain = re.sub(rb"^(?:\xef\xbb\xbf)+", b"", data, flags=re.MULTILINE)  # byte order marks are no part of a line
    wanted = [row for row, line in enumerate(plain.split(b"\n")) if line and not line.isspace()]
    ended = [row for block in blocks for row in block.rows.column("row").to_pylist()]
    ended += [row for row, _ in refusals(blocks)]
    assert len(ended) + sum(block.skipped for block in blocks) == len(wanted)
    assert len(set(ended)) == len(ended)
    assert set(ended) <= set(wanted)
    for block in blocks:
        fields = {
            k.encode(): v if isinstance(v, bytes) else str(v).encode() for k, v in encode_block(block).fields().items()
        }
        assert decode_block(fields, ()).refused == block.refused


def test_an_over_long_line_costs_only_itself(tmp_path: Path, index: DuplicateIndex) -> None:
    path = tmp_path / "c.jsonl"
    good = '{"id": "%s", "text": "x"}\n'
    path.write_text(good % "a" + '{"id": "b", "text": "' + "y" * (LONGEST_LINE_BYTES + 10) + '"}\n' + good % "c")
    parts = check_sources([str(path)])
    blocks = list(parts[0].blocks(make_spec(parts), index))
    assert ids(blocks) == ["a", "c"]
    assert refusals(blocks) == [(1, Code.LINE_TOO_LONG)]
    assert blocks[-1].rows.column("row").to_pylist()[-1] == 2


def test_large_kept_fields_make_smaller_blocks(tmp_path: Path, index: DuplicateIndex) -> None:
    path = write(tmp_path / "c.jsonl", *({"id": i, "text": "x", "k": "v" * 100_000} for i in range(10)))
    parts = check_sources([path])
    blocks = list(parts[0].blocks(make_spec(parts, keep=("k",)), index))
    assert max(block.rows.num_rows for block in blocks) * 100_000 <= BLOCK_LIMITS.text_bytes
    assert ids(blocks) == [str(i) for i in range(10)]


def test_progress_reaches_the_size_of_the_file(tmp_path: Path, index: DuplicateIndex) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"id": %d, "text": "x"}\n' % i for i in range(200_000))))
    parts = check_sources([str(path)])
    positions: list[int] = []
    for _ in parts[0].blocks(make_spec(parts), index, on_position=positions.append):
        pass
    assert len(positions) > 5
    assert positions == sorted(positions)
    assert positions[-1] == parts[0].size == path.stat().st_size == total_bytes(parts)


def test_standard_input_is_looked_at_and_loses_nothing(index: DuplicateIndex) -> None:
    data = b"\n\n" + b"".join(b'{"id": %d, "text": "x"}\n' % i for i in range(50_000))
    parts = check_sources(["-"], io.BytesIO(data))
    spec = make_spec(parts)
    assert spec.parts == ("-",)
    assert total_bytes(parts) is None
    assert parts[0].hint(spec) is None
    blocks = list(parts[0].blocks(spec, index))
    assert ids(blocks) == [str(i) for i in range(50_000)]
    assert parts[0].content == PartContent(None, hashlib.sha256(data).hexdigest()), "a stream has no size"
    assert blocks[0].rows.column("row")[0].as_py() == 2
    with pytest.raises(InputError, match="standard input: cannot be read a second time"):
        next(parts[0].blocks(spec, index))


def test_a_named_pipe_is_read_once(tmp_path: Path, index: DuplicateIndex) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b'{"id": 1, "text": "x"}\n',))
    writer.start()
    parts = check_sources([str(path)])
    assert ids(parts[0].blocks(make_spec(parts), index)) == ["1"]
    writer.join()
    with pytest.raises(InputError, match="a second time"):
        next(parts[0].blocks(make_spec(parts), index))


def test_an_empty_standard_input_has_no_records() -> None:
    with pytest.raises(InputError, match=r"^standard input: has no records$"):
        check_sources(["-"], io.BytesIO(b"\n"))


def test_what_cannot_be_a_corpus_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file$"):
        check_sources([str(tmp_path / "absent.jsonl")])
    with pytest.raises(InputError, match="cannot be read"):
        check_sources(["a\0b"])
    with pytest.raises(InputError, match=r"File name too long"):
        check_sources(["x" * 5000])
    with pytest.raises(InputError, match="has no records"):
        check_sources([write(tmp_path / "empty")])
    with pytest.raises(UsageError, match="no corpus given"):
        check_sources([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        check_sources([str(path)])


def test_one_file_under_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.jsonl", {"id": 1, "text": "x"})
    (tmp_path / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for sources in ([path, path], ["c.jsonl", path], ["./c.jsonl", "link.jsonl"], ["-", "-"]):
        with pytest.raises(UsageError, match=r"given twice|is the same file as"):
            check_sources(sources, io.BytesIO(b'{"id": 1, "text": "x"}'))


@pytest.mark.parametrize("corpus", [".", "./", "../docs/.", "sub/.."])
def test_vectors_of_the_folder_that_one_is_in_lie_beside_it(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs")
    options = Options((corpus,), None, None, None, "hashing", None, "0", {})
    assert resolve_output(options) == str(tmp_path / "docs.vectors")


def test_a_part_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.jsonl", {"id": 1, "text": "x"})
    monkeypatch.chdir(tmp_path)
    [part] = check_sources(["./c.jsonl"])
    assert (part.name, part.label) == (path, "./c.jsonl")


def test_a_file_of_other_fields_is_refused_before_the_job(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *({"id": i, "body": f"some text {i}"} for i in range(300)))
    parts = check_sources([path])
    with pytest.raises(InputError) as refused:
        check_sources([path], spec=make_spec(parts))
    assert str(refused.value) == (
        f'{path}: the first 100 rows are all refused: line 1: no field "text" (found: id, body); '
        f"use --text-field body: nothing was started"
    )
    assert parts[0].hint(make_spec(parts, text_field="body")) is None


def test_among_good_files_one_of_other_fields_gets_a_hint(tmp_path: Path) -> None:
    sources = [write(tmp_path / "c.jsonl", "id,text", "1,hello"), write(tmp_path / "d.jsonl", {"id": 1, "text": "x"})]
    bad, good = check_sources(sources, spec=make_spec(check_sources(sources)))
    assert "a corpus has one JSON object per line" in str(bad.advice)
    assert good.advice is None


def test_one_good_row_is_enough_for_no_hint(tmp_path: Path) -> None:
    parts = check_sources([write(tmp_path / "c.jsonl", "oops", {"id": 1, "text": "x"})])
    assert parts[0].hint(make_spec(parts)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": ("lang", "land", "meta.id")},
        {"title_field": "land"},
        {"task": "rerank", "keep": ("land",), "query_field": "land"},
    ],
)
def test_a_named_field_that_no_row_has_is_refused_with_those_near_it(tmp_path: Path, wrong: dict[str, Any]) -> None:
    rows = [{"id": i, "text": "x", "lang": "en", "null": None, "meta": {"id": i}} for i in range(300)]
    path, other = write(tmp_path / "c.jsonl", *rows), write(tmp_path / "d.jsonl", {"id": "d", "text": "x"})
    parts = check_sources([path, other])
    flags = {"title_field": "--title-field, '' for none", "query_field": "--query-field"}
    flag = next((flags[name] for name in wrong if name in flags), "--keep")
    with pytest.raises(InputError) as error:
        parts[0].hint(make_spec(parts, **wrong))
    assert str(error.value) == f"{path}: none of the first 100 rows has land ({flag}): did you mean lang?"
    right = make_spec(parts, keep=("lang", "null", "meta.id"))
    assert parts[0].hint(right) is None
    # Another file may lack it.
    assert str(parts[1].hint(right)).startswith(f"{other}: the first row does not have lang (--keep) or null (--keep)")


def test_a_stream_of_which_one_row_has_come_is_not_refused_for_a_kept_field() -> None:
    [part] = check_sources(["-"], io.BytesIO(b'{"id": 1, "text": "x"}'))
    assert part.hint(make_spec([part], keep=("lang",))) == (
        "standard input: the first row does not have lang (--keep): found: id, text"
    )


class Slow(io.RawIOBase):
    """A pipe into which a line at a time is written."""

    def __init__(self, *lines: bytes) -> None:
        self._lines = list(lines)

    def read(self, size: int = -1, /) -> bytes:  # noqa: ARG002
        return self._lines.pop(0) if self._lines else b""


def test_bad_rows_at_the_beginning_of_a_pipe_cost_only_themselves(index: DuplicateIndex) -> None:
    spec = JobSpec(queue="q", output="/o", model="m", parts=("-",))
    lines = [b"oops\n", b"x" * 600_000 + b"\n", *([b"oops\n"] * 90), b'{"id": 1, "text": "x"}\n', b"oops\n"]
    [part] = check_sources(["-"], Slow(*lines), spec=spec)
    assert part.advice is None
    [block] = part.blocks(spec, index)
    assert (ids([block]), [row for row, _ in refusals([block])]) == (["1"], [*range(92), 93])


def test_what_is_no_json_to_its_end_is_refused_however_short_it_is() -> None:
    spec = JobSpec(queue="q", output="/o", model="m", parts=("-",))
    with pytest.raises(InputError, match=r"standard input: the first 2 rows are all refused: .*: nothing was started$"):
        check_sources(["-"], Slow(b"hello\n", b"world\n"), spec=spec)


def test_two_named_pipes_are_two_parts(tmp_path: Path, index: DuplicateIndex) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for id, path in enumerate(paths):
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(b'{"id": %d, "text": "x"}\n' % id,)).start()
    parts = check_sources([str(path) for path in paths])
    assert ids(block for part in parts for block in part.blocks(make_spec(parts), index)) == ["0", "1"]


@pytest.mark.parametrize("value", [7, ["a"], {"a": 1}, True])
def test_a_pairs_first_that_is_no_text_is_refused_as_a_text_is(value: object) -> None:
    spec = JobSpec(queue="q", output="/o", model="m", parts=("c",), keep=("query",), query_field="query")
    row = {"id": "1", "text": "a text", "query": value}
    reader = RecordReader(spec)
    for outcome in (reader.line(0, json.dumps(row).encode()), reader.record(0, row)):
        assert isinstance(outcome, Refusal)
        assert outcome.code == "text_not_string"
        assert '"query"' in outcome.message
    assert isinstance(reader.line(0, json.dumps(row | {"query": "why?"}).encode()), Record)


def test_a_column_of_numbers_is_no_first_of_a_pair() -> None:
    spec = JobSpec(queue="q", output="/o", model="m", parts=("c",), keep=("query",), query_field="query")
    batch = pa.record_batch({"id": ["1", "2"], "text": ["a", "b"], "query": pa.array([7, None])})
    first, second = ColumnReader(spec, batch.schema, "c.parquet").judge(0, batch)
    assert isinstance(first, Refusal)
    assert first.code == "text_not_string"
    assert isinstance(second, Record)
