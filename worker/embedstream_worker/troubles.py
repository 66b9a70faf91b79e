"""How a worker's threads wait for Redis: each says once what it cannot do meanwhile, and once that it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import redis

from embedstream.server.patience import Patience
from embedstream.server.troubles import passes

log = logging.getLogger(__name__)

SAME_SECONDS = 60.0
"""A trouble that comes back so soon is the same one: a server at its memory's bound refuses now and then."""


def may_pass(error: Exception) -> bool:
    """Whether the same try may succeed later: Redis recovers, or a user mends the record."""
    return not isinstance(error, redis.RedisError) or passes(error)


def patience(
    work: str,
    wait: Callable[[float], object],
    about: Mapping[str, str] | None = None,
    lasting: Callable[[Exception], bool] = may_pass,
) -> Patience:
    """`work`: what the thread cannot do meanwhile, as in "committing". `about`: see `embedstream.cli.logs`."""

    def say(notice: str) -> None:
        if notice:
            log.warning("%s: %s", work, notice, extra=about)
        else:
            log.info("%s: Redis can be used again", work, extra=about)

    return Patience(say, wait=wait, lasting=lasting, same_seconds=SAME_SECONDS)
