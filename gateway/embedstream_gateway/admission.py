"""Which requests are admitted: by keys and their scopes, and none that a page of another site makes a browser send."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from embedstream_gateway import refusals
from embedstream_gateway.api_keys import ApiKey, ApiKeys
from embedstream_gateway.refusals import Refusal
from embedstream_gateway.scopes import needed

_SAFE = ("GET", "HEAD", "OPTIONS")


class Admission:
    """Refuses before anything of a body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys | None) -> None:
        """`keys`: None means that every user of this machine may do everything; see `serving`."""
        self._app = app
        self._keys = keys
        self._needed = lru_cache(1024)(needed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            refuse_other_sites(scope["method"], headers)
            if self._keys is None:
                refuse_other_names(headers)
            else:
                self._admit(self._keys, scope, headers)
        except Refusal as refusal:
            await refusals.answer(refusal, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, keys: ApiKeys, scope: Scope, headers: Headers) -> None:
        need = self._needed(scope["method"], scope["path"])
        if need == "none":
            return
        key = find_key(keys, headers.get("authorization", ""))
        if need != "any" and not key.may(need):
            raise Refusal(HTTPStatus.FORBIDDEN, f"key {key.name} may not do this: it needs the scope {need}", "scope")
        scope["state"]["key"] = key


def find_key(keys: ApiKeys, authorization: str) -> ApiKey:
    """The key of a header: `Bearer KEY`, or `Basic` with the key as password. Raises `Refusal`."""
    scheme, _, rest = authorization.partition(" ")
    secret = ""
    if scheme.lower() == "bearer":
        secret = rest.strip()
    elif scheme.lower() == "basic":
        try:
            secret = base64.b64decode(rest, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            secret = ""
    key = keys.find(secret) if secret else None
    if key is None:
        message = "this key is not known" if secret else "no API key: send `Authorization: Bearer KEY`"
        raise Refusal(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")
    return key


def refuse_other_sites(method: str, headers: Headers) -> None:
    """Raise `Refusal` for a change that a page of another site asked for: a browser sends the key along. Programs that
    are no browser send neither header."""
    if method in _SAFE:
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        other = site not in ("same-origin", "none")
    else:
        other = origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    if other:
        raise Refusal(HTTPStatus.FORBIDDEN, "this comes from a page of another site", "cross_site")


def refuse_other_names(headers: Headers) -> None:
    """Raise `Refusal` for a request without keys by any name but this machine's own: that of a site of others may be
    made to lead here, for a browser on this machine."""
    if not is_loopback(urlsplit(f"//{headers.get('host', '')}").hostname or ""):
        raise Refusal(HTTPStatus.FORBIDDEN, "without --api-key-file only localhost is served", "host")


@lru_cache(1024)
def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this machine for itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
