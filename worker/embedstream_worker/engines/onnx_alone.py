"""Models of which a folder has a graph for ONNX Runtime and no weights: what its other files say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from embedstream.dataset.values import Matrix
from embedstream.outputs import Kind
from embedstream_worker.engines.base import OutputInfo
from embedstream_worker.engines.onnx_slot import Tail
from embedstream_worker.engines.openvino_cache import NotConvertible
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.model_files import model_outputs, read_text_model
from embedstream_worker.model_folder import list_modules
from embedstream_worker.model_settings import read_settings
from embedstream_worker.models import ModelFolder
from embedstream_worker.purpose import Purpose
from embedstream_worker.recipe import pooling_modes

Mask = npt.NDArray[np.bool_]


def read_alone(folder: ModelFolder) -> tuple[TextModel, dict[Kind, OutputInfo]]:
    """How it takes texts, and what it gives.

    Raises:
        ModelError: its files do not tell.
    """
    model = read_text_model(folder)
    first = list_modules(folder.path)[0].folder
    settings = _settings(first / "tokenizer_config.json")
    source: Any = model.input.source
    assert isinstance(source, tokenizers.Tokenizer)
    pad: Any = settings.get("pad_token")
    pad_id = source.token_to_id(str(pad.get("content") if isinstance(pad, dict) else pad))
    special = frozenset(id for id, token in source.get_added_tokens_decoder().items() if token.special)
    text_input = replace(
        model.input,
        special_ids=special,
        pad_id=pad_id or 0,
        padding_side=str(settings.get("padding_side", "right")),
    )
    model = replace(model, input=text_input, pairs=folder.purpose is Purpose.PAIRS)
    return model, model_outputs(folder, model)


def read_tail(folder: ModelFolder, model: TextModel, output: str) -> Tail:
    """What follows the graph, by its output's name. Raises `NotConvertible` for what is not known here."""
    if folder.purpose is Purpose.PAIRS:
        return partial(_scores, _activation(folder.path))
    if folder.purpose is not Purpose.VECTORS:
        raise NotConvertible("without its weights it is run for dense vectors, scores of pairs and labels alone")
    if output == "sentence_embedding":
        return partial(_finish, None, model)
    modules = list_modules(folder.path)
    if strange := [str(module.kind) for module in modules[1:] if module.kind not in ("Pooling", "Normalize")]:
        raise NotConvertible(f"its {strange[0]} module needs weights that the folder lacks")
    settings = next((module.folder / "config.json" for module in modules if module.kind == "Pooling"), Path())
    modes = [*pooling_modes(settings)]
    right = model.input.padding_side == "right" and _settings(settings).get("include_prompt", True)
    if len(modes) != 1 or modes[0] not in _POOLING or not right:
        raise NotConvertible(f"its pooling ({'+'.join(modes)}) is not known without its weights")
    return partial(_finish, _POOLING[modes[0]], model)


def _finish(
    pool: Callable[[Matrix, Mask], Matrix] | None, model: TextModel, given: npt.NDArray[Any], mask: Mask
) -> Matrix:
    vectors = given.astype(np.float32)
    if pool is not None:
        vectors = pool(vectors, mask)
    vectors = vectors[:, : model.dim]
    if model.normalized:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(vectors)


def _mean(tokens: Matrix, mask: Mask) -> Matrix:
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1).astype(np.float32)
    means: Matrix = (tokens * mask[:, :, None]).sum(axis=1) / counts
    return means


def _greatest(tokens: Matrix, mask: Mask) -> Matrix:
    greatest: Matrix = np.where(mask[:, :, None], tokens, -np.inf).max(axis=1)
    return greatest


def _last(tokens: Matrix, mask: Mask) -> Matrix:
    last: Matrix = tokens[np.arange(len(tokens)), np.maximum(mask.sum(axis=1) - 1, 0)]
    return last


_POOLING: dict[str, Callable[[Matrix, Mask], Matrix]] = {
    "mean": _mean,
    "cls": lambda tokens, _: tokens[:, 0],
    "max": _greatest,
    "lasttoken": _last,
}
"""By sentence-transformers' names, for texts that are padded on the right."""


def _scores(activate: Callable[[Matrix], Matrix], given: npt.NDArray[Any], _: Mask) -> Matrix:
    return activate(given.astype(np.float32).reshape(len(given), -1))


def _activation(folder: Path) -> Callable[[Matrix], Matrix]:
    """As `CrossEncoder` has it for one score, and transformers' pipeline for labels."""
    config = _settings(folder / "config.json")
    labels = len(config.get("id2label") or (0, 1))
    if labels > 1:
        problem = config.get("problem_type")
        return {"multi_label_classification": _sigmoid, "regression": _as_it_is}.get(str(problem), _softmax)
    own = config.get("sentence_transformers")
    named = (own if isinstance(own, dict) else {}).get("activation_fn")
    named = named or config.get("sbert_ce_default_activation_function")
    named = named or _settings(folder / "config_sentence_transformers.json").get("activation_fn")
    name = str(named or "Sigmoid").rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise NotConvertible(f"its activation ({name}) is not known without its weights")
    return _ACTIVATIONS[name]


def _sigmoid(logits: Matrix) -> Matrix:
    with np.errstate(over="ignore"):
        scores: Matrix = np.reciprocal(1 + np.exp(-logits))
    return scores


def _softmax(logits: Matrix) -> Matrix:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Matrix = raised / raised.sum(axis=1, keepdims=True)
    return scores


def _as_it_is(logits: Matrix) -> Matrix:
    return logits


_ACTIVATIONS = {"Sigmoid": _sigmoid, "Identity": _as_it_is}


def _settings(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}
