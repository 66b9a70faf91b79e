"""The one guard around what others wrote: whatever reading it raises costs the one thing that was read.

Anybody who may write to Redis may put anything there: a hash where a list belongs, bytes that are no UTF-8, a number of
four hundred digits, a path of three hundred letters. Each piece is read within `reading`, which turns whatever that
raises into one sentence; the caller refuses that one job or record, says so once (`Said`), and goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import redis

from embedstream.errors import EmbedstreamError, RecordDamaged
from embedstream.server.troubles import trouble, without_command
from embedstream.terminal import printable

log = logging.getLogger(__name__)

_LONGEST_REASON = 300


@contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Read a key, record, block, shard or prompt that others may have written. `remedy`: what the user can do.

    Errors of our own family pass as they are, and so does what Redis says of itself (no connection, no memory, no
    rights): only a reply about the data is about `what`.

    Raises:
        RecordDamaged: `what` makes no sense.
    """
    try:
        yield
    except EmbedstreamError:
        raise
    except redis.RedisError as error:
        if is_about_data(error):
            raise _damaged(what, error, remedy) from error
        raise
    except Exception as error:  # whatever reading may raise
        raise _damaged(what, error, remedy) from error


def leaving_out(what: str, remedy: str = "") -> AbstractContextManager[None, bool]:
    """`reading` for what the reader can do without: what any error of our own is about is left out, and logged once."""
    # Type checkers do not see that what `contextmanager` makes may swallow an error.
    return cast("AbstractContextManager[None, bool]", _leaving_out(what, remedy))


@contextmanager
def _leaving_out(what: str, remedy: str) -> Iterator[None]:
    try:
        with reading(what, remedy):
            yield
    except EmbedstreamError as error:
        if _said.new(what, str(error)):
            log.warning("%s", error)


def names(key: str, raws: Iterable[bytes]) -> list[str]:
    """The names that lie under a key. One that is no UTF-8 is left out."""
    raws = list(raws)
    try:
        return [raw.decode() for raw in raws]
    except UnicodeDecodeError:
        found = []
        for raw in raws:
            with leaving_out(f"{key}: the name {raw[:100]!r}", "remove it"):
                found.append(raw.decode())
        return found


def answered(reply: Any) -> Any:
    """A reply of a pipeline that did not raise; raises it if it is an error."""
    if isinstance(reply, redis.RedisError):
        raise reply
    return reply


def is_about_data(error: redis.RedisError) -> bool:
    """Whether Redis refuses because of what lies under a key: it is of another type, holds no number, or a script
    meets a value there that it cannot work with.
    """
    text = str(error)
    return (
        isinstance(error, redis.ResponseError)
        and trouble(error) is None
        and any(words in text for words in _ABOUT_DATA)
    )


_ABOUT_DATA = (
    "WRONGTYPE",
    "not an integer",
    "not a valid float",
    "value is out of range",
    "offset is out of range",
    "hash value is not",
    "would overflow",
    "increment would produce",
    "exceeds maximum allowed size",
    "attempt to ",  # Lua's own errors
    "bad argument",
)


class Said:
    """What has been said of damaged records: each thing once, while it stays the same."""

    def __init__(self, most: int = 1000) -> None:
        """Remembers `most` things: beyond that the oldest may be said again, as memory is bounded."""
        self._most = most
        self._said: dict[str, str] = {}
        self._lock = threading.Lock()

    def new(self, what: str, why: str) -> bool:
        """Whether this has not been said yet; it counts as said now."""
        with self._lock:
            if self._said.get(what) == why:
                return False
            self._said.pop(what, None)
            self._said[what] = why
            while len(self._said) > self._most:
                del self._said[next(iter(self._said))]
            return True


_said = Said()


def _damaged(what: str, error: Exception, remedy: str) -> RecordDamaged:
    reason = printable(" ".join(f"{type(error).__name__}: {without_command(error)}".split()), _LONGEST_REASON)
    return RecordDamaged(f"{what} is damaged: {reason}{remedy and f': {remedy}'}")
