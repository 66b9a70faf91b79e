"""Bytes as a format reads them: plain, gzip or Zstandard, from a file or a stream, in bounded memory."""

from __future__ import annotations

import hashlib
import re
import select
import zlib
from collections.abc import Callable
from io import FileIO, IOBase
from typing import Protocol, cast

import pyarrow as pa

from embedstream.errors import InputError

READ_BYTES = 256 * 1024
"""Read at once: far above the cost of a call, far below what matters in memory."""

HEAD_BYTES = 64 * 1024
"""By so many first bytes, or by a first line, a format is recognized."""
_FIRST_LINE = re.compile(rb"[^\s\xef\xbb\xbf][^\r\n]*[\r\n]")
"""One with something on it."""
_TAR_HEADER = 512

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_GZIP_MEMBER = b"\x1f\x8b\x08"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""With what a frame begins that holds no data for us; pzstd and others put some in front."""
_MAGIC_BYTES = 6
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
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"SQLite format 3\x00", "a SQLite database", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"%PDF-", "a PDF document", _CONVERT),
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
                while (found := self._read(size)) is None:  # a non-blocking pipe, not its end
                    select.select([cast("FileIO", self._raw)], [], [])
                data = found
            except OSError as error:
                raise InputError(f"{self._label}: cannot be read ({error.strerror or error})") from error
            self.digest.update(data)
        self.position += len(data)
        return data

    def peek(self, size: int) -> bytes:
        """At least `size` first bytes, if there are so many; they will be read again."""
        data = at_least(self.read, size)
        self.position -= len(data)
        self._returned = data
        return data

    def close(self) -> None:
        self._raw.close()


class PlainStream:
    """The bytes of one source, decompressed."""

    closed = False  # asked for by Arrow

    def __init__(self, raw: ByteStream, label: str) -> None:
        """Read `raw`, which is closed by `close`; `label` names it in errors.

        Raises:
            InputError: it is named or looks like something that is no corpus.
        """
        self._label = label
        self._source = _Source(raw, label)
        self._format = ""
        self.warning = ""
        """What is wrong with the source and did no harm; known once it is read to its end."""
        self.place: Callable[[], str] = str
        """Says after a comma where a reader is, for errors."""
        try:
            self._format, self._read = self._decompressed(self._source.peek(_MAGIC_BYTES))
            self.head = at_least(self._read_plain, HEAD_BYTES, enough=_FIRST_LINE)
            """The first bytes, which `read` brings, too."""
            self._refuse_foreign(self.head)
        except InputError:
            raw.close()
            raise
        self._first = self.head

    @property
    def position(self) -> int:
        """Bytes of the source consumed, before any decompression."""
        return self._source.position

    @property
    def sha256(self) -> str:
        """Of the bytes of the source, in hex: of all of them once it is read to its end."""
        return self._source.digest.hexdigest()

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, fewer where a pipe has no more yet; none at the end. Raises `InputError`."""
        if self._first:
            data, self._first = self._first[:size], self._first[size:]
            return data
        return self._read_plain(size)

    def close(self) -> None:
        self._source.close()

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
                raise InputError(f"{self._label}: is {what}, no corpus: {advice}")
        if _is_tar(head):
            raise InputError(f"{self._label}: is a tar archive, no corpus: {_UNPACK}")
        if head and not self._format and self._label.endswith((".gz", ".zst")):
            raise InputError(f"{self._label}: is not compressed as its name says: rename it, or compress it again")

    def _read_plain(self, size: int) -> bytes:
        try:
            return self._read(size)
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            if "too much memory" in str(error):
                raise InputError(
                    f"{self._label}: needs more than 128 MiB to be decompressed (it was made with zstd --long or "
                    f"--ultra): unpack it (zstd -d --long=31), or compress it again without these"
                ) from error
            raise InputError(
                f"{self._label}: {self._format} data is damaged or cut off after {self.position:,} bytes"
                f"{self.place()} ({error}): make or fetch the file again"
            ) from error


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


def at_least(read: Callable[[int], bytes], size: int, enough: re.Pattern[bytes] | None = None) -> bytes:
    """At least `size` bytes, fewer at the end and once there is `enough` in them: pipes give what they have."""
    data = b""
    while len(data) < size and not (enough and enough.search(data)) and (more := read(READ_BYTES)):
        data += more
    return data
