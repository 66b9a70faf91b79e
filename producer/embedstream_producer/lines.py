"""Bytes -> lines, in bounded memory: plain, gzip or Zstandard, from a file or a stream."""

from __future__ import annotations

import gzip
import hashlib
import select
import zlib
from collections.abc import Callable, Iterator
from io import FileIO, IOBase
from types import TracebackType
from typing import BinaryIO, Protocol, Self, cast

import pyarrow as pa

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError

READ_BYTES = 256 * 1024
"""Read at once: far above the cost of a call, far below what matters in memory."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 6
_BOM = b"\xef\xbb\xbf"
_MARKS = bytes(ord(" " if bytes([byte]).isspace() else "x") for byte in range(256))
"""For `bytes.translate`: where lines are not blank."""
_SHORT_LINE = 8
"""Bytes: no record has fewer, so where lines have fewer on average many are blank, or bad."""
_MOSTLY = 16
"""So many lines for each byte that is not blank are mostly blank."""
_FOREIGN = (
    (b"PAR1", "a Parquet file", "name the file itself, as such a one cannot be read from a stream or compressed"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"BZh", "compressed with bzip2", "unpack it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it, or compress it with gzip or zstd"),
    (b"\xff\xfe", "UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
)


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
        try:
            self._format, self._read = self._decompressed(self._source.peek(_HEAD_BYTES))
            self._first = _at_least(self._plain, _HEAD_BYTES)
            for magic, what, advice in _FOREIGN:
                if self._first.startswith(magic):
                    raise InputError(f"{label}: is {what}, not JSON Lines: {advice}")
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
        chunk = self._first.removeprefix(_BOM) or self._plain(self._read_bytes)
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
        if not (judged or self._judge_first([tail])):
            raise InputError(f"{self._label}: has no records")
        if tail:
            yield self._line - 1, [tail]

    def _cut(self, data: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """The whole lines of the data, as `batches` gives them; what follows the last is the `_tail`."""
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
            return "gzip", gzip.GzipFile(fileobj=cast("BinaryIO", self._source)).read1
        if head.startswith(_ZSTD):
            stream = pa.CompressedInputStream(pa.PythonFile(cast("IOBase", self._source), mode="r"), "zstd")
            return "zstd", stream.read
        for suffix in (".gz", ".zst"):
            if head and self._label.endswith(suffix):
                raise InputError(f"{self._label}: is not compressed as its name says: rename it, or compress it again")
        return "", self._source.read

    def _plain(self, size: int) -> bytes:
        try:
            return self._read(size)
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            raise InputError(
                f"{self._label}: {self._format} data is damaged or cut off after {self.position:,} bytes, near line "
                f"{self._line:,} ({error}): make or fetch the file again"
            ) from error

    def _judge_first(self, lines: list[bytes]) -> bool:
        """Whether there is a line with something on it; raises `InputError` if it begins another kind of JSON."""
        first = next((line for line in lines if line and not line.isspace()), None)
        if first is None:
            return False
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


def _at_least(read: Callable[[int], bytes], size: int) -> bytes:
    """At least `size` bytes, fewer only at the end: pipes give what they have."""
    data = b""
    while len(data) < size and (more := read(READ_BYTES)):
        data += more
    return data
