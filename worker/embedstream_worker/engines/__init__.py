"""Engines: one long-lived model each, behind the seam in `base`."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.engines.hashing_faults import VARIABLE as FAULTS
from embedstream_worker.engines.hashing_faults import FaultyHashingEngine
from embedstream_worker.engines.hashing_paced import VARIABLE as PACE
from embedstream_worker.engines.hashing_paced import PacedHashingEngine, parse_pace
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.model_folder import NOTHING, Trust

log = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "openvino", "onnxruntime", "hashing"]

HASHING_MODEL = "hashing"
"""The model's name that stands for the hashing engine."""


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how it is run."""

    model: str
    revision: str | None = None
    engine: EngineName = "auto"
    """auto: the hashing engine for the model `hashing`, and for all others the fastest that gives the right vectors."""
    device: str = "auto"
    dtype: Dtype = "auto"
    """auto: the fastest precision that is still called exact, bfloat16 where the device has it."""
    threads: int | None = None
    """Those of one batch, for onnxruntime alone; by default it chooses."""
    trust: Trust = NOTHING
    """What of the model's own may be run."""
    compiles: bool = False
    """As in `TorchEngine`, where torch is the engine."""


def load_engine(options: EngineOptions) -> Engine:
    """An engine that runs.

    Raises:
        ModelError: the model cannot be found, trusted or loaded, or the engine is not here.
    """
    engine, source = _make(options)
    log.info("model %s: %s", options.model, source)
    engine.start()
    return engine


def _make(options: EngineOptions) -> tuple[Engine, str]:
    """An engine, not yet started, and where its model comes from."""
    engine, model, revision, device = options.engine, options.model, options.revision, options.device
    dtype, threads, trust, compiles = options.dtype, options.threads, options.trust, options.compiles
    if threads is not None and engine != "onnxruntime":
        raise ModelError(f"--threads {threads}: only --engine onnxruntime takes it; the others choose by the cores")
    if compiles and engine not in ("auto", "torch"):
        raise ModelError(f"--compile: --engine {engine} does not take it; use --engine torch, or leave it out")
    if engine == "hashing" or (engine == "auto" and model == HASHING_MODEL):
        return _make_hashing(), "computed from the text's bytes, no model"
    from embedstream_worker.engines.torch_environment import set_up
    from embedstream_worker.models import resolve_model

    set_up()
    # Engines are imported only when they are wanted: torch alone takes seconds.
    if engine == "openvino":
        if device not in ("auto", "cpu"):
            raise ModelError(f"--device {device}: openvino runs on the CPU; use --device cpu or --engine torch")
        if importlib.util.find_spec("openvino") is None:
            raise ModelError("--engine openvino: not installed; pip install 'embedstream[cpu]', or use --engine torch")
        from embedstream_worker.engines.openvino_engine import OpenVinoEngine

        folder = resolve_model(model, revision, trust)
        return OpenVinoEngine(folder, dtype), folder.source
    if engine == "onnxruntime":
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelError(
                "--engine onnxruntime: not installed; pip install 'embedstream[onnx]', or use --engine torch"
            )
        from embedstream_worker.engines.onnx_engine import OnnxEngine

        folder = resolve_model(model, revision, trust)
        return OnnxEngine(folder, device, dtype, threads=threads), folder.source
    folder = resolve_model(model, revision, trust)
    if engine == "torch":
        from embedstream_worker.engines.torch_engine import TorchEngine

        return TorchEngine(folder, device, dtype, compiles=compiles), folder.source
    from embedstream_worker.engines.auto_engine import AutoEngine

    return AutoEngine(folder, device, dtype, compiles), folder.source


def _make_hashing() -> HashingEngine:
    """The engine of tests and measurements, as its variables want it."""
    if faults := os.environ.get(FAULTS):
        return FaultyHashingEngine(Path(faults))
    pace = os.environ.get(PACE)
    return PacedHashingEngine(parse_pace(pace)) if pace else HashingEngine()
