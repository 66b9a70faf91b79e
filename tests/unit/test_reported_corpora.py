"""Corpora that other tools were reported to fail at: each test carries the name of its report."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.oddities import BOM, gz, zstd, zstd_frame, zstd_skippable
from lab.s3 import S3Server

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.parquet_pages import read_pages
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream_producer.corpus import check_sources, part_name

ROWS = [{"id": f"row{row}", "text": f"text {row}"} for row in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(*sources: Path | str) -> tuple[list[str], int]:
    """The ids of a corpus, and how many rows are refused."""
    names = [str(source) for source in sources]
    spec = JobSpec(queue="q", output="/out", model="m", parts=tuple(map(part_name, names)))
    with DuplicateIndex() as index:
        blocks = [block for part in check_sources(names, spec=spec) for block in part.blocks(spec, index)]
    return [str(id) for block in blocks for id in block.rows["id"].to_pylist()], sum(len(b.refused) for b in blocks)


ALL = [str(row["id"]) for row in ROWS], 0


@pytest.mark.parametrize("rest", [b"\r\n", b"junk" * 1000, b"\0" * 700 + b"\n", b"\x1e\x8b"], ids=repr)
def test_parsedmarc_429_what_follows_a_whole_gzip_is_left_out_with_a_warning(
    rest: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gz(LINES[:1000]) + gz(LINES[1000:]) + rest)
    assert read(path) == ALL
    [warning] = caplog.messages
    size = len(rest.lstrip(b"\0"))
    assert warning == f"{path}: the last {size:,} bytes are no gzip data and were left out, as gzip does"


def test_parsedmarc_429_what_follows_a_gzip_of_csv_is_told_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.csv.gz"
    path.write_bytes(gz(b"id,text\n1,a\n") + b"junk")
    assert read(path) == (["1"], 0)
    assert caplog.messages == [f"{path}: the last 4 bytes are no gzip data and were left out, as gzip does"]


def test_parsedmarc_429_zeros_after_a_gzip_are_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.jsonl.gz"
    for padding in (512, 3 << 20):
        path.write_bytes(gz(LINES[:1000]) + b"\0" * padding + gz(LINES[1000:]) + b"\0" * padding)
        assert read(path) == ALL
    assert not caplog.messages


def test_parsedmarc_429_what_is_cut_off_is_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    whole = gz(LINES)
    for end in (1, 2, 9, 20, len(whole) - 1):
        path.write_bytes(whole + whole[:end])
        with pytest.raises(InputError, match="gzip data is damaged or cut off"):
            read(path)


@pytest.mark.parametrize("between", [b"\r\n", b"j" * (256 * 1024 - 1)], ids=len)
def test_parsedmarc_429_rows_behind_junk_are_not_left_out(between: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gz(LINES[:1000]) + between + gz(LINES[1000:]))
    with pytest.raises(InputError, match="between two members are bytes that are no gzip data"):
        read(path)


@pytest.mark.parametrize("name", ["c.jsonl.zst", "c.jsonl"])
def test_arctic_shift_19_skippable_and_several_zstd_frames_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    cut, larger = LINES.index(b"\n") + 7, zstd_skippable(300_000, kind=15)
    for data in (
        zstd_skippable(4) + zstd(LINES),
        larger + zstd(LINES[:cut]) + zstd_skippable(0) + larger + zstd(LINES[cut:]) + zstd_skippable(9),
        b"".join(zstd(LINES[at : at + 5]) for at in range(0, len(LINES), 5)),
    ):
        path.write_bytes(data)
        assert read(path) == ALL


def test_python_zstandard_157_a_long_window_is_read_within_a_bound_and_else_said(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(zstd_frame(LINES, window_log=27))
    assert read(path) == ALL
    for data in (zstd_frame(LINES, window_log=28), zstd(LINES) + zstd_frame(LINES, window_log=31)):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"needs more than 128 MiB to be decompressed .*\(zstd -d --long=31\)"):
            read(path)


def empty_parquet(path: Path, columns: dict[str, pa.DataType]) -> None:
    pq.write_table(pa.table({name: pa.array([], type) for name, type in columns.items()}), path)


EMPTY: dict[str, Callable[[Path], object]] = {
    "nothing.jsonl": lambda path: path.write_bytes(b""),
    "blank.jsonl": lambda path: path.write_bytes(b"\n \r\n"),
    "bom.jsonl": lambda path: path.write_bytes(BOM),
    "packed.jsonl.gz": lambda path: path.write_bytes(gz(b"")),
    "not-even-packed.jsonl.gz": lambda path: path.write_bytes(b""),
    "packed.jsonl.zst": lambda path: path.write_bytes(zstd(b"\n")),
    "skippable.jsonl.zst": lambda path: path.write_bytes(zstd_skippable(8)),
    "typed.parquet": lambda path: empty_parquet(path, {"id": pa.string(), "text": pa.string()}),
    "pandas.parquet": lambda path: empty_parquet(path, {"id": pa.null(), "text": pa.null()}),
    "no-columns.parquet": lambda path: empty_parquet(path, {}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_doris_1594_an_empty_part_among_others_counts_as_one_of_no_rows(name: str, tmp_path: Path) -> None:
    empty, other, last = tmp_path / name, tmp_path / "z.jsonl", tmp_path / "zz.jsonl"
    EMPTY[name](empty)
    cut = LINES.index(b"\n", 1000) + 1
    other.write_bytes(LINES[:cut])
    last.write_bytes(LINES[cut:])
    names = [str(empty), str(other)]
    spec = JobSpec(queue="q", output="/out", model="m", parts=tuple(names))
    first, second = check_sources(names, spec=spec)
    assert first.advice == f"{empty}: has no records: it counts as a part of 0 rows"
    assert second.advice is None
    with DuplicateIndex() as index:
        assert list(first.blocks(spec, index)) == []
    assert first.content is not None
    assert first.content.bytes == empty.stat().st_size
    assert read(other, empty, last) == ALL


def test_doris_1594_a_corpus_without_any_row_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in EMPTY]
    for path in paths:
        EMPTY[path.name](path)
    with pytest.raises(InputError, match=r"nothing\.jsonl: has no records$"):
        read(*paths)


def test_llama_index_10369_a_name_that_is_no_utf_8_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    (folder / "c.jsonl").write_bytes(LINES)
    odd = tmp_path / os.fsdecode(b"c\xe9.jsonl")
    odd.write_bytes(LINES)
    for source in (odd, folder / "c.jsonl"):
        with pytest.raises(UsageError, match=r"\\udc(e9|ff).*name is not UTF-8: rename it"):
            read(source)
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="name is not UTF-8: rename it"):
        read(Path("c.jsonl"))
    (tmp_path / "link.jsonl").symlink_to(odd)
    assert read(tmp_path / "link.jsonl") == ALL


def tar(data: bytes, format: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as archive:
        member = tarfile.TarInfo("c.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def tar_of_seventh_edition(data: bytes) -> bytes:
    """Without the word `ustar`."""
    made = bytearray(tar(data, tarfile.USTAR_FORMAT))
    made[257:512] = bytes(255)
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made[:512])
    return bytes(made)


def zipped(data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("c.jsonl", data)
    return packed.getvalue()


ARCHIVES = {
    "a tar archive": tar(LINES, tarfile.GNU_FORMAT),
    "a tar archive (pax)": tar(LINES, tarfile.PAX_FORMAT),
    "a tar archive (v7)": tar_of_seventh_edition(LINES),
    "a zip archive": zipped(LINES),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + LINES,
    "a cpio archive": b"070701" + LINES,
    "an ar archive": b"!<arch>\n" + LINES,
    "compressed with bzip2": b"BZh91AY" + LINES,
    "compressed with xz": b"\xfd7zXZ\x00" + LINES,
    "compressed with lz4": b"\x04\x22\x4d\x18" + LINES,
}


@pytest.mark.parametrize("pack", [bytes, gz, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("what", ARCHIVES)
def test_kgx_347_an_archive_within_any_compression_is_named(
    what: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(pack(ARCHIVES[what]))
    with pytest.raises(InputError, match=rf"c\.jsonl\.gz: is {what.partition(' (')[0]}, no corpus: unpack it"):
        read(path)


@pytest.mark.parametrize("outer", [gz, zstd], ids=["gzip", "zstd"])
@pytest.mark.parametrize("inner", [gz, zstd], ids=["gzip", "zstd"])
def test_kgx_347_what_is_compressed_twice_is_said_to_be(
    inner: Callable[[bytes], bytes], outer: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl.gz").write_bytes(outer(inner(LINES)))
    with pytest.raises(InputError, match="is compressed twice"):
        read(tmp_path / "c.jsonl.gz")


@pytest.mark.parametrize("pack", [bytes, gz], ids=["plain", "gzip"])
def test_jsonlines_68_byte_order_marks_of_files_that_were_put_together_are_no_part_of_rows(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    lines = LINES.splitlines(keepends=True)
    for size in (1, 10, 299):
        path.write_bytes(pack(b"".join(BOM + b"".join(lines[at : at + size]) for at in range(0, 300, size))))
        assert read(path) == ALL
    path.write_bytes(pack(BOM + BOM + LINES.removesuffix(b"\n") + b"\n" + BOM))
    assert read(path) == ALL


def test_jsonlines_68_marks_between_pieces_that_are_read_at_once_are_found(tmp_path: Path) -> None:
    filler = b'{"id": "%s", "text": "' + b"x" * 262_100
    for more in range(40, 48):
        first = filler % b"a" + b"x" * more + b'"}\n'
        (tmp_path / "c.jsonl").write_bytes(first + BOM + b'{"id": "b", "text": "y"}')
        assert read(tmp_path / "c.jsonl") == (["a", "b"], 0)


def test_jsonlines_68_a_mark_within_a_text_stays(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "one\ufefftwo"}\n', encoding="utf-8")
    spec = JobSpec(queue="q", output="/out", model="m", parts=("c",))
    [part] = check_sources([str(tmp_path / "c.jsonl")])
    with DuplicateIndex() as index:
        [block] = part.blocks(spec, index)
    assert block.rows["text"].to_pylist() == ["one\ufefftwo"]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet", "c.zst"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(name: str, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    (tmp_path / name).write_bytes(pointer)
    with pytest.raises(InputError, match=r"is a Git LFS pointer, not .*: fetch the file \(git lfs pull\)$"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"/annex/objects/SHA256E-s5--0.jsonl\n")
    with pytest.raises(InputError, match="git-annex pointer"):
        read(tmp_path / name)


def test_what_is_no_json_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("id,text\n1,hello\n2,world\n")
    with pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: the first 3 rows are all refused: line ")
    assert str(refused.value).endswith("; a corpus has one JSON object per line: nothing was started")


def with_page_statistics(path: Path, texts: list[str]) -> None:
    """A file of one page a row, in whose headers other writers would repeat the text as least and greatest value."""
    table = pa.table({"id": [f"r{row}" for row in range(len(texts))], "text": texts})
    plain: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    pq.write_table(table, path, **plain, write_batch_size=1, data_page_size=1)
    whole, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(1)
    at = column.data_page_offset
    end, pages = at + column.total_compressed_size, b""
    sizes = column.total_uncompressed_size, column.total_compressed_size
    for page, text in zip(read_pages(lambda at, size: whole[at : at + size], column), texts, strict=True):
        header, value = whole[at : page.at], varint(len(text)) + text.encode()
        statistics = b"\x1c\x58" + value + b"\x18" + value + b"\0"  # field 5 of the page's, of which 5 and 6
        at = page.at + page.stored
        assert header.endswith(b"\x1c\0\0\0"), "statistics that say nothing"
        pages += header[:-4] + statistics + b"\0\0" + whole[page.at : at]
    more = len(pages) - column.total_compressed_size
    before, after = (b"".join(b"\x16" + varint(2 * (size + more)) for size in sizes) for more in (0, more))
    footer = whole[end:-8]
    assert footer.count(before) == 1
    footer = footer.replace(before, after)
    path.write_bytes(whole[: column.data_page_offset] + pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


@pytest.mark.parametrize("size", [7_000_000, 9_000_000])
def test_arrow_46404_a_value_that_statistics_repeat_costs_its_row_alone(size: int, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    with_page_statistics(path, ["a", "x" * size, "b", "y" * size, "c"])
    if size > 8_388_608:
        with pytest.raises(OSError, match="Deserializing page header failed"):
            pq.read_table(path)
    assert read(path) == (["r0", "r2", "r4"], 2)


def test_arrow_46404_an_object_loses_that_row_alone_too_and_its_sum_is_that_of_its_bytes(
    tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    path, source = tmp_path / "c.parquet", f"s3://{bucket}/c.parquet"
    with_page_statistics(path, ["a", "b", "x" * 9_000_000, "c", "y" * 9_000_000, "d"])
    s3_server.client().put_object(Bucket=bucket, Key="c.parquet", Body=path.read_bytes())
    assert read(source) == (["r0", "r1", "r3", "r5"], 2)
    for each in (str(path), source):
        spec = JobSpec(queue="q", output="/out", model="m", parts=(each,))
        [part] = check_sources([each], spec=spec)
        for _ in part.outcomes(spec):
            pass
        assert part.content is not None
        assert part.content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
