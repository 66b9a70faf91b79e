"""What a model folder must hold, and must not, judged from its files before any library opens them."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedstream.errors import ModelError

_LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own bound
_LOADABLE_PICKLES = "pytorch_model*.bin"
_PICKLES = (_LOADABLE_PICKLES, "*.pt", "*.pth", "*.ckpt", "*.pkl")


TRUST_REMOTE_CODE = "Run Python files in the model's folder, if it needs them: only of authors that you trust."
ALLOW_PICKLE = "Load pickled weights if there are no others: only of authors that you trust."
"""How the flags of the commands put it."""


@dataclass(frozen=True)
class Trust:
    """What of a model may be run or unpickled: nothing, unless whoever starts the worker says so."""

    code: bool = False
    """Python files in the model's folder."""
    pickle: bool = False
    """Pickled weights. torch's restricted unpickler reads them, which keeps to tensors as far as it is free of bugs."""

    def __or__(self, other: Trust) -> Trust:
        return Trust(self.code or other.code, self.pickle or other.pickle)


NOTHING = Trust()


def check_folder(folder: Path, trust: Trust = NOTHING) -> Trust:
    """Prove that a model folder can be loaded without running anything of its own but what is trusted.

    Returns what of that trust it needs: a model that needs none is loaded as if there were none.

    Raises:
        ModelError: a file is missing, broken or a pickle, or the model needs code of its own; names the file.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return _check_transformer(folder, trust)
    listed = _read_json(modules)
    if not isinstance(listed, list) or not listed:
        raise ModelError(f"{modules}: lists no modules; fetch the model again")
    needs = NOTHING
    for module in listed:
        if not isinstance(module, dict) or not isinstance(module.get("path"), str):
            raise ModelError(f"{modules}: a module has no path; fetch the model again")
        needs |= _check_module(folder, module["path"], str(module.get("type")), modules, trust)
    return needs


def _check_module(root: Path, path: str, type_name: str, listing: Path, trust: Trust) -> Trust:
    folder = root / path
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"{listing}: module path {path} leads out of the folder; fetch the model again")
    if not type_name.startswith("sentence_transformers."):
        if not trust.code:
            raise ModelError(
                f"{listing}: module type {type_name} is code of the model's own, which is not run; "
                f"use a model made of sentence-transformers' modules, {_OR_TRUST}"
            )
        _check_code(root, [type_name], listing)
        return Trust(code=True) | _check_weights(folder, False, trust)
    kind = type_name.rpartition(".")[2]
    if kind == "Router" or (folder / "router_config.json").is_file():
        router = folder / "router_config.json"
        types = _read_json(router).get("types") if router.is_file() else None
        if not isinstance(types, dict):
            raise ModelError(f"{router}: missing, or lists no modules; fetch the model again")
        needs = NOTHING
        for sub_path, sub_type in types.items():
            needs |= _check_module(folder, sub_path, str(sub_type), router, trust)
        return needs
    if kind == "Transformer":
        return _check_transformer(folder, trust)
    return _check_weights(folder, kind in ("Dense", "StaticEmbedding"), trust) if folder.is_dir() else NOTHING


def _check_transformer(folder: Path, trust: Trust) -> Trust:
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: an adapter without its base model; merge the two and give the merged folder")
        raise ModelError(f"{config}: missing; give a sentence-transformers or transformers model folder")
    settings = _read_json(config)
    if not isinstance(settings, dict):
        raise ModelError(f"{config}: not a model configuration; fetch the model again")
    needs = NOTHING
    if settings.get("auto_map") and not _is_native(str(settings.get("model_type"))):
        if not trust.code:
            raise ModelError(
                f"{config}: model type {settings.get('model_type')} needs code of its own (auto_map), which is not "
                f"run; use a model whose type transformers has built in, {_OR_TRUST}"
            )
        _check_code(folder, _references(settings["auto_map"]), config)
        needs = Trust(code=True)
    tokenizer = folder / "tokenizer_config.json"
    if trust.code and tokenizer.is_file() and (own := _read_json(tokenizer).get("auto_map")):
        _check_code(folder, _references(own), tokenizer)
        needs = Trust(code=True)
    return needs | _check_weights(folder, True, trust)


_OR_TRUST = "or, if you trust its authors, start the worker with --trust-remote-code (EMBEDSTREAM_TRUST_REMOTE_CODE=1)"


def _references(auto_map: object) -> list[str]:
    """The classes that an `auto_map` names: each `file.Class`, for tokenizers a slow and a fast one."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]


def _check_code(folder: Path, references: list[str], listing: Path) -> None:
    """Code counts as the model's own only if it lies in its folder, where the fingerprint sees it."""
    for reference in references:
        module = reference.rpartition(".")[0]
        if not re.fullmatch(r"\w+\.\w+", reference) or not (folder / f"{module}.py").is_file():
            raise ModelError(
                f"{listing}: {reference} is code that does not lie in the folder; put {module.rpartition('--')[2]}.py "
                f"there and name it without its repository"
            )


def _is_native(model_type: str) -> bool:
    # Imported only for the few folders that bring code: it takes a second.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_weights(folder: Path, needed: bool, trust: Trust) -> Trust:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: lists no weights; fetch the model again")
        for name in sorted({str(name) for name in weight_map.values()}):
            check_safetensors(folder / name)
        return NOTHING
    weights = folder / "model.safetensors"
    if weights.is_file():
        check_safetensors(weights)
        return NOTHING
    if trust.pickle and any(folder.glob(_LOADABLE_PICKLES)):
        return Trust(pickle=True)
    for pattern in _PICKLES:
        for pickled in sorted(folder.glob(pattern)):
            raise ModelError(
                f"{pickled}: pickled weights are not loaded, because a pickle can run code; use a revision with "
                f"model.safetensors, convert it, or, if you trust its authors, start the worker with --allow-pickle "
                f"(EMBEDSTREAM_ALLOW_PICKLE=1)"
            )
    if needed:
        raise ModelError(f"{weights}: missing; fetch the model again")
    return NOTHING


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
