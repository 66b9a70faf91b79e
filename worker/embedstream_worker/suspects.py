"""Blocks that were in the hands of workers that died: first alone in this worker, then chunk by chunk, each noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from embedstream.cli.logs import about
from embedstream.errors import RecordDamaged
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Answer, Code
from embedstream.server.patience import Stopped
from embedstream.server.troubles import passes
from embedstream_worker.held import Held, HeldBlock, RowErrors
from embedstream_worker.pipeline import Life
from embedstream_worker.troubles import patience

R = TypeVar("R")

ALONE = 2
"""From this delivery on a block has the whole worker to itself, so that the next death counts against it only."""

BY_CHUNK = 3
"""From this delivery on its chunks are tried one by one: it has killed while nothing else was there."""


class NotOurs(Exception):
    """Another worker has the block now, or its job has ended."""


class Trial:
    """One block that is tried chunk by chunk. Nothing else is in the worker meanwhile.

    A chunk is noted in Redis before it is touched, at first by the tokenizer, later by the model; if the process dies,
    the next holder finds it there and makes it an error row. A note names no chunk while none is being touched.
    """

    def __init__(self, broker: Broker, held: Held, life: Life, block: HeldBlock) -> None:
        self._broker = broker
        self._held = held
        self._block = block
        waits, job = "a chunk that may be poison waits to be noted", about(block.job.id)
        self._patience = patience(waits, life.stopping.wait, job, passes)
        self._guilty = self._ask()

    @property
    def errors(self) -> RowErrors:
        """The chunks with which earlier holders died."""
        deaths = self._block.deliveries - 1
        why = f"a worker's process died while it ran this text alone (deaths with its block: {deaths})"
        return dict.fromkeys(self._guilty, ("poison", f"{why}; run this text by itself to see why"))

    def note(self, row: int | None) -> None:
        """Note the chunk that is touched next, or that there is none. Waits while Redis cannot be used.

        Raises:
            NotOurs: the chunk must not be touched; or the worker was told to stop while Redis was away.
        """
        block = self._block.block
        chunks = self._guilty if row is None else (*self._guilty, row)
        step = self._broker.suspect(self._block.job.id, block.part, block.number, chunks)

        def act() -> Answer:
            if self._block.entry not in self._held.entries(self._block.stream):
                raise NotOurs
            return self._broker.run(step)

        if self._patiently(act).code is not Code.OK:
            raise NotOurs

    def _ask(self) -> tuple[int, ...]:
        block = self._block.block
        known = self._patiently(lambda: self._broker.suspected(self._block.job.id, block.part, block.number))
        return tuple(chunk for chunk in known if 0 <= chunk < block.rows.num_rows)

    def _patiently(self, act: Callable[[], R]) -> R:
        try:
            return self._patience(act)
        except (Stopped, RecordDamaged) as error:
            raise NotOurs from error  # a damaged record is the intake's to refuse
