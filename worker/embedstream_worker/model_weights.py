"""Which files of a module's folder hold its weights, and that they are whole tensors and no programs."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from embedstream.errors import ModelError
from embedstream_worker.model_settings import read_settings

_LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own bound
_INDEX, _PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
_POINTER = b"version https://git-lfs"
_SETTINGS = (".json", ".txt", ".model")
"""Settings and tokenizers, by the ends of their names."""
_OTHER_WEIGHTS = (
    ("adapter_config.json", "this is an adapter: merge it into its base model, and save that"),
    ("**/*.gguf", "its weights are for llama.cpp: fetch the model that they were made of"),
    ("**/*.onnx", "its weights are for ONNX Runtime alone, and not where that looks for them (onnx/model.onnx)"),
)
"""What lies where there are no others, and what to do."""
_GRAPHS = ("model.onnx", "model_quantized.onnx", "model_int8.onnx", "model_uint8.onnx", "model_q*int8*.onnx")
"""Of the folder `onnx`, the first that is there: in float32 before those whose weights are integers."""
_PICKLES = ("pytorch_model*.bin", _PICKLED_INDEX, "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_weights(folder: Path, split: bool, needed: bool, allow_pickle: bool) -> bool:
    """Prove that what is loaded as a module's weights is whole and no pickle; returns whether it is an allowed pickle.

    `split`: whether what loads the module reads weights that an index lists, too. `needed`: whether it has any; a graph
    for ONNX Runtime will do where there are no others.

    Raises:
        ModelError: weights are missing or broken, or are a pickle that is not allowed.
    """
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SETTINGS and path.is_file()):
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ModelError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    weights = folder / "model.safetensors"
    if weights.is_file():
        check_safetensors(weights)
        return False
    if split and (folder / _INDEX).is_file():
        for path in _listed(folder / _INDEX, r"[^/\\]+\.safetensors"):
            check_safetensors(path)
        return False
    if allow_pickle and (folder / "pytorch_model.bin").is_file():
        return True
    if allow_pickle and split and (folder / _PICKLED_INDEX).is_file():
        for path in _listed(folder / _PICKLED_INDEX, r"pytorch_model[^/\\]*\.bin"):
            if not path.is_file():
                raise ModelError(f"{path}: missing; fetch the model again")
        return True
    for pattern in _PICKLES:
        for pickled in sorted(folder.glob(pattern)):
            raise ModelError(
                f"{pickled}: pickled weights are not loaded, because a pickle can run code; use a revision with "
                f"model.safetensors, convert it, or, if you trust its authors, start the worker with --allow-pickle "
                f"(EMBEDSTREAM_ALLOW_PICKLE=1)"
            )
    if needed and find_graph(folder) is None:
        told = (what for pattern, what in _OTHER_WEIGHTS if any(folder.glob(pattern)))
        raise ModelError(f"{weights}: missing; {next(told, 'fetch the model again')}")
    return False


def find_graph(folder: Path) -> Path | None:
    """The graph for ONNX Runtime that a transformer's folder carries."""
    found = (path for pattern in _GRAPHS for path in sorted((folder / "onnx").glob(pattern)))
    return next((path for path in found if path.is_file()), None)


def lone_graph(folder: Path) -> Path | None:
    """The same, if the folder has no other weights."""
    if any((folder / name).is_file() for name in ("model.safetensors", _INDEX, "pytorch_model.bin", _PICKLED_INDEX)):
        return None
    return find_graph(folder)


def _listed(index: Path, names: str) -> list[Path]:
    """The files that an index lists: whatever has another name would be read as something else."""
    weight_map = read_settings(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: lists no weights; fetch the model again")
    listed = sorted({str(name) for name in weight_map.values()})
    for name in listed:
        if not re.fullmatch(names, name):
            raise ModelError(f"{index}: {name} is no name for weights; fetch the model again")
    return [index.parent / name for name in listed]


def check_safetensors(path: Path) -> None:
    """Prove that a safetensors file is whole, by its header alone.

    Raises:
        ModelError: it is missing, empty, cut off, or not a safetensors file.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; fetch the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ModelError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if len(start) < 8:
            raise ModelError(f"{path}: empty or cut off ({size} bytes); fetch the model again")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > _LONGEST_HEADER_BYTES:
            raise ModelError(f"{path}: not a safetensors file; fetch the model again")
        header = file.read(header_bytes)
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [int(tensor["data_offsets"][1]) for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path}: its header is broken or cut off; fetch the model again") from error
    if not ends:
        raise ModelError(f"{path}: holds no weights; fetch the model again")
    expected = 8 + header_bytes + max(ends)
    if size != expected:
        raise ModelError(f"{path}: has {size} bytes, its header says {expected}; fetch the model again")
