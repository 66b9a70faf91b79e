"""The lines of a batch's input: what is wrong with them, and the rows that a job embeds.

A line with several texts becomes as many rows. A row's id says all that its answer needs: the line, which of its texts
this is and how many it has, how the vector is to be written, and the caller's `custom_id`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream_gateway.answers import MOST_INPUTS
from embedstream_gateway.openai_embeddings import TOKENS_REFUSED

ENDPOINT = "/v1/embeddings"

LONGEST_LINE_BYTES = 16 * 1024 * 1024
MOST_LINES = 1_000_000
MOST_ERRORS = 100
"""Of one file, which are shown."""


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As `EmbeddingsBody`."""

    input: str | list[str | int | list[int]]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    user: str | None = None
    role: Literal["document", "query"] = "document"
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        """Empty for token ids."""
        return [self.input] if isinstance(self.input, str) else [each for each in self.input if isinstance(each, str)]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a batch."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\0]*$")]
    """Part of a row's id, which has no NUL."""
    method: Literal["POST"]
    url: Literal["/v1/embeddings"]
    body: Body


class Row(msgspec.Struct, frozen=True):
    """What a row's id says."""

    line: int
    """From 0."""
    number: int
    count: int
    form: Literal["float", "base64"]
    dimensions: int
    """0: all."""
    truncate: bool
    custom_id: str


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with an input file, as OpenAI shows it."""

    code: str
    message: str
    line: int | None
    """From 1."""
    param: str | None = None


class Lines(msgspec.Struct, frozen=True):
    """What a file holds, once it was read to its end."""

    total: int
    """Requests."""
    inputs: int
    """Texts."""
    model: str
    role: Literal["document", "query"]
    errors: tuple[LineError, ...] = ()


_decoder = msgspec.json.Decoder(Line)


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbers, from 0, and bytes of the lines that are not empty; None for one that is too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            if len(line) > LONGEST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE_BYTES)
                yield number, None
            elif line.strip():
                yield number, line
            number += 1


def first_line(path: Path) -> Line | None:
    """The first request; None if it is none."""
    for _, raw in read_lines(path):
        line = _parsed(raw)
        return line if isinstance(line, Line) else None
    return None


def check_lines(path: Path) -> Lines:
    """Read a whole file and find what is wrong with it. Raises `OutputError` if ids cannot be compared on disk."""
    total = inputs = 0
    model, role = "", "document"
    errors: list[LineError] = []
    with DuplicateIndex() as index:
        for number, raw in read_lines(path):
            line = _parsed(raw)
            if isinstance(line, Line):
                if not total:
                    model, role = line.body.model, line.body.role
                line = _judged(line, model, role)
            if isinstance(line, Line) and index.check(0, [number], [line.custom_id])[0] is not None:
                line = LineError("duplicate_custom_id", "an earlier line has this custom_id", None, "custom_id")
            if isinstance(line, LineError):
                errors.append(msgspec.structs.replace(line, line=number + 1))
                if len(errors) == MOST_ERRORS:
                    break
            else:
                inputs += len(line.body.texts)
            total += 1
            if total > MOST_LINES:
                errors.append(LineError("too_many_requests", f"a batch has {MOST_LINES:,} requests at most", None))
                break
    if not total:
        errors.append(LineError("empty_file", "the file has no request", None))
    return Lines(total, inputs, model, "query" if role == "query" else "document", tuple(errors))


class Records:
    """Rows of a checked file, the same each time that they are read, for `Client.submit`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number, raw in read_lines(self._path):
            assert raw is not None, "checked"
            line = _decoder.decode(raw)
            texts, body = line.body.texts, line.body
            for at, text in enumerate(texts):
                row = Row(
                    number, at, len(texts), body.encoding_format, body.dimensions or 0, body.truncate, line.custom_id
                )
                yield {"id": row_id(row), "text": text}


def custom_ids(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and custom ids of a checked file."""
    for number, raw in read_lines(path):
        assert raw is not None, "checked"
        yield number, _decoder.decode(raw).custom_id


def row_id(row: Row) -> str:
    return " ".join(
        [
            f"{row.line} {row.number} {row.count}",
            f"{row.form} {row.dimensions} {int(row.truncate)}",
            row.custom_id,
        ]
    )


def parse_row_id(id: str) -> Row:
    """Raises `ValueError` for what is none."""
    line, number, count, form, dimensions, truncate, custom_id = id.split(" ", 6)
    base64 = form == "base64"
    return Row(
        int(line),
        int(number),
        int(count),
        "base64" if base64 else "float",
        int(dimensions),
        truncate == "1",
        custom_id,
    )


def _parsed(raw: bytes | None) -> Line | LineError:
    if raw is None:
        return LineError("line_too_long", f"a line has {LONGEST_LINE_BYTES:,} bytes at most", None)
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_request", f"is no request for {ENDPOINT}: {error}", None)


def _judged(line: Line, model: str, role: str) -> Line | LineError:
    body = line.body
    given = 1 if isinstance(body.input, str) else len(body.input)
    texts = body.texts
    if len(texts) != given:
        return LineError("token_ids", TOKENS_REFUSED, None, "input")
    if not 1 <= given <= MOST_INPUTS:
        return LineError("invalid_request", f"`input` has {given:,} texts: from 1 to {MOST_INPUTS:,}", None, "input")
    if "" in texts:
        return LineError("invalid_request", "`input` has an empty text", None, "input")
    if body.model != model:
        return LineError("mismatched_model", f"the first line names model {model}: a batch has one", None, "model")
    if body.role != role:
        return LineError("mismatched_role", f"the first line has the role {role}: a batch has one", None, "role")
    return line
