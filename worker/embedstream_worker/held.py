"""What travels through the pipeline: held blocks, windows of them, and what becomes of them at each stage."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.queue.blocks import Block
from embedstream.queue.broker import Broker
from embedstream.server.patience import Refused
from embedstream_worker.engines.base import Results, Tokens
from embedstream_worker.jobs import OpenJob

log = logging.getLogger(__name__)

RowErrors = dict[int, tuple[str, str]]
"""Row of a group -> (code, message)."""


@dataclass(frozen=True)
class HeldBlock:
    """A block that this worker has claimed."""

    job: OpenJob
    stream: str
    entry: str
    size: int
    deliveries: int
    block: Block
    tokens: float
    """What it counts in a window, by estimate."""


@dataclass(frozen=True)
class Window:
    """Blocks that are sorted by length together."""

    blocks: list[HeldBlock]


@dataclass(frozen=True, eq=False)
class TokenizedGroup:
    """A window's blocks of one job, their rows in sequence. Rows in `errors` have no tokens."""

    job: OpenJob
    blocks: list[HeldBlock]
    tokens: Tokens
    input_hashes: pa.FixedSizeBinaryArray
    errors: RowErrors = field(default_factory=dict)
    note: Callable[[int | None], None] | None = None
    """Set for a block that is tried chunk by chunk: to be told of the row (or none) that enters the model next."""
    known: npt.NDArray[np.int64] | None = None
    """[rows]: the place of a row of the dataset that is updated, by `KnownRows`, whose results a row takes over, and
    then it has no tokens here; -1: none. None: of no row."""

    @property
    def new(self) -> npt.NDArray[np.bool_]:
        """[rows]: those whose results are not taken over."""
        return np.ones(len(self.input_hashes), np.bool_) if self.known is None else self.known < 0


@dataclass(frozen=True)
class EmbeddedGroup:
    """The same with results. Rows in `errors` have none; nor have those that are not `done`, as the worker stops."""

    tokenized: TokenizedGroup
    results: Results  # of all rows
    computed: npt.NDArray[np.int64]  # [rows]: tokens that the model computed for the row, padding included
    done: npt.NDArray[np.bool_]  # [rows]
    errors: RowErrors
    duplicates: npt.NDArray[np.bool_]  # [rows]: the results are those of an equal text, computed for another row


class Held:
    """The entries that this worker holds, from claiming to the answer to their commit. Shared between threads."""

    def __init__(self) -> None:
        self._entries: dict[str, set[str]] = {}  # stream -> entry ids
        self._lock = threading.Condition()
        self.awaited = False
        """Whether a stage waits for all of them to be committed."""

    def add(self, stream: str, entry: str) -> bool:
        """Whether the entry was not held yet."""
        with self._lock:
            entries = self._entries.setdefault(stream, set())
            new = entry not in entries
            entries.add(entry)
            return new

    def remove(self, stream: str, entries: Iterable[str]) -> None:
        with self._lock:
            left = self._entries.get(stream, set())
            left.difference_update(entries)
            if not left:
                self._entries.pop(stream, None)
            if not self._entries:
                self._lock.notify_all()

    def wait_for_none(self, seconds: float) -> bool:
        """Have open shards closed, and wait for so long until nothing is held; whether nothing is."""
        self.awaited = True
        try:
            with self._lock:
                return self._lock.wait_for(lambda: not self._entries, seconds)
        finally:
            self.awaited = False

    @property
    def empty(self) -> bool:
        """Whether nothing is held."""
        with self._lock:
            return not self._entries

    def entries(self, stream: str) -> set[str]:
        """The entries held of one stream."""
        with self._lock:
            return set(self._entries.get(stream, ()))

    def snapshot(self) -> dict[str, list[str]]:
        """Entry ids by stream."""
        with self._lock:
            return {stream: sorted(entries) for stream, entries in self._entries.items()}


class Delivered(Protocol):
    """What came as an entry of a stream."""

    @property
    def stream(self) -> str: ...

    @property
    def entry(self) -> str: ...


def release(broker: Broker, consumer: str, held: Held, blocks: Iterable[Delivered]) -> None:
    """Hand blocks back so that others can claim them at once."""
    streams: dict[str, list[str]] = {}
    for block in blocks:
        streams.setdefault(block.stream, []).append(block.entry)
    for stream, entries in streams.items():
        held.remove(stream, entries)
        try:
            hand_back(broker, stream, consumer, entries)
        except Refused as error:
            log.warning("could not hand %d blocks back (%s): their lease will expire", len(entries), error)


def hand_back(broker: Broker, stream: str, consumer: str, entries: Sequence[str], died: bool = False) -> None:
    """Release entries, so many at once as cost the server some milliseconds. Raises `redis.RedisError`.

    `died`: the worker that held them is dead, or will be in a moment, perhaps because of one of them.
    """
    for start in range(0, len(entries), ENTRIES_PER_STEP):
        broker.run(broker.release(stream, consumer, entries[start : start + ENTRIES_PER_STEP], died))


ENTRIES_PER_STEP = 500
"""How many entries one script run renews or releases: a few milliseconds of the server's time."""
