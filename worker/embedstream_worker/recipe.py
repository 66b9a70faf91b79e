"""What decides a job's vectors beside its texts, and where each part of it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedstream.jobs import JobSpec
from embedstream.records import Recipe
from embedstream.terminal import printable
from embedstream_worker.engines.base import EngineInfo, Origin
from embedstream_worker.model_folder import list_modules
from embedstream_worker.model_settings import read_settings
from embedstream_worker.models import ModelFolder
from embedstream_worker.purpose import Purpose, purpose_of

ASSUMED, FOLDER, FLAG, NOWHERE = "assumed", "folder", "flag", "none in the folder"

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""sentence-transformers' pooling modes, in the older spelling of their settings."""


def origin_of(folder: ModelFolder) -> Origin:
    """Raises `ModelError` if the folder cannot be read."""
    pooling, pooling_from = _pooling(folder.path)
    return Origin(folder.source, folder.revision, pooling, pooling_from, _similarity(folder.path))


def _similarity(folder: Path) -> str:
    settings = folder / "config_sentence_transformers.json"
    named = read_settings(settings).get("similarity_fn_name") if settings.is_file() else None
    return named if isinstance(named, str) else ""


def _pooling(folder: Path) -> tuple[str, str]:
    if not (folder / "modules.json").is_file():
        return ("mean", ASSUMED) if purpose_of(folder) is Purpose.VECTORS else ("", FOLDER)
    modules = list_modules(folder)
    found = [
        mode for module in modules if module.kind == "Pooling" for mode in pooling_modes(module.folder / "config.json")
    ]
    found += ["mean" for module in modules if module.kind == "StaticEmbedding"]
    return "+".join(dict.fromkeys(found)), FOLDER


def pooling_modes(config: Path) -> Iterator[str]:
    """Of a Pooling module, one or more, each of which gives a vector. Raises `ModelError`."""
    settings: dict[str, Any] = read_settings(config) if config.is_file() else {}
    newer = settings.get("pooling_mode")
    if newer:
        yield from map(str, newer if isinstance(newer, list | tuple) else [newer])
    elif older := [mode for name, mode in _MODES.items() if settings.get(name)]:
        yield from older
    else:
        yield "mean"


def recipe_of(info: EngineInfo, spec: JobSpec, prompt: str, max_length: int) -> Recipe:
    """Of a job on this engine; `prompt` and `max_length` are those in force."""
    given = spec.prompt is not None or spec.prompt_name is not None
    vectors = [output for kind, output in info.outputs.items() if kind in ("dense", "multivector")]
    return Recipe(
        model=spec.model,
        source=info.origin.source,
        revision=info.origin.revision,
        fingerprint=info.fingerprint,
        engine=info.engine,
        dtype=info.dtype,
        pooling=info.origin.pooling,
        pooling_from=info.origin.pooling_from,
        normalized=bool(vectors) and all(output.normalized for output in vectors),
        max_length=max_length,
        max_length_from=FLAG if spec.max_length else FOLDER,
        prompt=prompt,
        prompt_from=FLAG if given else FOLDER if prompt else NOWHERE,
    )


def in_words(recipe: Recipe) -> str:
    """One line for people."""
    prompt = f'prompt "{printable(recipe.prompt, 200)}"' if recipe.prompt else "no prompt"
    said = [
        f"{recipe.model} ({recipe.source})" if recipe.source else recipe.model,
        *([f"{recipe.engine} in {recipe.dtype}"] if recipe.engine else []),
        *([f"{recipe.pooling} pooling ({recipe.pooling_from})"] if recipe.pooling else []),
        "normalized" if recipe.normalized else "not normalized",
        f"at most {recipe.max_length:,} tokens ({recipe.max_length_from})",
        f"{prompt} ({recipe.prompt_from})",
    ]
    return f"recipe: {', '.join(said)}"
