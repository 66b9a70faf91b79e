"""What a request is refused with, in the words and the envelope of the API that it was made by."""

from __future__ import annotations

from html import escape
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from embedstream.masking import mask_text
from embedstream.terminal import printable

RETRY_SECONDS = 2
"""After an overload, or while no worker is there."""

LONGEST_MESSAGE = 1000

_TEI_KINDS = {
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded",
    HTTPStatus.SERVICE_UNAVAILABLE: "unhealthy",
}
_OPENAI_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Not shown: embedstream</title><link rel="stylesheet" href="/page/static/style.css"></head>
<body><main><h1>This cannot be shown</h1><p class="notice">{}</p><p><a href="/">Back to the fleet</a></p>
</main></body></html>
"""


class Refusal(Exception):
    """A request that gets no result. `param` names the field at fault; `code` is OpenAI's, or one in its manner."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(printable(mask_text(message), LONGEST_MESSAGE))
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request's own fault."""
    return Refusal(HTTPStatus.BAD_REQUEST, message, code, param)


def overloaded(message: str) -> Refusal:
    """More waits already than may wait: the caller slows down."""
    return Refusal(HTTPStatus.TOO_MANY_REQUESTS, message, "overloaded", retry_after=RETRY_SECONDS)


def unavailable(message: str) -> Refusal:
    """Redis or a worker is missing at the moment."""
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "unavailable", retry_after=RETRY_SECONDS)


def answer(refusal: Refusal, path: str) -> Response:
    """The response, with the envelope of the API that the path belongs to."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status is HTTPStatus.UNAUTHORIZED:
        # A browser asks its user for a name, which does not matter, and the key.
        scheme = 'Basic realm="embedstream", charset="UTF-8"' if is_page(path) else "Bearer"
        headers["WWW-Authenticate"] = scheme
    if is_page(path):
        return Response(_PAGE.format(escape(str(refusal))), refusal.status, headers, "text/html")
    return Response(msgspec.json.encode(_envelope(refusal, path)), refusal.status, headers, "application/json")


def is_page(path: str) -> bool:
    """Whether people look at it, rather than programs."""
    return path == "/" or path.startswith("/page/")


def _envelope(refusal: Refusal, path: str) -> dict[str, Any]:
    message = str(refusal)
    if path.startswith("/v2/"):
        return {"message": message}
    if path == "/v1/rerank":
        return {"detail": message, "message": message}
    if path.startswith(("/v1/", "/jobs")):
        default = "server_error" if refusal.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = _OPENAI_TYPES.get(refusal.status, default)
        return {"error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}}
    default = "backend" if refusal.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "validation"
    return {"error": message, "error_type": _TEI_KINDS.get(refusal.status, default)}
