"""Outputs in Redis: how their URLs are read, and the one way they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from embedstream.errors import UsageError
from embedstream.masking import mask
from embedstream.server.connection import is_cut_short

SCHEMES = ("redis", "rediss", "unix")

TAKEN_PREFIXES = ("embedstream:", "rq:")
"""How keys of queues and of coordinators' jobs begin."""

_DIGITS = 10
"""Of the numbers in a URL: three centuries of seconds."""

_CONNECTION = ("db", "ssl_ca_certs", "ssl_cert_reqs")
"""What a URL may say of the connection beside server, user, password and database."""


@dataclass(frozen=True)
class RedisAddress:
    """Where hashes go."""

    server: str | None
    """URL of the server; None: the queue's own."""
    prefix: str
    ttl: int | None
    """Seconds after which a hash expires."""

    @property
    def url(self) -> str:
        """The canonical spelling; equal for equal places."""
        settings: dict[str, str | int] = {"prefix": self.prefix}
        if self.ttl is not None:
            settings["ttl"] = self.ttl
        joint = "redis:?" if self.server is None else f"{self.server}{'&' if '?' in self.server else '?'}"
        return joint + urlencode(settings, safe=":/", quote_via=quote)


def parse_address(text: str) -> RedisAddress:
    """Read `redis://host:port/db?prefix=docs:&ttl=86400`, its `rediss://` and `unix://` kin, or `redis:?prefix=docs:`.

    Raises:
        UsageError: it cannot be used; the message shows no password.
    """
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UsageError(f"output {text.partition(':')[0]}:…: is no URL ({error})") from error
    shown = mask(text)
    if is_cut_short(parts):
        # Nothing of it is shown: any piece may be one of a password.
        raise UsageError(
            f"output {parts.scheme}:…: in a password, / ? # and @ are written as %2F %3F %23 and %40, as is @ in a "
            f"prefix; the whole is redis://USER:PASSWORD@host:6379/0?prefix=docs:"
        )
    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    ttl = _ttl(settings.pop("ttl"), shown) if "ttl" in settings else None
    prefix = settings.pop("prefix", "")
    if parts.fragment:
        raise UsageError(f"output {shown}: ends at #: write # in a prefix as %23")
    if not prefix:
        raise UsageError(f"output {shown}: no prefix: say how keys begin, as in redis://host:6379/0?prefix=docs:")
    if not prefix.endswith(":"):
        # With the prefix `r`, an id could say the rest of somebody else's.
        raise UsageError(f"output {shown}: the prefix does not end in a colon: write prefix={prefix[:100]}:")
    if prefix.lower().startswith(TAKEN_PREFIXES):
        taken = " or ".join(TAKEN_PREFIXES)
        raise UsageError(f"output {shown}: keys that begin with {taken} are the queue's: take another prefix")
    unknown = set(settings) - set(_CONNECTION)
    if unknown:
        raise UsageError(
            f"output {shown}: unknown setting {min(unknown)}: known are prefix, ttl, {', '.join(_CONNECTION)}"
        )
    if parts.scheme == "redis" and not parts.netloc and not parts.path:
        if settings:
            raise UsageError(f"output {shown}: names no server, so {min(settings)} means nothing: leave it out")
        return RedisAddress(None, prefix, ttl)
    db = _db(settings.pop("db", "") or (parts.path.strip("/") if parts.scheme != "unix" else ""), shown)
    user, at, _ = parts.netloc.rpartition("@")
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.path == "/":
            raise UsageError(f"output {shown}: no socket: write unix:///path/to/socket?prefix=docs:")
        settings["db"] = str(db)
        server = f"unix://{user}{at}{parts.path}"
    else:
        server = f"{parts.scheme}://{user}{at}{_host_and_port(parts.hostname, text, shown)}/{db}"
    return RedisAddress(f"{server}?{urlencode(sorted(settings.items()))}" if settings else server, prefix, ttl)


def _host_and_port(host: str | None, text: str, shown: str) -> str:
    try:
        port = urlsplit(text).port or 6379
    except ValueError as error:
        raise UsageError(f"output {shown}: the port is not a number below 65536") from error
    host = host or "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _db(text: str, shown: str) -> int:
    if not text:
        return 0
    if not text.isdecimal() or len(text) > _DIGITS:
        raise UsageError(f"output {shown}: the database is not a number: write redis://host:6379/0?prefix=docs:")
    return int(text)


def _ttl(text: str, shown: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS or int(text) == 0:
        raise UsageError(f"output {shown}: ttl={text[:100]} is not a number of seconds (ttl=86400 is a day)")
    return int(text)
