"""Ends a worker that cannot leave by itself: its device hangs, or what it was told to finish takes too long."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from embedstream.errors import STALLED, EmbedstreamError
from embedstream.settings import WorkerSettings
from embedstream_worker.pipeline import Life

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


class Watchdog:
    """A thread that hangs in native code cannot be ended or joined: the process has to go."""

    def __init__(self, life: Life, settings: WorkerSettings, leave: Callable[[], None]) -> None:
        """`leave` hands back what the worker holds, in bounded time."""
        self._life = life
        self._settings = settings
        self._leave = leave

    def run(self, gone: Callable[[float], bool]) -> None:
        """`gone(seconds)` waits and says whether the worker has ended."""
        while not gone(LOOK_SECONDS):
            if self._life.computing_seconds() > self._settings.stall_seconds:
                log.error(
                    "no batch came back for %g s (--stall-seconds): the device hangs; the worker leaves with exit code "
                    "%d, and what it held goes to others",
                    self._settings.stall_seconds,
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

    def _end(self, code: int) -> None:
        try:
            self._leave()
        finally:
            os._exit(code)
