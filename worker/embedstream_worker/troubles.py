"""What a worker says while Redis cannot be used: once when it begins, once when it is over."""

from __future__ import annotations

import logging

import redis

from embedstream.troubles import trouble

log = logging.getLogger(__name__)


class Outage:
    """The troubles of one thread, one after the other."""

    def __init__(self, work: str) -> None:
        """`work`: what the thread cannot do meanwhile, as in "committing"."""
        self._work = work
        self._said = ""

    def met(self, error: redis.RedisError) -> None:
        """Another try has failed."""
        clause = trouble(error) or f"refuses ({error})"
        if clause != self._said:
            self._said = clause
            log.warning("%s: Redis %s, trying again (%s)", self._work, clause, error)

    def over(self) -> None:
        """A try has succeeded."""
        if self._said:
            self._said = ""
            log.info("%s: Redis can be used again", self._work)
