"""The one guard around what others wrote: whatever reading it raises costs the one thing that was read.

Anybody who may write to Redis may put anything there: a hash where a list belongs, bytes that are no UTF-8, a number of
four hundred digits, a path of three hundred letters. Each piece is read within `reading`, which turns whatever that
raises into one sentence; the caller refuses that one job or record, says so once (`Said`), and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import redis

from embedstream.errors import EmbedstreamError, RecordDamaged

log = logging.getLogger(__name__)

_LONGEST_REASON = 300


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Read a key, record, block, shard or prompt that others may have written.

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
            raise RecordDamaged(f"{what} is damaged: {_reason(error)}") from error
        raise
    except Exception as error:  # whatever reading may raise
        raise RecordDamaged(f"{what} is damaged: {_reason(error)}") from error


@contextmanager
def leaving_out(what: str) -> Iterator[None]:
    """`reading` for what the reader can do without: if it is damaged, that is logged once, and the reader goes on."""
    try:
        with reading(what):
            yield
    except RecordDamaged as error:
        if _said.new(what, str(error)):
            log.warning("%s", error)


def names(key: str, raws: Iterable[bytes]) -> list[str]:
    """The names that lie under a key. One that is no UTF-8 is left out."""
    found = []
    for raw in raws:
        with leaving_out(f"{key}: the name {raw[:100]!r}"):
            found.append(raw.decode())
    return found


def is_about_data(error: redis.RedisError) -> bool:
    """Whether Redis refuses because of what lies under a key: it is of another type, or holds no number."""
    text = str(error)
    return isinstance(error, redis.ResponseError) and any(words in text for words in _ABOUT_DATA)


_ABOUT_DATA = (
    "WRONGTYPE",
    "not an integer",
    "not a valid float",
    "hash value is not",
    "would overflow",
    "increment would produce",
)


class Said:
    """What has been said of damaged records: each thing once, while it stays the same."""

    def __init__(self, most: int = 1000) -> None:
        """Remembers `most` things: beyond that the oldest may be said again, as memory is bounded."""
        self._most = most
        self._said: dict[str, str] = {}

    def new(self, what: str, why: str) -> bool:
        """Whether this has not been said yet; it counts as said now."""
        if self._said.get(what) == why:
            return False
        self._said.pop(what, None)
        self._said[what] = why
        while len(self._said) > self._most:
            del self._said[next(iter(self._said))]
        return True


_said = Said()


def _reason(error: Exception) -> str:
    # Of a pipeline's command, whose arguments may be another each time, nothing.
    said = str(error).rpartition("of pipeline caused error: ")[2]
    text = " ".join(f"{type(error).__name__}: {said}".split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
