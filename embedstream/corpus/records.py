"""One input row -> what the job needs of it, or the reason why not. Pure, and the same for files and Python records.

`RecordReader` finds the fields by themselves unless the spec names them, joins the title in front of the text, and
judges: a row ends as a `Record`, a `Refusal`, or None when the job skips empty texts.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import msgspec

from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import Code, RowRefused, refusal
from embedstream.settings import BLOCK_LIMITS, MIB
from embedstream.terminal import printable

ID_FIELDS = ("_id", "id", "custom_id", "docid")
TEXT_FIELDS = ("text", "content")
TITLE_FIELD = "title"

LONGEST_LINE_BYTES = 8 * MIB
"""A longer line is refused unread: the longest text with every character escaped still fits."""
LONGEST_ID_BYTES = BLOCK_LIMITS.longest_id_bytes
LONGEST_KEPT_BYTES = MIB
"""All kept fields of a row together: a block must stay a small stream entry."""

NAMED_FIELDS = 10
NAME_CHARACTERS = 60
"""How much of a row's field names a message repeats."""

Source: TypeAlias = object
"""Where a row came from: a line, or a Python record."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A row that can be embedded."""

    row: int
    """Position in the part: line number - 1 for files."""
    id: str
    text: str
    """With the title in front."""
    text_bytes: int
    """Its length in UTF-8."""
    kept: tuple[str | None, ...]
    """The fields of `JobSpec.keep`: strings as they are, null for null or missing, anything else as its JSON text."""
    source: Source
    """For the report, if the row turns out to be a duplicate."""


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
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_strings = msgspec.json.Decoder(str)
_raw_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


