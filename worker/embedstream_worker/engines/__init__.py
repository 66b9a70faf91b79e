"""Engines: one long-lived model each, behind the seam in `base`."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from embedstream.errors import ModelError
from embedstream_worker.model_folder import NOTHING, Trust

if TYPE_CHECKING:
    from embedstream_worker.engines.base import Engine
    from embedstream_worker.engines.precision import Dtype

log = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "openvino", "onnxruntime", "hashing")

GROUP = "embedstream.engines"
"""Entry points of installed packages that offer others: callables that take `EngineOptions` and give an `Engine`."""

_EXTRAS = {"openvino": "cpu", "onnxruntime": "onnx"}
"""Engines that are installed apart, and with what."""

HASHING_MODEL = "hashing"
"""The model's name that stands for the hashing engine."""


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how it is run."""

    model: str
    revision: str | None = None
    engine: str = "auto"
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
    name, model, device, dtype = options.engine, options.model, options.device, options.dtype
    if options.threads is not None and name != "onnxruntime":
        raise ModelError(
            f"--threads {options.threads}: only --engine onnxruntime takes it; the others choose by the cores"
        )
    if options.compiles and name not in ("auto", "torch"):
        raise ModelError(f"--compile: --engine {name} does not take it; use --engine torch, or leave it out")
    if name == "openvino" and device not in ("auto", "cpu"):
        raise ModelError(f"--device {device}: openvino runs on the CPU; use --device cpu or --engine torch")
    if name in _EXTRAS and importlib.util.find_spec(name) is None:
        extra = _EXTRAS[name]
        raise ModelError(f"--engine {name}: not installed; pip install 'embedstream[{extra}]', or use --engine torch")
    if name == "hashing" or (name == "auto" and model == HASHING_MODEL):
        from embedstream_worker.engines.hashing import HashingEngine

        return HashingEngine()
    if name not in ENGINES:
        for offered in entry_points(group=GROUP, name=name):
            made: Engine = offered.load()(options)
            return made
        raise ModelError(f"--engine {name}: no installed package offers it; use one of {', '.join(ENGINES)}")
    from embedstream_worker.engines.torch_environment import set_up
    from embedstream_worker.models import resolve_model

    set_up()
    folder = resolve_model(model, options.revision, options.trust)
    log.info("model %s: %s", model, folder.source)
    if folder.graph is not None:
        if name not in ("auto", "onnxruntime"):
            raise ModelError(f"--engine {name}: {folder.graph} is for --engine onnxruntime alone, and the only weights")
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelError(f"{folder.graph}: needs onnxruntime: pip install 'embedstream[onnx]'")
        name = "onnxruntime"
    # Engines are imported only when they are wanted: torch alone takes seconds.
    match name:
        case "openvino":
            from embedstream_worker.engines.openvino_trial import load_openvino

            return load_openvino(folder, dtype)
        case "onnxruntime":
            from embedstream_worker.engines.onnx_engine import OnnxEngine

            return OnnxEngine(folder, device, dtype, threads=options.threads)
        case "torch":
            from embedstream_worker.engines.headed_engine import load_torch

            return load_torch(folder, device, dtype, options.compiles)
        case _:
            from embedstream_worker.engines.fastest import load_fastest

            return load_fastest(folder, device, dtype, options.compiles)
