"""One input row -> what the job needs of it, or the reason why not. Pure, and the same for files and Python records.

`RecordReader` finds the fields by themselves unless the spec names them, joins the title in front of the text, and
judges: a row ends as a `Record`, a `Refusal`, or None when the job skips empty texts.
"""

from __future__ import annotations

import base64
import decimal
import json
import math
import numbers
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import msgspec

from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.kept import TAKES, fits
from embedstream.queue.refusals import Code, RowRefused, refusal
from embedstream.settings import BLOCK_LIMITS, MIB
from embedstream.terminal import printable

ID_FIELDS = ("_id", "id", "custom_id", "docid")
TEXT_FIELDS = ("text", "content", "body.input", "_source.text")
"""The latter two: lines of OpenAI's batches, and of Elasticsearch's dumps."""
TITLE_FIELD = "title"

LONGEST_LINE_BYTES = 8 * MIB
"""A longer line is refused unread: the longest text with every character escaped still fits."""
LONGEST_DOCUMENT_BYTES = LONGEST_LINE_BYTES
"""Of a text that is to be cut into chunks."""
LONGEST_ID_BYTES = BLOCK_LIMITS.longest_id_bytes
LONGEST_KEPT_BYTES = MIB
"""All kept fields of a row together: a block must stay a small stream entry."""

NAME = "NAME"
"""What a message ends with where a field is to be named; which one, no row can tell alone (see `corpus.advice`)."""
NAMED_FIELDS = 10
NAME_CHARACTERS = 60
"""How much of a row's field names a message repeats."""