class RecordReader:
    """Judges the rows of one job.

    `ids` and `texts` are the fields that are looked for, the first that a row has being taken; `title` is the one
    joined in front, by `title_sep`, if any.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.ids = (spec.id_field,) if spec.id_field is not None else ID_FIELDS
        self.texts = (spec.text_field,) if spec.text_field is not None else TEXT_FIELDS
        title = TITLE_FIELD if spec.title_field is None else spec.title_field
        self.title = None if title == spec.text_field else title
        self.title_sep = spec.title_sep
        self._keep = spec.keep
        self._skip_empty = spec.empty == "skip"
        names = dict.fromkeys([*self.ids, *self.texts, *([] if self.title is None else [self.title])])
        self._fast = _field_decoder(tuple(names), tuple(name for name in spec.keep if name not in names))
        at = {name: i for i, name in enumerate([*names, *(name for name in spec.keep if name not in names)])}
        self._id_at = [at[name] for name in self.ids]
        self._text_at = [at[name] for name in self.texts]
        self._title_at = -1 if self.title is None else at[self.title]
        self._keep_at = [at[name] for name in spec.keep]

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
            fields: dict[str, _Found] = {self.ids[0]: _Found(_STRING, str(row)), self.texts[0]: _found(record)}
        elif isinstance(record, Mapping):
            wanted = {*self.ids, *self.texts, self.title, *self._keep}
            others = _Found("")  # named if a field is missing, never read
            fields = {
                name: _found(value) if name in wanted or isinstance(value, str) else others
                for name, value in cast("Mapping[object, object]", record).items()
                if isinstance(name, str)
            }
        else:
            message = f"a record must be a mapping or a string, not {type(record).__name__}"
            return refusal(row, None, Code.NOT_AN_OBJECT, message, record)
        return self._judge(row, fields, record)

    def _clean(self, row: int, line: bytes, values: tuple[Any, ...]) -> Record | None:
        """The record of a row in which nothing is unusual; None for any other."""
        unset = msgspec.UNSET
        id: object = unset
        for at in self._id_at:
            if (id := values[at]) is not unset:
                break
        if type(id) is int and id:  # 0 may be written -0
            id = str(id)
        text: object = unset
        for at in self._text_at:
            if (text := values[at]) is not unset:
                break
        if type(id) is not str or type(text) is not str:
            return None
        if self._title_at >= 0 and (title := values[self._title_at]) is not unset:
            if type(title) is not str:
                return None
            if title:
                if not text or title.isspace():
                    return None
                text = f"{title}{self.title_sep}{text}"
        text_bytes = len(text) if text.isascii() else len(text.encode())
        if not 0 < text_bytes <= BLOCK_LIMITS.longest_text_bytes or text.isspace() or "\0" in text:
            return None
        if not 0 < len(id) <= LONGEST_ID_BYTES // 4 or "\0" in id:
            return None
        kept: tuple[str | None, ...] = ()
        if self._keep_at:
            kept = tuple([_kept_in_json(values[at]) for at in self._keep_at])
            if sum(map(len, filter(None, kept))) > LONGEST_KEPT_BYTES // 4 or any("\0" in v for v in kept if v):
                return None
        return Record(row, id, text, text_bytes, kept, line)

    def _slow_line(self, row: int, line: bytes) -> Outcome:
        if len(line) > LONGEST_LINE_BYTES:
            message = f"line is longer than {LONGEST_LINE_BYTES:,} bytes; split the record"
            return refusal(row, None, Code.LINE_TOO_LONG, message, line)
        try:
            line.decode()
            raw = _raw_objects.decode(line)
            return self._judge(row, {name: _found_in_json(value) for name, value in raw.items()}, line)
        except UnicodeDecodeError as error:
            message = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8; convert the file"
            return refusal(row, None, Code.NOT_UTF8, message, line)
        except msgspec.ValidationError as error:
            message = f"a line must be a JSON object; {str(error)[:1].lower()}{str(error)[1:]}"
            return refusal(row, None, Code.NOT_AN_OBJECT, message, line)
        except msgspec.DecodeError as error:
            if _SURROGATE_ESCAPE.search(line) and _is_json_but_for_surrogates(line):
                message = "half of a UTF-16 surrogate pair (\\ud800 to \\udfff) is no character; repair the record"
                return refusal(row, None, Code.LONE_SURROGATE, message, line)
            return refusal(row, None, Code.INVALID_JSON, str(error), line)
        except RecursionError:
            return refusal(row, None, Code.INVALID_JSON, "JSON is nested too deeply", line)

    def _judge(self, row: int, fields: Mapping[str, _Found], source: Source) -> Outcome:
        id: str | None = None
        try:
            id = self._judge_id(fields)
            text = self._judge_text(fields)
            if not text or text.isspace():
                if self._skip_empty:
                    return None
                raise RowRefused(Code.EMPTY_TEXT, "text is empty; --empty skip leaves such rows out")
            size = _check_characters("text", text)
            if size > BLOCK_LIMITS.longest_text_bytes:
                most = BLOCK_LIMITS.longest_text_bytes
                raise RowRefused(Code.TEXT_TOO_LONG, f"text has {size:,} bytes, at most {most:,} are allowed; split it")
            kept = tuple(self._judge_kept(fields))
        except RowRefused as refused:
            return refusal(row, id, refused.code, str(refused), source)
        return Record(row, id, text, size, kept, source)

    def _judge_id(self, fields: Mapping[str, _Found]) -> str:
        name = next((name for name in self.ids if name in fields), None)
        if name is None:
            hint = _likely_id(fields)
            raise RowRefused(Code.MISSING_ID, _missing(self.ids, "id", fields, f"--id-field {hint}"))
        found = fields[name]
        if found.kind not in (_STRING, _NUMBER):
            raise RowRefused(Code.BAD_ID, f"{_field(name)} is {found.kind}; an id must be a string or a number")
        if not found.text:
            raise RowRefused(Code.BAD_ID, f"{_field(name)} is empty; every row needs an id")
        size = _check_characters(_field(name), found.text)
        if size > LONGEST_ID_BYTES:
            message = f"{_field(name)} has {size:,} bytes, at most {LONGEST_ID_BYTES:,} are allowed for an id"
            raise RowRefused(Code.ID_TOO_LONG, message)
        return found.text

    def _judge_text(self, fields: Mapping[str, _Found]) -> str:
        name = next((name for name in self.texts if name in fields), None)
        if name is None:
            hint = _likely_text(fields, self.ids)
            raise RowRefused(Code.MISSING_FIELD, _missing(self.texts, "text", fields, f"--text-field {hint}"))
        found = fields[name]
        if found.kind != _STRING:
            raise RowRefused(Code.TEXT_NOT_STRING, f"{_field(name)} is {found.kind}; a text must be a string")
        title = _NULL if self.title is None else fields.get(self.title, _NULL)
        if title is _NULL or title.kind == "null":
            return found.text
        if title.kind != _STRING:
            message = (
                f"{_field(str(self.title))} is {title.kind}; a title must be a string; --title-field takes another"
            )
            raise RowRefused(Code.TEXT_NOT_STRING, message)
        if not title.text or title.text.isspace():
            return found.text
        return f"{title.text}{self.title_sep}{found.text}" if found.text else title.text

    def _judge_kept(self, fields: Mapping[str, _Found]) -> Iterable[str | None]:
        total = 0
        for name in self._keep:
            found = fields.get(name, _NULL)
            if found.kind in ("null", _NOT_FINITE):
                yield None
                continue
            if found.kind.startswith(_OF_TYPE) and not found.text:
                raise RowRefused(Code.BAD_KEPT, f"{_field(name)} is {found.kind}, which JSON cannot hold")
            total += _check_characters(_field(name), found.text)
            if total > LONGEST_KEPT_BYTES:
                raise RowRefused(Code.KEPT_TOO_LONG, f"kept fields have more than {LONGEST_KEPT_BYTES:,} bytes")
            yield found.text


@functools.lru_cache(maxsize=16)
def _reader(spec: JobSpec) -> RecordReader:
    return RecordReader(spec)


def validate_record(record: object, row: int, spec: JobSpec) -> Outcome:
    """Judge one Python record (see `RecordReader.record`, which is faster for many)."""
    return _reader(spec).record(row, record)


def duplicate_refusal(record: Record, where: str) -> Refusal:
    """The refusal of a record whose id an earlier row has; `where` says which, the same in every run."""
    message = f"id {printable(record.id, 100)} was used before, in {where}"
    return refusal(record.row, record.id, Code.DUPLICATE_ID, message, record.source)


def _field_decoder(names: tuple[str, ...], raw_names: tuple[str, ...]) -> msgspec.json.Decoder[Any] | None:
    """Decodes just these fields of an object, the latter ones as raw JSON; None if msgspec cannot take the names."""
    types = [Any] * len(names) + [msgspec.Raw] * len(raw_names)
    attributes = [f"f{i}" for i in range(len(types))]
    try:
        struct = msgspec.defstruct(
            "Fields",
            [(attribute, type, msgspec.UNSET) for attribute, type in zip(attributes, types, strict=True)],
            rename=dict(zip(attributes, names + raw_names, strict=True)),
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


def _is_json_but_for_surrogates(line: bytes) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


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
    """The same for a Python value. Numbers of other libraries count as numbers, UUIDs as strings."""
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


def _missing(names: tuple[str, ...], usual: str, fields: Mapping[str, _Found], use: str) -> str:
    name = names[0] if len(names) == 1 else usual
    found = ", ".join(printable(field, NAME_CHARACTERS) for field in list(fields)[:NAMED_FIELDS])
    if len(fields) > NAMED_FIELDS:
        found += f" and {len(fields) - NAMED_FIELDS} more"
    return f"no {_field(name)} (found: {found or 'nothing'}); use {use}"


def _likely_id(fields: Mapping[str, _Found]) -> str:
    """The field that looks most like an id."""
    for name, found in fields.items():
        if found.kind in (_STRING, _NUMBER, "") and name.lower().endswith(("id", "key", "url", "doi")):
            return printable(name, NAME_CHARACTERS)
    return "NAME"


def _likely_text(fields: Mapping[str, _Found], ids: tuple[str, ...]) -> str:
    """The field with the longest string."""
    strings = {name: len(found.text) for name, found in fields.items() if found.kind == _STRING and name not in ids}
    return printable(max(strings, key=strings.__getitem__), NAME_CHARACTERS) if strings else "NAME"
