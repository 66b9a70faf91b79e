"""Ends a worker that cannot leave by itself: its device hangs, or what it was told to finish takes too long."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from embedstream.errors import STALLED, EmbedstreamError
from embedstream_worker.shared import Shared

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5

LOADING = "loading its model"
WARMING_UP = "warming up"

SLOW_START_SECONDS = 60.0
"""After so long, and after each twice that, a worker that is not ready says what it is doing. A model may come over a
network: for that there is no bound."""

WARM_UP_BATCHES = 10
"""A warm-up runs about so many batches, each of which may take --stall-seconds as any other."""


class Watchdog:
    """A thread that hangs in native code cannot be ended or joined: the process has to go."""

    def __init__(self, shared: Shared, leave: Callable[[], None]) -> None:
        """`leave` hands back what the worker holds, in bounded time."""
        self._life, self._activity, self._settings = shared.life, shared.activity, shared.settings
        self._leave = leave
        self._said = SLOW_START_SECONDS / 2
        self._slow = False

    def run(self, gone: Callable[[float], bool]) -> None:
        """`gone(seconds)` waits and says whether the worker has ended."""
        while not gone(LOOK_SECONDS):
            self._look_at_start()
            least = self._settings.stall_seconds
            seconds, bound = self._activity.longest(least)
            if least < seconds <= bound and not self._slow:
                log.warning(
                    "a batch is slow: it takes more than %g s (--stall-seconds), and by the model's pace so far may "
                    "take %.0f s",
                    least,
                    bound,
                )
            self._slow = least < seconds <= bound
            if seconds > bound:
                log.error(
                    "no batch came back for %g s (%s): the device hangs; the worker leaves with exit code %d, and what "
                    "it held goes to others",
                    bound,
                    "--stall-seconds" if bound == least else "many times what it should take",
                    STALLED,
                )
                self._life.fail(TimeoutError("the device hangs"))
                self._end(STALLED)
            if self._life.stopping_seconds() > self._settings.drain_seconds:
                failure = self._life.failure
                log.warning(
                    "not done after %g s (--drain-seconds): the rest goes to others", self._settings.drain_seconds
                )
                self._end(0 if failure is None else failure.exit_code if isinstance(failure, EmbedstreamError) else 1)

    def _look_at_start(self) -> None:
        phase, seconds = self._activity.start_phase()
        if seconds >= 2 * self._said:
            self._said = seconds
            log.warning("not ready yet: %s for %.0f s", phase, seconds)
        if phase == WARMING_UP and seconds > WARM_UP_BATCHES * self._settings.stall_seconds:
            log.error(
                "still warming up after %.0f s (%d times --stall-seconds): the device hangs; the worker leaves with "
                "exit code %d",
                seconds,
                WARM_UP_BATCHES,
                STALLED,
            )
            self._life.fail(TimeoutError("the device hangs"))
            self._end(STALLED)

    def _end(self, code: int) -> None:
        try:
            self._leave()
        finally:
            os._exit(code)
