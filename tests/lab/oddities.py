"""Corpora of anything that exports, dumps and logs of others were reported to hold, and what each row must become.

What must become of a piece stands next to the piece: nothing here shares code with the reader.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

BOM = b"\xef\xbb\xbf"
ID = uuid.UUID(int=7)


class Code(str):
    """Why a row is refused, where otherwise its id or its text would be."""

    __slots__ = ()


Told = str | Code
MISSING_ID, BAD_ID, ID_TOO_LONG = Code("missing_id"), Code("bad_id"), Code("id_too_long")
MISSING_FIELD, TEXT_NOT_STRING, EMPTY_TEXT = Code("missing_field"), Code("text_not_string"), Code("empty_text")
NUL, LONE, NOT_UTF8 = Code("nul_in_text"), Code("lone_surrogate"), Code("not_utf8")
INVALID_JSON, NOT_AN_OBJECT, DUPLICATE_ID = Code("invalid_json"), Code("not_an_object"), Code("duplicate_id")
HOPELESS = {INVALID_JSON, NOT_UTF8, NOT_AN_OBJECT, MISSING_ID, BAD_ID, MISSING_FIELD, TEXT_NOT_STRING}
"""Lines that begin with 100 such rows, or have nothing else, are not worth a start; columns are known by name."""


@dataclass(frozen=True)
class Row:
    """What a row says. `whole`: why it has neither id nor text."""

    id: Told = MISSING_ID
    text: Told = MISSING_FIELD
    whole: Code | None = None

    def numbered(self, own: str) -> Row:
        """With `own` in place of "@"."""
        id, text = (told if isinstance(told, Code) else told.replace("@", own) for told in (self.id, self.text))
        return Row(id, text, self.whole)


BLANK = None
"""A line that is no row."""


@dataclass(frozen=True)
class Source:
    """One file. `rows`: by their place, blank lines included; None: the file is refused."""

    name: str
    data: bytes = field(repr=False)
    rows: Sequence[Row | None] | None
    streams: bool = False
    """Whether standard input may be this."""


@dataclass(frozen=True)
class Settings:
    empty: Literal["error", "skip"]
    number_rows: bool


@dataclass(frozen=True)
class Corpus:
    sources: tuple[Source, ...]
    settings: Settings
    piped: bool
    """Whether the first one is standard input."""

    def verdicts(self) -> dict[tuple[int, int], tuple[str, str] | Code] | None:
        """Id and text by part and row, or why the row is refused; None: the corpus is refused."""
        useful, used, found = False, set[str](), dict[tuple[int, int], tuple[str, str] | Code]()
        for part, source in enumerate(self.sources):
            if source.rows is None:
                return None
            judged = [(at, self._judge(part, at, row)) for at, row in enumerate(source.rows) if row is not BLANK]
            useful |= any(not source.streams or verdict not in HOPELESS for _, verdict in judged[:100])
            for at, verdict in judged:
                if isinstance(verdict, tuple):
                    duplicate = verdict[0] in used
                    used.add(verdict[0])
                    found[part, at] = DUPLICATE_ID if duplicate else verdict
                elif verdict is not None:
                    found[part, at] = verdict
        return found if useful else None

    def _judge(self, part: int, at: int, row: Row) -> tuple[str, str] | Code | None:
        id: Told = f"{part}-{at}" if self.settings.number_rows else row.id
        if row.whole is not None:
            return row.whole
        if isinstance(id, Code):
            return id
        if row.text is EMPTY_TEXT and self.settings.empty == "skip":
            return None
        return row.text if isinstance(row.text, Code) else (id, row.text)


# Lines of JSON. "@" stands for what no other row has.

IDS: list[tuple[str, Told]] = [
    ('"id": "@"', "@"),
    ('"_id":"@"', "@"),
    ('"custom_id": "@"', "@"),
    ('"docid":"é@"', "é@"),
    ('"_id": null, "id": "@"', "@"),
    ('"_id": [1], "id": "@"', "@"),
    ('"_id": {"$oid": "@"}', "@"),
    ('"id": "first", "id": "@"', "@"),
    ('"id": 7', "7"),
    ('"id": "7"', "7"),
    ('"_id": {"$numberLong": "7"}', "7"),
    ('"id": 1.50', "1.50"),
    ('"id": -0', "-0"),
    ('"id": 1e400', "1e400"),
    ('"id": 123456789012345678901234567890', "123456789012345678901234567890"),
    ('"id": "\\ud83d\\ude00"', "\U0001f600"),
    ('"_id": {"$binary": {"base64": "AAAAAAAAAAAAAAAAAAAABw==", "subType": "04"}}', str(ID)),
    ('"_id": {"$uuid": "00000000-0000-0000-0000-000000000007"}', str(ID)),
    ('"key": "@"', MISSING_ID),
    ('"id": null', BAD_ID),
    ('"id": true', BAD_ID),
    ('"id": ""', BAD_ID),
    ('"id": NaN', BAD_ID),
    ('"id": ["@"]', BAD_ID),
    ('"id": {"$date": "2024"}', BAD_ID),
    ('"id": {"$oid": "a", "b": 1}', BAD_ID),
    (f'"id": "{"x" * 1025}"', ID_TOO_LONG),
    (f'"id": {"9" * 1025}', ID_TOO_LONG),
    ('"id": "@\\u0000"', NUL),
    ('"id": "\\ud800@"', LONE),
]
TEXTS: list[tuple[str, Told]] = [
    ('"text": "text @"', "text @"),
    ('"content":"text @"', "text @"),
    ('"text": null, "content": "@"', "@"),
    ('"text": 5, "content": "@"', "@"),
    ('"body": {"model": "m", "input": "@"}', "@"),
    ('"_source": {"meta": {}, "text": "@"}', "@"),
    ('"title": "T", "text": "@"', "T @"),
    ('"title": "\\u200b", "text": "@"', "@"),
    ('"title": "T", "text": ""', "T"),
    ('"title": null, "text": "@"', "@"),
    ('"text": "a\\nb\\tc \\"@\\" \\\\ \\/"', 'a\nb\tc "@" \\ /'),
    ('"text": "\u2028\U0001f600 e\u0301"', "\u2028\U0001f600 e\u0301"),
    ('"text": "\\ud83d\\ude00\\u0001"', "\U0001f600\x01"),
    ('"text": "\ufffd"', "\ufffd"),
    ('"text": "\ufeffx"', "\ufeffx"),
    ('"body": {}', MISSING_FIELD),
    ('"abstract": "@"', MISSING_FIELD),
    ('"text": 5', TEXT_NOT_STRING),
    ('"text": null', TEXT_NOT_STRING),
    ('"text": ["a"]', TEXT_NOT_STRING),
    ('"text": Infinity', TEXT_NOT_STRING),
    ('"body": {"input": ["a", "b"]}', TEXT_NOT_STRING),
    ('"title": 5, "text": "x"', TEXT_NOT_STRING),
    ('"text": ""', EMPTY_TEXT),
    ('"text": " \\t\\u00a0\u3000"', EMPTY_TEXT),
    ('"text": "\u200b\ufeff\u00ad"', EMPTY_TEXT),
    ('"text": "a\\u0000b"', NUL),
    ('"text": "a\\udc00b"', LONE),
]
OTHERS = [
    "",
    '"score": NaN',
    '"n": -Infinity',
    '"half": "\\ud800"',
    '"big": 1e999',
    '"m": {"a": [1, {"b": null}], "text": "inner"}',
    '"é": "\u2028"',
    '"": true',
    '"score": [NaN, {"half": "\\udfff"}]',
]
SINGLE: list[tuple[bytes, Row | None]] = [
    (b"", BLANK),
    (b" \t ", BLANK),
    (b"\x0c", BLANK),
    *(
        (line, Row(whole=INVALID_JSON))
        for line in (
            b"oops",
            b'{"id":',
            b'{"id": "q", "text": "x"},',
            b'{"id": "q" "text": "x"}',
            b'{"id": "q", "text": "x"}{"id": "r", "text": "y"}',
            b"{'id': 'q'}",
            b'{"id": "q", "text": "a\tb"}',
            b'{"id": "q", "text": "\\x"}',
            b'{"id": 007, "text": "x"}',
            b'{"id": "q", "text": "x"} # first',
            b"\0" * 40,
            b"NaN",
            b'{"id": "q", "a": ' + b"[" * 3000,
            b'{"a":' * 3000,
            b"id and text",
            b"\x1a",
        )
    ),
    *(
        (line, Row(whole=NOT_UTF8))
        for line in (b'{"id": "q", "text": "caf\xe9"}', b"\xff", b'{"id": "\xed\xa0\x80", "text": "x"}', b"\xc3")
    ),
    *((line, Row(whole=NOT_AN_OBJECT)) for line in (b'"x"', b"7", b"null", b"true")),
    (b"{}", Row()),
]

Line = tuple[bytes, Row | None]


def _fields(id: tuple[str, Told], text: tuple[str, Told], other: str, order: int, around: tuple[bytes, bytes]) -> Line:
    pieces = [id[0], text[0], *([other] if other else [])]
    line = "{" + ", ".join(pieces[order:] + pieces[:order]) + "}"
    return around[0] + line.encode() + around[1], Row(id[1], text[1])


_around = st.sampled_from([(b"", b""), (b"", b""), (b" ", b"\t"), (BOM, b""), (BOM + BOM, b"\r"), (b"\t", b"\r\r")])
_good = st.tuples(st.sampled_from(IDS[:8]), st.sampled_from(TEXTS[:15]))
_any = st.tuples(st.sampled_from(IDS), st.sampled_from(TEXTS))
_object = st.builds(
    lambda both, *more: _fields(*both, *more), _good | _any, st.sampled_from(OTHERS), st.integers(0, 2), _around
)
_single = st.tuples(st.sampled_from(SINGLE), _around).map(lambda drawn: (drawn[1][0] + drawn[0][0], drawn[0][1]))
_lines = st.lists(_good.map(lambda both: _fields(*both, "", 0, (b"", b""))) | _object | _single, max_size=12)


@st.composite
def _text_of_lines(draw: st.DrawFn) -> tuple[bytes, list[Row | None]]:
    """Lines, and what they must become; "@" is still in them."""
    lines, end = draw(_lines), draw(st.sampled_from([b"\n", b"\r\n"]))
    data = end.join(line for line, _ in lines)
    return data + (end if draw(st.booleans()) else b""), [row for _, row in lines]


# Compressed, and in frames

ZSTD_WINDOW_LOG = 27


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def zstd_frame(data: bytes, window_log: int) -> bytes:
    """A frame of one block that is not compressed, as RFC 8878 has it."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def zstd_skippable(size: int, kind: int = 0) -> bytes:
    return bytes([0x50 + kind, 0x2A, 0x4D, 0x18]) + size.to_bytes(4, "little") + b"x" * size


