"""A way through the model for small requests, beside a bulk job's batches rather than behind them."""

from __future__ import annotations

import logging
import threading

from embedstream_worker.ahead import Ahead
from embedstream_worker.engines.base import Engine, Twin
from embedstream_worker.held import EmbeddedGroup, TokenizedGroup
from embedstream_worker.infer import Infer, Urgent
from embedstream_worker.pipeline import Channel, start_stage
from embedstream_worker.shared import Shared

log = logging.getLogger(__name__)

MOST_TOKENS = 512
"""A request of more goes before the next batch, as on one share of the cores it would take longer than that."""


class Express:
    """Takes the requests, and chooses their way. The model's twin is loaded for the first that finds the model busy."""

    def __init__(
        self, shared: Shared, engine: Engine, infer: Infer, usual: Channel[list[TokenizedGroup] | Urgent]
    ) -> None:
        """`infer`, `usual`: the stage of the batches, and the channel to it."""
        self._shared = shared
        self._engine = engine
        self._infer = infer
        self._usual = usual
        self._own: Channel[list[TokenizedGroup] | Urgent] | None = None
        self._twin: Engine | None = None
        self._thread: threading.Thread | None = None

    def put_first(self, request: Urgent) -> None:
        """Have a request computed; called by one thread. Raises `Closed`."""
        long = len(request.tokens.ids) > MOST_TOKENS or request.queries
        if not isinstance(self._engine, Twin) or not self._infer.busy or long:
            self._usual.put_first(request)
            return
        (self._own or self._open(self._engine)).put_first(request)

    def close(self, seconds: float) -> None:
        """After the last request: end the stage, waiting so long for it, and give the twin's memory back."""
        if self._thread is not None and self._own is not None and self._twin is not None:
            self._own.close()
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._twin.close()

    def _open(self, engine: Twin) -> Channel[list[TokenizedGroup] | Urgent]:
        try:
            twin = engine.twin()
        except Exception as error:  # noqa: BLE001 - whatever it lacks, memory above all: requests have another way
            log.warning("requests wait for a job's batches, as the model could not be loaded once more: %s", error)
            self._own = self._usual
            return self._usual
        own: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
        nothing: Channel[list[EmbeddedGroup]] = Channel(1)
        infer = Infer(self._shared, twin, self._infer.budget, Ahead(self._infer.budget, twin.info.padded), own, nothing)
        self._twin, self._own = twin, own
        self._thread = start_stage("express", self._shared.life, infer.run, [own])
        return own
