"""Connections to Redis, and what to say when there is none."""

from __future__ import annotations

import contextlib
import os
import shlex
import ssl
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from embedstream.errors import BrokerError, UsageError
from embedstream.failpoints import breakable
from embedstream.masking import HIDDEN
from embedstream.masking import mask as mask  # to be had here too, beside the connections whose addresses it hides
from embedstream.server.troubles import UNREACHABLE, trouble, without_command

TIMEOUT_SECONDS = 15.0
"""Above any blocking read (2 s at most) by far, below what a person waits."""

REQUEST_TIMEOUT_SECONDS = 5.0
"""The same for interactive requests, whose callers wait seconds: a server that hangs costs them little more."""

CLUSTER = "is a cluster node, and a queue's keys do not fit into one slot with the list of queues: use a single server"

Connect = Callable[[str, int], redis.Redis]
"""(URL, how often a command is repeated after a connection error) -> a client."""

REDIS_VARIABLE = "EMBEDSTREAM_REDIS_URL"

_SCHEMES = ("redis", "rediss", "unix")

_KNOWN = ("db", "username", "password", "client_name", "socket_timeout", "socket_connect_timeout")
_KNOWN_TLS = ("ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
"""What a URL's query may say; redis-py would fail on others at the first command, or answer in another type."""


def is_cut_short(parts: SplitResult) -> bool:
    """Whether an unescaped character in the password has ended what stands before the host."""
    login_is_whole = parts.scheme == "unix" and (not parts.netloc or "@" in parts.netloc)
    if not login_is_whole and "@" in f"{parts.path}{parts.query}{parts.fragment}":
        return True
    try:
        return parts.port is not None and parts.hostname is None
    except ValueError:
        # What stands for the port of a URL without an @ may be a password.
        return "@" not in parts.netloc and not parts.netloc.rpartition(":")[2].isdecimal()


def _options(url: str, timeout: float | None) -> dict[str, Any]:
    """Raises `UsageError` for a URL that is none, `ValueError` for one that is none to `urlsplit`."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        # Where the scheme was forgotten, any piece may be one of a password.
        shown = mask(url) if "://" in url or "@" not in url else HIDDEN
        raise UsageError(f"Redis URL {shown!r}: use redis://host:6379/0, rediss:// (TLS) or unix:///path/to/socket")
    if is_cut_short(parts):
        # Nothing of it is shown: any piece may be one of a password.
        raise UsageError(
            f"Redis URL {parts.scheme}://***: in a password, / ? # and @ are written as %2F %3F %23 and %40; "
            "the whole is redis://USER:PASSWORD@host:6379/0"
        )
    known = (*_KNOWN, *_KNOWN_TLS) if parts.scheme == "rediss" else _KNOWN
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name in _KNOWN_TLS and name not in known:
            raise UsageError(
                f"Redis URL {mask(url)!r}: {name} means nothing without TLS: use rediss://, or leave it out"
            )
        if name not in known:
            raise UsageError(f"Redis URL {mask(url)!r}: unknown setting {name} (known: {', '.join(known)})")
    if parts.scheme != "unix" and not parts.path.strip("/").isdecimal() and parts.path.strip("/"):
        raise UsageError(f"Redis URL {mask(url)!r}: the database is not a number: redis://host:6379/0")
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": 5.0,
        # A connection that was idle for so long proves itself before it is used.
        "health_check_interval": 30,
    }
    if parts.scheme != "unix":
        # Routers between forget connections on which nothing is said: a worker's long forward pass is such a silence.
        options["socket_keepalive"] = True
    return options


def connect(url: str, retries: int = 3, timeout: float = TIMEOUT_SECONDS) -> redis.Redis:
    """A client with its own pool; `timeout` seconds for a reply. Connects at the first command.

    Raises:
        UsageError: a URL that is none.
    """
    try:
        retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), retries)
        return breakable(redis.Redis.from_url(url, retry=retry, **_options(url, timeout)))
    except ValueError as error:
        raise UsageError(f"Redis URL {mask(url)!r}: {error}") from error


def connect_async(url: str) -> redis.asyncio.Redis:
    """A client for asyncio that repeats nothing by itself, and that waits for a reply for as long as its caller does.

    A time limit of redis-py's own would cost cancellations: `asyncio.wait_for` of Python 3.11 swallows some.
    """
    try:
        return redis.asyncio.Redis.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **_options(url, None))
    except ValueError as error:
        raise UsageError(f"Redis URL {mask(url)!r}: {error}") from error


def explain(error: Exception, url: str) -> str:
    """One sentence about a failed connection or refused command."""
    shown = mask(url)
    text = without_command(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return f"Redis at {shown}: TLS failed ({cause}): check certificate and that the port speaks TLS"
        if isinstance(cause, FileNotFoundError) and urlsplit(url).scheme == "rediss":
            return f"Redis at {shown}: a certificate file named in the URL (ssl_ca_certs, ssl_certfile…) cannot be read"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, redis.exceptions.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"Redis at {shown} refuses the password: put user and password into the URL (redis://:PASSWORD@host)"
    if isinstance(error, redis.exceptions.NoPermissionError) or "ACL failure in script" in text:
        return f"Redis at {shown} forbids a command or key to this user: {text}: see docs/operations.md for its rights"
    if isinstance(error, redis.exceptions.InvalidResponse):
        return f"{shown} does not speak the Redis protocol: check host and port"
    if "DENIED" in text:
        return f"Redis at {shown} runs in protected mode: give it a password, or connect from the same machine"
    if "unknown command" in text and "HELLO" in text:
        return f"Redis at {shown} is older than 6.2, the oldest that will do: upgrade it"
    if "DB index is out of range" in text:
        return f"Redis at {shown} has no such database: name one that it has (redis://host:6379/0)"
    if isinstance(error, redis.exceptions.MovedError):
        return f"Redis at {shown} {CLUSTER}"
    clause = trouble(error) if isinstance(error, redis.RedisError) else UNREACHABLE
    if clause == UNREACHABLE:
        tls = ", with TLS on that port" if urlsplit(url).scheme == "rediss" else ""
        return f"Redis at {shown} cannot be reached ({text}): check the URL and that a Redis server runs there{tls}"
    if clause is not None:
        return f"Redis at {shown} {clause}: try again"
    return f"Redis at {shown} answered an error: {text}"


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Turn what redis-py raises into a `BrokerError` of one sentence."""
    try:
        yield
    except redis.RedisError as error:
        raise BrokerError(explain(error, url)) from error


def redis_option(url: str) -> str:
    """What a command needs to use the same Redis, with a space in front; empty if EMBEDSTREAM_REDIS_URL says it, or if
    it has a password, which is not shown.
    """
    shown = url != os.environ.get(REDIS_VARIABLE) and mask(url) == url
    return f" --redis {shlex.quote(url)}" if shown else ""


def with_redis(command: str, url: str) -> str:
    """A command for people to paste, in backquotes, with the Redis that this process was given and no password.

    What EMBEDSTREAM_REDIS_URL says already is left out; a URL with a password is referred to, not shown.
    """
    option = redis_option(url)
    if option or url == os.environ.get(REDIS_VARIABLE):
        return f"`{command}{option}`"
    return f"`{command}` with the same --redis, or with {REDIS_VARIABLE} set"