def tar(data: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("c.jsonl")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("c.jsonl", data)
    return sink.getvalue()


def _cut(data: bytes, cuts: Sequence[float]) -> Iterator[bytes]:
    places = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]
    return (data[start:end] for start, end in pairwise(places))


def _squeezed(kind: str, data: bytes, cuts: Sequence[float]) -> bytes:
    match kind:
        case "gzip":
            return gz(data)
        case "members":
            return b"".join(map(gz, _cut(data, cuts)))
        case "junk":
            return gz(data) + b"\r\njunk"
        case "padded":
            return gz(data) + b"\0" * 300
        case "zstd":
            return zstd(data)
        case "frames":
            return zstd_skippable(9) + zstd_skippable(3, 7).join(map(zstd, _cut(data, cuts))) + zstd_skippable(0, 15)
        case "window":
            return zstd_frame(data, ZSTD_WINDOW_LOG)
        case _:
            return data


SUFFIXES = {
    "": (".jsonl", ".json", ".ndjson", "", ".txt", ".jsonl.zst.bak"),
    "gzip": (".jsonl.gz", ".gz", ".jsonl", ".zst"),
    "zstd": (".jsonl.zst", ".zst", ".jsonl", ".gz"),
}
SQUEEZED = {"members": "gzip", "junk": "gzip", "padded": "gzip", "frames": "zstd", "window": "zstd"}
REFUSED: list[tuple[str, Any]] = [
    (".jsonl.gz", lambda data: gz(data)[:-5]),
    (".jsonl.gz", lambda data: gz(tar(data))),
    (".tar", tar),
    (".jsonl.zst", lambda data: zstd(tar(data))),
    (".jsonl.gz", lambda data: gz(zipped(data))),
    (".zip", zipped),
    (".jsonl.gz", lambda data: gz(gz(data))),
    (".jsonl.zst", lambda data: zstd(data)[:-3]),
    (".jsonl.zst", lambda data: zstd_frame(data, 31)),
    (".jsonl.gz", lambda _: b'{"id": "a", "text": "b"}\n'),
    (".jsonl", lambda data: ("\ufeff" + '{"id": 1}\n' + data.decode("latin-1")).encode("utf-16-le")),
    (".jsonl", lambda data: ('{"id": 1}\n' + data.decode("latin-1")).encode("utf-16-be")),
    (".jsonl", lambda data: lzma.compress(data)),
    (".json", lambda _: b'[{"id": "a", "text": "b"},\n'),
    (".json", lambda _: b'{\n  "id": "a",\n  "text": "b"\n}\n'),
    (".jsonl", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
    (".parquet", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
    (".parquet", lambda _: b"PAR1" + b"\0" * 40 + b"PAR1"),
    (".html", lambda _: b"<!DOCTYPE html><html></html>"),
]


Made = Callable[[int], Source]
"""A source once its part's number is known."""


@st.composite
def line_sources(draw: st.DrawFn) -> Made:
    data, rows = draw(_text_of_lines())
    kind = draw(st.sampled_from(["", "", "gzip", "zstd", *SQUEEZED]))
    suffix = draw(st.sampled_from(SUFFIXES[SQUEEZED.get(kind, kind)]))
    cuts = draw(st.lists(st.floats(0, 1), max_size=4))

    def made(part: int) -> Source:
        lines = [line.replace(b"@", _own(part, at).encode()) for at, line in enumerate(data.split(b"\n"))]
        told = [row and row.numbered(_own(part, at)) for at, row in enumerate(rows)]
        return Source(f"{part}{suffix}", _squeezed(kind, b"\n".join(lines), cuts), told, streams=True)

    return made


@st.composite
def refused_sources(draw: st.DrawFn) -> Made:
    suffix, make = draw(st.sampled_from(REFUSED))
    lines = b"".join(b'{"id": "%d", "text": "word %d"}\n' % (at, at) for at in range(30))
    return lambda part: Source(f"{part}{suffix}", make(lines), None)


def _own(part: int, at: int) -> str:
    return f"p{part}r{at}"


# Parquet: a column's type, what stands in it, and what that must become

STRINGS: list[tuple[Any, Told]] = [("@", "@"), ("@", "@"), ("é@", "é@"), ("7", "7"), ("a\0", NUL)]
ODD_IDS: list[tuple[Any, Told]] = [*STRINGS, (None, BAD_ID), ("", BAD_ID), ("x" * 1025, ID_TOO_LONG)]
ODD_TEXTS: list[tuple[Any, Told]] = [*STRINGS, (None, TEXT_NOT_STRING), ("", EMPTY_TEXT), ("\u200b", EMPTY_TEXT)]
STRING_TYPES: list[pa.DataType] = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]
BYTES_TYPES: list[pa.DataType] = [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.binary()),
]
NO_UTF8: tuple[Any, Told] = (b"\xff@", NOT_UTF8)
WHOLE: list[tuple[Any, Told]] = [(7, "7"), (0, "0"), (100, "100"), (None, BAD_ID)]
ID_COLUMNS: list[tuple[pa.DataType, list[tuple[Any, Told]]]] = [
    *((type, ODD_IDS) for type in STRING_TYPES),
    *((type, [*ODD_IDS, NO_UTF8]) for type in BYTES_TYPES),
    *((type, WHOLE) for type in (pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.decimal128(38, 0))),
    (pa.int64(), [*WHOLE, (-(2**63), str(-(2**63)))]),
    (pa.uint64(), [*WHOLE, (2**64 - 1, str(2**64 - 1))]),
    (pa.uuid(), [(ID.bytes, str(ID)), (uuid.UUID(int=8).bytes, str(uuid.UUID(int=8))), (None, BAD_ID)]),
    (pa.binary(3), [(b"abc", "abc"), (b"a\xffc", NOT_UTF8), (None, BAD_ID), (b"a\0c", NUL)]),
]
TEXT_COLUMNS: list[tuple[pa.DataType, list[tuple[Any, Told]]]] = [
    *((type, ODD_TEXTS) for type in STRING_TYPES),
    *((type, [*ODD_TEXTS, NO_UTF8]) for type in BYTES_TYPES),
    (pa.json_(), [('{"a": "@"}', '{"a": "@"}'), (None, TEXT_NOT_STRING)]),
]
NESTED = ("body.input", "_source.text")