INVISIBLE = (
    "\x01-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""White space, control characters, and Unicode's Default_Ignorable_Code_Point, for a [] of a regular expression.
What is made of nothing else is empty."""
is_blank = re.compile(f"[{INVISIBLE}]*").fullmatch
"""Whether a text has nothing that can be seen."""

Source: TypeAlias = object
"""Where a row came from: a line, or a Python record."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A row that can be embedded."""

    row: int
    """Position in the part: line number - 1 for files."""
    id: str
    text: str
    """With the title in front, unless it is to be cut."""
    text_bytes: int
    """Its length in UTF-8."""
    kept: tuple[str | None, ...]
    """The fields of `JobSpec.keep`: strings as they are, null for null or missing, anything else as its JSON text."""
    source: Source
    """For the report, if the row turns out to be a duplicate."""
    title: str = ""
    """Where texts are cut into chunks: what is put in front of each, and is not in front of the text."""


Outcome: TypeAlias = Record | Refusal | None
"""How a row ends; None: skipped."""


class Unreadable(msgspec.Struct, frozen=True):
    """Stands for a value of an Arrow column that Python has none for."""

    type: str


class _Found(msgspec.Struct, frozen=True):
    """The value of a field: its kind in words, and a string as it is, anything else as its JSON text."""

    kind: str
    text: str = ""


_NULL = _Found("null")
_STRING, _NUMBER, _NOT_FINITE, _OF_TYPE = "a string", "a number", "not a finite number", "of type "
_KINDS = {"{": "an object", "[": "a list", "t": "a boolean", "f": "a boolean", "n": "null", '"': _STRING}
_EXTENDED = frozenset({"$oid", "$uuid", "$numberInt", "$numberLong", "$numberDouble", "$numberDecimal"})
"""MongoDB's extended JSON writes `{"$oid": "…"}` for a value that JSON has no type for."""
_UUID = re.compile(
    r'\s*{\s*"\$binary"\s*:\s*{\s*"base64"\s*:\s*"([\w+/]{22}==)"\s*,\s*"subType"\s*:\s*"04"\s*}\s*}\s*', re.ASCII
)
"""How it writes a UUID."""
ABSENT = object()
"""What `look_up` finds of a field that is not there."""
_CONSTANT = msgspec.Raw(b"null")
"""Stands for NaN and Infinity, which are no JSON; as a part of a kept value they are null, as in Python records."""
_strings = msgspec.json.Decoder(str)
_raw_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


class RecordReader:
    """Judges the rows of one job.

    `ids` and `texts` are the fields that are looked for, the first that a row has being taken; `title` is the one
    joined in front, by `title_sep`, if any.
    """

    def __init__(self, spec: JobSpec, part: int = 0) -> None:
        """`part`: where the rows are, which numbers them if the job says so."""
        self.ids = (spec.id_field,) if spec.id_field is not None else ID_FIELDS
        self.title = TITLE_FIELD if spec.title_field is None else spec.title_field
        # Named as the title, a field is a text only if there is no other.
        usual = tuple(sorted(TEXT_FIELDS, key=lambda name: name == self.title))
        self.texts = (spec.text_field,) if spec.text_field is not None else usual
        self.title_sep = spec.title_sep
        self.numbered = f"{part}-" if spec.number_rows else None
        """What the number of a row follows, as its id."""
        self._keep = spec.keep
        self._query = spec.query_field
        self._types = spec.keep_types
        self._typed_at = [(at, spec.keep_types[name]) for at, name in enumerate(spec.keep) if name in spec.keep_types]
        self._skip_empty = spec.empty == "skip"
        self.joins = spec.chunking is None
        """Whether titles are put in front of texts here."""
        self.longest_text_bytes = BLOCK_LIMITS.longest_text_bytes if self.joins else LONGEST_DOCUMENT_BYTES
        named = (spec.id_field, spec.text_field, spec.title_field, *spec.keep)
        self._wanted = tuple(dict.fromkeys((*self.ids, *self.texts, self.title, *spec.keep)))
        names = [name for name in self._wanted if "." not in name]
        at = {name: i for i, name in enumerate(names)}
        raw = [name for name in spec.keep if name not in (*self.ids, *self.texts, self.title)]
        dotted = any(name is not None and "." in name for name in named)
        # Fields of fields are looked for with care. The kept ones, which come last, are read as they are written.
        self._fast = None if dotted else _field_decoder(names[: len(names) - len(raw)], raw)
        self._id_at = [at[name] for name in self.ids if name in at]
        self._text_at = [at[name] for name in self.texts if name in at]
        self._title_at = at.get(self.title, -1)
        self._keep_at = [at.get(name, -1) for name in spec.keep]
        self._query_at = None if spec.query_field is None else at.get(spec.query_field)

    def line(self, row: int, line: bytes) -> Outcome:
        """Judge a line of JSON. Of an over-long line, more than `LONGEST_LINE_BYTES` of it are enough."""
        if self._fast is not None and len(line) <= LONGEST_LINE_BYTES and (line.isascii() or _is_utf8(line)):
            try:
                record = self._clean(row, line, msgspec.structs.astuple(self._fast.decode(line)))
            except (msgspec.MsgspecError, RecursionError, ValueError):
                record = None  # what is wrong is told below
            if record is not None:
                return record
        return self._slow_line(row, line)

    def record(self, row: int, record: object) -> Outcome:
        """Judge a Python record: a mapping, or a string that is the text itself, with the row's number as id."""
        if isinstance(record, str):
            named = {self.ids[0]: _Found(_STRING, str(row)), self.texts[0]: _found(record)}
            return self._judge(row, named, (), record)
        if isinstance(record, Mapping):
            return self._fields(row, cast("Mapping[object, object]", record), record)
        message = f"a record must be a mapping or a string, not {type(record).__name__}"
        return refusal(row, None, Code.NOT_AN_OBJECT, message, record)

    def _clean(self, row: int, line: bytes, values: tuple[Any, ...]) -> Record | None:
        """The record of a row in which nothing is unusual; None for any other."""
        unset = msgspec.UNSET
        id: object = unset
        if self.numbered is not None:
            id = f"{self.numbered}{row}"
        else:
            for at in self._id_at:
                if (id := values[at]) is not unset:
                    break
        if type(id) is int and id:  # 0 may be written -0
            id = str(id)
        text: object = unset
        for at in self._text_at:
            if (text := values[at]) is not unset:
                break
        else:
            return None
        if type(id) is not str or type(text) is not str:
            return None
        title: object = ""
        if at != self._title_at and (title := values[self._title_at]) is not unset:
            if type(title) is not str:
                return None
            if title:
                if not text or is_blank(title) or "\0" in title:
                    return None
                if self.joins:
                    text = f"{title}{self.title_sep}{text}"
        text_bytes = len(text) if text.isascii() else len(text.encode())
        if not 0 < text_bytes <= self.longest_text_bytes or is_blank(text) or "\0" in text:
            return None
        if not 0 < len(id) <= LONGEST_ID_BYTES // 4 or "\0" in id:
            return None
        if self._query_at is not None and not _may_be_text(values[self._query_at]):
            return None
        kept: tuple[str | None, ...] = ()
        if self._keep_at:
            kept = tuple([_kept_in_json(values[at]) for at in self._keep_at])
            if sum(map(len, filter(None, kept))) > LONGEST_KEPT_BYTES // 4 or any("\0" in v for v in kept if v):
                return None
            if any((value := kept[at]) is not None and not fits(value, type) for at, type in self._typed_at):
                return None
        return Record(row, id, text, text_bytes, kept, line, title if type(title) is str and not self.joins else "")

    def _slow_line(self, row: int, line: bytes) -> Outcome:
        if len(line) > LONGEST_LINE_BYTES:
            message = f"line is longer than {LONGEST_LINE_BYTES:,} bytes; split the record"
            return refusal(row, None, Code.LINE_TOO_LONG, message, line)
        try:
            text = line.decode()
            try:
                return self._fields(row, _raw_objects.decode(line), line)
            except msgspec.DecodeError:
                fields = _leniently(text)
                if fields is None:
                    raise
                return self._fields(row, fields, line)
        except UnicodeDecodeError as error:
            message = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8; convert the file"
            return refusal(row, None, Code.NOT_UTF8, message, line)
        except msgspec.ValidationError as error:
            message = f"a line must be a JSON object; {str(error)[:1].lower()}{str(error)[1:]}"
            return refusal(row, None, Code.NOT_AN_OBJECT, message, line)
        except msgspec.DecodeError as error:
            return refusal(row, None, Code.INVALID_JSON, str(error), line)
        except RecursionError:
            return refusal(row, None, Code.INVALID_JSON, "JSON is nested too deeply", line)

    def _fields(self, row: int, fields: Mapping[Any, object], source: Source) -> Outcome:
        found = ((name, look_up(fields, name)) for name in self._wanted)
        named = {name: _found(value) for name, value in found if value is not ABSENT}
        return self._judge(row, named, fields, source)

    def _judge(self, row: int, found: Mapping[str, _Found], there: Iterable[object], source: Source) -> Outcome:
        """`found`: what is wanted of the row; `there`: all of its fields."""
        id: str | None = None
        try:
            id = self._judge_id(row, found, there)
            title, text = self._judge_text(found, there)
            if title and (self.joins or not text):
                title, text = "", f"{title}{self.title_sep}{text}" if text else title
            if is_blank(text):
                if self._skip_empty:
                    return None
                raise RowRefused(Code.EMPTY_TEXT, "text is empty; --empty skip leaves such rows out")
            _check_characters("title", title)
            size = _check_characters("text", text)
            if size > self.longest_text_bytes:
                most = self.longest_text_bytes
                raise RowRefused(Code.TEXT_TOO_LONG, f"text has {size:,} bytes, at most {most:,} are allowed; split it")
            kept = tuple(self._judge_kept(found))
        except RowRefused as refused:
            return refusal(row, id, refused.code, str(refused), source)
        return Record(row, id, text, size, kept, source, title)

    def _judge_id(self, row: int, fields: Mapping[str, _Found], there: Iterable[object]) -> str:
        if self.numbered is not None:
            return f"{self.numbered}{row}"
        trouble: RowRefused | None = None
        for name in self.ids:
            if name in fields:
                try:
                    return _usable_id(_field(name), fields[name])
                except RowRefused as refused:
                    trouble = trouble or refused
        if trouble is None:
            use = f"--number-rows, or --id-field {NAME}"
            trouble = RowRefused(Code.MISSING_ID, _missing(self.ids, "id", there, use))
        raise trouble

    def _judge_text(self, fields: Mapping[str, _Found], there: Iterable[object]) -> tuple[str, str]:
        """Title, empty where there is none to be seen, and text."""
        names = [name for name in self.texts if name in fields]
        if not names:
            raise RowRefused(Code.MISSING_FIELD, _missing(self.texts, "text", there, f"--text-field {NAME}"))
        name = next((name for name in names if fields[name].kind == _STRING), names[0])
        found = fields[name]
        if found.kind != _STRING:
            raise RowRefused(Code.TEXT_NOT_STRING, f"{_field(name)} is {found.kind}; a text must be a string")
        title = _NULL if self.title == name else fields.get(self.title, _NULL)
        if title.kind == "null":
            return "", found.text
        if title.kind != _STRING:
            message = f"{_field(self.title)} is {title.kind}; a title must be a string; --title-field takes another"
            raise RowRefused(Code.TEXT_NOT_STRING, message)
        return "" if is_blank(title.text) else title.text, found.text

    def _judge_kept(self, fields: Mapping[str, _Found]) -> Iterable[str | None]:
        total = 0
        for name in self._keep:
            found = fields.get(name, _NULL)
            if found.kind in ("null", _NOT_FINITE):
                yield None
                continue
            if name == self._query and found.kind != _STRING:
                message = f"{_field(name)} is {found.kind}; the first of a pair must be a string"
                raise RowRefused(Code.TEXT_NOT_STRING, message)
            if found.kind.startswith(_OF_TYPE) and not found.text:
                raise RowRefused(Code.BAD_KEPT, f"{_field(name)} is {found.kind}, which JSON cannot hold")
            type = self._types.get(name, "string")
            if not fits(found.text, type):
                value = printable(found.text, NAME_CHARACTERS)
                raise RowRefused(Code.BAD_KEPT, f"{_field(name)} is {value}; --keep {name}:{type} takes {TAKES[type]}")
            total += _check_characters(_field(name), found.text)
            if total > LONGEST_KEPT_BYTES:
                raise RowRefused(Code.KEPT_TOO_LONG, f"kept fields have more than {LONGEST_KEPT_BYTES:,} bytes")
            yield found.text


def _may_be_text(value: object) -> bool:
    """Whether a field as it is written is a string, or null."""
    return value is msgspec.UNSET or isinstance(value, str) or bytes(cast("msgspec.Raw", value))[:1] in (b'"', b"n")


def duplicate_refusal(record: Record, where: str) -> Refusal:
    """The refusal of a record whose id an earlier row has; `where` says which, the same in every run."""
    message = f"id {printable(record.id, 100)} was used before, in {where}"
    return refusal(record.row, record.id, Code.DUPLICATE_ID, message, record.source)


def look_up(fields: Mapping[Any, object], name: str) -> object:
    """What a row has under a name: a field, else a field of a field (`body.input`); `ABSENT` if it has neither."""
    if name in fields:
        return fields[name]
    head, dot, rest = name.partition(".")
    inside = fields.get(head) if dot else None
    if isinstance(inside, msgspec.Raw):
        data = bytes(inside)
        inside = _raw_objects.decode(data) if data[:1] == b"{" else None
    return look_up(inside, rest) if isinstance(inside, Mapping) else ABSENT


def _field_decoder(names: Sequence[str], raw_names: Sequence[str]) -> msgspec.json.Decoder[Any] | None:
    """Decodes just these fields of an object, the latter ones as raw JSON; None if msgspec cannot take the names."""
    types = [Any] * len(names) + [msgspec.Raw] * len(raw_names)
    attributes = [f"f{i}" for i in range(len(types))]
    try:
        struct = msgspec.defstruct(
            "Fields",
            [(attribute, type, msgspec.UNSET) for attribute, type in zip(attributes, types, strict=True)],
            rename=dict(zip(attributes, (*names, *raw_names), strict=True)),
            gc=False,
        )
    except ValueError:  # quotes and control characters
        return None
    return msgspec.json.Decoder(struct)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _leniently(line: str) -> dict[str, object] | None:
    """The fields of an object that is JSON but for NaN, Infinity and halves of surrogate pairs, which Python and others
    write; numbers as they are written. None if it is not. Raises `RecursionError`.
    """

    def as_written(number: str) -> msgspec.Raw:
        return msgspec.Raw(number.encode())

    try:
        value = json.loads(line, parse_int=as_written, parse_float=as_written, parse_constant=lambda _: _CONSTANT)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _kept_in_json(value: Any) -> str | None:
    """A kept field as the fast path decoded it. Raises ValueError for what it does not know."""
    if value is msgspec.UNSET or value is None or type(value) is str:
        return None if value is msgspec.UNSET else value
    if type(value) is not msgspec.Raw:
        raise ValueError("a number or a container that was decoded: its exact text is lost")
    found = _found_in_json(value)
    return None if found.kind == "null" else found.text


def _found_in_json(raw: msgspec.Raw) -> _Found:
    data = bytes(raw)
    if data[:1] == b'"':
        return _Found(_STRING, _strings.decode(data))
    return _Found(_KINDS.get(chr(data[0]), _NUMBER), data.decode())


def kept_value(value: object) -> str | None:
    """A Python value of a kept field, as the dataset shows it. Raises `RowRefused` if JSON cannot hold it."""
    found = _found(value)
    if found.kind in ("null", _NOT_FINITE):
        return None
    if found.kind.startswith(_OF_TYPE) and not found.text:
        raise RowRefused(Code.BAD_KEPT, f"is {found.kind}, which JSON cannot hold")
    return found.text


def _found(value: object) -> _Found:
    """The same for a value of a row. Numbers of other libraries count as numbers, UUIDs as strings."""
    if isinstance(value, msgspec.Raw):
        return _Found(_NOT_FINITE) if value is _CONSTANT else _found_in_json(value)
    if isinstance(value, str):
        return _Found(_STRING, str(value))
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _Found(_KINDS["t"], "true" if value else "false")
    if isinstance(value, uuid.UUID):
        return _Found(_STRING, str(value))
    if isinstance(value, Unreadable):
        return _Found(f"{_OF_TYPE}{value.type} and out of bounds")
    of_type = f"{_OF_TYPE}{type(value).__name__}"
    try:
        if isinstance(value, numbers.Integral):
            return _Found(_NUMBER, str(int(value)))
        if isinstance(value, numbers.Real):
            number = float(value)
            return _Found(_NUMBER, repr(number)) if math.isfinite(number) else _Found(_NOT_FINITE)
        if isinstance(value, decimal.Decimal):
            return _Found(_NUMBER, str(value)) if value.is_finite() else _Found(_NOT_FINITE)
        if isinstance(value, bytes | bytearray | memoryview):
            return _Found(of_type)
        encoded = msgspec.json.encode(dict(value) if isinstance(value, Mapping) else value)
        if encoded[:1] == b'"':  # dates and the like, which JSON writes as strings
            return _Found(of_type, _strings.decode(encoded))
        return _Found(_KINDS.get(chr(encoded[0]), of_type), encoded.decode())
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return _Found(of_type)


def _check_characters(what: str, text: str) -> int:
    """The length of a text in UTF-8, if it can be stored at all."""
    if "\0" in text:
        raise RowRefused(Code.NUL_IN_TEXT, f"{what} has a NUL character (U+0000); remove it")
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        message = f"{what} has half of a UTF-16 surrogate pair (character {error.start + 1}); repair the record"
        raise RowRefused(Code.LONE_SURROGATE, message) from None


def _field(name: str) -> str:
    return f'field "{printable(name, NAME_CHARACTERS)}"'


def _usable_id(what: str, found: _Found) -> str:
    if found.kind == _KINDS["{"]:
        written = _raw_objects.decode(found.text)
        if len(written) == 1 and written.keys() <= _EXTENDED:
            found = _found_in_json(*written.values())
        elif (binary := _UUID.fullmatch(found.text)) is not None:
            found = _Found(_STRING, str(uuid.UUID(bytes=base64.b64decode(binary[1]))))
    text = found.text
    if found.kind not in (_STRING, _NUMBER):
        raise RowRefused(Code.BAD_ID, f"{what} is {found.kind}; an id must be a string or a number")
    if not text:
        raise RowRefused(Code.BAD_ID, f"{what} is empty; every row needs an id")
    size = _check_characters(what, text)
    if size > LONGEST_ID_BYTES:
        message = f"{what} has {size:,} bytes, at most {LONGEST_ID_BYTES:,} are allowed for an id"
        raise RowRefused(Code.ID_TOO_LONG, message)
    return text


def _missing(names: tuple[str, ...], usual: str, there: Iterable[object], use: str) -> str:
    name = names[0] if len(names) == 1 else usual
    fields = [printable(field, NAME_CHARACTERS) for field in there if isinstance(field, str)]
    found = ", ".join(fields[:NAMED_FIELDS])
    if len(fields) > NAMED_FIELDS:
        found += f" and {len(fields) - NAMED_FIELDS} more"
    return f"no {_field(name)} (found: {found or 'nothing'}); use {use}"
