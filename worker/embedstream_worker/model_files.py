"""A text model but for its weights, read from the files of its folder, without a model library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from embedstream.errors import ModelError
from embedstream.lifecycle.opening import scores_pairs
from embedstream.outputs import MOST_DIMENSIONS, Kind
from embedstream_worker.engines.base import OutputInfo
from embedstream_worker.engines.text_input import InputKind, TextInput, TextModel, static_input
from embedstream_worker.model_folder import Module, list_modules
from embedstream_worker.model_settings import TRANSFORMER_SETTINGS, read_settings
from embedstream_worker.models import ModelFolder
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.purpose import Purpose
from embedstream_worker.recipe import pooling_modes
from embedstream_worker.tokenizing import UNLIMITED, Limits

_PADDED_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec"}
)
"""Kinds of models that count positions from behind the padding's own row."""
_NO_TABLE = frozenset(
    {"modernbert", "nomic_bert", "new", "gte", "qwen2", "qwen3", "llama", "mistral", "gemma3_text", "t5"}
)
"""Kinds with relative or rotary positions: what the folder sets, sentence-transformers takes."""
_LARGEST_SET = 1_000_000
"""transformers writes a much larger `model_max_length` for none."""


def read_text_model(folder: ModelFolder) -> TextModel:
    """What tokenizes, how long texts may be, prompts and dimensions.

    Raises:
        ModelError: its files do not tell that: its tokenizer is written in Python, or it has a route for each role.
    """
    modules = list_modules(folder.path)
    first = modules[0]
    if first.kind not in ("Transformer", "StaticEmbedding"):
        raise ModelError(
            f"model {folder.name}: begins with {first.kind or first.type_name}: its tokens are known once it is loaded"
        )
    path = next(
        (each for each in (first.folder / "tokenizer.json", folder.path / "tokenizer.json") if each.is_file()), None
    )
    if path is None:
        raise ModelError(f"model {folder.name}: has no tokenizer.json: its tokens are known once it is loaded")
    try:
        with panics_are_errors():
            source = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path}: cannot be read ({error}): fetch the model again") from error
    config = _settings(first.folder / "config.json")
    own = _settings(folder.path / "config_sentence_transformers.json")
    return TextModel(
        name=folder.name,
        input=static_input(source) if first.kind == "StaticEmbedding" else _padded(source, first.folder, config),
        prompts={str(name): str(prompt) for name, prompt in (own.get("prompts") or {}).items()},
        default_prompt_name=own.get("default_prompt_name"),
        roles=dict.fromkeys(("document", "query"), _dim(modules, config, own)),
        normalized=any(module.kind == "Normalize" for module in modules),
        excludes_prompt=False,
    )


def model_outputs(folder: ModelFolder, model: TextModel) -> dict[Kind, OutputInfo]:
    """What the model gives; of `MOST_DIMENSIONS` where the files do not say how many there are."""
    dense = OutputInfo(model.dim or MOST_DIMENSIONS, model.normalized)
    config = _settings(folder.path / "config.json")
    match folder.purpose:
        case Purpose.VECTORS:
            return {"dense": dense}
        case Purpose.SPARSE:
            size = config.get("vocab_size")
            return {"sparse": OutputInfo(size if isinstance(size, int) else MOST_DIMENSIONS)}
        case Purpose.MULTIVECTOR:
            return {"multivector": dense}
        case Purpose.PAIRS:
            if scores_pairs(str(folder.path)):
                return {"score": OutputInfo(1)}
            names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
            return {"labels": OutputInfo(len(names), labels=tuple(map(str, dict(names).values())))}


def _padded(source: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> TextInput:
    module = next((_settings(folder / name) for name in TRANSFORMER_SETTINGS if (folder / name).is_file()), {})
    tokenizer = _settings(folder / "tokenizer_config.json")
    limit = tokenizer.get("model_max_length")
    positions = _positions(config)
    given = module.get("max_seq_length")
    if not given:
        given = min(limit if isinstance(limit, int | float) and limit < _LARGEST_SET else UNLIMITED, positions)
    longest = positions
    if config.get("model_type") in _NO_TABLE and given < UNLIMITED:
        longest = max(positions, int(given))
    special = source.num_special_tokens_to_add(is_pair=False)
    return TextInput(
        kind=InputKind.PADDED,
        source=source,
        limits=Limits(longest, special + 1),
        max_length=int(min(given, longest)),
        truncation_side=str(tokenizer.get("truncation_side", "right")),
    )


def _positions(config: dict[str, Any]) -> int:
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        return UNLIMITED
    padding = config.get("pad_token_id")
    if config.get("model_type") in _PADDED_POSITIONS and isinstance(padding, int):
        return positions - padding - 1
    return positions


def _dim(modules: list[Module], config: dict[str, Any], own: dict[str, Any]) -> int:
    """0: the files do not say."""
    if isinstance(cut := own.get("truncate_dim"), int):
        return cut
    for module in reversed(modules):
        path = module.folder / "config.json"
        settings = _settings(path)
        if module.kind == "Dense" and isinstance(size := settings.get("out_features"), int):
            return size
        size = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
        if module.kind == "Pooling" and isinstance(size, int):
            return size * len(list(pooling_modes(path)))
        weights = module.folder / "model.safetensors"
        if module.kind == "StaticEmbedding" and weights.is_file():
            return _columns(weights)
    size = config.get("hidden_size")
    return size if isinstance(size, int) else 0


def _columns(weights: Path) -> int:
    """Of the one table in a file of weights."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name.endswith("weight")]
    return int(shapes[0][-1]) if shapes else 0


def _settings(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}
