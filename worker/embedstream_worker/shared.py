"""What all threads of one worker share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from embedstream.queue.broker import Broker
from embedstream.settings import WorkerSettings
from embedstream_worker.activity import Activity
from embedstream_worker.held import Held
from embedstream_worker.ledger import Ledger
from embedstream_worker.meter import Meter
from embedstream_worker.pipeline import Life

RETRIES = 3
"""For steps, which are harmless when run twice. Claims are not repeated: their blocks would get lost."""


@dataclass(frozen=True)
class Shared:
    """Made once for a worker, and given to each of its stages."""

    consumer: str
    """The worker's name, under which it claims."""
    broker: Callable[[int], Broker]
    """Makes one with a connection of its own, as no thread waits for another's reply. The argument says how often a
    command is repeated after a connection error: `RETRIES`, or 0."""
    settings: WorkerSettings
    life: Life
    meter: Meter
    held: Held = field(default_factory=Held)
    activity: Activity = field(default_factory=Activity)
    ledger: Ledger = field(default_factory=Ledger)
