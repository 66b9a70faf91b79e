"""Which of Redis' refusals pass by themselves, and what to say while they last."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, MasterDownError, OutOfMemoryError, ReadOnlyError

R = TypeVar("R")

Notice = Callable[[str], None]
"""Told once per trouble or pause what is waited for; the empty string when it goes on."""

UNREACHABLE = "cannot be reached"

OUT_OF_MEMORY = "OOM command not allowed"

_PASSING: tuple[tuple[type[redis.RedisError] | None, str, str], ...] = (
    (BusyLoadingError, "LOADING Redis is loading", "is still loading its data"),
    (OutOfMemoryError, OUT_OF_MEMORY, "is out of memory (commits free some; if it lasts, raise its maxmemory)"),
    (ReadOnlyError, "READONLY", "takes no writes, as it is a replica (a failover is under way, or the URL is wrong)"),
    (MasterDownError, "MASTERDOWN", "is a replica that has lost its master (a failover is under way)"),
    (None, "MISCONF", "refuses writes because it cannot save to its disk (free space there; its log says more)"),
    (None, "NOREPLICAS", "refuses writes because too few of its replicas are there (min-replicas-to-write)"),
    (None, "BUSY Redis is busy", "is busy with somebody's script (SCRIPT KILL ends it)"),
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


def passes(error: redis.RedisError) -> bool:
    """Whether the same command may succeed later: no connection, a restart, a failover, a full server or disk."""
    return trouble(error) is not None


def waiting(clause: str, url: str) -> str:
    """What is said once while a trouble lasts."""
    return f"Redis at {url} {clause}, waiting for it"


def is_out_of_memory(error: redis.RedisError) -> bool:
    """Whether the server is over its `maxmemory`."""
    # Redis 7 begins the refusal of a script with its code, from which redis-py makes a type; 6.2 puts it in the middle.
    return isinstance(error, OutOfMemoryError) or OUT_OF_MEMORY in str(error)


def patiently(
    act: Callable[[], R],
    notice: Notice,
    url: str,
    tick: Callable[[], None] = lambda: None,
    until: float | None = None,
) -> R:
    """Do something with Redis, again and again while a trouble lasts that passes. `act` must be harmless when repeated.

    `url` is shown, so it must be masked. `tick` is called before every try and may raise; `until` is when to give up
    (`time.monotonic`; None: never).

    Raises:
        redis.RedisError: what does not pass, or has not passed in time.
    """
    backoff, failures, said = ExponentialWithJitterBackoff(base=0.1, cap=5.0), 0, ""
    while True:
        tick()
        try:
            done = act()
        except redis.RedisError as error:
            clause, left = trouble(error), None if until is None else until - time.monotonic()
            if clause is None or (left is not None and left <= 0):
                raise
            if clause != said:
                said = clause
                notice(waiting(clause, url))
            failures += 1
            pause = backoff.compute(failures)
            time.sleep(pause if left is None else min(pause, left))
        else:
            if said:
                notice("")
            return done
