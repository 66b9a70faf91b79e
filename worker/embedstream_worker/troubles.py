"""Which of Redis' refusals pass by themselves."""

from __future__ import annotations

import redis
from redis.exceptions import ClusterDownError, TryAgainError

from embedstream.plans import is_out_of_memory, is_unreachable

_PASSING_CODES = ("MISCONF", "NOREPLICAS", "BUSY ")
"""Errors for which redis-py has no type."""


def passes(error: redis.RedisError) -> bool:
    """Whether the same command may succeed later: no connection, a restart, a failover, a full server or disk."""
    return (
        is_unreachable(error)
        or is_out_of_memory(error)
        or isinstance(error, (ClusterDownError, TryAgainError))
        or any(code in str(error) for code in _PASSING_CODES)
    )
