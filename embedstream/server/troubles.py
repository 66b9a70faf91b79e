"""Which of Redis' refusals pass by themselves, and what to say while they last."""

from __future__ import annotations

import re

import redis
from redis.exceptions import AuthenticationError, BusyLoadingError, MasterDownError, OutOfMemoryError, ReadOnlyError

from embedstream.masking import mask

UNREACHABLE = "cannot be reached"

OUT_OF_MEMORY = "OOM command not allowed"

_PASSING: tuple[tuple[type[redis.RedisError] | None, str, str], ...] = (
    (BusyLoadingError, "LOADING Redis is loading", "is still loading its data"),
    (OutOfMemoryError, OUT_OF_MEMORY, "is out of memory (commits free some; if it lasts, raise its maxmemory)"),
    (ReadOnlyError, "READONLY", "takes no writes, as it is a replica (a failover is under way, or the URL is wrong)"),
    (MasterDownError, "MASTERDOWN", "is a replica that has lost its master (a failover is under way)"),
    (None, "MISCONF", "refuses writes because it cannot save to its disk (free space there; its log says more)"),
    (None, "NOREPLICAS", "refuses writes because too few of its replicas are there (min-replicas-to-write)"),
    (None, "BUSY Redis is busy", "is busy with a script (SCRIPT KILL ends it)"),
    (None, "max number of clients reached", "has no connection left (maxclients)"),
)
"""Error type, where redis-py has one; what the text says otherwise, and within scripts; the clause."""


def trouble(error: redis.RedisError) -> str | None:
    """What stands in the way, as a clause that follows "Redis at URL"; None if the same command can never succeed.

    One kind of trouble has one clause, so that what is said of it can be said once.
    """
    if isinstance(error, AuthenticationError):
        return None
    text = str(error)
    for kind, words, clause in _PASSING:
        if (kind is not None and isinstance(error, kind)) or words in text:
            return clause
    return UNREACHABLE if isinstance(error, (redis.ConnectionError, redis.TimeoutError)) else None


def without_command(error: Exception) -> str:
    """What Redis says, without the command that a pipeline puts in front: its values differ from try to try."""
    return re.sub(r"^Command # \d+ \(.*?\) of pipeline caused error: ", "", str(error), flags=re.DOTALL)


def passes(error: Exception) -> bool:
    """Whether the same command may succeed later: no connection, a restart, a failover, a full server or disk."""
    return isinstance(error, redis.RedisError) and trouble(error) is not None


def waiting(clause: str, url: str) -> str:
    """What is said once while a trouble lasts."""
    return f"Redis at {mask(url)} {clause}, waiting for it"


def is_out_of_memory(error: redis.RedisError) -> bool:
    """Whether the server is over its `maxmemory`."""
    # Redis 7 begins the refusal of a script with its code, from which redis-py makes a type; 6.2 puts it in the middle.
    return isinstance(error, OutOfMemoryError) or OUT_OF_MEMORY in str(error)
