"""The fastest engine that the device, the installed packages and the model allow, found when it starts."""

from __future__ import annotations

import importlib.util
import logging
import platform
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Engine, EngineInfo, Role, TextTokenizer, TokenBatch
from embedstream_worker.engines.precision import Dtype, cpu_has_bfloat16
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

_GPU_SIGNS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/proc/driver/nvidia")


class AutoEngine:
    """OpenVINO on the CPU where its vectors are right, torch for everything else. One log line says which and why."""

    def __init__(
        self, folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto", compiles: bool = False
    ) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._compiles = compiles
        self._engine: Engine | None = None

    @property
    def info(self) -> EngineInfo:
        return self._started.info

    @property
    def in_flight(self) -> int:
        return self._started.in_flight

    @in_flight.setter
    def in_flight(self, count: int) -> None:
        self._started.in_flight = count

    def start(self) -> None:
        """Raises `ModelError` if no engine can run the model."""
        self._engine, reason = self._choose()
        info = self._engine.info
        log.info("engine %s %s on %s: %s", info.engine, info.dtype, info.device, reason)

    def warm_up(self, batch_tokens: int) -> None:
        self._started.warm_up(batch_tokens)

    def tokenizer(self) -> TextTokenizer:
        return self._started.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        return self._started.prompt(role, prompt, prompt_name)

    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        return self._started.embed(batch)

    def embed_exact(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        return self._started.embed_exact(batch)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _started(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine is not started")
        return self._engine

    def _choose(self) -> tuple[Engine, str]:
        """An engine that has started, and why that one."""
        if not on_cpu(self._device):
            reason = "the device is not a CPU"
        elif importlib.util.find_spec("openvino") is None:
            reason = "openvino is not installed (pip install 'embedstream[cpu]' makes this several times as fast)"
        else:
            from embedstream_worker.engines.openvino_engine import EngineUnfit, OpenVinoEngine

            fast = OpenVinoEngine(self._folder, self._dtype)
            try:
                fast.start()
            except EngineUnfit as error:
                fast.close()
                reason = str(error)
            else:
                if self._compiles:
                    log.warning("--compile changes nothing here: openvino compiles by itself")
                has = "has" if cpu_has_bfloat16() else "lacks"
                return fast, f"fastest here; this CPU {has} bfloat16"
        if self._dtype == "int8":
            raise ModelError(f"--dtype int8: {reason}; use another dtype")
        from embedstream_worker.engines.torch_engine import TorchEngine

        engine = TorchEngine(self._folder, self._device, self._dtype, compiles=self._compiles)
        engine.start()
        return engine, reason


def on_cpu(device: str) -> bool:
    """Whether a device as the user gives it is the CPU. Asks torch only if there are signs of another."""
    if device != "auto":
        return device == "cpu"
    if platform.system() == "Linux" and not any(Path(sign).exists() for sign in _GPU_SIGNS):
        return True
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available())
