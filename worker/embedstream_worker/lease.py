"""Leases and signs of life, from a thread and a connection of their own: a forward pass blocks the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import redis

from embedstream.broker import Broker, WorkerRecord
from embedstream.settings import WorkerSettings
from embedstream_worker.held import Held
from embedstream_worker.pipeline import Life

log = logging.getLogger(__name__)

ENTRIES_PER_STEP = 500
"""How many entries one script run renews: a few milliseconds of the server's time."""


class Leases:
    """Renews what the worker holds and says that the worker lives, until the worker is gone."""

    def __init__(
        self,
        broker: Broker,
        consumer: str,
        held: Held,
        life: Life,
        settings: WorkerSettings,
        record: Callable[[], WorkerRecord],
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._held = held
        self._life = life
        self._settings = settings
        self._record = record

    def run(self, gone: Callable[[float], bool]) -> None:
        """`gone(seconds)` waits and says whether the worker has ended."""
        next_renewal = next_heartbeat = 0.0
        while True:
            now = time.monotonic()
            try:
                if now >= next_heartbeat:
                    self._broker.heartbeat(self._record(), 3 * self._settings.heartbeat_seconds)
                    next_heartbeat = now + self._settings.heartbeat_seconds
                if now >= next_renewal:
                    self.renew()
                    next_renewal = now + self._settings.lease_seconds / 4
            except redis.RedisError as error:
                log.warning("leases could not be renewed (%s), trying again", error)
            if gone(min(1.0, self._settings.lease_seconds / 8)):
                return

    def renew(self) -> None:
        """Reset the idle time of everything held, unless the pipeline has got nowhere for long: then others take over."""
        if self._life.idle_seconds() > self._settings.stall_seconds:
            log.error("nothing has moved for %d s: leases are no longer renewed", self._settings.stall_seconds)
            return
        for stream, entries in self._held.snapshot().items():
            for start in range(0, len(entries), ENTRIES_PER_STEP):
                some = entries[start : start + ENTRIES_PER_STEP]
                lost = self._broker.run(self._broker.renew(stream, self._consumer, some))
                # Committing does not ask who owns an entry: work on lost ones goes on, and counts if it is first.
                self._held.remove(stream, lost)
