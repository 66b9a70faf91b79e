"""What one worker has computed of its jobs: in the model, in shards, committed; and how fast each of them gets on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple

from embedstream.queue.workers import InHand, Rate

SPAN_SECONDS = 30.0
"""Rates are over so long: several windows of a slow device, yet a job that stands still shows soon."""

LOOK_SECONDS = 0.5
"""Looks that follow sooner are not kept."""


class Progress(NamedTuple):
    """How far a worker is at one moment."""

    total: InHand
    """All that was committed."""
    committed: dict[str, InHand]
    """By job, of those that are still worked on."""
    in_hand: dict[str, InHand]
    """By job: computed, and not committed."""
    rates: dict[str, Rate]
    """By job, of those that get on."""


class _Look(NamedTuple):
    at: float
    computed: Mapping[str, InHand]
    begun: Collection[str]


class Ledger:
    """Kept by the stages, read for the worker's record. Shared between threads.

    What is in hand lies in holders: a window's group while it is in the model, then the shard that it went into.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_model: dict[Hashable, tuple[str, InHand]] = {}
        self._in_shards: dict[Hashable, tuple[str, InHand]] = {}
        self._committed: dict[str, InHand] = {}
        self._total = InHand()
        self._looks: deque[_Look] = deque()

    def in_model(self, group: Hashable, job: str, computed: InHand) -> None:
        """A group is in the model, where so much of it is computed by now."""
        with self._lock:
            self._in_model[group] = job, computed

    def in_shard(self, shard: Hashable, job: str, computed: InHand, group: Hashable = None) -> None:
        """So much is in a shard, now that this group has left the model for it."""
        with self._lock:
            self._in_model.pop(group, None)
            self._in_shards[shard] = job, computed

    def left(self, holder: Hashable) -> None:
        """A group or a shard is none of this worker's any more: others were first, or it was handed back."""
        with self._lock:
            self._in_model.pop(holder, None)
            self._in_shards.pop(holder, None)

    def commit(self, shard: Hashable, job: str, some: InHand, open_jobs: Collection[str]) -> None:
        """So much of a shard is committed. `open_jobs`: those that are still worked on."""
        with self._lock:
            self._in_shards.pop(shard, None)
            self._total += some
            kept = {job: done for job, done in self._committed.items() if job in open_jobs}
            self._committed = kept | {job: self._committed.get(job, InHand()) + some}

    def look(self, now: float) -> Progress:
        """`now`: monotonic seconds."""
        with self._lock:
            in_hand: dict[str, InHand] = {}
            for job, some in (*self._in_model.values(), *self._in_shards.values()):
                in_hand[job] = in_hand.get(job, InHand()) + some
            committed = self._committed
            computed = {
                job: committed.get(job, InHand()) + in_hand.get(job, InHand()) for job in {*committed, *in_hand}
            }
            rates = {job: rate for job, done in computed.items() if (rate := self._rate(job, now, done)).tokens > 0}
            if not self._looks or now - self._looks[-1].at >= LOOK_SECONDS:
                # What is in the model may be there for long before it is computed.
                self._looks.append(_Look(now, computed, {job for job, _ in self._in_model.values()}))
            while len(self._looks) > 2 and self._looks[1].at <= now - SPAN_SECONDS:
                self._looks.popleft()
            return Progress(self._total, committed, in_hand, rates)

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
