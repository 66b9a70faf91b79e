"""Engines: one long-lived model each, behind the seam in `base`."""

from __future__ import annotations

from typing import Literal

from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.hashing import HashingEngine

EngineName = Literal["auto", "torch", "hashing"]

HASHING_MODEL = "hashing"
"""The model's name that stands for the hashing engine."""


def make_engine(
    engine: EngineName, model: str, revision: str | None = None, device: str = "auto"
) -> tuple[Engine, str]:
    """An engine for a model, not yet started, and where the model comes from, for printing.

    `engine` "auto" is the hashing engine for the model "hashing" and torch for all others.

    Raises:
        ModelError: the model cannot be found or trusted.
    """
    if engine == "hashing" or (engine == "auto" and model == HASHING_MODEL):
        return HashingEngine(), "computed from the text's bytes, no model"
    # Imported only here: it takes seconds, and a worker that hashes needs none of it.
    from embedstream_worker.engines.torch_engine import TorchEngine
    from embedstream_worker.models import resolve_model

    folder = resolve_model(model, revision)
    return TorchEngine(folder, device), folder.source
