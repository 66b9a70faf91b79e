"""Bytes of all sorts as lines."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError
from embedstream_producer.lines import LineStream
from embedstream_producer.plain import ByteStream, PlainStream


def line_stream(raw: ByteStream, label: str, **bounds: int) -> LineStream:
    return LineStream(PlainStream(raw, label), label, **bounds)


def gz(data: bytes) -> bytes:
    """The same whenever it is made: processes that share the tests compare their ids, which show the data."""
    return gzip.compress(data, mtime=0)


TEXT = b"".join(b'{"id": %d, "text": "some words"}\n' % i for i in range(40_000))
LINES = TEXT.split(b"\n")[:-1]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def all_lines(stream: LineStream) -> list[bytes]:
    """Of a stream, with the blank ones that are left out."""
    lines: list[bytes] = []
    for place, some in stream.batches():
        lines += [b""] * (place - len(lines)) + some
    return lines


def plain(lines: list[bytes]) -> list[bytes]:
    """Without what is no promise: what is on blank lines, and how many come last."""
    lines = [b"" if line.isspace() else line for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def lines_of(data: bytes, label: str = "corpus", longest: int = 1 << 20, read_bytes: int = 1 << 18) -> list[bytes]:
    with line_stream(io.BytesIO(data), label, longest=longest, read_bytes=read_bytes) as stream:
        lines = all_lines(stream)
        assert stream.plain.position == len(data)
        assert stream.plain.sha256 == hashlib.sha256(data).hexdigest(), "the bytes as they lie"
        return lines


class Trickle(io.RawIOBase):
    """A pipe that gives a byte or a few at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size = data, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        size = min(self._size, size) if size >= 0 else self._size
        data, self._data = self._data[:size], self._data[size:]
        return data


@pytest.mark.parametrize(
    "data",
    [
        TEXT,
        TEXT.removesuffix(b"\n"),
        b"\xef\xbb\xbf" + TEXT,
        gz(TEXT),
        gz(TEXT[:1000]) + gz(TEXT[1000:]),
        gz(TEXT) + b"\0" * 512,
        gz(b"\xef\xbb\xbf" + TEXT),
        zstd(TEXT),
        zstd(TEXT[:1000]) + zstd(b"") + zstd(TEXT[1000:]),
        zstd(b"\xef\xbb\xbf" + TEXT),
    ],
    ids=[
        "plain",
        "no newline at the end",
        "BOM",
        "gz",
        "gz members",
        "gz padded",
        "gz BOM",
        "zst",
        "zst frames",
        "zst BOM",
    ],
)
def test_every_kind_of_input_gives_the_same_lines(data: bytes) -> None:
    assert lines_of(data) == LINES


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_slow_pipe_loses_nothing(size: int) -> None:
    for data in (b"\xef\xbb\xbf" + TEXT[:200], gz(TEXT[:200]), zstd(TEXT[:200])):
        with line_stream(Trickle(data, size), "pipe") as stream:
            assert b"\n".join(all_lines(stream)) + b"\n" in (
                TEXT[:200],
                TEXT[:200] + b"\n",
            )
            assert stream.plain.sha256 == hashlib.sha256(data).hexdigest()


def test_a_pipe_that_is_made_non_blocking_is_read_to_its_end() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    ready = threading.Event()

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            pipe.write(b"first\n")
            ready.wait(10)
            pipe.write(b"second\n")

    writer = threading.Thread(target=write)
    writer.start()
    with line_stream(io.FileIO(reading), "pipe") as stream:
        batches = stream.batches()
        assert next(batches) == (0, [b"first"])
        ready.set()
        assert next(batches) == (1, [b"second"])
        assert list(batches) == []
    writer.join()


def test_carriage_returns_stay_for_the_json_reader() -> None:
    assert lines_of(b"1\r\n\r\n2\r\n") == [b"1\r", b"\r", b"2\r"]


def test_blank_lines_keep_their_place() -> None:
    assert lines_of(b"\n\n1\n\n2") == [b"", b"", b"1", b"", b"2"]


@given(
    runs=st.lists(
        st.tuples(st.sampled_from([b"x", b" y", b"z" * 30, b"\r", b"  "]), st.integers(0, 300), st.booleans()),
        max_size=8,
    ),
    read_bytes=st.integers(1, 500),
)
def test_lines_among_many_blank_ones_keep_their_place(runs: list[tuple[bytes, int, bool]], read_bytes: int) -> None:
    data = b"first\n" + b"".join(line + (b" \n" if spaces else b"\n") * count for line, count, spaces in runs)
    assert plain(lines_of(data, longest=20, read_bytes=read_bytes)) == plain([line[:21] for line in data.split(b"\n")])


def test_a_million_blank_lines_are_no_list() -> None:
    data = (b"\n" * 1_000_000 + b"{}") * 3 + b" \n" * 1_000_000
    with line_stream(io.BytesIO(gz(data)), "corpus") as stream:
        batches = list(stream.batches())
    found = [(place + at, line) for place, lines in batches for at, line in enumerate(lines) if line.strip()]
    assert found == [(1_000_000, b"{}"), (2_000_000, b"{}"), (3_000_000, b"{} ")]
    assert sum(len(lines) for _, lines in batches) < 10_000


@given(
    parts=st.lists(st.sampled_from([b"", b"a", b"bb", b"c" * 9, b"d" * 10, b"e" * 11, b"f" * 40, b"\r"]), max_size=12),
    end=st.sampled_from([b"", b"\n"]),
    read_bytes=st.integers(1, 50),
)
def test_over_long_lines_are_cut_to_one_byte_above_the_bound(parts: list[bytes], end: bytes, read_bytes: int) -> None:
    data = b"x\n" + b"\n".join(parts) + end
    expected = [line[:11] for line in data.split(b"\n")]
    if not expected[-1]:
        expected.pop()
    assert plain(lines_of(data, longest=10, read_bytes=read_bytes)) == plain(expected)


