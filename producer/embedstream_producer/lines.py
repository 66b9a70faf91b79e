"""Bytes -> lines, in bounded memory: plain, gzip or Zstandard, from a file or a stream."""

from __future__ import annotations

import hashlib
import re
import select
import zlib
from collections.abc import Callable, Iterator
from io import FileIO, IOBase
from types import TracebackType
from typing import Protocol, Self, cast

import pyarrow as pa

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError

READ_BYTES = 256 * 1024
"""Read at once: far above the cost of a call, far below what matters in memory."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_GZIP_MEMBER = b"\x1f\x8b\x08"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""With what a frame begins that holds no data for us; pzstd and others put some in front."""
_BOM = b"\xef\xbb\xbf"
_BOMS = re.compile(rb"^(?:\xef\xbb\xbf)+", re.M)
_MARKS = bytes(ord(" " if bytes([byte]).isspace() else "x") for byte in range(256))
"""For `bytes.translate`: where lines are not blank."""
_SHORT_LINE = 8
"""Bytes: no record has fewer, so where lines have fewer on average many are blank, or bad."""
_MOSTLY = 16
"""So many lines for each byte that is not blank are mostly blank."""
_UNPACK = "unpack it first"
_REPACK = "unpack it, or compress it with gzip or zstd"
_CONVERT = "convert it to JSON lines or Parquet"
_FOREIGN = (
    (b"PAR1", "a Parquet file", "name the file itself, as Parquet cannot be read from a stream or compressed"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"!<arch>\n", "an ar archive", _UNPACK),
    (b"07070", "a cpio archive", _UNPACK),
    (b"BZh", "compressed with bzip2", _REPACK),
    (b"\xfd7zXZ\x00", "compressed with xz", _REPACK),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _REPACK),
    (b"\x1f\x9d", "compressed with compress", _REPACK),
    *((tag, "compressed with zlib", _REPACK) for tag in (b"x\x01", b"x\x9c", b"x\xda")),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", _REPACK),
    (b"\x1f\x8b", "compressed twice", "unpack it once"),
    (b"\x28\xb5\x2f\xfd", "compressed twice", "unpack it once"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it (iconv -f UTF-32 -t UTF-8)"),
    (b"{\x00\x00\x00", "UTF-32 text", "convert it (iconv -f UTF-32LE -t UTF-8)"),
    (b"\x00\x00\x00{", "UTF-32 text", "convert it (iconv -f UTF-32BE -t UTF-8)"),
    (b"{\x00", "UTF-16 text", "convert it (iconv -f UTF-16LE -t UTF-8)"),
    (b"\x00{", "UTF-16 text", "convert it (iconv -f UTF-16BE -t UTF-8)"),
    (b"\xff\xfe", "UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\x1e{", "a sequence of JSON texts (RFC 7464)", "remove its separators (tr -d '\\036')"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file (git lfs pull)"),
    (b"version https://hawser", "a Git LFS pointer, not the file itself", "fetch the file (git lfs pull)"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "fetch the file (git annex get)"),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"SQLite format 3\x00", "a SQLite database", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"%PDF-", "a PDF document", _CONVERT),
)
_HEAD_BYTES = 6
_TAR_HEADER = 512


class ByteStream(Protocol):
    """What lines are read from: a binary file, buffered or not."""

    def read(self, size: int, /) -> bytes | None: ...
    def close(self) -> None: ...


class _Source:
    """A raw stream that counts its bytes and takes the first ones back."""

    closed = False  # asked for by Arrow

    def __init__(self, raw: ByteStream, label: str) -> None:
        self._raw = raw
        self._read: Callable[[int], bytes | None] = getattr(raw, "read1", raw.read)
        self._label = label
        self._returned = b""
        self.position = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        if self._returned:
            data, self._returned = self._returned[:size], self._returned[size:]
        else:
            try:
                while (found := self._read(size)) is None:  # a pipe that somebody made non-blocking is not at its end
                    select.select([cast("FileIO", self._raw)], [], [])
                data = found
            except OSError as error:
                raise InputError(f"{self._label}: cannot be read ({error.strerror or error})") from error
            self.digest.update(data)
        self.position += len(data)
        return data

    def peek(self, size: int) -> bytes:
        """At least `size` first bytes, if there are so many; they will be read again."""
        data = _at_least(self.read, size)
        self.position -= len(data)
        self._returned = data
        return data

    def close(self) -> None:
        self._raw.close()


