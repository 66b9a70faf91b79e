"""What a model folder must hold, and must not, judged from its files before any library opens them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from embedstream.errors import ModelError
from embedstream_worker.model_settings import MODULE_KINDS, check_settings, read_json, read_settings
from embedstream_worker.model_weights import check_weights
from embedstream_worker.purpose import has_heads

TRUST_REMOTE_CODE = "Run Python files in the model's folder, if it needs them: only of authors that you trust."
ALLOW_PICKLE = "Load pickled weights if there are no others: only of authors that you trust."
"""How the flags of the commands put it."""

_ALIASES = {"pylate.models.Dense.Dense": "sentence_transformers.base.modules.dense.Dense"}
"""PyLate's modules, in whose place sentence-transformers takes its own."""

_HAVE_WEIGHTS = {
    *("CNN", "Dense", "LayerNorm", "SparseAutoEncoder", "SparseStaticEmbedding", "StaticEmbedding", "Transformer"),
    "WeightedLayerPooling",
}
_PLAIN = "sentence_transformers.models.Transformer"  # what a folder without modules.json is read as
_OTHER_TASKS = {
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that answers questions",
    "ForMultipleChoice": "a model that chooses between answers",
}
_OR_TRUST = "or, if you trust its authors, start the worker with --trust-remote-code (EMBEDSTREAM_TRUST_REMOTE_CODE=1)"


@dataclass(frozen=True)
class Trust:
    """What of a model may be run or unpickled: nothing, unless the user who starts the worker says so."""

    code: bool = False
    """Python files in the model's folder."""
    pickle: bool = False
    """Pickled weights. torch's restricted unpickler reads them, which keeps to tensors as far as it is free of bugs."""

    def __or__(self, other: Trust) -> Trust:
        return Trust(self.code or other.code, self.pickle or other.pickle)


NOTHING = Trust()


@dataclass(frozen=True)
class Module:
    """One module of a model, as its `modules.json` or a router names it."""

    folder: Path
    type_name: str
    listing: Path
    """The file that names it."""

    @property
    def kind(self) -> str | None:
        """Its class in sentence-transformers; None for any other."""
        kind = MODULE_KINDS.get(_ALIASES.get(self.type_name, self.type_name))
        return "Transformer" if kind == "MLMTransformer" else kind


def check_folder(folder: Path, trust: Trust = NOTHING) -> Trust:
    """Prove that a model folder can be loaded without running anything of its own but what is trusted.

    Returns what of that trust it needs: a model that needs none is loaded as if there were none.

    Raises:
        ModelError: a file is missing, broken or a pickle, or the model needs code of its own; names the file.
    """
    try:
        needs = NOTHING
        for module in list_modules(folder):
            needs |= _check_module(folder, module, trust)
        if trust.pickle and has_heads(folder):
            needs |= Trust(pickle=True)
        for path in folder.rglob("*"):  # also what is no module's: libraries look for templates, graphs and more
            if path.is_symlink():
                _check_link(folder, path)
            if not (path.is_file() or path.is_dir()):
                raise ModelError(f"{path}: neither a file nor a folder; remove it")
        for path in model_files(folder):
            if path.name.casefold() == "adapter_config.json":
                raise ModelError(
                    f"{path}: an adapter is not loaded; merge it with its base model and give the merged folder"
                )
            if not needs.code:  # which could do all that settings can
                check_settings(path)
    except ModelError:
        raise
    except Exception as error:  # paths that no system takes, links in a circle, values of any type
        raise ModelError(f"{folder}: not readable as a model ({error}); fetch the model again") from error
    return needs


def list_modules(root: Path) -> list[Module]:
    """The modules of a model folder, those of routers and the routers themselves included.

    Raises:
        ModelError: the lists make no sense, or name what lies outside the folder.
    """
    listing = root / "modules.json"
    if not listing.is_file():
        return [Module(root, _PLAIN, root / "config.json")]
    listed = read_json(listing)
    if not isinstance(listed, list) or not listed:
        raise ModelError(f"{listing}: lists no modules; fetch the model again")
    if not all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in listed):
        raise ModelError(f"{listing}: a module has no path; fetch the model again")
    waiting = deque(_module(root, root, entry["path"], entry.get("type"), listing) for entry in listed)
    found, routers = [], set[Path]()
    while waiting:
        found.append(module := waiting.popleft())
        if module.kind != "Router":
            continue
        if (resolved := module.folder.resolve()) in routers:
            raise ModelError(f"{module.listing}: {module.folder} is listed twice; fetch the model again")
        routers.add(resolved)
        waiting.extend(_routed(root, module.folder))
    return found


