"""Which of Redis' refusals pass by themselves."""

from __future__ import annotations

import redis
from redis import exceptions

_PASSING = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a failover
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.OutOfMemoryError,
)

_PASSING_TEXTS = ("OOM command not allowed", "MISCONF", "NOREPLICAS", "BUSY ")
"""Errors that redis-py has no type for, or whose code comes after a script's own words."""


def passes(error: redis.RedisError) -> bool:
    """Whether the same command may succeed later: no connection, a restart, a failover, a full server."""
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError)):
        return False
    return isinstance(error, _PASSING) or any(text in str(error) for text in _PASSING_TEXTS)
