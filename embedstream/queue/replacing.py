"""Writing to keys that others may have made of another type: such a key is replaced, as the steps replace it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import redis

T = TypeVar("T")

# In one script, so that what another client has put there meanwhile stays.
_REMOVE_OTHER = "if redis.call('TYPE', KEYS[1]).ok ~= ARGV[1] then redis.call('UNLINK', KEYS[1]) end"


def replacing(client: redis.Redis, key: str, kind: Literal["zset", "hash"], write: Callable[[], T]) -> T:
    """Write to `key`; if it is of another type than `kind`, it is removed, and written to once more.

    Raises:
        redis.RedisError: as `write` raises it.
    """
    try:
        return write()
    except redis.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        client.eval(_REMOVE_OTHER, 1, key, kind)
        return write()


def enlist(client: redis.Redis, key: str, name: str, score: int, seconds: int) -> None:
    """Put a name into a sorted set, kept for so many seconds from now on; a key of another type is replaced."""

    def write() -> list[Any]:
        with client.pipeline(transaction=False) as pipe:
            pipe.zadd(key, {name: score})
            pipe.expire(key, seconds)
            return pipe.execute()

    replacing(client, key, "zset", write)
