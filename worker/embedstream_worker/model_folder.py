"""What a model folder must hold, and must not, judged from its files before any library opens them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from embedstream.errors import ModelError

_LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own bound
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path) -> None:
    """Prove that a model folder can be loaded without running anything of its own.

    Raises:
        ModelError: a file is missing, broken or a pickle, or the model needs code of its own; names the file.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        _check_transformer(folder)
        return
    listed = _read_json(modules)
    if not isinstance(listed, list) or not listed:
        raise ModelError(f"{modules}: lists no modules; fetch the model again")
    for module in listed:
        if not isinstance(module, dict) or not isinstance(module.get("path"), str):
            raise ModelError(f"{modules}: a module has no path; fetch the model again")
        _check_module(folder, module["path"], str(module.get("type")), modules)


def _check_module(root: Path, path: str, type_name: str, listing: Path) -> None:
    if not type_name.startswith("sentence_transformers."):
        raise ModelError(
            f"{listing}: module type {type_name} is code of the model's own, which is not run; "
            f"use a model made of sentence-transformers' modules"
        )
    folder = root / path
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"{listing}: module path {path} leads out of the folder; fetch the model again")
    kind = type_name.rpartition(".")[2]
    if kind == "Router" or (folder / "router_config.json").is_file():
        router = folder / "router_config.json"
        types = _read_json(router).get("types") if router.is_file() else None
        if not isinstance(types, dict):
            raise ModelError(f"{router}: missing, or lists no modules; fetch the model again")
        for sub_path, sub_type in types.items():
            _check_module(folder, sub_path, str(sub_type), router)
    elif kind == "Transformer":
        _check_transformer(folder)
    elif folder.is_dir():
        _check_weights(folder, needed=kind in ("Dense", "StaticEmbedding"))


def _check_transformer(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: an adapter without its base model; merge the two and give the merged folder")
        raise ModelError(f"{config}: missing; give a sentence-transformers or transformers model folder")
    settings = _read_json(config)
    if not isinstance(settings, dict):
        raise ModelError(f"{config}: not a model configuration; fetch the model again")
    if settings.get("auto_map") and not _is_native(str(settings.get("model_type"))):
        raise ModelError(
            f"{config}: model type {settings.get('model_type')} needs code of its own (auto_map), which is not run; "
            f"use a model whose type transformers has built in"
        )
    _check_weights(folder, needed=True)


def _is_native(model_type: str) -> bool:
    # Imported only for the few folders that bring code: it takes a second.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_weights(folder: Path, needed: bool) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: lists no weights; fetch the model again")
        for name in sorted({str(name) for name in weight_map.values()}):
            check_safetensors(folder / name)
        return
    weights = folder / "model.safetensors"
    if weights.is_file():
        check_safetensors(weights)
        return
    for pattern in _PICKLES:
        for pickled in sorted(folder.glob(pattern)):
            raise ModelError(
                f"{pickled}: pickled weights are not loaded, because a pickle can run code; "
                f"use a revision with model.safetensors, or convert it"
            )
    if needed:
        raise ModelError(f"{weights}: missing; fetch the model again")


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
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: its header is broken or cut off; fetch the model again") from error
    if not ends:
        raise ModelError(f"{path}: holds no weights; fetch the model again")
    expected = 8 + header_bytes + max(ends)
    if size != expected:
        raise ModelError(f"{path}: has {size} bytes, its header says {expected}; fetch the model again")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); fetch the model again") from error