@st.composite
def parquet_sources(draw: st.DrawFn) -> Made:
    id_type, ids = draw(st.sampled_from(ID_COLUMNS))
    text_type, texts = draw(st.sampled_from(TEXT_COLUMNS))
    rows = draw(st.lists(st.tuples(st.sampled_from(ids), st.sampled_from(texts)), max_size=12))
    names = draw(st.sampled_from(["id", "_id", "docid"])), draw(st.sampled_from(["text", "content", *NESTED]))
    cuts = draw(st.lists(st.integers(0, len(rows)), max_size=3))
    options: dict[str, Any] = {
        "compression": draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        "store_schema": draw(st.booleans()),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "use_dictionary": draw(st.booleans()),
    }
    suffix = draw(st.sampled_from([".parquet", "", ".jsonl"]))

    def made(part: int) -> Source:
        ids = _values([value for (value, _), _ in rows], id_type, part)
        texts = _values([value for _, (value, _) in rows], text_type, part)
        groups = [
            pa.table(
                {
                    names[0]: pa.array(ids[start:end], id_type),
                    "n": pa.array(range(start, end), pa.int64()),
                    **_nested(names[1], pa.array(texts[start:end], text_type)),
                }
            )
            for start, end in pairwise([0, *sorted(cuts), len(rows)])
        ]
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, groups[0].schema, **options) as writer:
            for group in groups:
                writer.write_table(group)
        told = [_row(id, text).numbered(_own(part, at)) for at, ((_, id), (_, text)) in enumerate(rows)]
        return Source(f"{part}{suffix}", sink.getvalue().to_pybytes(), told)

    return made


