"""Bodies of requests: read whole before any work begins, within bounds of size, time and memory."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream_gateway import refusals
from embedstream_gateway.refusals import Refusal, overloaded

MIB = 1024 * 1024

MOST_BODY_BYTES = 16 * MIB
"""Twice what the texts of a request may have: JSON escapes."""

MOST_HELD_BYTES = 256 * MIB
"""Of all bodies together."""

READ_SECONDS = 30.0
"""For a whole body."""

MOST_REQUESTS = 2048
"""Under way at once, their bodies read."""

STREAMED = ("/v1/files",)
"""Paths that read their bodies piece by piece, with bounds of their own."""


class Bodies:
    """Reads and hands on. A slow sender holds a connection and what it has sent, and no place among requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._held = 0
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        try:
            if scope["path"] not in STREAMED or scope["method"] != "POST":
                body = await self._read(scope, receive)
                receive = _replaying(body, receive)
            if self.requests >= MOST_REQUESTS:
                raise overloaded(f"{MOST_REQUESTS:,} requests are under way: try again later")
        except Refusal as refusal:
            self._held -= len(body)
            await refusals.answer(refusal, scope["path"])(scope, receive, send)
            return
        except _Gone:
            return
        self.requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.requests -= 1
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body, which counts as held. Raises `Refusal`, `_Gone`."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > MOST_BODY_BYTES:
            raise _too_long()
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(READ_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Gone
                    piece = message.get("body", b"")
                    size += len(piece)
                    self._held += len(piece)
                    if size > MOST_BODY_BYTES:
                        raise _too_long()
                    if self._held > MOST_HELD_BYTES:
                        raise overloaded("the bodies of other requests fill the memory: try again later")
                    pieces.append(piece)
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            self._held -= size
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT, f"the body did not come in {READ_SECONDS:g} s", "timeout"
            ) from None
        except (Refusal, _Gone):
            self._held -= size
            raise


class _Gone(Exception):
    """The client has left."""


def _too_long() -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body has more than {MOST_BODY_BYTES // MIB} MiB: send more texts as a batch or a job",
        "too_large",
    )


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Gives the body once; after that what `receive` gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
