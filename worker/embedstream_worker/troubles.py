"""What a worker says while Redis cannot be used: once when it begins, once when it is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import redis

from embedstream.errors import RecordDamaged
from embedstream.server.troubles import passes, trouble, without_command

log = logging.getLogger(__name__)

Refused = (redis.RedisError, RecordDamaged)
"""What a try with Redis may raise."""

SAME_SECONDS = 60.0
"""A trouble that comes back so soon is the same one: a server at its memory's bound refuses now and then."""


class Outage:
    """The troubles of one thread, one after the other."""

    def __init__(self, work: str, about: Mapping[str, str] | None = None) -> None:
        """`work`: what the thread cannot do meanwhile, as in "committing". `about`: see `embedstream.cli.logs`."""
        self._work = work
        self._about = about
        self._clause = ""
        self._met = 0.0
        self._to_end = False

    def met(self, error: Exception) -> None:
        """Another try has failed."""
        text, now = without_command(error), time.monotonic()
        clause = (trouble(error) if isinstance(error, redis.RedisError) else None) or f"refuses ({text})"
        new = clause != self._clause or now - self._met > SAME_SECONDS
        self._clause, self._met = clause, now
        if new:
            self._to_end = True
            log.warning("%s: Redis %s, trying again (%s)", self._work, clause, text, extra=self._about)

    def over(self) -> None:
        """A try has succeeded."""
        if self._to_end:
            self._to_end = False
            log.info("%s: Redis can be used again", self._work, extra=self._about)


def may_pass(error: Exception) -> bool:
    """Whether the same try may succeed later: Redis recovers, or somebody mends the record."""
    return not isinstance(error, redis.RedisError) or passes(error)