class LineStream:
    """The lines of one source."""

    def __init__(
        self, raw: ByteStream, label: str, *, longest: int = LONGEST_LINE_BYTES, read_bytes: int = READ_BYTES
    ) -> None:
        """Read `raw`, which is closed by `close`; `label` names it in errors.

        Raises:
            InputError: it is named or looks like something else than lines of text.
        """
        self._label = label
        self._longest = longest
        self._read_bytes = min(read_bytes, longest)
        self._source = _Source(raw, label)
        self._line = 1
        """The line that comes next."""
        self._tail = b""
        self.warning = ""
        """What is wrong with the source and did no harm; known once `batches` has come to its end."""
        try:
            self._format, self._read = self._decompressed(self._source.peek(_HEAD_BYTES))
            self._first = _at_least(self._plain, _TAR_HEADER, enough=b"\n")
            self._refuse_foreign(self._first)
        except InputError:
            raw.close()
            raise

    @property
    def position(self) -> int:
        """Bytes of the source consumed, before any decompression."""
        return self._source.position

    @property
    def sha256(self) -> str:
        """Of the bytes of the source, in hex: of all of them once `batches` has come to its end."""
        return self._source.digest.hexdigest()

    def batches(self) -> Iterator[tuple[int, list[bytes]]]:
        """Consecutive lines without their newlines, some at a time, with the place of the first, from 0.

        Where blank lines abound they are left out, so places tell of them. A line longer than the bound comes cut to
        one byte more than the bound, so its length tells.

        Raises:
            InputError: the source cannot be read to its end, or is no JSON Lines at all.
        """
        tail, in_long_line, judged = b"", False, False
        chunk = self._first or self._plain(self._read_bytes)
        while chunk:
            if in_long_line:
                _, newline, chunk = chunk.partition(b"\n")
                in_long_line = not newline
            if not in_long_line:
                for place, lines in self._cut(tail + chunk):
                    judged = judged or self._judge_first(lines)
                    yield place, lines
                tail = self._tail
                if len(tail) > self._longest:
                    judged = judged or self._judge_first([tail])
                    yield self._line - 1, [tail[: self._longest + 1]]
                    self._line += 1
                    tail, in_long_line = b"", True
            chunk = self._plain(self._read_bytes)
        if tail:
            if not judged:
                self._judge_first([tail])
            yield self._line - 1, [tail]

    def _cut(self, data: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """The whole lines of the data, as `batches` gives them; what follows the last is the `_tail`."""
        # One byte is found much faster than several. Within are marks where files were put together.
        if _BOM[:1] in data and (data.startswith(_BOM) or b"\n" + _BOM in data):
            data = _BOMS.sub(b"", data)
        count = data.count(b"\n")
        marks = data.translate(_MARKS) if count * _SHORT_LINE > len(data) else b""
        if count < _MOSTLY * marks.count(b"x") or not marks:
            lines = data.split(b"\n")
            self._tail = lines.pop()
            if len(data) > self._longest:
                lines = [line[: self._longest + 1] for line in lines]
            if lines:
                yield self._line - 1, lines
            self._line += count
            return
        # No list of a million empty lines is made.
        end, at = data.rfind(b"\n") + 1, 0
        self._tail = data[end:]
        while (found := marks.find(b"x", at, end)) >= 0:
            self._line += data.count(b"\n", at, found)
            begin, at = data.rfind(b"\n", 0, found) + 1, data.index(b"\n", found)
            yield self._line - 1, [data[begin : min(at, begin + self._longest + 1)]]
        self._line += data.count(b"\n", at)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decompressed(self, head: bytes) -> tuple[str, Callable[[int], bytes]]:
        """The name of the compression, if any, and what reads plain bytes."""
        if head.startswith(_GZIP):
            return "gzip", _Gunzip(self._source, self._left_out).read
        if head.startswith(_ZSTD) or _SKIPPABLE.match(head):
            stream = pa.CompressedInputStream(pa.PythonFile(cast("IOBase", self._source), mode="r"), "zstd")
            return "zstd", stream.read
        return "", self._source.read

    def _left_out(self, size: int) -> None:
        self.warning = f"the last {size:,} bytes are no gzip data and were left out, as gzip does"

    def _refuse_foreign(self, head: bytes) -> None:
        for magic, what, advice in _FOREIGN:
            if head.startswith(magic):
                raise InputError(f"{self._label}: is {what}, not JSON Lines: {advice}")
        if _is_tar(head):
            raise InputError(f"{self._label}: is a tar archive, not JSON Lines: {_UNPACK}")
        if head and not self._format and self._label.endswith((".gz", ".zst")):
            raise InputError(f"{self._label}: is not compressed as its name says: rename it, or compress it again")

    def _plain(self, size: int) -> bytes:
        try:
            return self._read(size)
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            if "too much memory" in str(error):
                raise InputError(
                    f"{self._label}: needs more than 128 MiB to be decompressed (it was made with zstd --long or "
                    f"--ultra): unpack it (zstd -d --long=31), or compress it again without these"
                ) from error
            raise InputError(
                f"{self._label}: {self._format} data is damaged or cut off after {self.position:,} bytes, near line "
                f"{self._line:,} ({error}): make or fetch the file again"
            ) from error

    def _judge_first(self, lines: list[bytes]) -> bool:
        """Whether there is a line with something on it; raises `InputError` if it begins another kind of JSON."""
        first = next((line for line in lines if line and not line.isspace()), None)
        if first is None:
            return False
        if first.lstrip().startswith(b"<"):
            raise InputError(f"{self._label}: is HTML or XML, not JSON Lines: fetch the data itself")
        if first.lstrip().startswith(b"["):
            raise InputError(
                f"{self._label}: is a JSON array, not JSON Lines (one object per line): "
                f"convert it (jq -c '.[]' array.json > lines.jsonl)"
            )
        if first.strip() == b"{":
            raise InputError(
                f"{self._label}: is JSON spread over lines, not JSON Lines (one object per line): "
                f"convert it (jq -c . spread.json > lines.jsonl)"
            )
        return True


class _Gunzip:
    """Reads as gzip(1) does: members one after the other, and what follows them and is none is left out."""

    def __init__(self, source: _Source, left_out: Callable[[int], None]) -> None:
        """`left_out` is told how many bytes at the end are no gzip data; zeros are padding."""
        self._source = source
        self._left_out = left_out
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._data = b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises `EOFError` and `zlib.error`."""
        while not self._member.eof or self._goes_on():
            data = self._data or self._source.read(READ_BYTES)
            plain = self._member.decompress(data, size)
            self._data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if plain:
                return plain
            if not data and not self._member.eof:
                raise EOFError("its end is missing")
        return b""

    def _goes_on(self) -> bool:
        """Whether another member follows."""
        rest = self._data.lstrip(b"\0")
        while len(rest) < len(_GZIP) and (more := self._source.read(READ_BYTES)):
            rest = (rest + more).lstrip(b"\0")
        if rest == _GZIP[:1]:
            raise EOFError("its end is missing")
        if rest.startswith(_GZIP):
            self._data, self._member = rest, zlib.decompressobj(zlib.MAX_WBITS | 16)
            return True
        self._data, size = b"", 0
        while rest:
            if _GZIP_MEMBER in rest:
                raise zlib.error("between two members are bytes that are no gzip data")
            more = self._source.read(READ_BYTES)
            held = rest[1 - len(_GZIP_MEMBER) :] if more else b""
            rest, size = held + more, size + len(rest) - len(held)
        if size:
            self._left_out(size)
        return False


def _is_tar(head: bytes) -> bool:
    """Whether it begins with the header of a tar archive: its sum is right, with blanks in place of the sum itself."""
    sum_of = head[148:156].strip(b" \0")
    return (
        len(head) >= _TAR_HEADER
        and re.fullmatch(rb"[0-7]+", sum_of) is not None
        and int(sum_of, 8) == sum(head[:148]) + 8 * ord(" ") + sum(head[156:_TAR_HEADER])
    )


def _at_least(read: Callable[[int], bytes], size: int, enough: bytes | None = None) -> bytes:
    """At least `size` bytes, fewer at the end and once there is `enough` in them: pipes give what they have."""
    data = b""
    while len(data) < size and not (enough and enough in data) and (more := read(READ_BYTES)):
        data += more
    return data
