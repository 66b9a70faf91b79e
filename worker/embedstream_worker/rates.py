"""How fast a worker gets on with each of its jobs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Mapping
from typing import NamedTuple

from embedstream.queue.workers import InHand, Rate

SPAN_SECONDS = 30.0
"""Rates are over so long: several windows of a slow device, yet a job that stands still shows soon."""

LOOK_SECONDS = 0.5
"""Looks that follow sooner are not kept."""


class _Look(NamedTuple):
    at: float
    computed: Mapping[str, InHand]
    begun: Collection[str]


class Rates:
    """Looks at what was computed so far, and what came of it since. Shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: deque[_Look] = deque()

    def look(self, now: float, computed: Mapping[str, InHand], begun: Collection[str] = ()) -> dict[str, Rate]:
        """Rates by job; `computed` never shrinks while a job is worked on. `now`: monotonic seconds.

        `begun`: jobs of which something is in the model, where it may be for long before it is computed.
        """
        with self._lock:
            rates = {job: self._rate(job, now, done) for job, done in computed.items()}
            if not self._looks or now - self._looks[-1].at >= LOOK_SECONDS:
                self._looks.append(_Look(now, computed, begun))
            while len(self._looks) > 2 and self._looks[1].at <= now - SPAN_SECONDS:
                self._looks.popleft()
        return {job: rate for job, rate in rates.items() if rate.tokens > 0}

    def _rate(self, job: str, now: float, done: InHand) -> Rate:
        first = self._looks[0].computed.get(job, InHand()) if self._looks else done
        if done == first:
            return Rate()
        # It begins when the job was last seen where it was at first: before, the worker had other work, or none ...
        still = [look for look in self._looks if look.computed.get(job, InHand()) == first]
        since = still[-1].at
        for look in reversed(still):
            if job not in look.begun:
                break
            since = look.at  # ... save what was in the model by then.
        seconds = now - since
        if seconds <= 0:
            return Rate()
        return Rate(max(0.0, (done.rows - first.rows) / seconds), max(0.0, (done.tokens - first.tokens) / seconds))
