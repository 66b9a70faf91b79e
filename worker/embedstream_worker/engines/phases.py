"""What an engine that is being loaded does at present: it says so here, and the worker that waits for it listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

CONVERTING = "converting its model for this processor, once"
CHECKING = "checking its vectors"

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


def phase(what: str) -> None:
    """Say what begins now, as an end of `the worker is …`."""
    listener = _listener.get()
    if listener is not None:
        listener(what)


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Hear what engines say that this thread loads."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
