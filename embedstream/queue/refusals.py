"""Why a row is refused, in words for people and in codes for scripts."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping

from embedstream.queue.blocks import Refusal

ORIGINAL_CHARACTERS = 1000
"""How much of a refused row is kept for the report."""


class Code(enum.StrEnum):
    """Why a row was refused. Stable: scripts of users match on them."""

    INVALID_JSON = "invalid_json"  # the line is not one JSON value, or nests too deeply
    NOT_UTF8 = "not_utf8"  # the line, or a column's value, has bytes that are not UTF-8
    BAD_ROW = "bad_row"  # a row of CSV with more or fewer values than the header
    LINE_TOO_LONG = "line_too_long"  # longer than LONGEST_LINE_BYTES
    NOT_AN_OBJECT = "not_an_object"  # JSON, but no object; or a Python record that is neither mapping nor string
    MISSING_ID = "missing_id"  # none of the id fields, or not the one the spec names
    BAD_ID = "bad_id"  # a list, boolean, null, empty, not finite, or an object but of extended JSON
    ID_TOO_LONG = "id_too_long"  # more than LONGEST_ID_BYTES
    DUPLICATE_ID = "duplicate_id"  # an earlier row of the corpus has this id
    MISSING_FIELD = "missing_field"  # none of the text fields, or not the one the spec names
    TEXT_NOT_STRING = "text_not_string"  # text, title, or the first of a pair is not a string
    MISSING_QUERY = "missing_query"  # a pair without its first text
    BAD_RUN_LINE = "bad_run_line"  # not the six columns of a run in TREC's format
    UNKNOWN_QUERY = "unknown_query"  # of a pair of a run: there is no query of this id
    UNKNOWN_DOCUMENT = "unknown_document"  # the same of its document
    EMPTY_TEXT = "empty_text"  # nothing that can be seen once the title is joined
    TEXT_TOO_LONG = "text_too_long"  # more than BLOCK_LIMITS.longest_text_bytes
    NOT_CUT = "not_cut"  # no chunk of the size that is asked for can be made of the text
    NUL_IN_TEXT = "nul_in_text"  # U+0000 in id, text or a kept string: most stores cannot hold it
    LONE_SURROGATE = "lone_surrogate"  # half of a UTF-16 pair, which no encoding can hold
    BAD_KEPT = "bad_kept"  # a Python value of a kept field that JSON cannot hold
    KEPT_TOO_LONG = "kept_too_long"  # kept fields of more than LONGEST_KEPT_BYTES


FOR_GOOD = frozenset(Code)
"""What the producer refuses would be refused again; every other code of an error row is a worker's."""


OF_THE_FORMAT = frozenset({Code.INVALID_JSON, Code.NOT_UTF8, Code.NOT_AN_OBJECT})
HOPELESS = OF_THE_FORMAT | {Code.MISSING_ID, Code.BAD_ID, Code.MISSING_FIELD, Code.TEXT_NOT_STRING}
"""Where the first rows all end by these, format or fields are not the expected ones: the rest is not worth a start."""


class RowRefused(Exception):
    """Carries a verdict out of the functions that judge a row."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def refusal(row: int, id: str | None, code: Code, message: str, source: object) -> Refusal:
    """A refusal of `source`: a line (bytes), or a Python record."""
    return Refusal(row=row, id=id, code=code.value, message=message, original=original_of(source))


def original_of(source: object) -> str:
    """A refused row for the report, cut at `ORIGINAL_CHARACTERS`; what is not Unicode is escaped."""
    if isinstance(source, bytes):
        text = source[: 4 * ORIGINAL_CHARACTERS + 4].rstrip(b"\r").decode(errors="backslashreplace")
    elif isinstance(source, str):
        text = source[:ORIGINAL_CHARACTERS]
    else:
        try:
            fields = dict(source) if isinstance(source, Mapping) else source
            text = json.dumps(fields, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
        except (TypeError, ValueError, RecursionError):
            text = f"<{type(source).__name__}>"  # never its repr: the same row must read the same in every run
    return text[:ORIGINAL_CHARACTERS].encode(errors="backslashreplace").decode()[:ORIGINAL_CHARACTERS]