def _row(id: Told, text: Told) -> Row:
    return Row(id, text, NOT_UTF8 if text is NOT_UTF8 else None)


def _values(values: list[Any], type: pa.DataType, part: int) -> list[Any]:
    kind = type.value_type if pa.types.is_dictionary(type) else type
    of_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    own: list[Any] = []
    for at, value in enumerate(values):
        if isinstance(value, str):
            value = value.replace("@", _own(part, at))
            own.append(value.encode() if of_bytes else value)
        else:
            own.append(value.replace(b"@", _own(part, at).encode()) if isinstance(value, bytes) else value)
    return own


def _nested(name: str, column: Any) -> dict[str, Any]:
    head, _, rest = name.partition(".")
    return {head: pa.StructArray.from_arrays([column], [rest]) if rest else column}


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """Up to four files; most have none that is refused."""
    kind = st.one_of(line_sources(), line_sources(), parquet_sources())
    made = draw(st.lists(kind, min_size=1, max_size=4))
    if draw(st.integers(0, 9)) == 9:
        made.insert(draw(st.integers(0, len(made))), draw(refused_sources()))
    sources = tuple(make(part) for part, make in enumerate(made))
    piped = sources[0].streams and draw(st.booleans())
    empty: Literal["error", "skip"] = "skip" if draw(st.booleans()) else "error"
    return Corpus(sources, Settings(empty, draw(st.integers(0, 4)) == 4), piped)
