"""A second copy of a model for the rare text whose vector is not finite: float32, on the CPU, loaded when needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from embedstream_worker.engines.base import Engine, TokenBatch
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)


class ExactModel:
    """The folder's model in float32. On the CPU: beside a GPU's batches there may be no memory for another copy."""

    def __init__(self, folder: ModelFolder, load: Callable[[ModelFolder], Engine]) -> None:
        """`load`: a folder's model in float32 on the CPU, started."""
        self._folder = folder
        self._load = load
        self._loading = threading.Lock()
        self._engine: Engine | None = None

    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        """As `Engine.embed`. Raises `ModelError` if the model cannot be loaded again."""
        with self._loading:
            if self._engine is None:
                self._engine = self._load(self._folder)
                log.info("loaded model %s in float32 as well, for vectors with NaN or infinity", self._folder.name)
            engine = self._engine
        return engine.embed(batch)

    def close(self) -> None:
        with self._loading:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
