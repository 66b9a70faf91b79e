"""Leases and signs of life, from a thread and a connection of their own: a forward pass blocks the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from embedstream.queue.workers import WorkerRecord
from embedstream_worker.held import ENTRIES_PER_STEP
from embedstream_worker.shared import Shared
from embedstream_worker.troubles import patience

log = logging.getLogger(__name__)


class Leases:
    """Renews what the worker holds and says that the worker lives, until the worker is gone."""

    def __init__(self, shared: Shared, record: Callable[[], WorkerRecord]) -> None:
        self._shared = shared
        self._broker = shared.broker(0)
        self._record = record
        self._stalled = False

    def run(self, gone: Callable[[float], bool]) -> None:
        """`gone(seconds)` waits and says whether the worker has ended."""
        renewing = patience("renewing leases", gone)
        speaking = patience("giving a sign of life", gone)
        next_renewal = next_heartbeat = 0.0
        said: WorkerRecord | None = None
        while True:
            now = time.monotonic()
            # Renewal first, and apart: a full server refuses the heartbeat, which is a write, but not the renewal.
            if now >= next_renewal and renewing.once(self.renew):
                next_renewal = now + self._shared.settings.lease_seconds / 4
            record = self._record()
            due = now >= next_heartbeat or said is None or said.state != record.state
            if due and speaking.once(self.say_alive):
                next_heartbeat, said = now + self._shared.settings.heartbeat_seconds, record
            if gone(min(1.0, self._shared.settings.lease_seconds / 8)):
                return

    def say_alive(self) -> None:
        """Raises `redis.RedisError`."""
        self._broker.heartbeat(self._record(), self._shared.settings.expire_seconds)

    def renew(self) -> None:
        """Reset the idle time of everything held, unless the pipeline has got nowhere for long: then others take over.

        Raises:
            redis.RedisError: some leases could not be renewed.
        """
        held = self._shared.held.snapshot()
        _, bound = self._shared.activity.longest(self._shared.settings.stall_seconds)
        stalled = bool(held) and self._shared.activity.idle_seconds() > bound
        if stalled and not self._stalled:
            log.error("nothing has moved for %d s: leases are no longer renewed", bound)
        self._stalled = stalled
        if stalled:
            return
        for stream, entries in held.items():
            for start in range(0, len(entries), ENTRIES_PER_STEP):
                some = entries[start : start + ENTRIES_PER_STEP]
                lost = self._broker.run(self._broker.renew(stream, self._shared.consumer, some))
                # Committing does not ask who owns an entry: work on lost ones goes on, and counts if it is first.
                self._shared.held.remove(stream, lost)