@given(data=st.binary(max_size=300), read_bytes=st.integers(1, 64), longest=st.integers(1, 64))
def test_any_bytes_end_as_lines_or_as_one_clear_error(data: bytes, read_bytes: int, longest: int) -> None:
    try:
        lines: list[bytes] | None = lines_of(data, longest=longest, read_bytes=read_bytes)
    except InputError as error:
        problem = str(error)
        lines = None
    if lines is None:
        assert problem.startswith("corpus: ")
    else:
        expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert plain(lines) == plain([line[: longest + 1] for line in expected])


@pytest.mark.holds("Bounded")
def test_a_line_far_over_the_bound_takes_no_memory_for_its_rest() -> None:
    class Endless(io.RawIOBase):
        left = 2000

        def read(self, size: int = -1, /) -> bytes:
            self.left -= 1
            return b"x" * size if self.left > 0 else b"\nlast\n" if self.left == 0 else b""

    with line_stream(Endless(), "endless", longest=100_000) as stream:
        assert [len(line) for line in all_lines(stream)] == [100_001, 4]


@pytest.mark.parametrize("data", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", gz(b""), zstd(b"\n")])
def test_an_input_without_records_has_only_blank_lines(data: bytes) -> None:
    assert plain(lines_of(data)) == []


@pytest.mark.parametrize("cut", [-1, -9, 20])
@pytest.mark.parametrize(("format", "packed"), [("gzip", gz(TEXT)), ("zstd", zstd(TEXT))])
def test_an_archive_that_is_cut_off_names_file_and_position(format: str, packed: bytes, cut: int) -> None:
    with pytest.raises(InputError, match=rf"^corpus: {format} data is damaged or cut off after [\d,]+ bytes"):
        lines_of(packed[:cut])


def test_a_damaged_archive_names_file_and_position() -> None:
    packed = gz(TEXT)
    middle = len(packed) // 2
    with pytest.raises(InputError, match=r"^corpus: gzip data is damaged"):
        lines_of(packed[:middle] + b"\xff" * 64 + packed[middle + 64 :])
    with pytest.raises(InputError, match=r"^corpus: zstd data is damaged"):
        lines_of(zstd(TEXT) + b"garbage")


@pytest.mark.parametrize("label", ["corpus.jsonl.gz", "corpus.jsonl.zst"])
def test_a_file_that_is_not_compressed_as_named_is_refused(label: str) -> None:
    with pytest.raises(InputError, match="not compressed as its name says"):
        lines_of(TEXT, label)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PAR1....", "a Parquet file"),
        (b"PK\x03\x04....", "a zip archive"),
        ("{}\n".encode("utf-16"), "UTF-16"),
        ("{}\n".encode("utf-16-le"), "UTF-16 .*LE"),
        ("{}\n".encode("utf-16-be"), "UTF-16 .*BE"),
        ("{}\n".encode("utf-32"), "UTF-32"),
        ("{}\n".encode("utf-32-le"), "UTF-32 .*LE"),
        ("{}\n".encode("utf-32-be"), "UTF-32 .*BE"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"\n  <HTML><BODY>404</BODY></HTML>", "HTML or XML"),
        (b"<Error><Code>AccessDenied</Code></Error>", "HTML or XML"),
        (zlib.compress(b"{}\n"), "compressed with zlib"),
        (b"\x1e{}\n", "a sequence of JSON texts"),
        (b'{\n  "id": 1\n}\n', "JSON spread over lines.*jq"),
        (gz(b"PK\x03\x04...."), "a zip archive"),
    ],
)
def test_other_formats_are_named_with_the_way_out(data: bytes, what: str) -> None:
    with pytest.raises(InputError, match=rf"^corpus: is {what}"):
        lines_of(data, longest=4096)


def test_a_stream_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(TEXT)
    raw = path.open("rb", buffering=0)
    with line_stream(raw, "corpus") as stream:
        batches = stream.batches()
        next(batches)
        os.close(raw.fileno())
        with pytest.raises(InputError, match=r"^corpus: cannot be read \(Bad file descriptor\)"):
            list(batches)
        os.dup2(os.open(path, os.O_RDONLY), raw.fileno())  # so that closing it closes something


PEAK = """
import resource, sys
from pathlib import Path
from embedstream_producer.lines import LineStream
from embedstream_producer.plain import PlainStream

def read(path):
    with LineStream(PlainStream(Path(path).open("rb", buffering=0), path), path) as stream:
        return [len(line) for _, lines in stream.batches() for line in lines]

read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lengths = read(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *lengths)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compress", [lambda data: gzip.compress(data, 1), zstd], ids=["gzip", "zstd"])
def test_an_archive_that_unpacks_to_one_endless_line_takes_the_memory_of_the_bound(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    small, bomb = tmp_path / "small", tmp_path / "bomb"
    small.write_bytes(compress(b'{"id": 1}\n' * 1000))
    bomb.write_bytes(compress(b" " * 512 * 1024 * 1024 + b"\n{}\n"))
    assert bomb.stat().st_size < 4 * 1024 * 1024
    done = subprocess.run([sys.executable, "-c", PEAK, small, bomb], capture_output=True, text=True, check=True)
    kib, *lengths = map(int, done.stdout.split())
    assert lengths == [LONGEST_LINE_BYTES + 1, 2]
    assert kib < 8 * LONGEST_LINE_BYTES // 1024, f"{kib} KiB more"