def model_files(root: Path) -> list[Path]:
    """The files that loading may look at: those in the folder itself, and all below the folders of its modules.

    In the order of their relative names. Raises as `list_modules`.
    """
    found = {path for path in root.iterdir() if path.is_file()}
    for folder in {module.folder for module in list_modules(root)} - {root}:
        found.update(path for path in folder.rglob("*") if path.is_file())
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _routed(root: Path, folder: Path) -> Iterator[Module]:
    """A router's modules, by whichever file sentence-transformers would read."""
    for listing in folder / "router_config.json", folder / "config.json":
        if content := read_settings(listing) if listing.is_file() else {}:
            break
    types = content.get("types")
    if not isinstance(types, dict):
        raise ModelError(f"{folder / 'router_config.json'}: missing, or lists no modules; fetch the model again")
    for path, type_name in types.items():
        yield _module(root, folder, path, type_name, listing)


def _module(root: Path, base: Path, path: str, type_name: object, listing: Path) -> Module:
    written = PureWindowsPath(path)  # knows the separators of all systems
    folder = base / path
    if "\0" in path or written.anchor or ".." in written.parts or not folder.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"{listing}: module path {path!r} leads out of the folder; fetch the model again")
    return Module(folder, str(type_name), listing)


def _check_module(root: Path, module: Module, trust: Trust) -> Trust:
    if module.kind is None and not module.type_name.startswith("sentence_transformers."):
        if not trust.code:
            raise ModelError(
                f"{module.listing}: module type {module.type_name} is code of the model's own, which is not run; "
                f"use a model made of sentence-transformers' modules, {_OR_TRUST}"
            )
        _check_code(root, [module.type_name], module.listing)
        return Trust(code=True, pickle=check_weights(module.folder, True, False, trust.pickle))
    if module.kind is None:
        known = ", ".join(sorted(set(MODULE_KINDS.values())))
        raise ModelError(
            f"{module.listing}: module type {module.type_name} is not supported; use a model made of {known} modules"
        )
    alone = not (root / "modules.json").is_file()
    needs = _check_transformer(module.folder, trust, alone) if module.kind == "Transformer" else NOTHING
    settings = module.folder / "config.json"
    if module.kind == "SparseStaticEmbedding" and settings.is_file() and read_settings(settings).get("path"):
        raise ModelError(f"{settings}: path names another file; save the model with its weights")
    if module.kind in _HAVE_WEIGHTS:
        needs |= Trust(pickle=check_weights(module.folder, module.kind == "Transformer", True, trust.pickle))
    return needs


def _check_transformer(folder: Path, trust: Trust, alone: bool) -> Trust:
    """`alone`: no `modules.json` says what comes after it."""
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: an adapter without its base model; merge the two and give the merged folder")
        raise ModelError(f"{config}: missing; give a sentence-transformers or transformers model folder")
    settings = read_settings(config)
    if alone:
        _refuse_other_tasks(settings, config)
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
    if trust.code and tokenizer.is_file() and (own := read_settings(tokenizer).get("auto_map")):
        _check_code(folder, _references(own), tokenizer)
        needs = Trust(code=True)
    return needs


def _refuse_other_tasks(settings: dict[str, Any], config: Path) -> None:
    """Raise `ModelError` for a model that was trained for something else: the mean of its tokens means nothing."""
    for name in settings.get("architectures") or ():
        task = next((task for head, task in _OTHER_TASKS.items() if str(name).endswith(head)), None)
        if task is not None:
            raise ModelError(f"{config}: {name} is {task}, which embedstream does not run; use another model")


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


def _check_link(root: Path, path: Path) -> None:
    """The hub's cache keeps files in `blobs`, and links to them in `snapshots/COMMIT`."""
    root, target = root.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(blobs))):
        raise ModelError(f"{path}: a link out of the folder; put the file itself there")
