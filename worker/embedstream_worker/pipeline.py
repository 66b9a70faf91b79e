"""Threads and the bounded channels between them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")

log = logging.getLogger(__name__)


class Closed(Exception):
    """The channel's other side is gone."""


class Channel(Generic[T]):
    """A bounded queue between two stages. Closing it lets the receiver take what is left, then ends it."""

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size = size
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, timeout: float | None = None) -> bool:
        """Wait for room; False if there was none within `timeout` seconds. Raises `Closed`."""
        with self._changed:
            room = self._changed.wait_for(lambda: len(self._items) < self._size or self._closed, timeout)
            if self._closed:
                raise Closed
            if room:
                self._items.append(item)
                self._changed.notify_all()
            return room

    def put_first(self, item: T) -> None:
        """Put an item before all others, without waiting for room. Raises `Closed`."""
        with self._changed:
            if self._closed:
                raise Closed
            self._items.appendleft(item)
            self._changed.notify_all()

    def take_first(self, kind: type[U]) -> U | None:
        """The next item if there is one of this kind; never waits."""
        with self._changed:
            if not self._items or not isinstance(self._items[0], kind):
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return cast(U, item)

    def get(self, timeout: float | None = None) -> T | None:
        """The next item; None after `timeout` seconds. Raises `Closed` when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed, timeout)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._closed:
                raise Closed
            return None

    def close(self) -> None:
        """Twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Life:
    """Whether the worker goes on. Shared by all its threads."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        """Claim no more; finish what is in the model, hand the rest back."""
        self.serving = False
        """Whether the stages have been started: before, a worker that is told to stop has nothing to finish."""
        self.failure: BaseException | None = None
        self._stopped: float | None = None

    @property
    def state(self) -> str:
        """starting, ready or draining."""
        return "draining" if self.stopping.is_set() else "ready" if self.serving else "starting"

    def unready(self) -> str:
        """Why the worker takes no work; empty if it does."""
        return "" if self.state == "ready" else self.state

    def stop(self) -> None:
        self._stopped = self._stopped or time.monotonic()
        self.stopping.set()

    def stopping_seconds(self) -> float:
        """How long ago the worker was told to stop, or failed; 0 if it goes on."""
        return 0.0 if self._stopped is None else time.monotonic() - self._stopped

    def fail(self, error: BaseException) -> None:
        """End the worker because a stage cannot go on."""
        if self.failure is None:
            self.failure = error
        self.stop()


def start_stage(name: str, life: Life, run: Callable[[], None], channels: Sequence[Channel[Any]]) -> threading.Thread:
    """Run a stage in its thread. When it ends, for whatever reason, its channels close, so that no neighbour waits.

    What it raises ends the worker, and comes out of `Worker.run`.
    """

    def main() -> None:
        try:
            run()
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001 - the worker must end, and say why, whatever a stage raised
            log.error("stage %s failed (%s: %s): the worker leaves", name, type(error).__name__, error)
            life.fail(error)
        finally:
            for channel in channels:
                channel.close()

    thread = threading.Thread(target=main, name=name, daemon=True)
    thread.start()
    return thread
