"""On which device torch computes, and in what precision."""

from __future__ import annotations

import os
import sys

import torch

from embedstream.errors import ModelError
from embedstream.machine import cpu_cores
from embedstream_worker.cache import cache_folder
from embedstream_worker.engines.free_gpu import take_gpu
from embedstream_worker.engines.precision import Dtype, cpu_has_bfloat16

SWITCH_SECONDS = 0.0005
"""How long a thread that computes in Python may keep others waiting, where one of them launches a GPU's kernels."""

_OTHER_THREADS = 3
"""Beside those that tokenize: the one that launches, the one that writes, the one that decodes."""


def pick_dtype(wanted: Dtype, device: torch.device) -> Dtype:
    """The precision to compute in: where the device has it, bfloat16. Raises `ModelError` for int8."""
    if wanted == "int8":
        raise ModelError("--dtype int8: torch does not compute in it; use --engine openvino, or another dtype")
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    if device.type == "cuda":
        with torch.cuda.device(device):  # of the current one it is asked
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bfloat16"  # not float16, in which some models overflow
    return "float32"


def share_cores(device: torch.device) -> None:
    """Let tokenizing leave the processor what the device needs of it. Before any text is tokenized.

    Beside a model on the CPU, tokenizing takes its own thread alone; beside a GPU, all cores but those of the threads
    that feed it. A user's own choice stands, as far as there are so many cores.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cpu_cores()))  # it does not know of quotas
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if device.type == "cpu" else "true")
    if device.type == "cuda":
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cpu_cores() - _OTHER_THREADS)))
        sys.setswitchinterval(SWITCH_SECONDS)


def pick_device(wanted: str) -> torch.device:
    """The device of that name, or the best one here: of several GPUs the one that the fewest workers have.

    Raises `ModelError` for one that is not here.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
            return torch.device("cuda", take_gpu(names, cache_folder("devices")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(f"--device {wanted}: use auto, cpu, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(f"--device {wanted}: torch sees {count} CUDA devices here; use auto or cpu")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"--device {wanted}: torch sees no Apple GPU here; use auto or cpu")
    if device.type not in ("cpu", "mps"):
        raise ModelError(f"--device {wanted}: use auto, cpu, cuda:N or mps")
    return device
