"""What a worker is doing, for those that watch whether it gets anywhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Activity:
    """Told by the stages, asked by watchdog and leases. Shared between threads."""

    def __init__(self) -> None:
        self._progressed = time.monotonic()
        self._computing: dict[int, tuple[float, float]] = {}  # thread -> since when, and seconds that it may take
        self._starting: tuple[str, float] | None = None  # what is done, and since when

    @contextlib.contextmanager
    def starting(self, phase: str) -> Iterator[None]:
        """The worker is not ready yet, and this is what it is doing."""
        self.enter(phase)
        try:
            yield
        finally:
            self._starting = None

    def enter(self, phase: str) -> None:
        """Something else begins before the worker is ready."""
        self._starting = (phase, time.monotonic())

    def start_phase(self) -> tuple[str, float]:
        """What the worker does before it is ready, and for how many seconds already; "" and 0 otherwise."""
        phase, since = self._starting or ("", time.monotonic())
        return phase, time.monotonic() - since

    @contextlib.contextmanager
    def computing(self, allowed: float = 0.0) -> Iterator[None]:
        """This thread is in the model or the tokenizer, from where it may never come back.

        `allowed`: seconds that this much work may take, where that is known.
        """
        me = threading.get_ident()
        self._computing[me] = time.monotonic(), allowed
        try:
            yield
        finally:
            del self._computing[me]

    def longest(self, least: float) -> tuple[float, float]:
        """How long the computation that is nearest to its bound has been going on, and that bound in seconds.

        A bound is what a computation is allowed, and `least` seconds at least.
        """
        now = time.monotonic()
        running = [(now - since, max(least, allowed)) for since, allowed in self._computing.copy().values()]
        return max(running, key=lambda each: each[0] - each[1], default=(0.0, least))

    def progress(self) -> None:
        """Some stage has finished a piece of work."""
        self._progressed = time.monotonic()

    def idle_seconds(self) -> float:
        """How long no stage has finished anything."""
        return time.monotonic() - self._progressed
