"""What an earlier start on this machine found out about a model's batches, so that the next need not try them again."""

from __future__ import annotations

import msgspec

from embedstream.machine import cpu_cores
from embedstream_worker.cache import cache_folder, keep, name_of, version_of
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.engines.precision import cpu_name
from embedstream_worker.probe import Trial

_RUNTIMES = ("embedstream", "openvino", "onnxruntime", "torch")


def recall(info: EngineInfo) -> Trial | None:
    """What the last worker of this model, engine (with batches of so many tokens), processor and these versions found;
    None if there was none."""
    try:
        trial = msgspec.json.decode((cache_folder("starts") / _key(info)).read_bytes(), type=Trial)
    except (OSError, msgspec.MsgspecError):
        return None
    return trial if trial.batch_tokens > 0 and trial.tokens_per_second >= 0 else None


def remember(info: EngineInfo, trial: Trial) -> None:
    """Keep it: best effort, where nothing can be kept the next start tries again."""
    keep(cache_folder("starts") / _key(info), msgspec.json.encode(trial))


def _key(info: EngineInfo) -> str:
    versions = [f"{name} {version_of(name)}" for name in _RUNTIMES]
    engine = [info.fingerprint, info.engine, info.device, info.dtype, str(info.batch_tokens)]
    return name_of([*engine, cpu_name(), str(cpu_cores()), *versions])
