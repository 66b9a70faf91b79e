"""A second copy of a model for the rare text whose vector is not finite: float32, on the CPU, loaded when needed."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.models import ModelFolder

if TYPE_CHECKING:
    from embedstream_worker.engines.torch_engine import TorchEngine

log = logging.getLogger(__name__)


class ExactModel:
    """The folder's model in float32. On the CPU: beside a GPU's batches there may be no memory for another copy."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._loading = threading.Lock()
        self._engine: TorchEngine | None = None

    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        """As `Engine.embed`. Raises `ModelError` if the model cannot be loaded again."""
        with self._loading:
            if self._engine is None:
                # Imported only here: an engine that needs no torch must not load it for nothing.
                from embedstream_worker.engines.torch_engine import TorchEngine

                engine = TorchEngine(self._folder, "cpu", "float32")
                engine.start()
                log.info("loaded model %s in float32 as well, for vectors with NaN or infinity", self._folder.name)
                self._engine = engine
            engine = self._engine
        return engine.embed(batch)

    def close(self) -> None:
        with self._loading:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
