"""An upload as a browser or OpenAI's client sends it (multipart/form-data), written to the disk as it comes."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from pathlib import PurePath
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from embedstream.terminal import printable
from embedstream_gateway.refusals import Refusal, bad
from embedstream_gateway.store import NewFile, Store, StoredFile

MOST_FILE_BYTES = 8 * 1024**3
"""Of one upload."""

MOST_FIELD_BYTES = 64 * 1024
"""Of all that is not the file."""

AT_ONCE = 1024 * 1024
"""Bytes that are written in one go, off the event loop."""

PIECE_SECONDS = 60.0
"""Within which more of a body must come."""

LONGEST_NAME = 255


class _Form:
    """What came of a form so far. The parser calls its `on_…`."""

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self.filename = ""
        self.content: list[bytes] = []
        """Of the file, not written yet."""
        self.found = self.ended = False
        self._header, self._value, self._name = b"", b"", ""
        self._is_file = False
        self._held = 0

    def on_part_begin(self) -> None:
        self._name, self._is_file = "", False

    def on_header_begin(self) -> None:
        self._header, self._value = b"", b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if self._name == "file":
                if self.found:
                    raise bad("the form has two parts named `file`", "file")
                self._is_file = self.found = True
                given = PurePath(options.get(b"filename", b"file").decode("utf-8", "replace")).name
                self.filename = printable(given, LONGEST_NAME)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.content.append(data[start:end])
        else:
            self.fields[self._name] = self.fields.get(self._name, b"") + self._counted(data[start:end])

    def on_end(self) -> None:
        self.ended = True

    def _counted(self, data: bytes) -> bytes:
        self._held += len(data)
        if self._held > MOST_FIELD_BYTES:
            raise bad(f"the form has more than {MOST_FIELD_BYTES:,} bytes beside its file")
        return data

    def field(self, name: str) -> str:
        return self.fields.get(name, b"").decode("utf-8", "replace")


async def receive(request: Request, store: Store) -> StoredFile:
    """Store the file of an upload. Raises `Refusal`."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise bad("an upload is multipart/form-data with the parts `purpose` and `file`")
    form = _Form()
    names = [name for name in dir(form) if name.startswith("on_")]
    callbacks: Any = {name: getattr(form, name) for name in names}
    parser = MultipartParser(boundary, callbacks)
    writing = store.writing("", "batch")
    new = await asyncio.to_thread(writing.__enter__)
    try:
        await _read(request, parser, form, new)
        stored = await asyncio.to_thread(new.finish, form.filename)
    except BaseException as error:
        await asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writing.__exit__, None, None, None)
    return stored


async def _read(request: Request, parser: MultipartParser, form: _Form, new: NewFile) -> None:
    pieces = aiter(request.stream())
    waiting = 0
    try:
        while (piece := await asyncio.wait_for(anext(pieces, None), PIECE_SECONDS)) is not None:
            parser.write(piece)
            waiting += len(piece)
            if waiting >= AT_ONCE:
                await _write(form, new)
                waiting = 0
        parser.finalize()
    except MultipartParseError as error:
        raise bad(f"the form cannot be read: {error}") from error
    except TimeoutError:
        raise Refusal(HTTPStatus.REQUEST_TIMEOUT, f"nothing more came in {PIECE_SECONDS:g} s", "timeout") from None
    except ClientDisconnect:
        raise bad("the upload was broken off") from None
    await _write(form, new)
    if not form.ended:
        raise bad("the form ends in its middle")
    if not form.found:
        raise bad("the form has no part named `file`", "file")
    if form.field("purpose") != "batch":
        raise bad("`purpose` is batch, and nothing else is done with files", "purpose")


async def _write(form: _Form, new: NewFile) -> None:
    content, form.content = form.content, []
    if new.size + sum(map(len, content)) > MOST_FILE_BYTES:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a file has {MOST_FILE_BYTES:,} bytes at most", "too_large", "file"
        )
    await asyncio.to_thread(new.write, b"".join(content))
