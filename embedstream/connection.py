"""Connections to Redis, and what to say when there is none."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio
import redis.exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from embedstream.errors import BrokerError, UsageError
from embedstream.failpoints import breakable

TIMEOUT_SECONDS = 15.0
"""Above any blocking read (2 s at most) by far, below what a person waits."""

_SCHEMES = ("redis", "rediss", "unix")


def _options(url: str) -> dict[str, Any]:
    if urlsplit(url).scheme not in _SCHEMES:
        raise UsageError(f"Redis URL {mask(url)!r}: use redis://host:6379/0, rediss:// (TLS) or unix:///path/to/socket")
    return {
        "socket_timeout": TIMEOUT_SECONDS,
        "socket_connect_timeout": 5.0,
        "health_check_interval": 30,
    }


def connect(url: str, retries: int = 3) -> redis.Redis:
    """A client with its own pool. Raises `UsageError` for a URL that is none; connects at the first command."""
    try:
        retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), retries)
        return breakable(redis.Redis.from_url(url, retry=retry, **_options(url)))
    except ValueError as error:
        raise UsageError(f"Redis URL {mask(url)!r}: {error}") from error


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for asyncio."""
    try:
        return redis.asyncio.Redis.from_url(url, **_options(url))
    except ValueError as error:
        raise UsageError(f"Redis URL {mask(url)!r}: {error}") from error


def check(client: redis.Redis, url: str) -> None:
    """Prove that the server answers. Raises `BrokerError` with one sentence that says what to do."""
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerError(explain(error, url)) from error


def explain(error: Exception, url: str) -> str:
    """One sentence about a failed connection or refused command."""
    shown = mask(url)
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return f"Redis at {shown}: TLS failed ({cause}): check certificate and that the port speaks TLS"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, redis.exceptions.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"Redis at {shown} refuses the password: put user and password into the URL (redis://:PASSWORD@host)"
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"Redis at {shown} forbids a command to this user: {text}"
    if isinstance(error, redis.exceptions.InvalidResponse):
        return f"{shown} does not speak the Redis protocol: check host and port"
    if "DENIED" in text:
        return f"Redis at {shown} runs in protected mode: give it a password, or connect from the same machine"
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return f"Redis at {shown} cannot be reached ({text}): check the URL and that a Redis server runs there"
    return f"Redis at {shown} answered an error: {text}"


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Turn what redis-py raises into a `BrokerError` of one sentence."""
    try:
        yield
    except redis.RedisError as error:
        raise BrokerError(explain(error, url)) from error


def mask(url: str) -> str:
    """The URL without its password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://***"
    parts = parts._replace(query=re.sub(r"(?<![^&])password=[^&]*", "password=***", parts.query))
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username or ''}:***@{host}")
    # urlunsplit drops the slashes of unix:///path.
    return urlunsplit(parts).replace("unix:/", "unix:///", 1) if url.startswith("unix:///") else urlunsplit(parts)
