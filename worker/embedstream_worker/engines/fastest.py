"""The fastest engine that the device, the installed packages and the model allow."""

from __future__ import annotations

import importlib.util
import logging
import platform
from pathlib import Path

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.precision import Dtype, cpu_has_bfloat16
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

_GPU_SIGNS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/proc/driver/nvidia")


def load_fastest(folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto", compiles: bool = False) -> Engine:
    """OpenVINO on the CPU where its vectors are right, torch for everything else. One log line says which and why.

    Raises:
        ModelError: no engine can run the model.
    """
    engine, reason = _load(folder, device, dtype, compiles)
    info = engine.info
    log.info("engine %s %s on %s: %s", info.engine, info.dtype, info.device, reason)
    return engine


def _load(folder: ModelFolder, device: str, dtype: Dtype, compiles: bool) -> tuple[Engine, str]:
    """An engine, and why that one."""
    if not on_cpu(device):
        reason = "the device is not a CPU"
    elif importlib.util.find_spec("openvino") is None:
        reason = "openvino is not installed (pip install 'embedstream[cpu]' makes this several times as fast)"
    else:
        from embedstream_worker.engines.openvino_trial import EngineUnfit, load_openvino

        try:
            engine = load_openvino(folder, dtype)
        except EngineUnfit as error:
            reason = str(error)
        else:
            if compiles:
                log.warning("--compile changes nothing here: openvino compiles by itself")
            return engine, f"fastest here; this CPU {'has' if cpu_has_bfloat16() else 'lacks'} bfloat16"
    if dtype == "int8":
        raise ModelError(f"--dtype int8: {reason}; use another dtype")
    from embedstream_worker.engines.headed_engine import load_torch

    return load_torch(folder, device, dtype, compiles), reason


def on_cpu(device: str) -> bool:
    """Whether a device as the user gives it is the CPU. Asks torch only if there are signs of another."""
    if device != "auto":
        return device == "cpu"
    if platform.system() == "Linux" and not any(Path(sign).exists() for sign in _GPU_SIGNS):
        return True
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available())
